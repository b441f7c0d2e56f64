"""Normals of a density field and diffuse light from one point; which light is drawn when, as in DreamFusion.

Source: Poole et al., arXiv 2209.14988, section 3.2 and appendix A.2.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn.functional import normalize

from mvdream_fast.core.rng import Stream

SigmaFn = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Shading:
    """colour = albedo (diffuse max(0, n . l) + ambient), with a white albedo where textureless."""

    diffuse: float = 0.0
    ambient: float = 1.0
    textureless: bool = False

    @property
    def needs_normals(self) -> bool:
        """Whether a normal changes the colour."""
        return self.diffuse > 0


ALBEDO = Shading()


def draw_shading(
    stream: Stream,
    step: int,
    ambient_only_steps: int = 5000,
    diffuse_prob: float = 0.75,
    textureless_prob: float = 0.5,
    soft: bool = True,
) -> Shading:
    """The shading of a training step: plain albedo before `ambient_only_steps`, and with chance 1 - diffuse_prob later.

    Soft shading draws the diffuse light from U(0, 1); otherwise it is 0.9. The ambient light is the rest of 1.
    """
    lit, textureless, diffuse = map(float, stream.uniform(3))
    if step < ambient_only_steps or lit >= diffuse_prob:
        return ALBEDO
    diffuse = diffuse if soft else 0.9
    return Shading(diffuse, 1 - diffuse, textureless < textureless_prob)


def draw_light_positions(
    stream: Stream,
    camera_positions: torch.Tensor,
    n_views: int,
    distance_range: tuple[float, float] = (0.8, 1.5),
    perturb: float = 1.0,
) -> torch.Tensor:
    """A light near each camera's direction, its offset and distance shared by the views of a scene: [B*V, 3].

    camera_positions: [B*V, 3], views fastest; the last scene may have fewer.
    """
    n, device = camera_positions.shape[0], camera_positions.device
    n_scenes = -(-n // n_views)
    offset = (stream.normal(n_scenes, 3, device=device) * perturb).repeat_interleave(n_views, 0)[:n]
    distance = stream.uniform(n_scenes, 1, low=distance_range[0], high=distance_range[1], device=device)
    return normalize(camera_positions + offset, dim=-1) * distance.repeat_interleave(n_views, 0)[:n]


def shade(
    albedo: torch.Tensor, normals: torch.Tensor, positions: torch.Tensor, lights: torch.Tensor, shading: Shading
) -> torch.Tensor:
    """Colours [S, 3] of samples under their lights; albedo, normals, positions and lights: [S, 3]."""
    cosine = (normals * normalize(lights - positions, dim=-1)).sum(-1, keepdim=True).clamp(min=0)
    light = shading.diffuse * cosine + shading.ambient
    return light.expand_as(albedo) if shading.textureless else albedo * light


def analytic_normals(sigmas: torch.Tensor, positions: torch.Tensor, create_graph: bool = True) -> torch.Tensor:
    """-grad sigma, normalised, [S, 3], through the graph that made sigmas [S] of positions [S, 3].

    With create_graph the normals can be differentiated again, which the field must support.
    """
    (gradient,) = torch.autograd.grad(sigmas.sum(), positions, create_graph=create_graph, retain_graph=True)
    return -normalize(gradient, dim=-1)


def finite_difference_normals(sigma_fn: SigmaFn, positions: torch.Tensor, eps: float = 0.01) -> torch.Tensor:
    """The same from six densities at distance eps, central differences: [S, 3]."""
    return -normalize(finite_differences(sigma_fn, positions, eps), dim=-1)


def finite_differences(function: SigmaFn, positions: torch.Tensor, eps: float) -> torch.Tensor:
    """The derivatives of a function ([P, 3] -> [P]) at positions [S, 3], central differences of +-eps: [S, 3]."""
    offsets = eps * torch.eye(3, device=positions.device, dtype=positions.dtype)
    around = positions[:, None, None] + torch.stack([offsets, -offsets])  # [S, 2, 3, 3]
    values = function(around.reshape(-1, 3)).reshape(-1, 2, 3)
    # Divided by the distance, so that `normalize` takes only what is truly flat for flat.
    return (values[:, 0] - values[:, 1]) / (2 * eps)
