"""ops.sds_target: reference numbers, registered form and Triton kernels."""

import random

import pytest
import torch
from tolerances import close, within_flash_rule
from triton_on_cpu import CAMPAIGN, DEVICE, DRAWN

from mvdream_fast.ops import sds_target, sds_target_ref

OP = "sds_target"


def draw(shape=(8, 4, 3, 5), *, dtype=torch.float32, seed=0, per_image=False, strided=False, device="cpu"):
    """z, z_t, both predictions, the noise, and abar."""
    generator = torch.Generator().manual_seed(seed)
    images, *rest = shape
    tensors = [torch.randn(images, *rest, generator=generator) for _ in range(5)]
    if strided:
        tensors = [x.to(memory_format=torch.channels_last) for x in tensors]
    abar = torch.rand(images if per_image else 1, generator=generator) * 0.9 + 0.05
    return [x.to(device).to(dtype) for x in tensors] + [abar.to(device)]


def by_kernels(*arguments):
    from mvdream_fast.kernels import sds_target as kernels

    return kernels.forward(*arguments)


def test_worked_by_hand():
    # abar = 1/4: x0(o) = 2 z_t - sqrt(3) o. One scene of one view with two values; guidance 2 doubles c (u = 0).
    z, z_t = torch.tensor([1.0, 1.0]), torch.tensor([1.0, 2.0])
    cond = torch.tensor([1.0, -1.0]) / 3**0.5
    z, z_t, cond = (x.reshape(1, 1, 1, 2) for x in (z, z_t, cond))
    abar, zero = torch.tensor(0.25), torch.zeros(1, 1, 1, 2)
    # x0(c) = (1, 5), std 4/sqrt 2; x0(m) = (0, 6), std 6/sqrt 2; f = 2/3; half of it: factor 5/6.
    target, gradient = sds_target(z, z_t, cond, zero, None, abar, 2.0, "eps", 0.5, "x0", 1)
    assert target.flatten().tolist() == pytest.approx([0.0, 5.0], abs=1e-6)
    assert gradient.flatten().tolist() == pytest.approx([1.0, -4.0], abs=1e-6)
    # "sds": (1 - abar) (2 c - noise) with noise 1
    target, gradient = sds_target(z, z_t, cond, zero, zero + 1, abar, 2.0, "eps", 0.5, "sds", 1)
    assert gradient.flatten().tolist() == pytest.approx([0.75 * (2 / 3**0.5 - 1), 0.75 * (-2 / 3**0.5 - 1)])
    assert target.flatten().tolist() == pytest.approx((1 - gradient).flatten().tolist())
    # v: x0 = z_t / 2 - sqrt(3)/2 v, without rescaling
    target, _ = sds_target(z, z_t, cond, zero, None, abar, 1.0, "v", 0.0, "x0", 1)
    assert target.flatten().tolist() == pytest.approx([0.0, 1.5], abs=1e-6)


@pytest.mark.parametrize("function", [sds_target, sds_target_ref])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (1, 1, 1, 1), (1,) * 5])
def test_one_element_is_one_of_any_shape(function, shape):
    *tensors, abar = draw()
    wanted = function(*tensors, abar, 7.5, mode="sds", grad_clip=torch.tensor(0.5))
    got = function(*tensors, abar.reshape(shape), 7.5, mode="sds", grad_clip=torch.full(shape, 0.5))
    assert all(torch.equal(a, b) for a, b in zip(got, wanted))


BY_WEIGHTING = {"sds": 0.75, "uniform": 1.0, "fantasia3d": 0.375}  # abar = 1/4: 1 - abar, 1, sqrt(abar) (1 - abar)


@pytest.mark.parametrize("function", [sds_target, by_kernels])
@pytest.mark.parametrize(("weighting", "weight"), BY_WEIGHTING.items())
def test_weights_and_limits_by_hand(function, weighting, weight):
    # Two images of one value. m = u + 3 (c - u) = 4 and 0.5; the noise is 1 and 1: eps(m) - noise = 3 and -0.5.
    z, cond, uncond, noise = ([2.0, 3.0], [2.0, 0.5], [1.0, 0.5], [1.0, 1.0])
    z, cond, uncond, noise = (torch.tensor(x, device=DEVICE).reshape(2, 1, 1, 1) for x in (z, cond, uncond, noise))
    abar = torch.tensor([0.25], device=DEVICE)
    settings = (3.0, "eps", 0.5, "sds", 1, weighting)
    target, gradient = function(z, z, cond, uncond, noise, abar, *settings)
    assert gradient.flatten().tolist() == pytest.approx([weight * 3 / 2, weight * -0.5 / 2])  # over two images
    assert target.flatten().tolist() == pytest.approx([2 - weight * 3, 3 + weight * 0.5])
    # A limit of 0.25 holds weight * 3 for all weights, and of the others but 0.375 * 0.5 = 0.1875.
    limit = torch.tensor(0.25, device=DEVICE)
    target, gradient = function(z, z, cond, uncond, noise, abar, *settings, limit)
    second = -min(0.25, weight * 0.5)
    assert gradient.flatten().tolist() == pytest.approx([0.125, second / 2])
    assert target.flatten().tolist() == pytest.approx([1.75, 3 - second])
    # "x0" has no weight, but the same limit: x0(m) = 2 z_t - sqrt(3) m = -2.93 and 5.13, that is 4.93 and -2.13 away.
    target, gradient = function(z, z, cond, uncond, None, abar, 3.0, "eps", 0.0, "x0", 1, "sds", limit + 2)
    away = 3 - (6 - 0.5 * 3**0.5)
    assert gradient.flatten().tolist() == pytest.approx([2.25 / 2, away / 2])
    assert target.flatten().tolist() == pytest.approx([-0.25, 3 - away])


@pytest.mark.parametrize("function", [sds_target, by_kernels])
def test_what_is_no_number_is_not_hidden_by_a_limit(function):
    z, z_t, cond, uncond, noise, abar = draw((1, 1, 1, 3), device=DEVICE)
    cond[..., 0], cond[..., 1] = float("nan"), float("inf")
    limit = torch.tensor(0.5, device=DEVICE)
    gradient = function(z, z_t, cond, uncond, noise, abar, 2.0, "eps", 0.0, "sds", 1, "sds", limit)[1]
    assert gradient.isnan().tolist() == [[[[True, False, False]]]]
    assert gradient[..., 1].item() == 0.5


def test_without_rescaling_x0_is_sds_with_the_weight_sigma_over_alpha():
    z, _, cond, uncond, noise, abar = draw()
    z_t = abar.sqrt() * z + (1 - abar).sqrt() * noise
    _, gradient = sds_target(z, z_t, cond, uncond, noise, abar, 7.5, "eps", 0.0, "x0", 4)
    _, plain = sds_target(z, z_t, cond, uncond, noise, abar, 7.5, "eps", 0.0, "sds", 4)
    close(OP, gradient, plain / (1 - abar) * ((1 - abar) / abar).sqrt())


def test_v_and_eps_predictions_of_the_same_model_agree():
    z, z_t, cond, uncond, noise, abar = draw()
    v_cond, v_uncond = ((x - (1 - abar).sqrt() * z_t) / abar.sqrt() for x in (cond, uncond))
    for mode in ("x0", "sds"):
        eps = sds_target(z, z_t, cond, uncond, noise, abar, 3.0, "eps", 0.5, mode, 4)
        v = sds_target(z, z_t, v_cond, v_uncond, noise, abar, 3.0, "v", 0.5, mode, 4)
        close(OP, v.target, eps.target)


def test_full_rescaling_gives_each_scene_the_conditional_deviation():
    z, z_t, cond, uncond, _, abar = draw()
    target = sds_target(z, z_t, cond, uncond, None, abar, 50.0, "eps", 1.0, "x0", 4).target
    x0 = z_t / abar.sqrt() - (1 / abar - 1).sqrt() * cond
    for scene in range(2):
        close(OP, target[4 * scene : 4 * scene + 4].std(), x0[4 * scene : 4 * scene + 4].std())


def test_the_gradient_is_that_of_the_stated_loss():
    z, *rest = draw()
    target, gradient = sds_target(z.requires_grad_(), *rest, 7.5)
    assert not target.requires_grad
    loss = (z - target).square().sum() / (2 * z.shape[0])
    close(OP, torch.autograd.grad(loss, z)[0], gradient)


@pytest.mark.parametrize("function", [sds_target, by_kernels])
@pytest.mark.parametrize("shape", [(0, 4, 3, 3), (4, 4, 0, 3)])
@pytest.mark.parametrize("mode", ["x0", "sds"])
def test_empty(function, shape, mode):
    target, gradient = function(*draw(shape), 7.5, "eps", 0.5, mode, 4)
    assert target.shape == gradient.shape == shape


def check_case(case):
    rng = random.Random(case)
    views = rng.choice([1, 2, 3, 4])
    shape = (views * rng.choice([1, 2]), rng.choice([1, 4]), rng.randint(2, 6), rng.randint(2, 6))
    if case % 20 == 0:
        shape = (2 * views, 4, 20, 20)  # a scene longer than a block
    dtype = rng.choice([torch.float32, torch.float16, torch.bfloat16])
    inputs = draw(
        shape, dtype=dtype, seed=case, per_image=rng.random() < 0.5, strided=rng.random() < 0.3, device=DEVICE
    )
    guidance, mode = rng.choice([1.0, 7.5, 50.0]), rng.choice(["x0", "sds"])
    settings = (guidance, rng.choice(["eps", "v"]), rng.choice([0.0, 0.5, 1.0]), mode, views)
    results, plain = by_kernels(*inputs, *settings), sds_target_ref(*inputs, *settings)
    exact = sds_target_ref(*(x.double() for x in inputs), *settings)
    # z - B*V * gradient cancels; guidance multiplies what its two predictions have in common
    terms = 3 * guidance / inputs[-1].min().item() ** 0.5
    wide = torch.finfo(torch.float32).eps / torch.finfo(dtype).eps
    for result, p, e in zip(results, plain, exact):
        within_flash_rule(result, p, e, max(1.0, terms * wide))


@pytest.mark.parametrize("case", DRAWN)
def test_kernels_follow_the_flash_rule(case):
    check_case(case)


@pytest.mark.parametrize("case", range(30))
def test_kernels_weigh_and_clip_by_the_flash_rule(case):
    rng = random.Random(case)
    dtype, mode = rng.choice([torch.float32, torch.float16, torch.bfloat16]), rng.choice(["x0", "sds"])
    inputs = draw(dtype=dtype, seed=case, per_image=rng.random() < 0.5, device=DEVICE)
    weighting = rng.choice(["sds", "uniform", "fantasia3d"]) if mode == "sds" else "sds"
    limit = torch.tensor([rng.choice([0.1, 1.0, 10.0])], device=DEVICE) if rng.random() < 0.7 else None
    settings = (7.5, rng.choice(["eps", "v"]), rng.choice([0.0, 0.5]), mode, 4, weighting)
    results, plain = by_kernels(*inputs, *settings, limit), sds_target_ref(*inputs, *settings, limit)
    exact = sds_target_ref(*(x.double() for x in inputs), *settings, limit)
    if limit is not None:
        assert results[1].abs().max() <= limit / 8
    wide = torch.finfo(torch.float32).eps / torch.finfo(dtype).eps
    for result, p, e in zip(results, plain, exact):
        within_flash_rule(result, p, e, max(1.0, 3 * 7.5 / inputs[-1].min().item() ** 0.5 * wide))


@pytest.mark.slow
@pytest.mark.parametrize("case", CAMPAIGN)
def test_kernels_follow_the_flash_rule_campaign(case):
    check_case(case)


def test_kernels_repeat_bit_for_bit():
    inputs = draw(dtype=torch.float16, device=DEVICE)
    first = by_kernels(*inputs, 50.0, "v", 0.5, "x0", 4)
    for _ in range(19):
        assert all(torch.equal(a, b) for a, b in zip(first, by_kernels(*inputs, 50.0, "v", 0.5, "x0", 4)))


@pytest.mark.parametrize("mode", ["x0", "sds"])
@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize("strided", [True, False])
def test_opcheck(mode, prediction, strided):
    arguments = (*draw(strided=strided), 7.5, prediction, 0.5, mode, 4)
    results = torch.library.opcheck(torch.ops.mvdream_fast.sds_target.default, arguments)
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize(("weighting", "limit"), [("uniform", None), ("fantasia3d", torch.tensor(0.5))])
def test_opcheck_of_weights_and_limits(weighting, limit):
    arguments = (*draw(), 7.5, "eps", 0.5, "sds", 4, weighting, limit)
    results = torch.library.opcheck(torch.ops.mvdream_fast.sds_target.default, arguments)
    assert set(results.values()) == {"SUCCESS"}
    compiled = torch.compile(sds_target, fullgraph=True, backend="aot_eager")
    close(OP, compiled(*arguments).gradient, sds_target(*arguments).gradient)


def test_compiles_to_one_graph():
    z, *rest = draw()
    compiled = torch.compile(sds_target, fullgraph=True, backend="aot_eager")
    result, expected = compiled(z.requires_grad_(), *rest, 7.5), sds_target(z, *rest, 7.5)
    close(OP, result.target, expected.target)
    assert not result.gradient.requires_grad


def test_autocast_changes_nothing():
    inputs = draw()
    with torch.autocast("cpu", torch.bfloat16):
        result = sds_target(*inputs, 7.5)
    assert torch.equal(result.target, sds_target(*inputs, 7.5).target)


def test_vmap_is_refused():
    tensors = draw()
    with pytest.raises(RuntimeError, match="sds_target: arguments must be plain tensors, got a vmapped one"):
        torch.func.vmap(lambda z: sds_target(z, *tensors[1:], 7.5))(torch.stack([tensors[0]] * 3))


def test_scenes_of_one_value_have_no_deviation():
    z = torch.randn(4, 1, 1, 1)
    arguments = (z, z, z + 1, z - 1, None, torch.tensor(0.5), 7.5)
    with pytest.raises(ValueError, match="rescale must be 0 for scenes of one value, got 0.5"):
        sds_target(*arguments, n_views=1)
    assert sds_target(*arguments, n_views=1, rescale=0.0).target.isfinite().all()
    assert sds_target(*arguments, n_views=2).target.isfinite().all()
    target, _ = by_kernels(*(a if a is None else a.to(DEVICE) for a in arguments[:6]), 7.5, "eps", 0.0, "x0", 1)
    close(OP, target.cpu(), sds_target_ref(*arguments, n_views=1, rescale=0.0).target)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"prediction": "x0"}, ValueError, 'prediction must be "eps" or "v", got \'x0\''),
        ({"mode": "vsd"}, ValueError, 'mode must be "x0" or "sds", got \'vsd\''),
        ({"mode": "sds", "noise": None}, ValueError, 'noise must be given in mode "sds"'),
        ({"rescale": 1.5}, ValueError, "rescale must be from 0 to 1, got 1.5"),
        ({"n_views": 3}, ValueError, "n_views must divide the batch of 8 images, got 3"),
        ({"z_t": torch.zeros(8, 4, 3, 4)}, ValueError, r"z_t must be \(8, 4, 3, 5\) as z"),
        ({"alphas_cumprod_t": torch.ones(3)}, ValueError, r"alphas_cumprod_t must be one element or \[B\*V\]"),
        ({"z": torch.zeros(8, 4, 3, 5).int()}, TypeError, "z must be float32"),
        ({"noise": torch.zeros(8, 4, 3, 5, device="meta")}, RuntimeError, "noise must be on the device of z"),
        ({"weighting": "dream"}, ValueError, 'weighting must be "sds", "uniform" or "fantasia3d", got \'dream\''),
        ({"weighting": "uniform"}, ValueError, 'weighting must be "sds" in mode "x0", got \'uniform\''),
        ({"grad_clip": torch.ones(8)}, ValueError, r"grad_clip must be one element, got \(8,\)"),
        ({"grad_clip": 1.0}, TypeError, "grad_clip must be a tensor, got float"),
        ({"grad_clip": torch.ones(1, device="meta")}, RuntimeError, "grad_clip must be on the device of z"),
    ],
)
def test_bad_arguments(change, error, text):
    names = ("z", "z_t", "noise_pred_cond", "noise_pred_uncond", "noise", "alphas_cumprod_t")
    with pytest.raises(error, match=f"sds_target: {text}"):
        sds_target(**dict(zip(names, draw())) | {"guidance_scale": 7.5} | change)
