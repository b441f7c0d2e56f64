"""Latent channels of detail: linear layers around an autoencoder of one level, which leave its other channels alone."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from mvdream_fast.checkpoints.manifest import check_config
from mvdream_fast.core.errors import ModelError
from mvdream_fast.models.blocks import zero
from mvdream_fast.models.config import MINI, VAEConfig
from mvdream_fast.models.vae import LOGVAR_RANGE, VAE
from mvdream_fast.training.vae import Linear, linear_start, reconstruction, settle

BASE, N = 10, 6
PLAIN = VAEConfig(
    block_out_channels=(64,), layers_per_block=1, latent_channels=BASE, norm_num_groups=4,
    mid_block_add_attention=False,
    scale_factor=1.25, image_size=16, patch_size=4, decoder_width=96,
)  # fmt: skip
DETAILED = replace(PLAIN, latent_channels=BASE + N, detail_channels=N)


@pytest.fixture(scope="module")
def pair() -> tuple[VAE, VAE]:
    """Without and with detail; the weights that both have are the same."""
    torch.manual_seed(0)
    detailed, plain = VAE(DETAILED), VAE(PLAIN)
    state = detailed.state_dict()
    state["model.decoder.conv_in.weight"] = state["model.decoder.conv_in.weight"][:, :BASE]
    plain.load_state_dict({name: x for name, x in state.items() if ".detail." not in name})
    return plain.requires_grad_(False).eval(), detailed.requires_grad_(False).eval()


def images(n: int = 3, size: int = 16) -> torch.Tensor:
    """Smooth ones, with some noise."""
    g = torch.Generator().manual_seed(n)
    coarse = F.interpolate(torch.rand(n, 3, 5, 5, generator=g), size, mode="bicubic", align_corners=True)
    return (coarse + 0.05 * torch.randn(n, 3, size, size, generator=g)).clamp(0, 1) * 2 - 1


def test_other_channels_are_what_they_are_without(pair):
    plain, detailed = pair
    z = detailed.encode(images())
    assert z.shape == (3, BASE + N, 4, 4)
    torch.testing.assert_close(z[:, :BASE], plain.encode(images()), rtol=0, atol=0)


def test_detail_is_linear_in_a_cell_s_pixels_and_its_other_channels(pair):
    x, layer = images(), pair[1].model.encoder.detail
    mean, logvar = pair[1].posterior(x)
    patches = torch.einsum("bcyixj->bcijyx", x.unflatten(3, (4, 4)).unflatten(2, (4, 4))).flatten(1, 3)
    known = torch.cat([patches, mean[:, :BASE]], 1)
    expected = torch.einsum("oi,bihw->bohw", layer.weight[..., 0, 0], known) + layer.bias[:, None, None]
    torch.testing.assert_close(mean[:, BASE:], expected, rtol=1e-5, atol=1e-5)
    assert (logvar[:, BASE:] == LOGVAR_RANGE[0]).all()


def test_what_is_decoded_gets_all_channels_as_a_cell_s_pixels_too(pair):
    z, decoder = pair[1].encode(images()), pair[1].model.decoder
    z = z + torch.randn(z.shape, generator=torch.Generator().manual_seed(1))
    kept, decoder.detail = decoder.detail, zero(torch.nn.Conv2d(BASE + N, 48, 1))
    without, decoder.detail = pair[1].decode(z), kept
    added = torch.einsum("oi,bihw->bohw", kept.weight[..., 0, 0], z / 1.25) + kept.bias[:, None, None]
    torch.testing.assert_close(pair[1].decode(z), without + F.pixel_shuffle(added, 4), rtol=1e-5, atol=1e-5)


def test_it_goes_with_its_half():
    half, whole = VAE(DETAILED, decoder=False), VAE(DETAILED)
    assert {name for name in half.state_dict() if "detail" in name} == {
        "model.encoder.detail.weight",
        "model.encoder.detail.bias",
    }
    half.load_state_dict({name: x for name, x in whole.state_dict().items() if name in half.state_dict()})
    torch.testing.assert_close(half.encode(images()), whole.encode(images()), rtol=0, atol=0)


def squared_error(decibels: float) -> float:
    return 4 * 10 ** (-decibels / 10)


def test_training_begins_with_the_next_components_as_detail():
    torch.manual_seed(0)
    seen, new = images(64), images(32)
    linear = Linear.fit(seen, 4)
    detailed, plain = VAE(DETAILED).requires_grad_(False), VAE(PLAIN).requires_grad_(False)
    for vae in (detailed, plain):
        linear_start(vae, linear)
        settle(vae)
    bounds = [linear.bound(new, n) for n in (BASE, BASE + N)]
    assert bounds[1] > bounds[0] + 1
    errors = [squared_error(x) for x in (*bounds, reconstruction(plain, new), reconstruction(detailed, new))]
    # What the detail explains is all that is gained; what normalisation costs the others stays.
    assert errors[2] - errors[3] == pytest.approx(errors[0] - errors[1], rel=0.1)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"detail_channels": BASE + N}, f"detail_channels must be from 0 to {BASE + N - 1}"),
        ({"detail_channels": -1}, "detail_channels must be from 0"),
        ({"decoder_width": None}, "detail_channels must be from 0 to 0 beside this decoder_width, got 6"),
    ],
)
def test_numbers_that_cannot_be(changes, told):
    check_config(replace(MINI, vae=DETAILED))
    with pytest.raises(ModelError, match=told):
        check_config(replace(MINI, vae=replace(DETAILED, **changes)))


def test_an_autoencoder_of_several_levels_has_none():
    with pytest.raises(ValueError, match="detail_channels must come with one level and a decoder_width"):
        VAE(replace(DETAILED, decoder_width=None))
