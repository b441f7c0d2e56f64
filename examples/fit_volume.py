"""Fits a volume to 24 images of a mesh and shows how 8 views that it never saw come out.

    python examples/fit_volume.py MESH [--out fit]
    python examples/fit_volume.py FOLDER --name "teddy bear"     # of Debian's sweethome3d-furniture, unpacked

The images are drawn by a rasteriser in numpy, which shares nothing with the volume renderer.
Prints the PSNR of the held-out views and writes `fit.png`: the mesh above, the volume below. Under a minute on two
cores.
"""

import argparse
import math
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from mvdream_fast.camera import Cameras, Rays, generate_rays, orbit_cameras
from mvdream_fast.core.cli import set_threads
from mvdream_fast.core.rng import Stream
from mvdream_fast.rendering.catalogue import read_sweethome3d
from mvdream_fast.rendering.mesh import Mesh
from mvdream_fast.rendering.mesh_file import load_mesh
from mvdream_fast.rendering.software import NumpyRenderer
from mvdream_fast.scene.background import FixedBackground
from mvdream_fast.scene.losses import opaque_loss
from mvdream_fast.scene.nerf.occupancy import OccupancyGrid
from mvdream_fast.scene.nerf.renderer import Renderer
from mvdream_fast.scene.nerf.volume import Volume, VolumeConfig

N_VIEWS, HELD_OUT = 32, range(2, 32, 4)  # 24 to fit, 8 to judge
FOVY_DEG = 40.0
LARGE = 512  # pixels of the view that is timed
RAYS_PER_STEP = 4096


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="a mesh file, or a folder of sweethome3d-furniture")
    parser.add_argument("--name", default="teddy bear", help="the asset of the folder")
    parser.add_argument("--size", type=int, default=128, help="pixels a side")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="default: all that this process may use")
    parser.add_argument("--out", type=Path, default=Path("fit"), help="folder of the comparison")
    return parser.parse_args()


def load(source: Path, name: str) -> Mesh:
    if source.is_file():
        return load_mesh(source).normalised("sphere")
    entries = [entry for entry in read_sweethome3d(source) if name.lower() in entry.name.lower()]
    if not entries:
        raise SystemExit(f"no asset named {name!r} in {source}; try --name chair")
    return entries[0].load().normalised("sphere")


def spread_cameras() -> Cameras:
    """Views all around by the golden angle, from 15 degrees below to 60 above; the unit ball fills the image."""
    distance = 1.02 / math.sin(math.radians(FOVY_DEG / 2))
    views = [
        orbit_cameras(1, -15 + 75 * i / (N_VIEWS - 1), 137.508 * i, distance=distance, fovy_deg=FOVY_DEG)
        for i in range(N_VIEWS)
    ]
    return Cameras(torch.cat([v.c2w for v in views]), torch.cat([v.fovy for v in views]))


def draw(mesh: Mesh, cameras: Cameras, size: int) -> torch.Tensor:
    """RGBA with straight alpha in [0, 1], [V, size, size, 4]."""
    images = NumpyRenderer().render(mesh, cameras.c2w.numpy(), cameras.fovy.numpy(), size)
    return torch.from_numpy(images.astype(np.float32) / 255)


def over(rgba: torch.Tensor, background: torch.Tensor) -> torch.Tensor:
    return rgba[..., :3] * rgba[..., 3:] + (1 - rgba[..., 3:]) * background


def fit(renderer: Renderer, rays: Rays, pixels: torch.Tensor, steps: int, seed: int) -> None:
    """Rays drawn from all images, in front of a new colour each step so that emptiness must be transparent."""
    volume = renderer.volume
    networks = [*volume.density_weights, *volume.feature_weights]
    groups = [{"params": [volume.table], "lr": 0.02}, {"params": networks, "lr": 0.005}]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99), eps=1e-15, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, eta_min=0)
    begun = time.perf_counter()
    for step in range(steps):
        stream = Stream(seed, step, "fit")
        renderer.occupancy.update(step, volume.density, Stream(seed, step, "occupancy"))
        chosen = stream.integers(0, len(pixels), RAYS_PER_STEP)
        renderer.background.color = stream.uniform(3)
        out = renderer(Rays(rays.rays_o[chosen], rays.rays_d[chosen]), stream, training=True)
        error = torch.nn.functional.mse_loss(out.rgb, over(pixels[chosen], renderer.background.color))
        optimizer.zero_grad()
        (error + 1e-3 * opaque_loss(out.opacity)).backward()
        optimizer.step()
        schedule.step()
        if step % 200 == 0 or step == steps - 1:
            share, seconds = renderer.occupancy.fraction, time.perf_counter() - begun
            psnr = -10 * math.log10(error.item())
            print(f"step {step:5d}  {seconds:6.1f} s  {psnr:5.2f} dB  {out.n_samples:7d} samples  {share:.1%} occupied")


@torch.no_grad()
def seconds_of_a_view(renderer: Renderer, cameras: Cameras) -> float:
    """An image of the trained asset at its largest; the fastest of three."""
    rays = generate_rays(Cameras(cameras.c2w[:1], cameras.fovy[:1]), LARGE, LARGE)
    times = []
    for _ in range(3):
        begun = time.perf_counter()
        renderer(rays)
        times.append(time.perf_counter() - begun)
    return min(times)


def main() -> None:
    args = parse_arguments()
    set_threads(args.threads)
    cameras = spread_cameras()
    rgba = draw(load(args.source, args.name), cameras, args.size)
    judged = list(HELD_OUT)
    fitted = [i for i in range(N_VIEWS) if i not in judged]
    rays = generate_rays(Cameras(cameras.c2w[fitted], cameras.fovy[fitted]), args.size, args.size)
    config = replace(VolumeConfig.mini(), log2_size=17, bias_scale=2.0)
    renderer = Renderer(Volume(config), OccupancyGrid(64), FixedBackground(), n_samples_per_ray=384)
    begun = time.perf_counter()
    fit(renderer, rays, rgba[fitted].reshape(-1, 4), args.steps, args.seed)
    seconds = time.perf_counter() - begun

    renderer.background.color = torch.ones(3)
    unseen = generate_rays(Cameras(cameras.c2w[judged], cameras.fovy[judged]), args.size, args.size)
    wanted = over(rgba[judged], torch.ones(3))
    got = renderer(unseen).rgb.reshape(wanted.shape).clamp(0, 1)
    errors = (got - wanted).square().mean((1, 2, 3))
    psnr = -10 * torch.log10(errors)
    print(f"fitted in {seconds:.0f} s; held-out views: {psnr.mean():.2f} dB (worst {psnr.min():.2f})")
    print(f"one view of {LARGE} x {LARGE}: {seconds_of_a_view(renderer, cameras):.2f} s")
    args.out.mkdir(parents=True, exist_ok=True)
    sheet = torch.cat([torch.cat(list(wanted), 1), torch.cat(list(got), 1)]).mul(255).round().byte().numpy()
    Image.fromarray(sheet).save(args.out / "fit.png")
    print(args.out / "fit.png")


if __name__ == "__main__":
    main()
