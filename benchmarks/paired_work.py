"""What `paired.py` times: a few ops and steps, each by public names, so that an older commit knows them, too.

Each function makes what it needs and returns the call that is timed.
"""

from collections.abc import Callable

import torch

from mvdream_fast import MVDreamPipeline, TextTo3D, ops
from mvdream_fast.scene.nerf.volume import Volume, VolumeConfig

Call = Callable[[], object]


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def geglu() -> Call:
    x, d_y = _random(2048, 1024).requires_grad_(), _random(2048, 512)
    return lambda: torch.autograd.grad(ops.geglu(x), x, d_y)


def group_norm_silu() -> Call:
    x = _random(16, 128, 16, 16).contiguous(memory_format=torch.channels_last).requires_grad_()
    scale, shift = torch.ones(128), torch.zeros(128)
    return lambda: torch.autograd.grad(ops.group_norm_silu(x, scale, shift, 32, 1e-5), x, x.detach())


def attention() -> Call:
    q, k, v = (_random(8, 64, 4, 64).requires_grad_() for _ in range(3))
    return lambda: torch.autograd.grad(ops.cross_view_attention(q, k, v, 4), (q, k, v), q.detach())


def overhead() -> Call:
    x = _random(1, 2).requires_grad_()
    return lambda: ops.geglu(x)


def field() -> Call:
    volume = Volume(VolumeConfig.mini())
    positions = _random(1 << 15, 3).clamp(-1, 1)

    def call() -> None:
        sigmas, rgb = volume(positions)
        (sigmas.sum() + rgb.sum()).backward()

    return call


def generate() -> Call:
    pipeline = MVDreamPipeline.from_pretrained("embedded")
    return lambda: pipeline("a green armchair", n_steps=4, seed=0)


def text_to_3d() -> Call:
    grow = TextTo3D(MVDreamPipeline.from_pretrained("embedded"))
    return lambda: grow("a green armchair", preset="mini", method="sds", steps=6, seed=0)


WORK: dict[str, Callable[[], Call]] = {
    "geglu with backward": geglu,
    "group_norm_silu with backward": group_norm_silu,
    "attention with backward": attention,
    "a call's overhead": overhead,
    "field with backward": field,
    "four views, 4 steps": generate,
    "text to 3D, 6 steps": text_to_3d,
}
