"""Pixels in the place of latents: where each pixel goes, that nothing is lost, that such a model is saved and read."""

from dataclasses import replace

import pytest
import torch

from mvdream_fast.checkpoints.manifest import check_config
from mvdream_fast.checkpoints.open import load_model, save_model
from mvdream_fast.core.errors import ModelError
from mvdream_fast.models.config import PIXELS, VAEConfig
from mvdream_fast.models.pixels import Pixels
from mvdream_fast.training.initial_model import new_model


def config(patch: int, **settings) -> VAEConfig:
    return VAEConfig("pixels", (), latent_channels=3 * patch**2, patch_size=patch, scale_factor=1.0, **settings)


def test_a_square_is_3_p_p_channels_by_color_row_and_column():
    image = torch.arange(3 * 4 * 4.0).reshape(1, 3, 4, 4)
    seen = Pixels(config(2)).encode(image)
    assert seen.shape == (1, 12, 2, 2)
    assert seen[0, :, 0, 1].tolist() == [2, 3, 6, 7, 18, 19, 22, 23, 34, 35, 38, 39]


@pytest.mark.parametrize(("patch", "size"), [(1, (5, 7)), (2, (6, 4)), (4, (12, 20))])
def test_images_come_back_bit_for_bit(patch, size):
    image = torch.rand(2, 3, *size) * 2 - 1
    pixels = Pixels(config(patch))
    assert torch.equal(pixels.decode(pixels.encode(image)), image)
    assert torch.equal(pixels.encode(image, torch.randn(2, 3 * patch**2, 9, 9)), pixels.encode(image))  # no noise


def test_shift_scale_and_gradient():
    pixels = Pixels(replace(config(1), scale_factor=2.0, shift_factor=0.25))
    image = torch.full((1, 3, 2, 2), 0.75, requires_grad=True)
    seen = pixels.encode(image)
    assert torch.equal(seen, torch.ones(1, 3, 2, 2))  # (0.75 - 0.25) * 2
    assert torch.equal(pixels.decode(seen), image)
    seen.sum().backward()
    assert torch.equal(image.grad, torch.full_like(image, 2.0))


def test_other_shapes_are_refused():
    pixels = Pixels(config(4))
    with pytest.raises(ValueError, match=r"multiples of 4, got \(1, 3, 6, 8\)"):
        pixels.encode(torch.zeros(1, 3, 6, 8))
    with pytest.raises(ValueError, match=r"must be \[B, 48, h, w\], got \(1, 4, 2, 2\)"):
        pixels.decode(torch.zeros(1, 4, 2, 2))


@pytest.mark.parametrize(
    ("change", "message"),
    [({"latent_channels": 4}, "latent_channels must be 48"), ({"block_out_channels": (64,)}, "must be empty")],
)
def test_a_configuration_that_is_no_square_is_refused(change, message):
    with pytest.raises(ModelError, match=message):
        check_config(replace(PIXELS, vae=replace(PIXELS.vae, **change)))


def test_a_model_of_pixels_goes_to_a_folder_and_back(tmp_path):
    words = ["<pad>", "<start_of_text>", "<end_of_text>", "<unknown>", "cat</w>"]
    model = new_model("pixels", words, 0)
    save_model(model, tmp_path / "model")
    again = load_model(tmp_path / "model")
    assert again.config == model.config
    assert isinstance(again.vae, Pixels)
    for name, weight in model.unet.state_dict().items():
        assert torch.equal(again.unet.state_dict()[name], weight), name
