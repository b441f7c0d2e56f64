"""The noise schedule: upstream's golden numbers, both predictions, and the timesteps of both step conventions."""

import pytest
import torch
from diffusers import DDIMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from mvdream_fast.core.errors import ArgumentError
from mvdream_fast.core.rng import Stream
from mvdream_fast.diffusion.schedule import NoiseSchedule, ddim_timesteps, nearest_n_steps
from mvdream_fast.models.config import ScheduleConfig

GOLDEN = {
    0: 0.99915, 1: 0.998296028, 20: 0.981314362, 500: 0.276332684, 980: 0.005843783, 981: 0.005775500, 999: 0.004660099
}  # fmt: skip


def upstream_ldm_steps(n_steps: int, n_timesteps: int = 1000) -> list[int]:
    """The rule as LDM states it: every c-th of the range, one later; highest first."""
    c = n_timesteps // n_steps
    return [t + 1 for t in range(n_timesteps) if t % c == 0][::-1]


def diffusers_scheduler(prediction: str = "epsilon", **changes) -> DDIMScheduler:
    settings = {
        "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False,
        "set_alpha_to_one": False, "steps_offset": 1, "prediction_type": prediction,
    }  # fmt: skip
    return DDIMScheduler(**{**settings, **changes})


@pytest.mark.parametrize(("t", "expected"), GOLDEN.items())
def test_golden_alphas_cumprod(t, expected):
    schedule = NoiseSchedule.from_config(ScheduleConfig())
    assert schedule.alphas_cumprod.dtype == torch.float32
    assert schedule.alphas_cumprod[t].item() == pytest.approx(expected, abs=1e-9 if t else 5e-9, rel=6e-8)


def test_golden_noise_ratios():
    schedule = NoiseSchedule.from_config(ScheduleConfig())
    ratio = (schedule.sigmas / schedule.alphas)[[20, 500, 980]]
    torch.testing.assert_close(ratio, torch.tensor([0.13799, 1.61828, 13.04308]), atol=6e-6, rtol=0)


def test_alphas_cumprod_are_diffusers_scaled_linear():
    """diffusers multiplies up in float32, ours in float64: they differ by its rounding only."""
    ours = NoiseSchedule.from_config(ScheduleConfig()).alphas_cumprod
    torch.testing.assert_close(ours, diffusers_scheduler().alphas_cumprod, atol=0, rtol=2e-5)


SCHEDULES = [
    {"beta_schedule": "squaredcos_cap_v2"},
    {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 7},
    {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
    {"trained_betas": [0.1, 0.3, 0.2, 0.05], "num_train_timesteps": 4},
    {"rescale_betas_zero_snr": True},
    {"rescale_betas_zero_snr": True, "beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
]


def of_diffusers(settings: dict) -> ScheduleConfig:
    """Our configuration of a scheduler's settings, written out."""
    names = {"num_train_timesteps": "n_timesteps", "beta_start": "linear_start", "beta_end": "linear_end"}
    values = {names.get(name, name): tuple(x) if isinstance(x, list) else x for name, x in settings.items()}
    return ScheduleConfig(prediction="v", **values)


@pytest.mark.parametrize("settings", SCHEDULES, ids=str)
def test_other_schedules_are_diffusers(settings):
    ours = NoiseSchedule.from_config(of_diffusers(settings))
    theirs = diffusers_scheduler("v_prediction", **settings).alphas_cumprod
    # A thousand products in float32, and where they are rescaled the cancellation next to zero.
    torch.testing.assert_close(ours.alphas_cumprod, theirs, atol=3e-8, rtol=3e-5)


def test_zero_terminal_snr_worked_by_hand():
    """Betas 0.5, 0.5: the roots 0.70711 and 0.5 become 0.70711 and 0; of betas 0.19 twice, 0.9 and 0.81 too."""
    for beta in (0.5, 0.19):
        config = ScheduleConfig(2, prediction="v", trained_betas=(beta, beta), rescale_betas_zero_snr=True)
        schedule = NoiseSchedule.from_config(config)
        assert schedule.alphas_cumprod.tolist() == pytest.approx([1 - beta, 0.0], abs=1e-7)
        assert (schedule.alphas[-1].item(), schedule.sigmas[-1].item()) == (0.0, 1.0)
        x0, noise = torch.full((1, 1), 2.0), torch.full((1, 1), 3.0)
        z, v = schedule.add_noise(x0, noise, 1), schedule.target(x0, noise, 1)
        assert (z.item(), v.item()) == (3.0, -2.0)  # all noise; v is minus the image
        assert (schedule.to_x0(z, v, 1).item(), schedule.to_noise(z, v, 1).item()) == (2.0, 3.0)


@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize("t", [0, 1, 500, 999, torch.tensor(3), torch.tensor([1, 500, 999])])
def test_conversions_undo_each_other(prediction, t):
    schedule = NoiseSchedule.from_config(ScheduleConfig(prediction=prediction))
    stream = Stream(0, 0, "conversions")
    x0, noise = stream.normal(3, 4, 5, 5).double(), stream.normal(3, 4, 5, 5).double()
    z_t = schedule.add_noise(x0, noise, t)
    out = schedule.target(x0, noise, t)
    # alpha² + sigma² is 1 to float32's precision, and x0 from noise divides by alpha >= 0.068
    torch.testing.assert_close(schedule.to_x0(z_t, out, t), x0, atol=1e-6, rtol=0)
    torch.testing.assert_close(schedule.to_noise(z_t, out, t), noise, atol=1e-6, rtol=0)


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_conversions_are_diffusers(prediction):
    schedule = NoiseSchedule.from_config(ScheduleConfig(prediction=prediction))
    reference = diffusers_scheduler({"eps": "epsilon", "v": "v_prediction"}[prediction])
    stream = Stream(1, 0, "conversions")
    x0, noise, out = (stream.normal(3, 4, 5, 5) for _ in range(3))
    t = torch.tensor([1, 501, 981])
    z_t = reference.add_noise(x0, noise, t)
    torch.testing.assert_close(schedule.add_noise(x0, noise, t), z_t, atol=2e-5, rtol=0)
    if prediction == "v":
        torch.testing.assert_close(
            schedule.target(x0, noise, t), reference.get_velocity(x0, noise, t), atol=2e-5, rtol=0
        )
    for i, step in enumerate(t.tolist()):
        reference.set_timesteps(50)
        one = reference.step(out[i : i + 1], step, z_t[i : i + 1]).pred_original_sample
        # float32 products in diffusers' alphas_cumprod: 2e-5 relative, times 1/alpha = 13 at t = 981
        torch.testing.assert_close(schedule.to_x0(z_t, out, t)[i : i + 1], one, atol=1e-3, rtol=2e-5)


def test_v_worked_by_hand():
    """abar_500 = 0.276332684: alpha 0.525674, sigma 0.850687."""
    schedule = NoiseSchedule.from_config(ScheduleConfig(prediction="v"))
    x0, noise = torch.full((1, 1, 1, 1), 2.0), torch.full((1, 1, 1, 1), -1.0)
    assert schedule.add_noise(x0, noise, 500).item() == pytest.approx(2 * 0.525674 - 0.850687, abs=2e-6)
    assert schedule.target(x0, noise, 500).item() == pytest.approx(-0.525674 - 2 * 0.850687, abs=2e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    schedule = NoiseSchedule.from_config(ScheduleConfig())
    stream = Stream(2, 0, "half")
    x0, noise = stream.normal(2, 4, 3, 3).to(dtype), stream.normal(2, 4, 3, 3).to(dtype)
    for t in (7, torch.tensor(7), torch.tensor([7, 900])):
        out = schedule.add_noise(x0, noise, t)
        assert out.dtype == dtype
        assert torch.equal(out, schedule.add_noise(x0.float(), noise.float(), t).to(dtype))


def test_one_timestep_per_image_and_nothing_else():
    schedule = NoiseSchedule.from_config(ScheduleConfig())
    x0 = torch.zeros(4, 1, 2, 2)
    with pytest.raises(ValueError, match=r"one for each of the 4 images, got \[3\]; repeat it"):
        schedule.add_noise(x0, x0, torch.tensor([1, 2, 3]))
    assert schedule.add_noise(x0[:0], x0[:0], torch.zeros(0, dtype=torch.long)).shape == (0, 1, 2, 2)


def test_to_moves_every_table():
    moved = NoiseSchedule.from_config(ScheduleConfig(prediction="v")).to("meta")
    assert moved.prediction == "v"
    assert {moved.alphas_cumprod.device.type, moved.alphas.device.type, moved.sigmas.device.type} == {"meta"}


def test_ldm_steps_are_upstreams_for_every_number_of_steps():
    refused = []
    for n_steps in range(1, 1001):
        expected = upstream_ldm_steps(n_steps)
        if expected[0] >= 1000:
            refused.append(n_steps)
            with pytest.raises(ArgumentError, match="outside 0..999"):
                ddim_timesteps(n_steps)
        else:
            assert ddim_timesteps(n_steps) == expected
    assert refused == [3, 9, 27, 36, 37, *range(101, 112), *range(251, 334), *range(501, 1001)]


def test_thirty_steps_are_31_in_ldm():
    ldm, other = ddim_timesteps(30), ddim_timesteps(30, "diffusers")
    assert (len(ldm), ldm[0], ldm[-1]) == (31, 991, 1)
    assert (len(other), other[0], other[-1]) == (30, 958, 1)


def test_diffusers_steps_are_diffusers():
    reference = diffusers_scheduler()
    for n_steps in [*range(1, 60), 99, 100, 101, 250, 333, 499, 500, 501, 998, 999]:
        reference.set_timesteps(n_steps)
        assert ddim_timesteps(n_steps, "diffusers") == reference.timesteps.tolist()
    with pytest.raises(ArgumentError, match="the nearest number that works is 999"):
        ddim_timesteps(1000, "diffusers")


@pytest.mark.parametrize("n_steps", [1, 2, 4, 5, 10, 20, 25, 50, 100, 200, 250, 500])
def test_conventions_agree_where_the_steps_divide(n_steps):
    assert ddim_timesteps(n_steps, "ldm") == ddim_timesteps(n_steps, "diffusers")
    assert len(ddim_timesteps(n_steps)) == n_steps


@pytest.mark.parametrize(
    ("n_steps", "nearest"),
    [(3, 4), (9, 10), (27, 28), (36, 35), (37, 38), (101, 100), (105, 100), (107, 112), (251, 250), (300, 334),
     (501, 500), (5000, 500), (0, 1), (-7, 1)],
)  # fmt: skip
def test_refusal_names_the_nearest_number(n_steps, nearest):
    with pytest.raises(ArgumentError, match=rf"{n_steps} steps ask .* the nearest number that works is {nearest}$"):
        ddim_timesteps(n_steps)


@given(st.integers(-10, 1200), st.sampled_from(["ldm", "diffusers"]))
@settings(max_examples=20, deadline=None)
def test_nearest_is_valid_and_no_valid_one_is_nearer(n_steps, convention):
    best = nearest_n_steps(n_steps, convention)
    assert ddim_timesteps(best, convention)[0] < 1000
    distance = abs(best - n_steps)
    for nearer in range(n_steps - distance + 1, n_steps + distance):
        assert nearest_n_steps(nearer, convention) != nearer


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("offset", [0, 1, 3])
def test_every_spacing_is_diffusers(spacing, offset):
    reference = diffusers_scheduler(timestep_spacing=spacing, steps_offset=offset)
    for n_steps in [*range(1, 60), 99, 100, 101, 250, 333, 499, 500, 501, 998, 999, 1000]:
        reference.set_timesteps(n_steps)
        theirs = reference.timesteps.tolist()
        if theirs[0] > 999:
            with pytest.raises(ArgumentError, match=f"{n_steps} steps ask for a timestep outside"):
                ddim_timesteps(n_steps, "diffusers", 1000, spacing, offset)
            continue
        assert ddim_timesteps(n_steps, "diffusers", 1000, spacing, offset) == theirs
        if spacing != "leading":
            assert ddim_timesteps(n_steps, "ldm", 1000, spacing, offset) == theirs


def test_spacings_worked_by_hand():
    assert ddim_timesteps(5, spacing="linspace") == [999, 749, 500, 250, 0]
    assert ddim_timesteps(5, spacing="trailing") == [999, 799, 599, 399, 199]
    assert ddim_timesteps(5, steps_offset=0) == [800, 600, 400, 200, 0]
    config = ScheduleConfig(timestep_spacing="trailing")
    assert NoiseSchedule.from_config(config).timesteps(2) == [999, 499]


def test_unknown_convention():
    with pytest.raises(ArgumentError, match="convention must be ldm or diffusers, got 'karras'"):
        ddim_timesteps(50, "karras")
