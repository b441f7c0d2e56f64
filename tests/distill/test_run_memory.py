"""Memory is estimated before it is taken: what is counted, what is refused and in which words."""

import re
import resource
import subprocess
import sys

import pytest
import torch

from mvdream_fast.core import memory
from mvdream_fast.core.errors import OutOfMemoryError
from mvdream_fast.distill import run_memory
from mvdream_fast.distill.config import replaced
from mvdream_fast.distill.recipes import shaded
from mvdream_fast.distill.systems import SDS_PRESETS, mvdream_solid
from mvdream_fast.models import lora
from mvdream_fast.models.config import MINI, SD21
from mvdream_fast.models.unet import MultiViewUNet

PAPER, SMALL = SDS_PRESETS["paper"], SDS_PRESETS["mini"]


def total(model, config, weights=0):
    return sum(run_memory.estimate(model, config, weights).values())


def test_mini_fits_a_laptop_and_the_papers_recipe_does_not():
    assert total(MINI, SDS_PRESETS["mini"], 42 << 20) < 3 << 30
    assert total(SD21, PAPER, 5220 << 20) > 10 << 30


def test_what_grows_the_run_grows_the_estimate():
    base = total(SD21, PAPER)
    for changes in ({"n_views": 8}, {"n_groups": (4, 1)}, {"samples_per_ray": 1024}):
        assert total(SD21, replaced(PAPER, max_samples=1 << 31, **changes)) > base
    assert run_memory.estimate(SD21, PAPER)["the VAE's encoder"] > run_memory.estimate(MINI, PAPER)["the VAE's encoder"]
    four_prompts = run_memory.estimate(SD21, replaced(PAPER, mode="2d", perp_neg=True))
    assert four_prompts["the UNet"] == 2 * run_memory.estimate(SD21, PAPER)["the UNet"]
    beside = run_memory.estimate(MINI, replaced(SMALL, sampled_views=8))["the renderer's samples"]
    assert beside > 1.4 * run_memory.estimate(MINI, SMALL)["the renderer's samples"]
    reconstruction = run_memory.estimate(SD21, replaced(PAPER, method="reconstruct", n_views=16))
    assert "the VAE's encoder" not in reconstruction
    assert reconstruction["the UNet"] == 2 * run_memory.estimate(SD21, PAPER)["the UNet"]  # of 2 groups of 4 views
    assert total(SD21, shaded(PAPER)) > base


def test_views_that_are_sampled_first_count_with_those_between():
    solid = mvdream_solid("paper")
    asked = [
        run_memory.estimate(SD21, replaced(solid, sampled_views=n, sampled_between=between))["the UNet"]
        for n, between in ((4, False), (64, False), (64, True))
    ]
    assert asked[1:] == [16 * asked[0], 32 * asked[0]]
    many = replaced(solid, sampled_views=64, sampled_between=True)
    parts = dict.fromkeys(run_memory.FLAGS, 0) | {"the UNet": asked[2]}
    assert "try fewer sampled_views in --config" in run_memory.advice(parts, many)
    assert "try --n-views 4" in run_memory.advice(parts, solid)


def test_a_gpu_marches_all_rays_at_once_and_has_an_encoder_of_16_bits():
    on_cpu, on_gpu = (
        run_memory.estimate(SD21, PAPER),
        run_memory.estimate(SD21, PAPER, gpu_memory=80 << 30, encoder_bytes=2),
    )
    rays = 4 * 256 * 256
    beside = (1 << 23) * 80 + (1 << 18) * 16 * 2 * 4  # the samples that the field is trained on, features of a slab
    block = on_gpu["the renderer's samples"] - beside
    assert block == rays * 512 * 28
    small = run_memory.estimate(SD21, PAPER, gpu_memory=4 << 30)["the renderer's samples"] - beside
    assert (1 << 30) - 512 * 28 < small <= 1 << 30  # a quarter of the memory, in as many blocks as it takes
    assert on_gpu["the VAE's encoder"] * 2 == on_cpu["the VAE's encoder"]


def test_the_volume_counts_parameter_gradient_and_both_moments():
    assert run_memory.estimate(None, PAPER)["the volume and its optimiser"] == pytest.approx(16 * 12_599_920)


def test_a_learner_is_counted_by_its_adapters_and_what_its_step_keeps():
    """Rank 4 around Stable Diffusion's projections is 829,952 numbers (0.83 M, as diffusers' adapters of this model
    have), each with a gradient and two moments; MINI's are fewer. In 2D mode there is the embedding of a camera."""
    for model, n_adapters in ((SD21, 829_952), (MINI, 75_264)):
        plain, vsd = (run_memory.estimate(model, replaced(PAPER, kind=kind)) for kind in ("sds", "vsd"))
        with torch.device("meta"):
            built = lora.add_adapters(unet := MultiViewUNet(model.unet), 4)
        assert built
        assert sum(p.numel() for p in unet.parameters() if p.requires_grad) == n_adapters
        assert run_memory.adapter_weights(model.unet, 4) == n_adapters
        level = 4 * 8 * model.latent_size**2 * model.unet.model_channels * model.unet.channel_mult[0]
        assert vsd == {**plain, run_memory.LEARNER: 16 * n_adapters + 250 * level}
        in_2d = run_memory.estimate(model, replaced(PAPER, kind="vsd", mode="2d"))[run_memory.LEARNER]
        with torch.device("meta"):
            unet.learn_camera()
        assert in_2d - vsd[run_memory.LEARNER] == 16 * sum(p.numel() for p in unet.camera_embed.parameters())
    half = run_memory.estimate(SD21, replaced(PAPER, kind="vsd"), encoder_bytes=2)[run_memory.LEARNER]
    assert half < 0.51 * run_memory.estimate(SD21, replaced(PAPER, kind="vsd"))[run_memory.LEARNER]


def test_each_particle_is_a_volume():
    one, three = (run_memory.estimate(SD21, replaced(PAPER, kind="vsd", particles=n)) for n in (1, 3))
    assert three == {**one, run_memory.VOLUME: 3 * one[run_memory.VOLUME]}


def test_graphs_are_counted_by_the_sizes_of_the_rendered_views():
    """The paper's recipe renders 64 and 256 pixels: two graphs of 1000 kernels, 64 KB each."""
    plain, graphs = run_memory.estimate(SD21, PAPER), run_memory.estimate(SD21, PAPER, graphs=True)
    assert graphs == {**plain, memory.GRAPHS: 2 * 1000 * 65536}
    assert memory.GRAPHS not in run_memory.estimate(None, PAPER, graphs=True)
    alone = {memory.GRAPHS: 2 << 30, run_memory.WEIGHTS: 1 << 30}
    assert run_memory.advice(alone, PAPER).endswith("try --no-graphs")


def test_too_little_is_refused_with_needs_and_a_way_out(monkeypatch):
    monkeypatch.setattr(memory, "available", lambda device: (100 << 20, "left of the control group's limit"))
    parts = run_memory.estimate(MINI, SDS_PRESETS["mini"])
    sentence = (
        r"needs about \d+\.\d\d GB more than is in use, and 0\.10 GB is left of the control group's limit; "
        r"most goes to .+ \(\d+\.\d\d GB\) and .+ \(\d+\.\d\d GB\); try --"
    )
    with pytest.raises(OutOfMemoryError, match=sentence):
        run_memory.check(parts, SDS_PRESETS["mini"])
    monkeypatch.setattr(memory, "available", lambda device: (None, ""))
    run_memory.check(parts, SDS_PRESETS["mini"])


def test_the_flag_to_try_helps():
    config = replaced(SDS_PRESETS["mini"], render_size=(512,), max_samples=1 << 31)
    parts = run_memory.estimate(MINI, config)
    assert "try --render-size 256" in run_memory.advice(parts, config)
    smaller = run_memory.estimate(MINI, replaced(config, render_size=(256,)))
    assert smaller["the renderer's samples"] < parts["the renderer's samples"] / 3


def under_limit(size: int, *arguments: str) -> subprocess.CompletedProcess:
    """The sds command in `size` bytes of address space."""
    line = [sys.executable, "-m", "mvdream_fast.sds", "a green chair", *arguments]
    limit = lambda: resource.setrlimit(resource.RLIMIT_AS, (size, size))  # noqa: E731
    return subprocess.run(line, capture_output=True, text=True, preexec_fn=limit)


def test_a_process_that_could_not_start_is_refused_before_torch(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = under_limit(400 << 20)
    assert done.returncode == 4
    assert re.fullmatch(r"sds: starting needs about \S+ GB of address space, and \S+ GB is left .*\n", done.stderr)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_under_any_limit_a_run_is_refused_or_succeeds(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    quick = ["--steps", "2", "--mesh-resolution", "16", "--threads", "1"]
    codes = [under_limit(size << 20, *quick).returncode for size in range(500, 5000, 450)]
    assert set(codes) == {0, 4}
    assert codes == sorted(codes, reverse=True)  # refused below, done above
