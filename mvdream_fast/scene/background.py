"""What a ray sees behind the volume: a learned environment, random colours while training, or one fixed colour."""

from itertools import pairwise
from typing import Literal

import torch
from torch import nn

from mvdream_fast.core.images import GREY
from mvdream_fast.core.pinned import to_device
from mvdream_fast.core.rng import Stream
from mvdream_fast.scene.base import Lighting

FLAT_COLORS = {"grey": GREY, "white": 1.0}


def new_background(
    kind: Literal["learned", "grey", "white"], augment_prob: float, stream: Stream | None = None
) -> nn.Module:
    """The background that a configuration names; a learned one draws its weights from the stream."""
    if kind == "learned":
        return EnvironmentMap(augment_prob=augment_prob, stream=stream)
    level = FLAT_COLORS[kind]
    return FixedBackground((level, level, level))


def seen_behind(background: nn.Module, rays_d: torch.Tensor, stream: Stream | None, lighting: Lighting) -> torch.Tensor:
    """What a training render has behind the scene, [R, 3]: `background`, random where it is, but for plain rays."""
    colors = background(rays_d, lighting.behind or stream, True)
    return colors if lighting.plain is None else torch.where(lighting.plain[:, None], background(rays_d), colors)


def spherical_harmonics(directions: torch.Tensor) -> torch.Tensor:
    """The nine real spherical harmonics of the bands 0 to 2, [R, 3] unit vectors -> [R, 9].

    Order and signs of tiny-cuda-nn's encoding of degree 3, with the Condon-Shortley phase.
    """
    x, y, z = directions.unbind(-1)
    c1, c2 = 0.4886025119029199, 1.0925484305920792
    bands = [
        torch.full_like(x, 0.28209479177387814),
        -c1 * y,
        c1 * z,
        -c1 * x,
        c2 * x * y,
        -c2 * y * z,
        0.9461746957575601 * z * z - 0.31539156525252,
        -c2 * x * z,
        0.5462742152960396 * (x * x - y * y),
    ]
    return torch.stack(bands, dim=-1)


class EnvironmentMap(nn.Module):
    """Colour of a direction: spherical harmonics -> 16 -> 16 -> 3, ReLU, no bias, sigmoid.

    While training, with probability `augment_prob` a step, one uniform colour stands for the whole batch. The weights
    then get a gradient of zero rather than none, so that their optimiser takes the same steps either way.
    """

    def __init__(self, width: int = 16, augment_prob: float = 0.5, stream: Stream | None = None):
        super().__init__()
        self.augment_prob = augment_prob
        sizes, stream = [9, width, width, 3], stream or Stream(0, 0, "background")
        self.layers = nn.ModuleList(_linear(a, b, stream) for a, b in pairwise(sizes))

    def forward(self, rays_d: torch.Tensor, stream: Stream | None = None, training: bool = False) -> torch.Tensor:
        """rays_d [R, 3] unit vectors -> [R, 3] in [0, 1]. A stream is needed only in training."""
        x = spherical_harmonics(rays_d)
        for layer in self.layers[:-1]:
            x = torch.relu(layer(x))
        color = torch.sigmoid(self.layers[-1](x))
        if not training or self.augment_prob == 0:
            return color
        if stream is None:
            raise ValueError("EnvironmentMap: stream must be a Stream in training, got None; pass rng.Stream(...)")
        draw = stream.uniform(4)  # on the CPU, where the first number can be looked at without waiting
        return color * 0 + to_device(draw[1:], color.device) if float(draw[0]) < self.augment_prob else color


def _linear(n_in: int, n_out: int, stream: Stream) -> nn.Linear:
    """A layer without bias whose weights are those that torch would begin with, but from the stream: torch's own
    generator is the caller's."""
    layer = nn.Linear(n_in, n_out, bias=False, device="meta").to_empty(device="cpu")
    most = n_in**-0.5
    layer.weight.data.copy_(stream.uniform(n_out, n_in, low=-most, high=most))
    return layer


class FixedBackground(nn.Module):
    """One colour behind everything, black unless told."""

    color: torch.Tensor  # [3]

    def __init__(self, color: tuple[float, float, float] = (0.0, 0.0, 0.0)):
        super().__init__()
        self.register_buffer("color", torch.tensor(color, dtype=torch.float32), persistent=False)

    def forward(self, rays_d: torch.Tensor, stream: Stream | None = None, training: bool = False) -> torch.Tensor:
        """rays_d [R, 3] -> [R, 3]."""
        return self.color.expand(rays_d.shape[0], 3)
