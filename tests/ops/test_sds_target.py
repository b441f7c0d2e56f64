"""ops.sds_target: reference numbers, registered form and Triton kernels."""

import random

import pytest
import torch
from tolerances import close, within_flash_rule
from triton_on_cpu import DEVICE

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


@pytest.mark.parametrize("case", range(200))
def test_kernels_follow_the_flash_rule(case):
    check_case(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", range(200, 1000))
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
    ],
)
def test_bad_arguments(change, error, text):
    names = ("z", "z_t", "noise_pred_cond", "noise_pred_uncond", "noise", "alphas_cumprod_t")
    with pytest.raises(error, match=f"sds_target: {text}"):
        sds_target(**dict(zip(names, draw())) | {"guidance_scale": 7.5} | change)
