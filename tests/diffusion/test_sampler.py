"""DDIM against diffusers' scheduler step by step, and the loop that hands the work to a scheduler of diffusers."""

from dataclasses import replace

import diffusers
import pytest
import torch

from mvdream_fast.core.errors import ArgumentError
from mvdream_fast.core.rng import Stream
from mvdream_fast.diffusion.sampler import check_scheduler, ddim_sample, diffusers_settings, guided, scheduler_sample
from mvdream_fast.diffusion.schedule import NoiseSchedule, ddim_timesteps
from mvdream_fast.models.config import ScheduleConfig

SHAPE = (3, 4, 5, 6)


def config(prediction: str = "eps") -> ScheduleConfig:
    return ScheduleConfig(prediction=prediction)


def noise(purpose: str = "noise") -> torch.Tensor:
    return Stream(0, 0, purpose).normal(*SHAPE)


def ddim_scheduler(prediction: str) -> diffusers.DDIMScheduler:
    settings = diffusers_settings(config(prediction))
    return diffusers.DDIMScheduler(**settings, clip_sample=False, set_alpha_to_one=False, steps_offset=1)


def model_fn(latents: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Non-linear and different for the two halves of a guided batch, bounded so that trajectories stay O(1)."""
    halves = 2 if len(latents) == 2 * SHAPE[0] else 1
    out = torch.tanh(0.7 * latents + float(t) / 1000)
    if halves == 2:
        out = torch.cat([0.5 * out[: SHAPE[0]], out[SHAPE[0] :]])
    return out


def record(into: list):
    return lambda done, total, latents: into.append((done, total, latents.clone()))


@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize("n_steps", [20, 30, 47])
def test_equals_diffusers_step_by_step(prediction, n_steps):
    scheduler = ddim_scheduler(prediction)
    scheduler.set_timesteps(n_steps)
    ours: list = []
    schedule = NoiseSchedule.from_config(config(prediction))
    last = ddim_sample(model_fn, noise(), schedule, n_steps, 7.5, "diffusers", record(ours))
    expected = noise()
    for i, t in enumerate(scheduler.timesteps):
        expected = scheduler.step(guided(model_fn, expected, t, 7.5), t, expected).prev_sample
        done, total, latents = ours[i]
        assert (done, total) == (i + 1, n_steps)
        # diffusers multiplies alphas_cumprod up in float32; x0 is divided by alpha >= 0.07 and added up over the steps
        torch.testing.assert_close(latents, expected, atol=1e-4 * expected.abs().max().item(), rtol=0)
    assert torch.equal(last, ours[-1][2])
    assert last.abs().max() > 0.1


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_eta_equals_diffusers_with_the_same_noise(eta):
    scheduler = ddim_scheduler("v")
    scheduler.set_timesteps(10)
    expected, stream = noise(), Stream(5, 0, "eta")
    for t in scheduler.timesteps:
        out = guided(model_fn, expected, t, 2.0)
        expected = scheduler.step(out, t, expected, eta=eta, variance_noise=stream.normal(*SHAPE)).prev_sample
    schedule = NoiseSchedule.from_config(config("v"))
    again = Stream(5, 0, "eta")
    ours = ddim_sample(model_fn, noise(), schedule, 10, 2.0, eta=eta, fresh=lambda: again.normal(*SHAPE))
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=0)
    assert (ours - ddim_sample(model_fn, noise(), schedule, 10, 2.0)).abs().max() > 0.1


def test_ldm_convention_leads_each_step_to_the_next_timestep():
    """S = 30: 31 steps from t = 991, each to the timestep of the next, the last to abar_0. A UNet that knows the noise
    exactly then lands on x0 with exactly abar_0 of it left."""
    schedule = NoiseSchedule.from_config(config())
    x0, true_noise, seen = noise("x0"), noise("true"), []

    def oracle(latents, t):
        seen.append(int(t))
        torch.testing.assert_close(latents, schedule.add_noise(x0, true_noise, int(t)), atol=1e-5, rtol=0)
        return true_noise

    out = ddim_sample(oracle, schedule.add_noise(x0, true_noise, 991), schedule, 30, 1.0)
    assert seen == ddim_timesteps(30) == list(range(991, 0, -33))
    torch.testing.assert_close(out, schedule.add_noise(x0, true_noise, 0), atol=1e-5, rtol=0)


SETTINGS = [
    {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
    {"rescale_betas_zero_snr": True, "timestep_spacing": "linspace", "set_alpha_to_one": True},
    {"timestep_spacing": "trailing", "steps_offset": 0},
    {"timestep_spacing": "linspace"},
    {"steps_offset": 0, "set_alpha_to_one": True},
    {"set_alpha_to_one": True},
    {"beta_schedule": "linear", "timestep_spacing": "linspace"},
    {"trained_betas": tuple(0.001 + 0.00002 * t for t in range(1000))},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("n_steps", [5, 20, 47])
def test_a_model_s_own_sampling_is_diffusers(settings, n_steps):
    ours = ScheduleConfig(prediction="v", **settings)
    more = {"steps_offset": ours.steps_offset, "set_alpha_to_one": ours.set_alpha_to_one}
    scheduler = diffusers.DDIMScheduler(**diffusers_settings(ours) | more, clip_sample=False)
    schedule = NoiseSchedule.from_config(ours)
    check_scheduler(scheduler, schedule)
    theirs = scheduler_sample(model_fn, noise(), scheduler, n_steps, 3.0)
    out = ddim_sample(model_fn, noise(), schedule, n_steps, 3.0, "diffusers")
    torch.testing.assert_close(out, theirs, atol=2e-4 * theirs.abs().max().item(), rtol=0)


@pytest.mark.parametrize(("share", "most"), [(0.95, 1.5), (0.7, 100.0), (1.0, 1.0)])
def test_a_threshold_is_diffusers(share, most):
    ours = ScheduleConfig(beta_schedule="squaredcos_cap_v2", threshold=share, threshold_max=most, steps_offset=0)
    settings = diffusers_settings(ours) | {"set_alpha_to_one": False}
    assert settings["thresholding"]
    scheduler = diffusers.DDIMScheduler(**settings)
    theirs = scheduler_sample(model_fn, noise(), scheduler, 20, 3.0)
    out = ddim_sample(model_fn, noise(), NoiseSchedule.from_config(ours), 20, 3.0, "diffusers")
    torch.testing.assert_close(out, theirs, atol=2e-4, rtol=0)
    free = ddim_sample(model_fn, noise(), NoiseSchedule.from_config(replace(ours, threshold=None)), 20, 3.0)
    assert out.abs().max() < free.abs().max() / 2


def test_a_threshold_worked_by_hand():
    """Of the values 0.5, 1, 3 and 4 the share 2/3 ends at 3: those above become 1, the others a third; but by at most
    threshold_max, and an image that lies inside stays."""
    schedule = NoiseSchedule.from_config(ScheduleConfig(threshold=2 / 3, threshold_max=10.0, set_alpha_to_one=True))

    def last(values: list[float], schedule: NoiseSchedule) -> list[float]:
        x0 = torch.tensor(values).reshape(1, 1, 2, 2)
        z = schedule.add_noise(x0, torch.zeros_like(x0), 1)
        return ddim_sample(lambda z, t: torch.zeros_like(z), z, schedule, 1, 1.0).flatten().tolist()

    assert last([0.5, -1, 3, -4], schedule) == pytest.approx([0.5 / 3, -1 / 3, 1, -1], abs=1e-5)
    most = NoiseSchedule.from_config(replace(schedule.config, threshold_max=2.0))
    assert last([0.5, -1, 3, -4], most) == pytest.approx([0.25, -0.5, 1, -1], abs=1e-5)
    assert last([0.5, -0.25, 0.75, 0], schedule) == pytest.approx([0.5, -0.25, 0.75, 0], abs=1e-5)


def test_what_any_scheduler_is_told_of_a_model():
    plain = {
        "num_train_timesteps": 1000, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012,
        "prediction_type": "epsilon",
    }  # fmt: skip
    assert diffusers_settings(ScheduleConfig()) == plain
    own = ScheduleConfig(3, prediction="v", trained_betas=(0.1, 0.2, 0.3), timestep_spacing="trailing", steps_offset=0)
    assert diffusers_settings(own) == plain | {
        "num_train_timesteps": 3, "prediction_type": "v_prediction", "trained_betas": [0.1, 0.2, 0.3],
        "timestep_spacing": "trailing", "steps_offset": 0,
    }  # fmt: skip


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"])
def test_a_model_of_zero_terminal_snr_in_other_schedulers(name):
    config = ScheduleConfig(prediction="v", rescale_betas_zero_snr=True, timestep_spacing="trailing")
    schedule = NoiseSchedule.from_config(config)
    x0, model = oracle_of_constant(schedule, "v")
    scheduler = getattr(diffusers, name)(**diffusers_settings(config))
    check_scheduler(scheduler, schedule)
    torch.testing.assert_close(scheduler_sample(model, noise(), scheduler, 20, 1.0), x0, atol=0.05, rtol=0)


@pytest.mark.parametrize("scale", [7.5, 0.0, -1.0, 0.5])
def test_guidance_puts_uncond_first_in_one_batch(scale):
    calls = []

    def two_halves(latents, t):
        calls.append(latents)
        return torch.cat([torch.full(SHAPE, 2.0), torch.full(SHAPE, 3.0)])

    out = guided(two_halves, noise(), torch.tensor(5), scale)
    assert torch.equal(out, torch.full(SHAPE, 2.0 + scale))
    assert len(calls) == 1
    assert torch.equal(calls[0], torch.cat([noise(), noise()]))


def test_guidance_scale_one_computes_the_conditional_half_alone():
    sizes = []

    def count(latents, t):
        sizes.append(len(latents))
        return model_fn(latents, t)

    schedule = NoiseSchedule.from_config(config("v"))
    alone = ddim_sample(count, noise(), schedule, 5, 1.0)
    assert set(sizes) == {SHAPE[0]}
    nearly = ddim_sample(count, noise(), schedule, 5, 1.0 + 1e-7)
    torch.testing.assert_close(alone, nearly, atol=1e-5, rtol=0)


def test_nothing_is_clipped():
    schedule = NoiseSchedule.from_config(config())
    big = ddim_sample(lambda z, t: torch.zeros_like(z), 10 * noise(), schedule, 20, 1.0)
    top = schedule.alphas_cumprod[951]
    torch.testing.assert_close(big, 10 * noise() * (schedule.alphas_cumprod[0] / top).sqrt(), atol=0, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_state_keeps_the_dtype_of_the_noise(dtype):
    def half(latents, t):
        return model_fn(latents, t).half()

    out = ddim_sample(half, noise().to(dtype), NoiseSchedule.from_config(config("v")), 4, 3.0)
    assert out.dtype == dtype


def test_the_noise_given_is_not_written_into():
    given = noise()
    ddim_sample(model_fn, given, NoiseSchedule.from_config(config()), 2, 3.0)
    assert torch.equal(given, noise())


def test_no_images():
    empty = torch.zeros(0, *SHAPE[1:])
    out = ddim_sample(lambda z, t: z, empty, NoiseSchedule.from_config(config()), 4, 3.0)
    assert out.shape == empty.shape


def test_eta_needs_noise_and_lies_between_ddim_and_ddpm():
    schedule = NoiseSchedule.from_config(config())
    with pytest.raises(ValueError, match=r"fresh must be given for eta > 0, got eta 0.5"):
        ddim_sample(model_fn, noise(), schedule, 2, 3.0, eta=0.5)
    for eta in (1.5, -0.1, float("nan"), float("inf")):
        with pytest.raises(
            ArgumentError, match=r"ddim_sample: eta must be from 0 to 1, got .*; 0 is DDIM, 1 has DDPM's"
        ):
            ddim_sample(model_fn, noise(), schedule, 2, 3.0, eta=eta, fresh=noise)


@pytest.mark.parametrize("settings", [{"set_alpha_to_one": True}, {"timestep_spacing": "trailing"}], ids=str)
@pytest.mark.parametrize("n_steps", [4, 10, 50])
def test_all_noise_anew_is_real_at_zero_terminal_snr(settings, n_steps):
    schedule = NoiseSchedule.from_config(ScheduleConfig(prediction="v", rescale_betas_zero_snr=True, **settings))
    out = ddim_sample(model_fn, noise(), schedule, n_steps, 3.0, "diffusers", eta=1.0, fresh=noise)
    assert out.dtype == torch.float32
    assert out.isfinite().all()


def test_steps_that_leave_the_schedule_are_refused():
    with pytest.raises(ArgumentError, match="the nearest number that works is 38"):
        ddim_sample(model_fn, noise(), NoiseSchedule.from_config(config()), 37, 3.0)


def oracle_of_constant(schedule: NoiseSchedule, prediction: str):
    """The exact UNet of a data set whose only image is `x0`: every correct sampler must arrive at it."""
    x0 = 0.5 * torch.sin(torch.arange(120.0)).reshape(1, *SHAPE[1:]).expand(SHAPE)

    def model(latents, t):
        index = int(t)
        true = (latents - schedule.alphas[index] * x0) / schedule.sigmas[index]
        return true if prediction == "eps" else schedule.alphas[index] * true - schedule.sigmas[index] * x0

    return x0, model


SCHEDULERS = {
    "dpm": lambda settings: diffusers.DPMSolverMultistepScheduler(**settings),
    "euler": lambda settings: diffusers.EulerDiscreteScheduler(**settings, timestep_spacing="leading", steps_offset=1),
    "euler-ancestral": lambda settings: diffusers.EulerAncestralDiscreteScheduler(
        **settings, timestep_spacing="leading", steps_offset=1
    ),
}


@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_any_diffusers_scheduler_arrives_at_the_data(name, prediction):
    schedule = NoiseSchedule.from_config(config(prediction))
    x0, model = oracle_of_constant(schedule, prediction)
    scheduler = SCHEDULERS[name](diffusers_settings(config(prediction)))
    check_scheduler(scheduler, schedule)
    before, seen = dict(vars(scheduler)), []
    generator = torch.Generator().manual_seed(0)
    out = scheduler_sample(model, noise(), scheduler, 20, 1.0, record(seen), generator=generator)
    torch.testing.assert_close(out, x0, atol=0.05, rtol=0)
    assert [(done, total) for done, total, _ in seen] == [(i + 1, 20) for i in range(20)]
    assert vars(scheduler).keys() == before.keys()
    assert all(vars(scheduler)[key] is before[key] for key in before), "the caller's scheduler must keep its state"


def test_the_ddim_scheduler_gives_what_ddim_sample_gives():
    schedule, scheduler = NoiseSchedule.from_config(config("v")), ddim_scheduler("v")
    theirs = scheduler_sample(model_fn, noise(), scheduler, 30, 5.0)
    ours = ddim_sample(model_fn, noise(), schedule, 30, 5.0, "diffusers")
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_schedulers_of_another_kind_are_refused():
    schedule = NoiseSchedule.from_config(config("v"))
    with pytest.raises(ArgumentError, match="prediction_type must be v_prediction for this model, got epsilon"):
        check_scheduler(diffusers.DDIMScheduler(), schedule)
    with pytest.raises(ArgumentError, match="betas must be the model's"):
        check_scheduler(diffusers.DDIMScheduler(prediction_type="v_prediction", clip_sample=False), schedule)


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_schedulers_that_would_change_the_latents_are_refused(prediction):
    schedule = NoiseSchedule.from_config(config(prediction))
    settings, clipping = diffusers_settings(schedule.config), r"clip_sample must be False for this model, got True"
    for kind in (diffusers.DDIMScheduler, diffusers.DDPMScheduler):
        with pytest.raises(ArgumentError, match=clipping + "; construct it with clip_sample=False"):
            check_scheduler(kind(**settings), schedule)
        check_scheduler(kind(**settings, clip_sample=False), schedule)
        with pytest.raises(ArgumentError, match="thresholding must be False for this model, got True"):
            check_scheduler(kind(**settings, clip_sample=False, thresholding=True), schedule)
    with pytest.raises(ArgumentError, match="use_flow_sigmas must be False for this model, got True"):
        check_scheduler(diffusers.UniPCMultistepScheduler(**settings, use_flow_sigmas=True), schedule)


@pytest.mark.parametrize(
    ("scheduler", "lacks", "got"),
    [
        ("ddim", "config, set_timesteps, scale_model_input, step, alphas_cumprod", "'ddim'"),
        (diffusers.DDIMScheduler, "alphas_cumprod", "<class 'diffusers.*DDIMScheduler'>"),
        (diffusers.EDMEulerScheduler(prediction_type="v_prediction"), "alphas_cumprod", "EDMEulerScheduler"),
        (diffusers.EDMDPMSolverMultistepScheduler(prediction_type="v_prediction"), "alphas_cumprod", "EDMDPM"),
        (diffusers.FlowMatchEulerDiscreteScheduler(), "scale_model_input, alphas_cumprod", "FlowMatchEuler"),
        (7, "config, .*", "int"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_what_is_no_scheduler_of_such_noise_is_refused(scheduler, lacks, got, prediction):
    schedule = NoiseSchedule.from_config(config(prediction))
    with pytest.raises(ArgumentError, match=f"scheduler: it must be a diffusers scheduler with {lacks}, got {got}"):
        check_scheduler(scheduler, schedule)


def test_schedulers_that_another_loop_drives_are_refused():
    schedule = NoiseSchedule.from_config(config("v"))
    settings = diffusers_settings(config("v")) | {"clip_sample": False}
    inverse = diffusers.DDIMInverseScheduler(**settings)
    with pytest.raises(ArgumentError, match="must go from noise to images, got DDIMInverseScheduler"):
        scheduler_sample(model_fn, noise(), inverse, 4, 1.0)
    told_more = diffusers.CogVideoXDPMScheduler(**settings, snr_shift_scale=1.0)
    with pytest.raises(ArgumentError, match="its step must ask for .* alone, got .*timestep_back.* of CogVideoXDPM"):
        check_scheduler(told_more, schedule)


def test_eta_reaches_a_scheduler_or_is_refused():
    schedule, settings = NoiseSchedule.from_config(config("v")), diffusers_settings(config("v"))
    ddim = diffusers.DDIMScheduler(**settings, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    check_scheduler(ddim, schedule, 0.5)
    drawn = torch.Generator().manual_seed(3)

    def again() -> torch.Tensor:
        return torch.randn(SHAPE, generator=drawn)

    generator = torch.Generator().manual_seed(3)
    theirs = scheduler_sample(model_fn, noise(), ddim, 10, 2.0, generator=generator, eta=0.5)
    ours = ddim_sample(model_fn, noise(), schedule, 10, 2.0, "diffusers", eta=0.5, fresh=again)
    torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=0)
    euler = diffusers.EulerDiscreteScheduler(**settings)
    check_scheduler(euler, schedule)
    for refuse in (
        lambda: check_scheduler(euler, schedule, 0.5),
        lambda: scheduler_sample(model_fn, noise(), euler, 4, 2.0, eta=0.5),
    ):
        with pytest.raises(ArgumentError, match=r"eta must be 0 for a EulerDiscreteScheduler, .*, got 0.5"):
            refuse()


@pytest.mark.parametrize(
    "name", ["EulerAncestralDiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "DDPMScheduler"]
)
def test_a_generator_for_each_image(name):
    """One that is given several times is drawn from once for each of its images, as if they were a batch alone."""
    clips = {"clip_sample": False} if name == "DDPMScheduler" else {}
    scheduler = getattr(diffusers, name)(**diffusers_settings(config("v")), **clips)
    start = Stream(0, 0, "many").normal(6, 4, 4, 4)  # a multiple of 16 numbers each: what torch draws at a time

    def run(latents: torch.Tensor, generators) -> torch.Tensor:
        return scheduler_sample(lambda z, t: torch.tanh(z), latents, scheduler, 5, 1.0, generator=generators)

    a, b = (torch.Generator().manual_seed(s) for s in (1, 2))
    both = run(start, [a] * 3 + [b] * 3)
    torch.testing.assert_close(both[3:], run(start[3:], [torch.Generator().manual_seed(2)] * 3))
    torch.testing.assert_close(both[:3], run(start[:3], torch.Generator().manual_seed(1)))
    assert len({tuple(x.flatten()[:3].tolist()) for x in both}) == 6
