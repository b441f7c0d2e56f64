"""What the classifier sees of views and of real renders, through a stand-in that sees their mean colours."""

import pytest
import torch

from mvdream_fast.core.rng import Stream
from mvdream_fast.evaluation.classifier import Seen
from mvdream_fast.evaluation.independent import (
    RealSeen,
    distances,
    look,
    naming,
    real_fog,
    real_gradients,
    shrunk,
)


class MeanColor:
    """Features: the mean of each channel. It takes red things for a teapot (849), all others for a cat (281)."""

    def __init__(self):
        self.sizes = []

    def look(self, images):
        self.sizes.append(tuple(images.shape))
        features = images.mean((2, 3))
        logits = torch.zeros(len(images), 1000)
        red = features[:, 0] > features[:, 1]
        logits[red, 845:850], logits[~red, 281:286] = 1.0, 1.0
        return Seen(features, logits)


def test_images_shrink_to_the_means_of_areas():
    image = torch.arange(16.0).view(1, 1, 4, 4)
    assert shrunk(image, 2).tolist() == [[[[2.5, 4.5], [10.5, 12.5]]]]
    assert shrunk(image, 4) is image
    assert shrunk(torch.zeros(2, 5, 3, 8, 8), 4).shape == (2, 5, 3, 4, 4)


def test_what_is_seen_of_views():
    views = torch.zeros(3, 2, 3, 128, 128)
    views[0, :, 0] = 1.0
    views[1, 0, 0] = views[1, 1, 1] = 1.0
    classifier = MeanColor()
    found = look(classifier, views, ["a red teapot", "a white teapot", "a red tulip"])
    assert classifier.sizes == [(6, 3, 64, 64)]
    assert found.features[1].tolist() == [[1, 0, 0], [0, 1, 0]]
    assert found.named == [1.0, 0.5, None]  # ImageNet has no tulip
    assert naming(found.named) == {"named": 0.75, "named_of": 2}
    assert naming([None]) == {}


def test_real_renders_are_compared_with_their_other_orbits():
    features = Stream(0, 0, "x").normal(3, 2, 4, 5)
    seen = RealSeen(features)
    assert torch.equal(seen.rest, features[:, 1].flatten(0, 1))
    first = features[:, 0].flatten(0, 1)
    assert seen.distances(8) == distances(first[:8], seen.rest)
    scores = seen.scores()
    assert scores["classifier_kernel"] == distances(first, seen.rest)["classifier_kernel"]
    assert -0.5 < scores["agreement"] < 0.5  # nothing is alike here
    alike = RealSeen(features[:, :1].repeat(1, 3, 1, 1))
    assert alike.scores()["agreement"] == pytest.approx(1)
    assert alike.rest.shape == (24, 5)
    assert RealSeen(features[:, :1]).rest.shape == (12, 5)


def test_the_sharpness_of_real_renders_by_size():
    stripes = (torch.arange(128) % 4 < 2).float().expand(2, 3, 128, 128)  # two pixels wide: the edges are every other
    found = real_gradients(stripes)
    assert found.keys() == {"gradient_64", "gradient_128"}
    assert found["gradient_128"] == pytest.approx(63 / 127)
    assert found["gradient_64"] == pytest.approx(1)
    assert real_gradients(stripes[..., :32]) == {}


def test_the_fog_of_real_renders():
    opacity = torch.ones(3, 2, 128, 128)
    opacity[1, :, :, 64:] = 0.5
    opacity[2, 0, 64:] = 0.0
    opacity[2, 1, :64] = 0.5
    found = real_fog(opacity)
    assert found["fog"] == pytest.approx((0 + 1 / 2 + 1 / 3) / 3)
    assert found["fog_median"] == pytest.approx(1 / 3)
    assert real_fog(opacity[..., :64, :64]) == {}  # in which edges are too much of it
