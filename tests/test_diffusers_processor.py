"""CrossViewAttnProcessor in a real diffusers UNet, against a processor that regroups views around diffusers' own."""

import copy
import gc
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel, UNet3DConditionModel, UNetMotionModel, UNetSpatioTemporalConditionModel
from diffusers.models.attention_processor import Attention, AttnProcessor2_0

from mvdream_fast.diffusers import CrossViewAttnProcessor


class Regrouping:
    """diffusers' attention on the tokens of all views laid end to end: the independent reference."""

    def __init__(self, n_views):
        self.n_views, self.plain = n_views, AttnProcessor2_0()

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None, **kwargs):
        if encoder_hidden_states is not None:
            return self.plain(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        images, tokens, width = hidden_states.shape
        rows = hidden_states.reshape(images // self.n_views, self.n_views * tokens, width)
        return self.plain(attn, rows, None, attention_mask, temb).reshape(images, tokens, width)


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=12,
        attention_head_dim=8,
        norm_num_groups=8,
    )


def step(unet, processor, text_mask=None):
    """The UNet's output for two scenes of four views, and every gradient."""
    unet.set_attn_processor(processor)
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(8, 4, 8, 8, generator=generator).requires_grad_()
    text = torch.randn(8, 5, 12, generator=generator).requires_grad_()
    out = unet(latents, 7, text, encoder_attention_mask=text_mask).sample
    d_out = torch.randn(out.shape, generator=generator)
    wanted = [latents, text, *unet.parameters()]
    return out, torch.autograd.grad(out, wanted, d_out)


@pytest.mark.parametrize("n_views", [1, 2, 4, 8])
def test_matches_regrouping_around_diffusers_own_attention(unet, n_views):
    out, grads = step(unet, CrossViewAttnProcessor(n_views))
    expected, expected_grads = step(unet, Regrouping(n_views))
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    for g, e in zip(grads, expected_grads):
        torch.testing.assert_close(g, e, atol=2e-5, rtol=1e-4)  # sums over all tokens of the weights' gradients


def test_one_view_is_diffusers_itself_and_four_views_see_each_other(unet):
    plain, _ = step(unet, AttnProcessor2_0())
    torch.testing.assert_close(step(unet, CrossViewAttnProcessor(1))[0], plain, atol=1e-5, rtol=1e-5)
    assert (step(unet, CrossViewAttnProcessor(4))[0] - plain).abs().max() > 1e-3


def test_the_readme_s_example_makes_a_unet_multi_view(unet):
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    (example,) = (block for block in readme.split("```python\n")[1:] if "set_attn_processor" in block.split("```")[0])
    unet.set_attn_processor(AttnProcessor2_0())
    exec(example.split("```")[0], {"unet": unet})
    assert {(type(p), p.n_views) for p in unet.attn_processors.values()} == {(CrossViewAttnProcessor, 4)}


@pytest.mark.parametrize("call", ["fuse_qkv_projections", "set_attention_slice"])
def test_what_replaces_it_is_said(unet, call):
    """README and docstring say that these put other processors in its place, and they do."""
    own = copy.deepcopy(unet)
    own.set_attn_processor(CrossViewAttnProcessor(4))
    getattr(own, call)(*["max"] * (call == "set_attention_slice"))
    assert not any(isinstance(p, CrossViewAttnProcessor) for p in own.attn_processors.values())
    for text in ((Path(__file__).parent.parent / "README.md").read_text(), CrossViewAttnProcessor.__doc__):
        assert f"`{call}()`" in text


SMALL = {"sample_size": 8, "block_out_channels": (16, 32), "layers_per_block": 1, "cross_attention_dim": 12}


def video_unet(kind):
    """A small UNet with layers over time, the arguments of a call on 2 scenes of 4 frames, and these layers' names."""
    torch.manual_seed(0)
    draw = torch.Generator().manual_seed(1)
    latents = torch.randn(2, 4, 4, 8, 8, generator=draw)
    if kind == "spatio-temporal":  # frames before channels, one row of text a scene, three more numbers
        net = UNetSpatioTemporalConditionModel(
            **SMALL | {"block_out_channels": (32, 64)}, in_channels=4, num_attention_heads=(2, 2),
            addition_time_embed_dim=4, projection_class_embeddings_input_dim=12, num_frames=4,
            down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
            up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        )  # fmt: skip
        call = (latents.transpose(1, 2), 7, torch.randn(2, 1, 12, generator=draw), torch.ones(2, 3))
        return net, call, ("temporal_transformer_blocks",)
    blocks = [f"{name}{'3D' if kind == '3d' else 'Motion'}" for name in
              ("CrossAttnDownBlock", "DownBlock", "UpBlock", "CrossAttnUpBlock")]  # fmt: skip
    net = {"3d": UNet3DConditionModel, "motion": UNetMotionModel}[kind](
        **SMALL, norm_num_groups=8, down_block_types=blocks[:2], up_block_types=blocks[2:],
        **({"attention_head_dim": 8} if kind == "3d" else {"num_attention_heads": 2, "motion_num_attention_heads": 2}),
    )  # fmt: skip
    text = torch.randn(2 if kind == "3d" else 8, 5, 12, generator=draw)  # one a scene, or one a frame
    return net, (latents, 7, text), ("temp_attentions", "transformer_in", "motion_modules")


@pytest.mark.parametrize("kind", ["3d", "motion", "spatio-temporal"])
@torch.no_grad()
def test_layers_over_time_do_not_mix_pixels(kind):
    """Against the reference in the layers over space alone, chosen by their names; frames are the views."""
    net, call, over_time = video_unet(kind)
    names = net.attn_processors
    assert 0 < sum(any(part in name for part in over_time) for name in names) < len(names)
    plain = {name: AttnProcessor2_0() for name in names}
    net.set_attn_processor(dict(plain))
    untouched = net(*call).sample
    net.set_attn_processor(
        {name: plain[name] if any(part in name for part in over_time) else Regrouping(4) for name in names}
    )
    expected = net(*call).sample
    net.set_attn_processor(CrossViewAttnProcessor(4))
    torch.testing.assert_close(net(*call).sample, expected, atol=1e-5, rtol=1e-5)
    assert (expected - untouched).abs().max() > 1e-4


@pytest.mark.parametrize("kind", ["3d", "motion"])
@torch.no_grad()
def test_layers_over_time_that_the_collector_has_frozen(kind):
    """gc.get_objects() lists none of them: a network that isn't known yet is refused, a known one goes on, and so does
    one that is made afterwards."""
    net, call, _ = video_unet(kind)
    net.set_attn_processor(CrossViewAttnProcessor(4))
    expected = net(*call).sample
    frozen, _, _ = video_unet(kind)
    frozen.set_attn_processor(CrossViewAttnProcessor(4))
    gc.freeze()
    try:
        assert torch.equal(net(*call).sample, expected)
        with pytest.raises(
            RuntimeError, match="attn must be part of a network that gc lists, got one of before gc.freeze"
        ):
            frozen(*call)
        fresh, _, _ = video_unet(kind)
        fresh.set_attn_processor(CrossViewAttnProcessor(4))
        assert torch.equal(fresh(*call).sample, expected)
    finally:
        gc.unfreeze()
    assert torch.equal(frozen(*call).sample, expected)


def test_a_text_mask_is_obeyed(unet):
    mask = torch.tensor([[1, 1, 1, 0, 0]] * 8)
    out, _ = step(unet, CrossViewAttnProcessor(4), mask)
    torch.testing.assert_close(out, step(unet, Regrouping(4), mask)[0], atol=1e-5, rtol=1e-5)
    assert (out - step(unet, CrossViewAttnProcessor(4))[0]).abs().max() > 1e-4


def test_image_shaped_input_with_a_group_norm_and_a_residual():
    torch.manual_seed(0)
    attn = Attention(16, heads=2, dim_head=8, norm_num_groups=4, residual_connection=True, rescale_output_factor=2.0)
    x = torch.randn(4, 16, 3, 5)
    torch.testing.assert_close(CrossViewAttnProcessor(1)(attn, x), AttnProcessor2_0()(attn, x), atol=1e-5, rtol=1e-5)


def test_query_and_key_norms():
    torch.manual_seed(0)
    attn = Attention(16, heads=2, dim_head=8, qk_norm="layer_norm")
    x = torch.randn(4, 6, 16)
    torch.testing.assert_close(CrossViewAttnProcessor(1)(attn, x), AttnProcessor2_0()(attn, x), atol=1e-5, rtol=1e-5)


def test_compiles_to_one_graph():
    torch.manual_seed(0)
    attn = Attention(16, heads=2, dim_head=8, processor=CrossViewAttnProcessor(2))
    x = torch.randn(4, 6, 16)
    compiled = torch.compile(attn, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), attn(x), atol=1e-5, rtol=1e-5)


def test_bad_use():
    attn, x = Attention(16, heads=2, dim_head=8), torch.randn(4, 6, 16)
    with pytest.raises(ValueError, match="n_views must be at least 1, got 0"):
        CrossViewAttnProcessor(0)
    for wrong in ("4", 4.0, True, None, [4]):
        with pytest.raises(
            ValueError, match="CrossViewAttnProcessor: n_views must be a whole number, got .*; 1 is the"
        ):
            CrossViewAttnProcessor(wrong)
    assert CrossViewAttnProcessor(np.int64(4)).n_views == CrossViewAttnProcessor(torch.tensor(4)).n_views == 4
    with pytest.raises(ValueError, match="n_views must divide the batch of 4 images, got 3"):
        CrossViewAttnProcessor(3)(attn, x)
    with pytest.raises(ValueError, match="attention_mask must be None for self-attention"):
        CrossViewAttnProcessor(2)(attn, x, attention_mask=torch.zeros(4, 1, 6))
    with pytest.raises(ValueError, match="attn must attend to itself or to one text, got added keys and values"):
        CrossViewAttnProcessor(2)(Attention(16, heads=2, dim_head=8, added_kv_proj_dim=16), x)
    with pytest.raises(ValueError, match="attn must attend to itself or to one text"):
        CrossViewAttnProcessor(2)(attn, x, (x, [x]))
