"""The VAE against LDM's autoencoder in plain torch, through a released file's names; scale, noise and shape rules."""

import copy
from dataclasses import replace

import pytest
import torch
from reference import upstream
from reference import vae as reference

from mvdream_fast.checkpoints.layouts import released
from mvdream_fast.models import functional
from mvdream_fast.models import vae as vae_module
from mvdream_fast.models.config import MINI, VAEConfig
from mvdream_fast.models.vae import VAE

TINY = VAEConfig(block_out_channels=(32, 64), layers_per_block=2)


@pytest.fixture(scope="module")
def state() -> dict:
    return upstream.random(upstream.vae(upstream.NARROW21))


@pytest.fixture(scope="module")
def vae(state) -> VAE:
    from mvdream_fast.models.config import SD21

    module = VAE(TINY)
    slots = released("vae", replace(SD21, vae=TINY), ()).slots
    own = {name: state[slot.name.removeprefix("first_stage_model.")] for name, slot in slots.items()}
    own = {name: x.reshape(module.model.state_dict()[name].shape) for name, x in own.items()}
    module.model.load_state_dict(own)
    return module.requires_grad_(False).eval()


def images(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize("size", [(32, 32), (30, 46)])
def test_encode_equals_ldm(vae, state, size):
    x, noise = images(2, 3, *size), torch.randn(2, 4, size[0] // 2, size[1] // 2)
    expected = reference.encode(state, x, noise)
    assert expected.std() > 0.05
    torch.testing.assert_close(vae.encode(x, noise), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [(16, 16), (9, 21)])
def test_decode_equals_ldm(vae, state, size):
    z = torch.randn(2, 4, *size, generator=torch.Generator().manual_seed(2))
    expected = reference.decode(state, z)
    assert 0.1 < expected.std() < 10
    torch.testing.assert_close(vae.decode(z), expected, rtol=1e-4, atol=1e-4)


def test_gradient_of_the_encoder_equals_ldm(vae, state):
    x, noise = images(1, 3, 16, 16), torch.randn(1, 4, 8, 8)
    cotangent = torch.randn(1, 4, 8, 8)
    grads = []
    for encode in (vae.encode, lambda x, noise: reference.encode(state, x, noise)):
        leaf = x.clone().requires_grad_()
        (encode(leaf, noise) * cotangent).sum().backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-3, atol=1e-4)


def test_mean_without_noise_and_sample_with_it(vae):
    x = images(1, 3, 16, 16)
    mean, logvar = vae.posterior(x)
    noise = torch.randn(mean.shape)
    assert torch.equal(vae.encode(x), mean * 0.18215)
    torch.testing.assert_close(vae.encode(x, noise), (mean + (logvar / 2).exp() * noise) * 0.18215)


def test_logvar_is_clamped(vae):
    biases = vae.model.quant_conv.bias
    before = biases.clone()
    try:
        biases[4:6], biases[6:] = 1e4, -1e4
        _, logvar = vae.posterior(images(1, 3, 8, 8))
        assert logvar[:, :2].eq(20).all()
        assert logvar[:, 2:].eq(-30).all()
    finally:
        biases.copy_(before)


def test_encoder_only_has_no_decoder_and_equal_latents(vae):
    half = VAE(TINY, decoder=False)
    half.model.load_state_dict({n: x for n, x in vae.model.state_dict().items() if not n.startswith(("dec", "post"))})
    assert not any(name.startswith(("decoder", "post_quant")) for name in half.model.state_dict())
    x = images(1, 3, 16, 16)
    assert torch.equal(half.requires_grad_(False).encode(x), vae.encode(x))
    with pytest.raises(RuntimeError, match="without its decoder"):
        half.decode(torch.zeros(1, 4, 8, 8))


def test_weights_are_channels_last(vae):
    weight = vae.model.encoder.down_blocks[0].resnets[0].conv1.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)


def test_mini_has_24_channels_and_no_attention():
    vae = VAE(MINI.vae)
    assert not any("attentions" in name for name in vae.model.state_dict())
    z = vae.encode(images(1, 3, 64, 64))
    assert z.shape == (1, 24, 8, 8)
    assert vae.decode(z).shape == (1, 3, 64, 64)


def test_a_wide_decoder_leaves_the_encoder():
    config = replace(MINI.vae, decoder_width=160)
    wide, plain = VAE(config), VAE(replace(MINI.vae, decoder_width=None))
    assert wide.model.encoder.conv_in.weight.shape == plain.model.encoder.conv_in.weight.shape
    assert wide.model.decoder.conv_out.in_channels == 160
    assert wide.decode(wide.encode(images(1, 3, 64, 64))).shape == (1, 3, 64, 64)
    with pytest.raises(ValueError, match="decoder_width must be None with 2 levels, got 160"):
        VAE(replace(config, block_out_channels=(32, 64)))


CLEANING = replace(MINI.vae, decoder_cleaner=32, scale_factor=1.25)


@pytest.fixture(scope="module")
def plain() -> VAE:
    torch.manual_seed(0)
    return VAE(replace(CLEANING, decoder_cleaner=None)).requires_grad_(False).eval()


def with_cleaner(plain: VAE, spread: float = 0.0) -> VAE:
    """The same autoencoder with a cleaner; with a spread, all of its weights are random."""
    vae = VAE(CLEANING)
    missing, unexpected = vae.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected
    assert {name.split(".")[:3] == ["model", "decoder", "cleaner"] for name in missing} == {True}
    g = torch.Generator().manual_seed(5)
    for parameter in vae.cleaner.parameters() if spread else ():
        parameter.data = spread * torch.randn(parameter.shape, generator=g)
    return vae.requires_grad_(False).eval()


def test_a_new_cleaner_changes_nothing(plain):
    z = torch.randn(2, 24, 8, 8, generator=torch.Generator().manual_seed(1))
    assert plain.cleaner is None
    assert plain.cleaned(z) is z
    assert torch.equal(with_cleaner(plain).cleaned(z), z)
    assert torch.equal(with_cleaner(plain).decode(z), plain.decode(z))


def test_a_cleaner_leaves_the_encoder_and_goes_with_the_decoder(plain):
    x = images(1, 3, 64, 64)
    vae = with_cleaner(plain, 0.2)
    assert torch.equal(vae.encode(x), plain.encode(x))
    z = plain.encode(x)
    torch.testing.assert_close(vae.decode(z), plain.decode(vae.cleaned(z)), rtol=0, atol=0)
    assert not torch.allclose(vae.decode(z), plain.decode(z), atol=0.01)
    half = VAE(CLEANING, decoder=False)
    assert half.state_dict().keys() == VAE(MINI.vae, decoder=False).state_dict().keys()


def norm_silu(x, norm):
    """GroupNorm of x [B, C, h, w] by hand, and the SiLU."""
    groups = x.unflatten(1, (norm.num_groups, -1))
    mean, variance = groups.mean((2, 3, 4), keepdim=True), groups.var((2, 3, 4), keepdim=True, unbiased=False)
    x = ((groups - mean) / (variance + 1e-6).sqrt()).flatten(1, 2)
    x = x * norm.weight[:, None, None] + norm.bias[:, None, None]
    return x * x.sigmoid()


def conv(x, layer):
    return torch.nn.functional.conv2d(x, layer.weight, layer.bias, padding=1)


@pytest.mark.parametrize("size", [(8, 8), (5, 7)])
def test_a_cleaner_equals_plain_torch(plain, size):
    """Of an even number of cells the median is the lower of the two in the middle."""
    vae, z = with_cleaner(plain, 0.2), torch.randn(2, 24, *size, generator=torch.Generator().manual_seed(2))
    cleaner = vae.cleaner
    rows = z.flatten(2).sort(dim=2).values
    away = z - rows[:, :, (rows.shape[2] - 1) // 2, None, None]
    x = conv(torch.cat([z, (2.5 * away).tanh(), (8 * away).tanh()], dim=1), cleaner.conv_in)
    assert len(cleaner.blocks) == 2
    for block in cleaner.blocks:
        h = conv(norm_silu(x, block.norm1), block.conv1)
        x = x + conv(norm_silu(h, block.norm2), block.conv2)
    added = conv(norm_silu(x, cleaner.norm_out), cleaner.conv_out)
    assert added.std() > 0.1
    torch.testing.assert_close(vae.cleaned(z), z + added, rtol=1e-4, atol=1e-4)


def test_every_weight_of_a_cleaner_learns_and_so_does_what_is_before_it(plain):
    vae, z = with_cleaner(plain, 0.2), torch.randn(1, 24, 8, 8).requires_grad_()
    vae.cleaner.requires_grad_(True)
    vae.cleaned(z).square().mean().backward()
    assert [name for name, p in vae.cleaner.named_parameters() if p.grad is None or not p.grad.any()] == []
    assert z.grad.abs().min() > 0


def test_wrong_shapes(vae):
    with pytest.raises(
        ValueError, match=r"VAE.encode: images must be \[B, 3, Hp, Wp\].*multiples of 2, got \(1, 3, 15"
    ):
        vae.encode(torch.zeros(1, 3, 15, 16))
    with pytest.raises(ValueError, match="VAE.encode: noise must be"):
        vae.encode(torch.zeros(1, 3, 16, 16), torch.zeros(1, 4, 1, 1))
    with pytest.raises(ValueError, match=r"VAE.decode: latents must be \[B, 4, h, w\]"):
        vae.decode(torch.zeros(1, 3, 8, 8))


def test_a_shift_is_taken_off_before_the_scale():
    """diffusers' order: latents = (sample - shift) * scale, and back."""
    config = VAEConfig(
        block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, mid_block_add_attention=False, image_size=16
    )
    plain, shifted = VAE(config), VAE(replace(config, shift_factor=0.5, scale_factor=0.25))
    shifted.load_state_dict(plain.state_dict())
    images, noise = torch.rand(2, 3, 16, 16) * 2 - 1, torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        sample = plain.encode(images, noise) / config.scale_factor
        latents = shifted.encode(images, noise)
        torch.testing.assert_close(latents, (sample - 0.5) * 0.25)
        torch.testing.assert_close(shifted.decode(latents), plain.decode(sample * config.scale_factor))
    assert torch.equal(shifted.scaled(torch.tensor([0.5, 1.5])), torch.tensor([0.0, 0.25]))


@pytest.fixture
def fused(monkeypatch):
    """Norms and the SiLU after them as our op, as on a GPU, in the CPU's bodies of it."""
    calls, plain = [], functional.group_norm_silu
    monkeypatch.setattr(vae_module, "fuses", lambda x: True)
    monkeypatch.setattr(functional, "group_norm_silu", lambda *args: calls.append(args[6]) or plain(*args))
    return calls


def test_fused_norms_change_nothing_but_rounding(vae, monkeypatch):
    x, cotangent = images(2, 3, 16, 16), torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    z = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(4))

    def run():
        leaf = x.clone().requires_grad_()
        latents = vae.encode(leaf)
        return latents.detach(), torch.autograd.grad(latents, leaf, cotangent)[0], vae.decode(z)

    expected = run()
    with monkeypatch.context() as patch:
        patch.setattr(vae_module, "fuses", lambda x: True)
        for name, found, wanted in zip(("latents", "gradient", "images"), run(), expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5 * wanted.abs().max().item(), msg=name)


def test_every_norm_is_fused_with_the_silu_behind_it(vae, fused):
    """TINY's encoder: two norms in each of 2 levels x 2 and 2 middle blocks, one in attention, one before the end."""
    vae.encode(images(1, 3, 16, 16))
    assert sorted(fused) == [False] + [True] * (2 * 4 + 2 * 2 + 1)


def test_norms_of_a_cleaner_are_fused_too(plain, monkeypatch, fused):
    """Two in each of its two blocks, and one before the end."""
    vae, z = with_cleaner(plain, 0.2), torch.randn(1, 24, 8, 8, generator=torch.Generator().manual_seed(4))
    found = vae.cleaned(z)
    assert fused == [True] * 5
    monkeypatch.setattr(vae_module, "fuses", lambda x: False)
    torch.testing.assert_close(found, vae.cleaned(z), rtol=1e-4, atol=1e-4)


def test_norms_on_a_cpu_are_diffusers_own(vae, monkeypatch):
    monkeypatch.setattr(functional, "group_norm_silu", None)
    vae.decode(vae.encode(images(1, 3, 16, 16)))


def test_an_encoder_in_bfloat16_gives_float32_latents_near_the_exact_ones(vae):
    half = copy.deepcopy(vae)
    half.encode_in(torch.bfloat16)
    half_layers = {name.split(".")[2] for name, p in half.named_parameters() if p.dtype == torch.bfloat16}
    assert half_layers == {"conv_in", "down_blocks", "mid_block"}
    rest = {p.dtype for part in (half.model.decoder, half.model.quant_conv) for p in part.parameters()}
    assert rest == {torch.float32}
    x = images(2, 3, 32, 32).requires_grad_()
    exact, found = vae.encode(x), half.encode(x)
    assert found.dtype == torch.float32
    cotangent = torch.randn(exact.shape, generator=torch.Generator().manual_seed(3))
    (wanted,), (gradient,) = (torch.autograd.grad(latents, x, cotangent) for latents in (exact, found))
    assert gradient.dtype == torch.float32
    assert 1e-3 < (found - exact).std() / exact.std() < 0.03  # 8 bits, through some thirty layers
    assert (gradient - wanted).std() / wanted.std() < 0.06
    z = torch.randn(1, 4, 8, 8)
    assert torch.equal(half.decode(z), vae.decode(z))
