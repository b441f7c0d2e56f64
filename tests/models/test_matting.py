"""What tells things from the backgrounds of decoded images: its numbers by hand, its place in the autoencoder."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from mvdream_fast.checkpoints.manifest import check_config
from mvdream_fast.core.errors import ModelError
from mvdream_fast.models.config import MINI
from mvdream_fast.models.matting import BEHIND, LEAST, SLOPE, Matte, Matting
from mvdream_fast.models.pixels import Pixels
from mvdream_fast.models.vae import VAE

CONFIG = replace(MINI.vae, decoder_matting=16, scale_factor=1.25, norm_num_groups=4)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random_weights(module: torch.nn.Module, spread: float = 0.1) -> None:
    for k, parameter in enumerate(module.parameters()):
        parameter.data = spread * noise(*parameter.shape, seed=k)


@pytest.fixture(scope="module")
def plain() -> VAE:
    torch.manual_seed(0)
    return VAE(replace(CONFIG, decoder_matting=None)).requires_grad_(False).eval()


@pytest.fixture
def matted(plain) -> VAE:
    vae = VAE(CONFIG)
    missing, unexpected = vae.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected
    assert {tuple(name.split(".")[:3]) for name in missing} == {("model", "decoder", "matting")}
    random_weights(vae.model.decoder.matting)
    return vae.requires_grad_(False).eval()


def test_an_image_is_its_foreground_before_its_background():
    foreground, alpha, background = noise(2, 3, 4, 4), torch.rand(2, 1, 4, 4), noise(2, 3, 1, 1, seed=1)
    wanted = alpha * foreground + (1 - alpha) * background
    torch.testing.assert_close(Matte(foreground, alpha, background).image, wanted)


def norm_silu(x, norm):
    groups = x.unflatten(1, (norm.num_groups, -1))
    mean, variance = groups.mean((2, 3, 4), keepdim=True), groups.var((2, 3, 4), keepdim=True, unbiased=False)
    x = ((groups - mean) / (variance + 1e-6).sqrt()).flatten(1, 2)
    return F.silu(x * norm.weight[:, None, None] + norm.bias[:, None, None])


def residuals(x, blocks):
    for block in blocks:
        h = F.conv2d(norm_silu(x, block.norm1), block.conv1.weight, block.conv1.bias, padding=1)
        x = x + F.conv2d(norm_silu(h, block.norm2), block.conv2.weight, block.conv2.bias, padding=1)
    return x


def by_hand(net: Matting, decoded, latents) -> Matte:
    """The network in plain torch, its levels of 32, 16 and 8 places a side written out."""
    ring = torch.ones(64, 64, dtype=torch.bool)
    ring[1:-1, 1:-1] = False
    corners = [decoded[..., a, b] for a in (0, -1) for b in (0, -1)]  # which lie on two sides
    border = torch.cat([decoded[..., ring], torch.stack(corners, -1)], -1).sort(-1).values
    away = torch.tanh(SLOPE * (decoded - border[..., (border.shape[-1] - 1) // 2, None, None]))
    x = F.conv2d(F.pixel_unshuffle(torch.cat([decoded, away], 1), 2), net.conv_in.weight, net.conv_in.bias, padding=1)
    fine = residuals(x, net.down[0])
    x = F.conv2d(fine, net.shrink[0].weight, net.shrink[0].bias, stride=2, padding=1)
    middling = residuals(x, net.down[1])
    x = F.conv2d(middling, net.shrink[1].weight, net.shrink[1].bias, stride=2, padding=1)
    x = residuals(x + F.conv2d(latents, net.latents_in.weight, net.latents_in.bias), net.middle)
    for level, skip in ((1, middling), (0, fine)):
        x = F.conv2d(x, net.grow[level].weight, net.grow[level].bias)
        x = residuals(x.repeat_interleave(2, 2).repeat_interleave(2, 3) + skip, net.up[level])
    out = F.pixel_shuffle(F.conv2d(norm_silu(x, net.norm_out), net.conv_out.weight, net.conv_out.bias, padding=1), 2)
    alpha = out[:, 3:].sigmoid()
    weight = (1 - alpha) ** BEHIND + LEAST
    background = (decoded * weight).sum((2, 3)) / weight.sum((2, 3))
    return Matte(decoded + out[:, :3], alpha, background[..., None, None])


def test_it_equals_plain_torch():
    net = Matting(16, CONFIG)
    random_weights(net)
    decoded, latents = noise(2, 3, 64, 64), noise(2, 24, 8, 8, seed=1)
    found, wanted = net(decoded, latents), by_hand(net, decoded, latents)
    assert wanted.alpha.std() > 0.01
    assert (wanted.foreground - decoded).std() > 0.01
    for name, a, b in zip(Matte._fields, found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4, msg=name)


def test_a_flat_image_has_its_own_background_whatever_alpha_says():
    net = Matting(16, CONFIG)
    random_weights(net, 0.5)
    found = net(torch.full((1, 3, 64, 64), 0.25), noise(1, 24, 8, 8))
    torch.testing.assert_close(found.background, torch.full((1, 3, 1, 1), 0.25))


def test_a_new_one_says_a_half_and_leaves_the_colours():
    decoded = noise(1, 3, 64, 64)
    matte = Matting(16, CONFIG)(decoded, noise(1, 24, 8, 8))
    assert torch.equal(matte.foreground, decoded)
    assert (matte.alpha == 0.5).all()


def test_every_weight_learns_and_so_does_what_is_before_it():
    net, decoded = Matting(16, CONFIG), noise(1, 3, 64, 64).requires_grad_()
    random_weights(net)
    latents = noise(1, 24, 8, 8).requires_grad_()
    net(decoded, latents).image.square().mean().backward()
    assert [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()] == []
    assert decoded.grad.any()
    assert latents.grad.any()


def test_an_autoencoder_with_it_decodes_to_the_mattes_image(plain, matted):
    z = noise(2, 24, 8, 8)
    assert torch.equal(matted.plain(z), plain.decode(z))
    assert torch.equal(matted.decode(z), matted.matte(z).image)
    assert torch.equal(matted.matte(z).alpha, matted.apart(plain.decode(z), z).alpha)
    assert not torch.allclose(matted.decode(z), plain.decode(z), atol=0.01)
    assert plain.matte(z) is None
    assert Pixels(replace(MINI.vae, kind="pixels", latent_channels=48, patch_size=4)).matte(z) is None


def test_it_goes_with_the_decoder(matted):
    half = VAE(CONFIG, decoder=False)
    assert half.state_dict().keys() == VAE(MINI.vae, decoder=False).state_dict().keys()
    assert half.matte(noise(1, 24, 8, 8)) is None
    with pytest.raises(RuntimeError, match="without its decoder"):
        half.decode(noise(1, 24, 8, 8))


@pytest.mark.parametrize(("patch", "n_levels"), [(4, 2), (8, 3), (16, 4)])
def test_it_goes_down_to_the_latents_whatever_their_size(patch, n_levels):
    net = Matting(8, replace(CONFIG, patch_size=patch))
    assert len(net.shrink) == n_levels - 1
    matte = net(noise(1, 3, 4 * patch, 8 * patch), noise(1, 24, 4, 8))
    assert matte.alpha.shape == (1, 1, 4 * patch, 8 * patch)


@pytest.mark.parametrize("patch", [1, 2, 6, 12])
def test_cells_that_it_cannot_reach_are_refused(patch):
    with pytest.raises(ValueError, match=f"down-sampling of 4, 8, 16, ..., got {patch}"):
        Matting(8, replace(CONFIG, patch_size=patch))


@pytest.mark.parametrize(("width", "told"), [(0, "decoder_matting must be from 1"), (36, "must be a divisor of 36 ch")])
def test_widths_that_cannot_be_are_refused(width, told):
    check_config(replace(MINI, vae=CONFIG))
    with pytest.raises(ModelError, match=told):
        check_config(replace(MINI, vae=replace(MINI.vae, decoder_matting=width)))
