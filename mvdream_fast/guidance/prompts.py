"""Words for what a camera sees, for priors that are told no camera or that shall hear of it twice: view-dependent
prompts, and Perp-Neg, which leads a view away from the words of the other sides. Functions for any guidance.

Sources: Poole et al. 2022, "DreamFusion", section 3.2; Armandpour et al. 2023, "Re-imagine the Negative Prompt
Algorithm: Transform 2D Diffusion into 3D, alleviate Janus problem and Beyond"; thresholds and constants are
threestudio's.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from mvdream_fast.core.pinned import to_device
from mvdream_fast.diffusion.denoiser import TextCond

VIEW_WORDS = ("front view", "side view", "back view", "overhead view")
FRONT, SIDE, BACK, OVERHEAD = range(4)
# From the front and from the back, and over the horizon.
WITHIN_DEG, OVERHEAD_DEG = 45.0, 60.0


class Falling(NamedTuple):
    """scale * exp(-rate * r) + shift."""

    scale: float
    rate: float
    shift: float

    def __call__(self, r: Tensor) -> Tensor:
        return self.scale * torch.exp(-self.rate * r) + self.shift


# How strongly a view is led away from a side.
FRONT_BETWEEN_FRONT_AND_SIDE = Falling(4.0, 0.5, -2.426)  # of the share of the front in what it is told
SIDE_BETWEEN_FRONT_AND_SIDE = Falling(4.0, 0.5, -2.426)  # these three of the share of the side
SIDE_BETWEEN_SIDE_AND_BACK = Falling(1.0, 0.5, -0.606)
FRONT_BETWEEN_SIDE_AND_BACK = Falling(1.0, 0.5, 0.967)


class PerpNeg(NamedTuple):
    """What Perp-Neg tells V views, in shares and rows of VIEW_WORDS."""

    shares: Tensor  # [V, 4], of each side in the prompt's embedding; they sum to 1
    rows: Tensor  # [2, V] int64, the sides that the view is led away from
    weights: Tensor  # [2, V], of those: 0 or less


def azimuth_deg(c2w: Tensor) -> Tensor:
    """Degrees from the front to where each camera stands, [V] from 0 to 180, the same to the left and to the right."""
    x, y, _ = c2w[:, :3, 3].unbind(1)
    return torch.rad2deg(torch.atan2(x, -y)).abs()


def is_overhead(c2w: Tensor) -> Tensor:
    """Whether each camera stands higher than OVERHEAD_DEG over the horizon, [V]."""
    x, y, z = c2w[:, :3, 3].unbind(1)
    return torch.rad2deg(torch.atan2(z, torch.hypot(x, y))) > OVERHEAD_DEG


def view_words(c2w: Tensor, within_deg: float = WITHIN_DEG) -> Tensor:
    """Which of VIEW_WORDS each view is, [V] for c2w [V, 4, 4]: by where around the object it stands, or above it; front
    and back are within so many degrees."""
    azimuth = azimuth_deg(c2w)
    row = torch.where(azimuth < within_deg, FRONT, torch.where(azimuth <= 180 - within_deg, SIDE, BACK))
    return torch.where(is_overhead(c2w), OVERHEAD, row)


def perp_neg(c2w: Tensor) -> PerpNeg:
    """Perp-Neg for views at c2w [V, 4, 4]. A view between two sides is told of both, by where between them it stands:
    from the front (azimuth 0) to the side (90), from there to the back (180). From above there is nothing to avoid.

    The weights are continuous but for 5e-4 at the side, where the published constants do not quite meet.
    """
    azimuth = azimuth_deg(c2w)
    front = 1 - azimuth / 90  # the share of the front, positive before the side
    ahead, above = front >= 0, is_overhead(c2w)
    side = torch.where(ahead, 1 - front, 1 + front)  # from 0 to 1, and back to 0
    shares = torch.stack([front.clamp(min=0), side, (-front).clamp(min=0), torch.zeros_like(side)], 1)
    shares = torch.where(above[:, None], torch.eye(4).to(shares)[OVERHEAD], shares)
    rows = torch.stack([torch.full_like(side, FRONT), torch.full_like(side, SIDE)]).long()
    of_front = torch.where(ahead, FRONT_BETWEEN_FRONT_AND_SIDE(front), FRONT_BETWEEN_SIDE_AND_BACK(side))
    of_side = torch.where(ahead, SIDE_BETWEEN_FRONT_AND_SIDE(side), SIDE_BETWEEN_SIDE_AND_BACK(side))
    weights = -torch.stack([of_front, of_side])
    return PerpNeg(shares, rows, torch.where(above, 0.0, weights))


def tell(
    sides: TextCond, c2w: Tensor, with_perp_neg: bool = False, within_deg: float = WITHIN_DEG
) -> tuple[TextCond, Tensor | None]:
    """What each of V views is told in words.

    Args:
        sides: the prompt with each of VIEW_WORDS, B = 4. c2w: [V, 4, 4].
        with_perp_neg: mixes the sides' embeddings, and adds the sides to be led away from.
        within_deg: as in `view_words`; Perp-Neg has no such steps.

    Returns:
        The text, B = V; and with Perp-Neg the weights of its `away`, [K, V] on the text's device, else None.
    """
    device = sides.cond.device
    rows = to_device(view_words(c2w, within_deg), device)
    if not with_perp_neg:
        return TextCond(sides.cond[rows], sides.uncond[rows]), None
    shares, others, weights = (to_device(x, device) for x in perp_neg(c2w))
    wide = torch.promote_types(sides.cond.dtype, torch.float32)
    cond = torch.einsum("vs,sld->vld", shares.to(wide), sides.cond.to(wide)).to(sides.cond.dtype)
    return TextCond(cond, sides.uncond[rows], sides.cond[others.flatten()]), weights


def led_away(cond: Tensor, uncond: Tensor, away: Tensor, weights: Tensor) -> Tensor:
    """A model's conditional prediction, led away from what it predicts for other prompts.

    cond + sum over k of w_k * (the part of e_k that is perpendicular to e), e = cond - uncond, e_k = away_k - uncond:
    to leave out what is along e keeps what the right prompt asks for. Guidance then works on the result as on any
    conditional prediction: uncond + s (result - uncond) is the paper's. Of v-predictions the result is that of the
    noises they stand for: differences of two are the same times one factor.

    Args:
        cond, uncond: [n, C, h, w]. away: [K*n, C, h, w], K slowest. weights: [K, n], none above 0.

    Returns:
        [n, C, h, w].
    """
    direction, result = cond - uncond, cond
    length = direction.square().sum((1, 2, 3), keepdim=True).clamp(min=1e-6)
    for other, weight in zip(away.chunk(len(weights)), weights, strict=True):
        other = other - uncond
        along = (other * direction).sum((1, 2, 3), keepdim=True) / length
        result = result + weight.to(cond.dtype)[:, None, None, None] * (other - along * direction)
    return result
