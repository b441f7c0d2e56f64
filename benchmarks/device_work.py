"""What benchmarks/device_parts.py measures its times on: a clock for a GPU's queue, and the paper's field and models.

MVDREAM_FAST_BENCH_CPU=1 makes all of it small, for a rehearsal on a CPU.
"""

import functools
import os
import time
from collections.abc import Callable
from functools import partial

import torch
from scenes import BOX, CELLS, STEP, grid_of

from mvdream_fast import ops
from mvdream_fast.camera import generate_rays, get_camera, orbit_cameras
from mvdream_fast.models.config import MINI, NAMED
from mvdream_fast.models.unet import MultiViewUNet
from mvdream_fast.ops.march_rays import Samples
from mvdream_fast.scene.nerf.volume import Volume, VolumeConfig

TOY = os.environ.get("MVDREAM_FAST_BENCH_CPU") == "1"
DEVICE = torch.device("cpu" if TOY else "cuda")
N_SAMPLES, N_VIEWS, N_SCENES = 1 << (10 if TOY else 20), 4, 2 if TOY else 256


def milliseconds(call: Callable[[], object], n: int = 1) -> float:
    """Of one call, in a queue of n of them."""
    if TOY:
        start = time.perf_counter()
        for _ in range(n):
            call()
        return 1e3 * (time.perf_counter() - start) / n
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(n):
        call()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / n


@functools.cache
def volume() -> Volume:
    return Volume(VolumeConfig.mini() if TOY else VolumeConfig.paper()).to(DEVICE)


@functools.cache
def marched(n_views: int) -> tuple[Callable[[], Samples], Samples]:
    """A march of 64 x 64 views through a full grid, about 2^20 samples each; and its samples."""
    rays = generate_rays(orbit_cameras(n_views, distance=3.0, fovy_deg=40.0), *[8 if TOY else 64] * 2)
    rays_o, rays_d, bits = (x.to(DEVICE) for x in (rays.rays_o, rays.rays_d, grid_of("full")))
    march = partial(ops.march_rays, rays_o, rays_d, BOX, bits, CELLS, STEP)
    return march, march()


@torch.no_grad()
def filled(make: Callable[[], torch.nn.Module], dtype: torch.dtype) -> torch.nn.Module:
    """A model with numbers of a trained model's sizes, made where it runs."""
    with torch.device("meta"):
        model = make()
    model.to_empty(device=DEVICE).requires_grad_(False)
    for name, p in model.named_parameters():
        p.normal_(std=p[0].numel() ** -0.5 if p.ndim > 1 else 0.1).add_(float(p.ndim == 1 and name.endswith("weight")))
    return model.to(dtype, memory_format=torch.channels_last)


def diffusers_step() -> Callable[[], object]:
    """A guided step of diffusers' UNet, whose latents are given twice."""
    from reference.diffusers_unet import RegroupProcessor, add_camera, diffusers_unet

    whole, dtype = (MINI, torch.float32) if TOY else (NAMED["sd21-4view"], torch.float16)
    config, side, n = whole.unet, whole.latent_size, 2 * N_VIEWS
    random = partial(torch.randn, device=DEVICE, dtype=dtype)
    latents = random(n, config.in_channels, side, side).contiguous(memory_format=torch.channels_last)
    t, text = torch.full((n,), 500, device=DEVICE), random(2, whole.text.context_length, config.context_dim)
    model = filled(lambda: diffusers_unet(config, side), dtype)
    model.set_attn_processor(RegroupProcessor(N_VIEWS))
    add_camera(model, random(n, config.time_embed_dim))
    return torch.no_grad()(partial(model, latents, t, text.repeat_interleave(N_VIEWS, 0), return_dict=False))


def training_step() -> tuple[Callable[[], object], int]:
    """The embedded UNet's step, forward and backward in bfloat16; and its images."""
    n, config, side = N_SCENES * N_VIEWS, MINI.unet, MINI.latent_size
    unet, latents = MultiViewUNet(config).to(DEVICE), torch.randn(n, config.in_channels, side, side, device=DEVICE)
    text = torch.randn(N_SCENES, MINI.text.context_length, config.context_dim, device=DEVICE)
    camera, t = get_camera(N_VIEWS).repeat(N_SCENES, 1).to(DEVICE), torch.randint(0, 1000, (n,), device=DEVICE)

    def call():
        with torch.autocast(DEVICE.type, torch.bfloat16):
            out = unet(latents, t, text, camera, N_VIEWS)
        out.float().square().mean().backward()
        unet.zero_grad(set_to_none=True)

    return call, n
