"""Measures of views and of turning assets: pure functions on embeddings, images, silhouettes and angles.

What makes the embeddings is evaluator.py; which images are measured, judging.py. Angles are degrees.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mvdream_fast.camera import Cameras, generate_rays
from mvdream_fast.core.border import off_border

FRONT_DEG = 45.0  # a view reads as front when its predicted azimuth is that close to 0
OPPOSITE_DEG = 120.0  # two fronts that far apart are two faces: one mistake at the edge of the front is less
CONFIDENT = 0.3  # views that the evaluator is less sure of read as no side; at this, it accuses few real objects
FOREGROUND = 0.06  # largest difference of a channel from the background, in [0, 1], that is still background
COVERED, SOLID = 0.1, 0.9  # opacities: above the first an image shows something, from the second on it hides the rest
MAX_PSNR = 99.0
HULL_SAMPLES = 64  # along a ray through the unit ball: as many as the image has pixels


def top1(similarity: Tensor, truth: Tensor) -> Tensor:
    """Whether the most similar candidate of each row is the true one: [n, m], int64 [n] -> bool [n].

    A tie is a miss, so that embeddings that say nothing earn nothing.
    """
    own = similarity.gather(1, truth[:, None])
    return (similarity >= own).sum(1) == 1


def angle_difference(a_deg: Tensor, b_deg: Tensor) -> Tensor:
    """The angle between directions, from 0 to 180."""
    return ((a_deg - b_deg + 180) % 360 - 180).abs()


def moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [F] and covariance [F, F] of features [n, F], float64.

    Raises: ValueError if there are fewer than two.
    """
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"moments: features must be [n, F] with n from 2, got {list(features.shape)}")
    return features.double().mean(0), torch.cov(features.double().T)


def frechet_distance(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> float:
    """|mean_a - mean_b|^2 + tr(cov_a + cov_b - 2 (cov_a cov_b)^(1/2)), of two `moments`.

    Source: Heusel et al. 2017 (FID); the root's trace is that of (cov_a^(1/2) cov_b cov_a^(1/2))^(1/2).
    """
    values, vectors = torch.linalg.eigh(a[1])
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ b[1] @ root).clamp_min(0).sqrt().sum()
    return float((a[0] - b[0]).square().sum() + a[1].trace() + b[1].trace() - 2 * cross)


def spread(embeddings: Tensor) -> float:
    """Mean of 1 - cosine over the pairs of n unit embeddings [n, E]: 0 where all are the same.

    Raises: ValueError if there are fewer than two.
    """
    n = len(embeddings)
    if n < 2:
        raise ValueError(f"spread: embeddings must be at least 2, got {n}")
    cosines = embeddings @ embeddings.T
    return float(1 - (cosines.sum() - cosines.trace()) / (n * (n - 1)))


def opposite_difference(views: Tensor, masks: Tensor) -> float:
    """RMS difference of the images taken half a turn apart, over what either of them shows.

    Small where an object has no front: it looks the same from there and from behind. 0 where nothing is seen.

    Args: an orbit of evenly spaced views [V, 3, Hp, Wp], V even, and their silhouettes, bool [V, Hp, Wp].
    """
    half = len(views) // 2
    if len(views) != 2 * half or not half:
        raise ValueError(f"opposite_difference: views must be an even number, got {len(views)}")
    either = masks[:half] | masks[half:]
    errors = (views[:half] - views[half:]).square().mean(1)[either]
    return float(errors.mean().sqrt()) if len(errors) else 0.0


def reads_as_front(predicted_deg: Tensor, confidence: Tensor) -> Tensor:
    """Which views [V] show the front, as far as the evaluator is sure of it: bool [V]."""
    return (angle_difference(predicted_deg, torch.zeros(())) <= FRONT_DEG) & (confidence >= CONFIDENT)


def is_janus(azimuth_deg: Tensor, front: Tensor) -> bool:
    """Whether two (nearly) opposite views of a turn both read as front: the multi-face problem.

    Args: the views' true azimuths [V], and whether each reads as front, bool [V].
    """
    seen = azimuth_deg[front]
    return bool((angle_difference(seen[:, None], seen[None]) >= OPPOSITE_DEG).any())


def silhouettes(images: Tensor) -> Tensor:
    """What stands in front of a flat background: [V, 3, Hp, Wp] in [0, 1] -> bool [V, Hp, Wp].

    The background is each image's median colour along its border. What has the background's colour is lost.
    """
    return off_border(images)[:, 0] > FOREGROUND


def hull_support(masks: Tensor, cameras: Cameras) -> float:
    """The share of all silhouettes' pixels that the views' common visual hull fills: 1 where the views agree.

    A pixel is filled when some point on its ray lies, within a pixel, in every view's silhouette. Consistent views
    of a solid give 1 whatever its shape, as every silhouette is the hull's own; needs no fit and has no settings that a
    volume's regularisers would have. Colours are not looked at. 0 where nothing is seen.

    Args: masks bool [V, Hp, Wp]; cameras that look at the origin, whose unit ball holds the object.
    Source: Laurentini 1994, "The visual hull concept".
    """
    n_views, height, width = masks.shape
    if len(cameras) != n_views:
        raise ValueError(f"hull_support: cameras must be one a view, got {len(cameras)} for {n_views}")
    if not masks.any():
        return 0.0
    rays = generate_rays(cameras, height, width)
    seen = masks.flatten()
    origins, directions = rays.rays_o[seen], rays.rays_d[seen]
    middle = -(origins * directions).sum(-1, keepdim=True)
    t = middle + torch.linspace(-1, 1, HULL_SAMPLES)
    points = origins[:, None] + t[..., None] * directions[:, None]  # [R, S, 3]
    wide = F.max_pool2d(masks[:, None].float(), 3, 1, 1)[:, 0] > 0
    inside = torch.ones(points.shape[:2], dtype=torch.bool)
    for c2w, fovy, mask in zip(cameras.c2w, cameras.fovy, wide):
        inside &= _covered(points, c2w, float(fovy), mask)
    return float(inside.any(1).float().mean())


def _covered(points: Tensor, c2w: Tensor, fovy: float, mask: Tensor) -> Tensor:
    """Which points [..., 3] fall on the mask [Hp, Wp] of a camera; bool [...]."""
    height, width = mask.shape
    local = (points - c2w[:3, 3]) @ c2w[:3, :3]
    focal = 0.5 * height / math.tan(0.5 * fovy)
    depth = -local[..., 2]
    column = (width / 2 + focal * local[..., 0] / depth).floor().long()
    row = (height / 2 - focal * local[..., 1] / depth).floor().long()
    on = (depth > 0) & (column >= 0) & (column < width) & (row >= 0) & (row < height)
    return on & mask[row.clamp(0, height - 1), column.clamp(0, width - 1)]


def color_spread(images: Tensor, masks: Tensor) -> float:
    """RMS distance of the views' mean object colours from their mean: [V, 3, Hp, Wp] and bool [V, Hp, Wp].

    1, the worst, where fewer than two views show anything.
    """
    seen = masks.flatten(1).any(1)
    if seen.sum() < 2:
        return 1.0
    weights = masks[seen, None].float()
    means = (images[seen] * weights).sum((2, 3)) / weights.sum((2, 3))
    return float((means - means.mean(0)).square().sum(1).mean().sqrt())


def overlap(a: Tensor, b: Tensor) -> float:
    """Mean intersection over union of silhouettes, both bool [V, Hp, Wp], view by view; 0 for empty ones."""
    both, either = ((op(a, b)).flatten(1).sum(1) for op in (torch.logical_and, torch.logical_or))
    return float((both / either.clamp_min(1)).mean())


def neighbour_overlap(masks: Tensor) -> float:
    """Mean intersection over union of each silhouette of a turn, bool [V, Hp, Wp], and the next; 0 for empty ones."""
    return overlap(masks, masks.roll(-1, 0))


def fog(opacity: Tensor) -> float:
    """Of the pixels that images cover, the share that are half transparent: opacities [V, Hp, Wp].

    A solid has little more than its silhouette's edge. 1, the worst, where nothing is covered.
    """
    covered = opacity > COVERED
    return float((covered & (opacity < SOLID)).sum() / covered.sum()) if covered.any() else 1.0


def mean_gradient(images: Tensor) -> float:
    """How sharp images [..., 3, Hp, Wp] in [0, 1] are: the mean length of their brightness' gradient, a pixel.

    Brightness is the mean of the channels, its gradient the differences to the right and downwards. Only images of the
    same things at the same size compare: an edge's gradient grows with the pixel.
    """
    brightness = images.mean(-3)
    d_x = brightness[..., :-1, 1:] - brightness[..., :-1, :-1]
    d_y = brightness[..., 1:, :-1] - brightness[..., :-1, :-1]
    return float(torch.hypot(d_x, d_y).mean())


def psnr(a: Tensor, b: Tensor, mask: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of images [V, 3, Hp, Wp] in [0, 1] where a mask, bool [V, Hp, Wp], is.

    At most MAX_PSNR, of images that are the same; 0 where the mask is empty.
    """
    errors = (a - b).square().mean(1)[mask]
    return min(MAX_PSNR, -10 * math.log10(max(float(errors.mean()), 1e-30))) if len(errors) else 0.0


def kernel_distance(a: Tensor, b: Tensor) -> float:
    """Squared maximum mean discrepancy of features [n, F] and [m, F] under the kernel (x.y / F + 1)^3, unbiased.

    Near 0, and as often below it, for samples of one distribution, however few they are: the Frechet distance of few
    is large.
    Raises: ValueError if there are fewer than two of either.
    Source: Binkowski et al. 2018, "Demystifying MMD GANs" (KID); Gretton et al. 2012, eq. 3.
    """
    n, m = len(a), len(b)
    if n < 2 or m < 2:
        raise ValueError(f"kernel_distance: features must be at least 2 of both, got {n} and {m}")
    a, b = a.double(), b.double()
    within = [(k.sum() - k.trace()) / (len(k) * (len(k) - 1)) for k in (_kernel(a, a), _kernel(b, b))]
    return float(within[0] + within[1] - 2 * _kernel(a, b).mean())


def _kernel(a: Tensor, b: Tensor) -> Tensor:
    return (a @ b.T / a.shape[1] + 1) ** 3


def agreement(a: Tensor, b: Tensor, origin: Tensor) -> float:
    """Mean cosine of features a and b, both [n, F], image by image, as seen from an origin [F].

    From the mean of many images, those of different things are near 0: features that have no sign are all alike from 0.
    """
    return float(F.cosine_similarity(a - origin, b - origin, dim=1).mean())
