"""The multi-view UNet against a plain reference and against diffusers, its properties, and what its caches survive."""

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from reference.diffusers_unet import RegroupProcessor, add_camera, diffusers_unet, load_ldm, to_diffusers
from reference.unet import ReferenceUNet
from torch import nn

from mvdream_fast.core.errors import ModelError
from mvdream_fast.models import functional as fn
from mvdream_fast.models.config import NAMED, UNetConfig
from mvdream_fast.models.unet import MultiViewUNet

SD21 = UNetConfig(model_channels=32, num_head_channels=16, context_dim=24)  # the released topology, narrow
SD15 = dataclasses.replace(SD21, num_heads=2, num_head_channels=None, use_linear_in_transformer=False)
SMALL = dataclasses.replace(SD21, channel_mult=(1, 2), num_res_blocks=1, attention_resolutions=(1, 2))
STEM = dataclasses.replace(SMALL, channel_mult=(2, 3))  # as the mini model: a first layer narrower than its level
TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}  # fp32, outputs of O(1): orders of summation differ
EXACT = {"atol": 1e-5, "rtol": 1e-5}  # the same sums, another order or batch; a Winograd convolution errs by 1e-5
TEXT = 5


def randomised(config: UNetConfig, seed: int = 0) -> MultiViewUNet:
    """No layer at zero, unlike a fresh model, and outputs of O(1)."""
    unet, generator = MultiViewUNet(config), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in unet.named_parameters():
            scale = p[0].numel() ** -0.5 if p.ndim > 1 else 0.1
            p.copy_(torch.randn(p.shape, generator=generator) * scale + (p.ndim == 1 and name.endswith("weight")))
    return unet


def inputs(config: UNetConfig, scenes: int, n_views: int, size: int = 8, seed: int = 1):
    """latents, t, context of each scene, camera."""
    generator, batch = torch.Generator().manual_seed(seed), scenes * n_views
    latents = torch.randn(batch, config.in_channels, size, size, generator=generator)
    t = torch.randint(0, 1000, (batch,), generator=generator)
    context = torch.randn(scenes, TEXT, config.context_dim, generator=generator)
    return latents, t, context, torch.randn(batch, config.camera_dim, generator=generator)


def gradients(model: nn.Module, out: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(2)))
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_gradients(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    """Equal names, and equal values relative to each gradient's size."""
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        size = theirs[name].abs().max().clamp(min=1.0)
        torch.testing.assert_close(
            gradient / size, theirs[name] / size, atol=1e-4, rtol=0, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.fixture(scope="module")
def small() -> MultiViewUNet:
    return randomised(SMALL)


@pytest.mark.parametrize(("name", "n_parameters"), [("sd21-4view", 867_572_164), ("sd15-4view", 861_182_404)])
def test_names_and_counts_are_those_of_the_released_models(name, n_parameters):
    with torch.device("meta"):
        state = MultiViewUNet(NAMED[name].unet).state_dict()
        expected = ReferenceUNet(NAMED[name].unet).state_dict()
        diffusers = diffusers_unet(NAMED[name].unet).state_dict()
    assert len(state) == 690
    assert sum(p.numel() for p in state.values()) == n_parameters
    shapes = {key: tuple(p.shape) for key, p in state.items()}
    assert shapes == {key: tuple(p.shape) for key, p in expected.items()}
    names = to_diffusers(state, NAMED[name].unet)
    assert {new: shapes[old] for old, new in names.items()} == {key: tuple(p.shape) for key, p in diffusers.items()}
    assert shapes["camera_embed.0.weight"] == (1280, 16)
    assert shapes["output_blocks.5.2.conv.weight"] == (1280, 1280, 3, 3)
    # What time_camera_embedding projects to in one product.
    assert sum(shape[0] for key, shape in shapes.items() if key.endswith("emb_layers.1.weight")) == 20_160


@pytest.mark.parametrize("n_views", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("lean", [False, True])
def test_any_number_of_views_equals_the_reference(small, n_views, lean):
    reference = ReferenceUNet(SMALL)
    reference.load_state_dict(small.state_dict())
    latents, t, context, camera = inputs(SMALL, 2, n_views)
    expected = reference(latents, t, context.repeat_interleave(n_views, 0), camera, n_views)
    with torch.set_grad_enabled(not lean):
        out = small(latents, t, context, camera, n_views)
    assert out.is_contiguous()
    assert 0.1 < expected.std() < 10
    torch.testing.assert_close(out, expected, **TOLERANCE)


@pytest.mark.parametrize("config", [SD21, SD15], ids=["sd21", "sd15"])
@pytest.mark.parametrize(("n_views", "with_camera"), [(4, True), (1, False)])
def test_released_topologies_equal_the_reference_with_gradients(config, n_views, with_camera):
    unet, reference = randomised(config), ReferenceUNet(config)
    reference.load_state_dict(unet.state_dict())
    latents, t, context, camera = inputs(config, 2, n_views)
    camera = camera if with_camera else None
    wide = context.repeat_interleave(n_views, 0)
    out, expected = unet(latents, t, context, camera, n_views), reference(latents, t, wide, camera, n_views)
    torch.testing.assert_close(out, expected, **TOLERANCE)
    with torch.no_grad():
        torch.testing.assert_close(unet(latents, t, context, camera, n_views), expected, **TOLERANCE)
    assert_gradients(gradients(unet, out), gradients(reference, expected))


@pytest.mark.parametrize(
    ("config", "n_views", "with_camera"), [(SD21, 4, True), (SD21, 1, False), (STEM, 2, True)], ids=["4", "2d", "stem"]
)
def test_equals_diffusers_with_gradients(config, n_views, with_camera):
    unet, latents_size = randomised(config), 16
    oracle = diffusers_unet(config, latents_size)
    load_ldm(oracle, unet.state_dict(), config)
    latents, t, context, camera = inputs(config, 2, n_views, latents_size)
    if n_views > 1:  # in 2D mode diffusers stays as it is published
        oracle.set_attn_processor(RegroupProcessor(n_views))
    camera = camera if with_camera else None
    add_camera(oracle, unet.camera_embed(camera) if with_camera else None)
    out = unet(latents, t, context, camera, n_views)
    expected = oracle(latents, t, context.repeat_interleave(n_views, 0)).sample
    torch.testing.assert_close(out, expected, **TOLERANCE)
    theirs = gradients(oracle, expected)
    ours = gradients(unet, out)
    names = to_diffusers(ours, config)
    assert_gradients({new: ours[old] for old, new in names.items()}, theirs)


@pytest.mark.parametrize("camera_in", ["time", "attention", "time+attention", "text", "none"])
@pytest.mark.parametrize("view_mixing", ["3d", "2d", "temporal"])
def test_options_equal_the_reference(camera_in, view_mixing):
    config = dataclasses.replace(SMALL, camera_in=camera_in, view_mixing=view_mixing)
    unet, reference = randomised(config), ReferenceUNet(config)
    reference.load_state_dict(unet.state_dict())
    latents, t, context, camera = inputs(config, 2, 3)
    for cam in (camera, None):
        expected = reference(latents, t, context.repeat_interleave(3, 0), cam, 3)
        torch.testing.assert_close(unet(latents, t, context, cam, 3), expected, **TOLERANCE)
        with torch.no_grad():
            prepared = unet.prepare_context(context)
            torch.testing.assert_close(unet(latents, t, prepared, cam, 3), expected, **TOLERANCE)
    with torch.no_grad():
        unaware = unet(latents, t, context, camera, 3) - unet(latents, t, context, camera + 1, 3)
    assert (unaware.abs().max() < 1e-6) == (camera_in == "none")


@pytest.mark.parametrize(
    "option", [{"camera_in": "attention"}, {"camera_in": "time+attention"}, {"view_mixing": "temporal"}], ids=str
)
def test_new_layers_of_an_option_start_as_the_identity(small, option):
    unet = MultiViewUNet(dataclasses.replace(SMALL, **option))
    missing, unexpected = unet.load_state_dict(small.state_dict(), strict=False)
    assert not unexpected
    assert all(("camera_vectors" in name) or ("_views" in name) for name in missing)
    base = dataclasses.replace(SMALL, view_mixing="2d") if "view_mixing" in option else SMALL
    plain = MultiViewUNet(base)
    plain.load_state_dict(small.state_dict())
    latents, t, context, camera = inputs(SMALL, 1, 3)
    given = None if option.get("camera_in") == "attention" else camera  # which does not add it to the time embedding
    torch.testing.assert_close(unet(latents, t, context, camera, 3), plain(latents, t, context, given, 3), **EXACT)


@torch.no_grad()
def test_permuting_views_with_their_cameras_permutes_outputs(small):
    latents, t, context, camera = inputs(SMALL, 1, 4)
    order = torch.tensor([2, 0, 3, 1])
    out = small(latents, t, context, camera, 4)
    torch.testing.assert_close(small(latents[order], t[order], context, camera[order], 4), out[order], **EXACT)


@torch.no_grad()
def test_scenes_of_a_batch_do_not_touch_each_other(small):
    latents, t, context, camera = inputs(SMALL, 2, 2)
    out = small(latents, t, context, camera, 2)
    latents[2:], t[2:], context[1:], camera[2:] = float("nan"), 7, float("nan"), float("nan")
    torch.testing.assert_close(small(latents, t, context, camera, 2)[:2], out[:2], atol=0, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("view_mixing", ["3d", "2d", "temporal"])
def test_views_of_a_scene_see_each_other_only_where_they_should(view_mixing):
    unet = randomised(dataclasses.replace(SMALL, view_mixing=view_mixing))
    latents, t, context, camera = inputs(SMALL, 1, 3)
    out = unet(latents, t, context, camera, 3)
    latents[2] += 1
    moved = (unet(latents, t, context, camera, 3) - out).abs().amax((1, 2, 3))
    assert moved[2] > 1e-2
    assert ((moved[:2] > 1e-4) == (view_mixing != "2d")).all()


@torch.no_grad()
def test_identical_views_attend_to_copies_of_themselves(small):
    """Softmax over V equal copies of the keys is softmax over one of them: each view gets what it would alone."""
    latents, t, context, camera = inputs(SMALL, 1, 1)
    alone = small(latents, t, context, camera, 1)
    four = small(latents.repeat(4, 1, 1, 1), t.repeat(4), context, camera.repeat(4, 1), 4)
    torch.testing.assert_close(four, alone.repeat(4, 1, 1, 1), **EXACT)
    other = camera.repeat(4, 1)
    other[3] += 1  # and one with another camera is seen by the three that are equal
    changed = small(latents.repeat(4, 1, 1, 1), t.repeat(4), context, other, 4)
    assert (changed[0] - alone[0]).abs().max() > 1e-4
    torch.testing.assert_close(changed[0], changed[2], **EXACT)


@torch.no_grad()
def test_every_form_of_context_and_step_is_the_same(small):
    latents, t, context, camera = inputs(SMALL, 2, 3)
    t = torch.full_like(t, 321)
    out = small(latents, t, context, camera, 3)
    wide = context.repeat_interleave(3, 0)
    for form in (wide, small.prepare_context(context), small.prepare_context(wide)):
        torch.testing.assert_close(small(latents, torch.tensor(321), form, camera, 3), out, **EXACT)


@pytest.mark.parametrize("camera_in", ["time", "attention", "time+attention", "text"])
@pytest.mark.parametrize("view_mixing", ["3d", "temporal"])
@pytest.mark.parametrize("lean", [False, True])
def test_several_prompts_equal_a_repeated_batch(camera_in, view_mixing, lean):
    unet = randomised(dataclasses.replace(SMALL, camera_in=camera_in, view_mixing=view_mixing))
    latents, t, context, camera = inputs(SMALL, 2, 2)
    context = torch.cat([context, -context])
    with torch.set_grad_enabled(not lean):
        expected = unet(latents.repeat(2, 1, 1, 1), t.repeat(2), context, camera.repeat(2, 1), 2)
        for form in (context, context.repeat_interleave(2, 0), unet.prepare_context(context)):
            torch.testing.assert_close(unet(latents, t, form, camera, 2, n_prompts=2), expected, **EXACT)


@torch.no_grad()
def test_nothing_given_is_written_to(small):
    given = inputs(SMALL, 1, 2)
    before = [x.clone() for x in given]
    small(*given, 2)
    for x, y in zip(given, before, strict=True):
        assert torch.equal(x, y)


@torch.no_grad()
@pytest.mark.parametrize("change", ["in place", "load", "assign", "optimiser", "dtype"])
def test_caches_follow_the_weights(change):
    """Text keys and packed projections: all filled, then every weight changes underneath."""
    unet, other = randomised(SMALL), randomised(SMALL, seed=9)
    latents, t, context, camera = inputs(SMALL, 1, 2)
    prepared = unet.prepare_context(context)
    before = unet(latents, t, prepared, camera, 2)
    if change == "in place":
        for p, q in zip(unet.parameters(), other.parameters(), strict=True):
            p.copy_(q)
    elif change == "optimiser":
        optimiser = torch.optim.SGD(unet.parameters(), lr=1.0)
        for p, q in zip(unet.parameters(), other.parameters(), strict=True):
            p.grad = p - q
        optimiser.step()
    elif change == "dtype":
        unet.double().load_state_dict(other.state_dict())
        unet.float()
    else:
        unet.load_state_dict(copy.deepcopy(other.state_dict()), assign=change == "assign")
    expected = other(latents, t, context, camera, 2)
    assert (before - expected).abs().max() > 0.1
    torch.testing.assert_close(unet(latents, t, prepared, camera, 2), expected, **EXACT)
    torch.testing.assert_close(unet(latents, t, prepared, camera, 2), expected, **EXACT)


@torch.no_grad()
def test_caches_follow_the_camera_and_the_text(small):
    latents, t, context, camera = inputs(SMALL, 1, 2)
    prepared = small.prepare_context(context)
    small(latents, t, prepared, camera, 2)
    camera.mul_(-1)
    context.mul_(-1)
    expected = small(latents, t, context.clone(), camera.clone(), 2)
    torch.testing.assert_close(small(latents, t, prepared, camera, 2), expected, **EXACT)


@torch.no_grad()
def test_caches_tell_views_of_one_tensor_apart(small):
    latents, t, context, camera = inputs(SMALL, 2, 2)
    small(latents, t, context, camera, 2)
    expected = small(latents[:2], t[:2], context[:1], camera[:2].clone(), 2)
    torch.testing.assert_close(small(latents[:2], t[:2], context[:1], camera[:2], 2), expected, **EXACT)


@torch.no_grad()
def test_a_switched_adapter_is_not_hidden_by_a_prepared_context():
    class Scaled(nn.Linear):
        scale = 1.0

        def forward(self, x):
            return self.scale * super().forward(x)

    unet = randomised(SMALL)
    for block in unet._text_blocks():
        block.attn2.to_v.__class__ = Scaled
    latents, t, context, camera = inputs(SMALL, 1, 2)
    prepared = unet.prepare_context(context)
    before = unet(latents, t, prepared, camera, 2)
    Scaled.scale = 3.0
    expected = unet(latents, t, context, camera, 2)
    assert (before - expected).abs().max() > 1e-2
    torch.testing.assert_close(unet(latents, t, prepared, camera, 2), expected, **EXACT)


def test_a_prepared_context_does_not_cut_gradients(small):
    latents, t, context, camera = inputs(SMALL, 1, 2)
    expected = gradients(small, small(latents, t, context, camera, 2))
    prepared = small.prepare_context(context)
    assert_gradients(gradients(small, small(latents, t, prepared, camera, 2)), expected)


def test_weights_packed_in_inference_mode_can_still_be_trained():
    unet = randomised(SMALL)
    given = inputs(SMALL, 1, 2)
    with torch.inference_mode():
        fast = unet(*given, 2)
    out = unet(*given, 2)
    torch.testing.assert_close(fast.clone(), out, **TOLERANCE)
    out.sum().backward()
    assert all(p.grad is not None for p in unet.parameters())


@torch.no_grad()
def test_packing_moves_weights_without_changing_them(tmp_path):
    from safetensors.torch import load_file, save_file

    unet = randomised(SMALL)
    before = {name: p.clone() for name, p in unet.state_dict().items()}
    parameters = dict(unet.named_parameters())
    unet(*inputs(SMALL, 1, 2), 2)
    attention = unet.middle_block[1].transformer_blocks[0].attn1
    assert attention.to_k.weight.data_ptr() == attention.to_q.weight.data_ptr() + attention.to_q.weight.nbytes
    assert all(parameters[name] is p for name, p in unet.named_parameters())
    save_file({name: p.contiguous() for name, p in unet.state_dict().items()}, tmp_path / "unet.safetensors")
    for name, p in load_file(tmp_path / "unet.safetensors").items():
        assert torch.equal(p, before[name])


def test_gradient_checkpointing_changes_no_gradient():
    unet = randomised(SMALL)
    given = inputs(SMALL, 1, 2)
    expected = gradients(unet, unet(*given, 2))
    unet.gradient_checkpointing = True
    assert_gradients(gradients(unet, unet(*given, 2)), expected)


@torch.no_grad()
def test_an_adapter_around_a_projection_is_used():
    class Doubled(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base, self.weight, self.bias = base, base.weight, base.bias

        def forward(self, x):
            return 2 * self.base(x)

    unet, expected = randomised(SMALL), randomised(SMALL)
    for model, wrap in ((unet, True), (expected, False)):
        block = model.middle_block[1].transformer_blocks[0]
        for owner, name in ((block.attn1, "to_v"), (block.attn2.to_out, "0"), (block.ff.net, "2")):
            layer = getattr(owner, name)
            if wrap:
                setattr(owner, name, Doubled(layer))
            else:
                for p in layer.parameters():
                    p.mul_(2)
    given = inputs(SMALL, 1, 2)
    torch.testing.assert_close(unet(*given, 2), expected(*given, 2), **EXACT)


# One of each way in which weights are read, not called: joined, added to, by products or Winograd, in blocks of rows.
READ = [
    "time_embed.2", "camera_embed.0", "input_blocks.1.0.emb_layers.1", "skip_scale", "input_blocks.0.0",
    "input_blocks.1.0.in_layers.0", "input_blocks.1.0.in_layers.2", "input_blocks.3.0.skip_connection",
    "middle_block.1.norm", "middle_block.1.proj_in", "middle_block.1.proj_out",
    "middle_block.1.transformer_blocks.0.attn1.to_q", "middle_block.1.transformer_blocks.0.attn1.to_out.0",
    "middle_block.1.transformer_blocks.0.attn2.to_k", "middle_block.1.transformer_blocks.0.ff.net.2",
    "middle_block.1.transformer_blocks.0.norm3", "output_blocks.1.2.conv", "out.0", "out.2",
]  # fmt: skip


def double_by_forward(layer: nn.Module):
    """As some LoRA libraries do it."""
    plain = layer.forward
    layer.forward = lambda x: 2 * plain(x)


def double_by_hook(layer: nn.Module):
    layer.register_forward_hook(lambda _layer, _given, out: 2 * out)


@torch.no_grad()
@pytest.mark.parametrize("double", [double_by_forward, double_by_hook])
@pytest.mark.parametrize("name", READ)
def test_a_hook_or_a_forward_of_its_own_is_used(name, double, monkeypatch):
    config = dataclasses.replace(SMALL, use_linear_in_transformer=False, input_skip=True)
    unet, expected = randomised(config), randomised(config)
    double(unet.get_submodule(name))
    for p in expected.get_submodule(name).parameters():
        p.mul_(2)
    latents, t, context, camera = inputs(config, 1, 2, 16)
    given = (latents, t, unet.prepare_context(context), camera, 2)
    monkeypatch.setattr(fn, "_GEMM_WEIGHTS", 0)
    wanted = expected(latents, t, context, camera, 2)
    size = wanted.abs().max()
    torch.testing.assert_close(unet(*given) / size, wanted / size, **EXACT)
    with torch.enable_grad():
        torch.testing.assert_close(unet(*given).detach() / size, wanted / size, **TOLERANCE)


def test_hooks_see_the_same_numbers_with_autograd_and_without():
    """Each layer with weights once, as images where it takes images; what a hook has kept is not overwritten."""
    config = dataclasses.replace(SMALL, use_linear_in_transformer=False, input_skip=True)
    unet, seen = randomised(config), {}
    leaves = {name: m for name, m in unet.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d, nn.GroupNorm))}
    for name, layer in leaves.items():
        layer.register_forward_hook(lambda _layer, _given, out, name=name: seen.setdefault(name, []).append(out))
    kept = []
    for grad in (True, False):
        seen.clear()
        with torch.set_grad_enabled(grad):
            unet(*inputs(config, 1, 2), 2)
        assert seen.keys() == leaves.keys()
        assert {len(outs) for outs in seen.values()} == {1}
        kept.append({name: outs[0].detach().clone() for name, outs in seen.items()})
    for name, layer in leaves.items():
        assert kept[0][name].ndim == (3 if isinstance(layer, nn.Linear) and ".attn" in name else kept[1][name].ndim)
        torch.testing.assert_close(kept[0][name], kept[1][name], **TOLERANCE)


@torch.no_grad()
@pytest.mark.parametrize(
    "changed",
    [{"padding_mode": "circular"}, {"groups": 2}, {"stride": 2}, {"dilation": 2, "padding": 2}, {"padding": 0}],
    ids=str,
)
def test_another_convolution_is_called_as_it_is(changed, monkeypatch):
    monkeypatch.setattr(fn, "_GEMM_WEIGHTS", 0)
    torch.manual_seed(0)
    conv = nn.Conv2d(32, 32, 3, **{"padding": 1, **changed}).to(memory_format=torch.channels_last)
    x = torch.randn(4, 32, 16, 16).contiguous(memory_format=torch.channels_last)
    assert torch.equal(fn.conv3x3(conv, x), conv(x))
    assert torch.equal(fn.upsample_conv(conv, x), conv(F.interpolate(x, scale_factor=2.0)))
    plain = nn.Conv2d(32, 32, 3, padding=1).to(memory_format=torch.channels_last)
    plain.padding_mode = "circular"  # set afterwards
    assert (fn.conv3x3(plain, x) - F.conv2d(x, plain.weight, plain.bias, padding=1)).abs().max() > 0.1


@torch.no_grad()
def test_a_hook_on_all_modules_is_used(small):
    given, seen = inputs(SMALL, 1, 2), []
    expected = small(*given, 2)
    handle = nn.modules.module.register_module_forward_hook(lambda layer, *_: seen.append(layer))
    try:
        out = small(*given, 2)
    finally:
        handle.remove()
    torch.testing.assert_close(out, expected, **EXACT)
    with_weights = [m for m in small.modules() if isinstance(m, (nn.Linear, nn.Conv2d, nn.GroupNorm, nn.LayerNorm))]
    assert not set(with_weights) - set(seen)


@torch.no_grad()
@pytest.mark.parametrize("name", ["time_embed.2", "camera_embed.0", "input_blocks.1.0.emb_layers.1"])
def test_an_adapter_around_a_layer_of_the_embeddings_is_used(name):
    unet, expected = randomised(SMALL), randomised(SMALL)
    parent, _, key = name.rpartition(".")
    layer = unet.get_submodule(name)
    unet.get_submodule(parent)[int(key)] = nn.Sequential(layer, nn.Dropout(0.0))
    given = inputs(SMALL, 1, 2)
    torch.testing.assert_close(unet(*given, 2), expected(*given, 2), **EXACT)
    layer.weight.mul_(2)
    expected.get_submodule(name).weight.mul_(2)
    torch.testing.assert_close(unet(*given, 2), expected(*given, 2), **EXACT)


@torch.no_grad()
@pytest.mark.parametrize("camera_in", ["time", "text"])
def test_writes_that_no_version_counts_reach_the_camera_embedding(camera_in):
    """As an average of weights is copied into a model: `parameter.data.copy_`."""
    config = dataclasses.replace(SMALL, camera_in=camera_in)
    unet, other = randomised(config), randomised(config, seed=9)
    given = inputs(config, 1, 2)
    before = unet(*given, 2)
    for p, q in zip(unet.parameters(), other.parameters(), strict=True):
        p.data.copy_(q.data)
    expected = other(*given, 2)
    assert (before - expected).abs().max() > 0.1
    torch.testing.assert_close(unet(*given, 2), expected, **EXACT)


@torch.no_grad()
@pytest.mark.parametrize("autocast", [True, False])
def test_bfloat16_stays_near_float32(autocast):
    unet = randomised(SMALL)
    latents, t, context, camera = inputs(SMALL, 1, 2)
    expected = unet(latents, t, context, camera, 2)
    if autocast:
        with torch.autocast("cpu", torch.bfloat16):
            out = unet(latents, t, context, camera, 2)
            prepared = unet(latents, t, unet.prepare_context(context), camera, 2)
        torch.testing.assert_close(prepared, out, atol=0, rtol=0)
    else:
        out = unet.bfloat16()(latents.bfloat16(), t, context.bfloat16(), camera, 2)
    assert out.dtype == torch.bfloat16
    # bfloat16 keeps 8 bits: 2**-8 an operation, grown through about 30 layers.
    assert (out.float() - expected).square().mean().sqrt() < 0.05 * expected.std()


@torch.no_grad()
@pytest.mark.parametrize("shape", [(2, 6, 4, 4), (3, 5, 5, 3), (1, 4, 1, 1), (0, 4, 4, 4)])
@pytest.mark.parametrize("n_out", [3, 64, 400])
@pytest.mark.parametrize("bias", [True, False])
def test_convolutions_by_products_equal_torch(shape, n_out, bias, monkeypatch):
    monkeypatch.setattr(fn, "_GEMM_WEIGHTS", 0)
    conv = nn.Conv2d(shape[1], n_out, 3, padding=1, bias=bias)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    for memory_format in (torch.contiguous_format, torch.channels_last):
        conv, x = conv.to(memory_format=memory_format), x.contiguous(memory_format=memory_format)
        torch.testing.assert_close(fn.conv3x3(conv, x), conv(x), **EXACT)
        big = conv(F.interpolate(x, scale_factor=2.0)) if len(x) else x.new_zeros(0, n_out, 2 * shape[2], 2 * shape[3])
        torch.testing.assert_close(fn.upsample_conv(conv, x), big, **EXACT)


@torch.no_grad()
def test_large_feed_forward_in_blocks_of_rows(small, monkeypatch):
    given = inputs(SMALL, 1, 3)
    expected = small(*given, 3)
    monkeypatch.setattr(fn, "_FEED_FORWARD_ROWS", 37)
    torch.testing.assert_close(small(*given, 3), expected, **EXACT)


def test_a_copied_model_owns_its_weights(small):
    with torch.no_grad():
        small(*inputs(SMALL, 1, 2), 2)
        twin = copy.deepcopy(small)
        expected = twin(*inputs(SMALL, 1, 2), 2)
        for p in twin.parameters():
            p.zero_()
        torch.testing.assert_close(small(*inputs(SMALL, 1, 2), 2), expected, **EXACT)
        assert twin(*inputs(SMALL, 1, 2), 2).abs().max() == 0


def call(unet, **changes):
    latents, t, context, camera = inputs(SMALL, 2, 2)
    given = {"latents": latents, "t": t, "context": context, "camera": camera, "n_views": 2}
    return unet(**{**given, **changes})


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"n_views": 3}, ValueError, "n_views must be a divisor of the batch of 4, got 3; views are the fastest"),
        ({"n_views": 0}, ValueError, "n_views must be a divisor"),
        ({"camera": torch.zeros(2, 16)}, ValueError, r"camera must be \[4, 16\], got \(2, 16\); one flattened camera"),
        ({"camera": torch.zeros(4, 4, 4)}, ValueError, r"camera must be \[4, 16\], got \(4, 4, 4\)"),
        ({"latents": torch.zeros(4, 3, 8, 8)}, ValueError, r"latents must be \[B\*V, 4, h, w\], got \(4, 3, 8, 8\)"),
        ({"latents": torch.zeros(4, 4, 8)}, ValueError, "latents must be"),
        ({"latents": torch.zeros(4, 4, 7, 8)}, ValueError, r"divisible by 2, got \(7, 8\); pad or crop"),
        ({"latents": torch.zeros(4, 4, 8, 8).double()}, TypeError, "latents must be torch.float32 as the weights"),
        ({"context": torch.zeros(2, 5, 25)}, ValueError, r"context must be \[2 or 4, L, 24\], got \(2, 5, 25\)"),
        ({"context": torch.zeros(3, 5, 24)}, ValueError, r"context must be \[2 or 4, L, 24\], got \(3, 5, 24\)"),
        ({"context": torch.zeros(2, 5, 24), "n_prompts": 2}, ValueError, r"context must be \[4 or 8, L, 24\]"),
        ({"n_prompts": 0}, ValueError, "n_prompts must be at least 1, got 0"),
        ({"t": torch.zeros(3)}, ValueError, r"t must be a scalar or \[4\], got \(3,\)"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(small, changes, error, message):
    with pytest.raises(error, match="^MultiViewUNet: .*" + message):
        call(small, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 4}, "exactly one of num_heads and num_head_channels must be set"),
        ({"num_head_channels": None}, "exactly one of"),
        ({"num_head_channels": 24}, "num_head_channels must divide the 32 channels of a level, got 24"),
        ({"norm_groups": 7}, "norm_groups must divide the 32 channels of a level, got 7"),
    ],
    ids=str,
)
def test_bad_configurations_are_named(changes, message):
    with pytest.raises(ModelError, match=message):
        MultiViewUNet(dataclasses.replace(SMALL, **changes))


@torch.no_grad()
def test_compiles_to_one_graph():
    unet = randomised(dataclasses.replace(SMALL, attention_resolutions=(2,)))
    given = inputs(SMALL, 1, 2)
    compiled = torch.compile(unet, fullgraph=True, backend="aot_eager")  # no code generation: this is about the graph
    torch.testing.assert_close(compiled(*given, 2), unet(*given, 2), **TOLERANCE)
