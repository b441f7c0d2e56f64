"""What a piece of a ray hides, by the signed distances at its two ends; and those ends, shared by neighbouring pieces.

An opacity alpha is handed on as the optical depth -log(1 - alpha), which `ops.composite` turns back into it exactly:
the march, pruning and compositing of a density volume serve a surface as they are.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from mvdream_fast.core import reads
from mvdream_fast.ops._packing import packed_counts
from mvdream_fast.ops.march_rays import Samples, ours

Opacity = Literal["neus", "volsdf"]


@dataclass(frozen=True)
class Nodes:
    """The ends of the samples of all rays, in order: a point [N] on a ray is the end of one sample and the start of the
    next where these touch. points: as Samples of length 0. first: [S] int64, the node where a sample starts; the next
    one is its end."""

    points: Samples
    first: Tensor

    def starts(self, values: Tensor) -> Tensor:
        """values [N, ...] at the samples' starts, [S, ...]."""
        return values.index_select(0, self.first)

    def ends(self, values: Tensor) -> Tensor:
        """The same at their ends."""
        return values.index_select(0, self.first + 1)

    def means(self, values: Tensor) -> Tensor:
        """The mean of both."""
        return (0.5 * (values[:-1] + values[1:])).index_select(0, self.first)


def nodes_of(samples: Samples) -> Nodes:
    """The nodes of samples as `march_rays` packs them; on a GPU their number is waited for."""
    n, (starts, counts) = samples.n_samples, samples.packed_info.unbind(-1)
    if not n:
        return Nodes(samples, starts.new_empty(0))
    gap = torch.ones(n, dtype=torch.bool, device=starts.device)  # behind a sample
    gap[:-1] = samples.t_starts[1:] != samples.t_ends[:-1]
    gap[starts + counts - 1] = True  # behind a ray's last; of an empty ray, that of a ray before it, or of all
    up_to = torch.nn.functional.pad(gap.cumsum(0), (1, 0))
    (n_gaps,) = reads.read(up_to[-1:])
    first = torch.arange(n, device=starts.device) + up_to[:-1]
    distances = samples.t_starts.new_empty(n + n_gaps)
    distances[first] = samples.t_starts
    distances[first + 1] = samples.t_ends
    counts = counts + up_to[starts + counts] - up_to[starts]
    return Nodes(ours(Samples(distances, distances, packed_counts(counts))), first)


def optical_depths(
    kind: Opacity, before: Tensor, after: Tensor, lengths: Tensor, inverse_std: Tensor, cos_ratio: float = 1.0
) -> Tensor:
    """-log(1 - alpha) of pieces of rays [S], 0 or more.

    before, after: [S], the signed distances at their ends, negative inside. lengths: [S]. inverse_std: [] or [1].
    "neus": alpha = max((Phi(before) - Phi(after)) / Phi(before), 0), Phi(x) the sigmoid of inverse_std x. That is
    unbiased: a ray's weights are largest where it meets the surface. Where cos_ratio r < 1, the fall of the distance
    along the ray, -c = (before - after) / length, is taken as (1 - r) max(0.5 - 0.5 c, 0) + r max(-c, 0) around the
    same middle, so that a surface that is seen from its side or from behind has gradients early on.
    "volsdf": the integral of `density_of` by the trapezoid rule; cos_ratio is passed over.

    Source: Wang et al. 2021, "NeuS", eq. 13; threestudio's annealing; Yariv et al. 2021, "VolSDF", eq. 2 and 3.
    """
    if kind == "volsdf":
        return 0.5 * lengths * (density_of(kind, before, inverse_std) + density_of(kind, after, inverse_std))
    fall = (before - after).clamp(min=0)
    if cos_ratio < 1:
        fall = cos_ratio * fall + (1 - cos_ratio) * (0.5 * (lengths + before - after)).clamp(min=0)
    middle = 0.5 * (before + after)
    depths = logsigmoid(inverse_std * (middle + 0.5 * fall)) - logsigmoid(inverse_std * (middle - 0.5 * fall))
    return depths.clamp(min=0)  # of rounding


def density_of(kind: Opacity, distances: Tensor, inverse_std: Tensor) -> Tensor:
    """The density [P] at signed distances [P]: NeuS's for a ray that meets the surface head on, the largest; VolSDF's,
    a share of 1 / beta by the distribution of Laplace, with inverse_std for 1 / beta."""
    if kind == "neus":
        return inverse_std * torch.sigmoid(-inverse_std * distances)
    tail = 0.5 * torch.exp(-inverse_std * distances.abs())
    return inverse_std * torch.where(distances > 0, tail, 1 - tail)
