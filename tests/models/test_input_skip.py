"""A UNet that adds its input to its output, each channel times a factor that the time decides."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from mvdream_fast.checkpoints.manifest import check_config
from mvdream_fast.core.errors import ModelError
from mvdream_fast.models.config import MINI, UNetConfig
from mvdream_fast.models.unet import MultiViewUNet
from mvdream_fast.ops.time_camera_embedding import sinusoid

PLAIN = UNetConfig(
    model_channels=32, channel_mult=(1, 2), num_res_blocks=1, attention_resolutions=(1, 2), num_head_channels=16,
    context_dim=24,
)  # fmt: skip
SKIPPING = dataclasses.replace(PLAIN, input_skip=True)
T = torch.tensor([3, 500, 3, 500, 999, 0])


@pytest.fixture(scope="module")
def pair() -> tuple[MultiViewUNet, MultiViewUNet]:
    """Without and with the skip; the weights that both have are the same, and none is zero."""
    torch.manual_seed(0)
    skipping, plain = MultiViewUNet(SKIPPING), MultiViewUNet(PLAIN)
    with torch.no_grad():
        for p in skipping.parameters():
            p.add_(0.05 * torch.randn(p.shape))
    plain.load_state_dict({name: x for name, x in skipping.state_dict().items() if "skip_scale" not in name})
    return plain, skipping


def inputs(batch: int = 6) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Latents, context of two scenes and their cameras."""
    g = torch.Generator().manual_seed(1)
    shapes = (batch, 4, 8, 8), (2, 5, 24), (batch, 16)
    latents, context, camera = (torch.randn(shape, generator=g) for shape in shapes)
    return latents, context, camera


def factors(unet: MultiViewUNet, camera: torch.Tensor | None) -> torch.Tensor:
    """[B*V, C] in plain torch."""
    told = unet.time_embed(sinusoid(T, 32))
    told = told if camera is None else told + unet.camera_embed(camera)
    return F.linear(F.silu(told), unet.skip_scale.weight, unet.skip_scale.bias)


@pytest.mark.parametrize("lean", [True, False])
@pytest.mark.parametrize("has_camera", [True, False])
def test_the_input_is_added(pair, lean, has_camera):
    plain, skipping = pair
    latents, context, camera = inputs()
    told = camera if has_camera else None
    with torch.set_grad_enabled(not lean):
        expected = plain(latents, T, context, told, 3) + factors(skipping, told)[:, :, None, None] * latents
        torch.testing.assert_close(skipping(latents, T, context, told, 3), expected, atol=1e-4, rtol=1e-4)


def test_of_several_prompts_each_gets_it(pair):
    latents, context, camera = inputs()
    both = torch.cat([context, -context])
    with torch.no_grad():
        out = pair[1](latents, T, both, camera, 3, 2)
        expected = [pair[1](latents, T, c, camera, 3) for c in both.chunk(2)]
    torch.testing.assert_close(out, torch.cat(expected), atol=1e-5, rtol=1e-5)


def test_it_learns(pair):
    latents, context, camera = inputs()
    pair[1](latents, T, context, camera, 3).square().sum().backward()
    assert pair[1].skip_scale.weight.grad.abs().max() > 0


def test_a_new_one_adds_nothing():
    unet = MultiViewUNet(SKIPPING)
    assert not unet.skip_scale.weight.any()
    assert not unet.skip_scale.bias.any()


def test_it_needs_as_many_channels_out_as_in():
    check_config(dataclasses.replace(MINI, unet=SKIPPING))
    with pytest.raises(ModelError, match="out_channels must be 4, as the input that is added to it, got 8"):
        check_config(dataclasses.replace(MINI, unet=dataclasses.replace(SKIPPING, out_channels=8)))
