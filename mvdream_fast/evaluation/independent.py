"""Figures that owe nothing to our own evaluator: what an ImageNet classifier sees in views, what real renders score.

The measures are measures.py's, the classifier classifier.py's; a finished run's are in runs.py.
"""

from collections.abc import Sequence
from statistics import median
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from mvdream_fast.evaluation import measures as ev
from mvdream_fast.evaluation.classifier import Classifier, classes_of, is_named

SEEN_SIZE = 64  # the classifier is shown no more pixels a side, whoever drew them: no distance may tell sizes apart
GRADIENT_SIZES = (64, 128, 256)  # at which real renders' sharpness is measured, where they are that large
FOG_SIZE = 128

Scores = dict[str, float]


def shrunk(images: Tensor, size: int) -> Tensor:
    """Images [..., Hp, Wp] of more than `size` pixels a side as means of areas; smaller ones as they are."""
    if images.shape[-1] <= size:
        return images
    return F.adaptive_avg_pool2d(images.flatten(0, -3), size).unflatten(0, images.shape[:-2])


class Looked(NamedTuple):
    """What the classifier makes of the views of n objects: features [n, V, F], and whether it names them, by text.

    named: the share of each object's views that have its noun among the five likeliest, None without such a class.
    """

    features: Tensor
    named: list[float | None]


def look(classifier: Classifier, views: Tensor, texts: Sequence[str]) -> Looked:
    """Shows views [n, V, 3, Hp, Wp] in [0, 1] of n texts to the classifier, none larger than SEEN_SIZE."""
    seen = classifier.look(shrunk(views, SEEN_SIZE).flatten(0, 1))
    logits, classes = seen.logits.unflatten(0, views.shape[:2]), [classes_of(text) for text in texts]
    named = [float(is_named(x, wanted).float().mean()) if wanted else None for x, wanted in zip(logits, classes)]
    return Looked(seen.features.unflatten(0, views.shape[:2]), named)


def naming(named: Sequence[float | None]) -> Scores:
    """`named`, the mean over those that have a class, and of how many; nothing where none has."""
    known = [share for share in named if share is not None]
    return {"named": sum(known) / len(known), "named_of": len(known)} if known else {}


def distances(features: Tensor, real: Tensor) -> Scores:
    """Frechet and kernel distance of features [n, F] to those of real renders [m, F]; the first grows as n falls."""
    return {
        "classifier_frechet": ev.frechet_distance(ev.moments(features), ev.moments(real)),
        "classifier_kernel": ev.kernel_distance(features, real),
    }


class RealSeen(NamedTuple):
    """Classifier features of real renders, four views of O orbits of n objects: [n, O, 4, F].

    Assets and views are compared with all orbits but the first, and so is the first, which tells how near is near.
    """

    features: Tensor

    @property
    def rest(self) -> Tensor:
        """What is compared with, [m, F]."""
        return (self.features[:, 1:] if self.features.shape[1] > 1 else self.features).flatten(0, 2)

    def distances(self, n_views: int) -> Scores:
        """Of so many views of the first orbits, or of all there are."""
        return distances(self.features[:, 0].flatten(0, 1)[:n_views], self.rest)

    def scores(self) -> Scores:
        """All of the first orbits' distances, and their agreement with the second."""
        first, second = self.features[:, 0], self.features[:, min(1, self.features.shape[1] - 1)]
        same = ev.agreement(first.flatten(0, 1), second.flatten(0, 1), self.rest.mean(0))
        return self.distances(first.shape[0] * first.shape[1]) | {"agreement": same}


def real_gradients(images: Tensor) -> Scores:
    """`gradient_64` and so on of images [..., 3, Hp, Wp], as far as they are that large."""
    return {f"gradient_{s}": ev.mean_gradient(shrunk(images, s)) for s in GRADIENT_SIZES if s <= images.shape[-1]}


def real_fog(opacity: Tensor) -> Scores:
    """Mean and median fog of n objects, opacities [n, V, Hp, Wp]; nothing of renders under FOG_SIZE pixels.

    In small images the edges, which no renderer leaves hard, are most of what is covered.
    """
    if opacity.shape[-1] < FOG_SIZE:
        return {}
    each = [ev.fog(views) for views in shrunk(opacity, FOG_SIZE)]
    return {"fog": sum(each) / len(each), "fog_median": median(each)}
