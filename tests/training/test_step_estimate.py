"""What a step is estimated to need against what autograd and torch's own counter see of a real one."""

import shutil

import pytest
import torch
from reference.random_model import random_model
from torch.utils.flop_counter import FlopCounterMode

from mvdream_fast.core import memory
from mvdream_fast.core.errors import OutOfMemoryError, OutputError
from mvdream_fast.models import functional
from mvdream_fast.models.config import SD21
from mvdream_fast.training import step_estimate

BATCH = 3


@pytest.fixture(scope="module")
def model():
    return random_model()


def kept_by_autograd(unet, *arguments) -> int:
    """Bytes of the storages, weights apart, that a real forward pass keeps for its backward pass."""
    seen = {p.untyped_storage().data_ptr(): 0 for p in unet.parameters()}
    alive = []

    def note(tensor):
        alive.append(tensor)
        seen.setdefault(tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        unet(*arguments)
    return sum(seen.values())


def test_activations_and_operations_are_those_of_a_real_step(model, monkeypatch):
    """Operations: torch's counter does not see the CPU's attention, so the estimate lies a little above it; nor does it
    see Winograd's convolutions, so torch's own are taken."""
    monkeypatch.setattr(functional, "winograd_pays", lambda *_: False)
    config, unet = model.config, model.unet
    guess = step_estimate.estimate_step(config, BATCH, 16)
    latents, t = torch.zeros(BATCH, 4, 8, 8), torch.zeros(BATCH, dtype=torch.int64)
    context = torch.zeros(BATCH, config.text.context_length, config.unet.context_dim)
    kept = kept_by_autograd(unet, latents, t, context)
    assert guess.memory["activations"] == pytest.approx(kept, rel=0.15)
    with FlopCounterMode(display=False) as counter:
        unet(latents, t, context).sum().backward()
    text = 2 * step_estimate.text_weights(config.text) * BATCH * config.text.context_length
    assert 1.0 <= guess.flops / (counter.get_total_flops() + text) < 1.1


def test_the_parts_add_up(model):
    n = sum(p.numel() for p in model.unet.parameters())
    full = step_estimate.estimate_step(model.config, BATCH, 16)
    assert full.trained == n
    assert full.memory["gradients"] == 4 * n
    assert full.memory["Adam's moments"] == 8 * n
    assert full.memory["weights to stay close to"] == 4 * n
    frozen = sum(p.numel() for module in (model.text, model.vae) for p in module.parameters())
    assert full.memory["text tower and autoencoder"] == 4 * frozen
    assert step_estimate.estimate_step(model.config, BATCH, 16, accumulate=3).flops == 3 * full.flops
    saving = step_estimate.estimate_step(model.config, BATCH, 16, checkpointing=True)
    assert saving.memory["activations"] < 0.5 * full.memory["activations"]
    assert saving.flops > 1.2 * full.flops
    half = step_estimate.estimate_step(model.config, BATCH, 16, half=True)
    assert half.memory["activations"] < 0.7 * full.memory["activations"]
    lora = step_estimate.estimate_step(model.config, BATCH, 16, lora_rank=2)
    assert lora.trained < 0.05 * n
    assert lora.memory["weights to stay close to"] == 0
    graph = step_estimate.estimate_step(model.config, BATCH, 16, graphs=True)
    assert graph.memory == {**full.memory, memory.GRAPHS: 2500 * 65536}
    both = step_estimate.estimate_step(model.config, BATCH, 16, train_text=True)
    assert both.trained == n + sum(p.numel() for p in model.text.parameters())


def test_the_full_size_step():
    """Weights, gradients, two moments and theta_0 of 867,572,164 weights, and about 2.4 TFLOP for four photos."""
    step = step_estimate.estimate_step(SD21, 4, 256)
    assert step.trained == 867_572_164
    weights = step.total - step.memory["activations"] - step.memory["the program"]
    assert weights == 4 * (5 * 867_572_164 + 340_387_840 + 83_653_863)
    assert 1 << 30 < step.memory["activations"] < 3 << 30
    assert 2.3e12 < step.flops < 2.5e12


def test_refusals(model, tmp_path, monkeypatch):
    step = step_estimate.estimate_step(model.config, BATCH, 16)
    available = {"fits": step.total - memory.PROGRAM_BYTES, "lacks a byte": step.total - memory.PROGRAM_BYTES - 1}
    monkeypatch.setattr(memory, "available", lambda device: (available[device], "left"))
    step_estimate.check_memory(step, "fits", "")
    sentence = r"a step needs about 0\.\d\d GB more than is in use, and 0\.\d\d GB is left; most goes to .*; use less"
    with pytest.raises(OutOfMemoryError, match=sentence):
        step_estimate.check_memory(step, "lacks a byte", "use less")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    step_estimate.check_disk(tmp_path / "new" / "er", 1000, "it")
    with pytest.raises(OutputError, match=r"it will take about .* of disk and .* free; make room"):
        step_estimate.check_disk(tmp_path / "new" / "er", 1001, "it")


def test_what_the_machine_says():
    assert step_estimate.measured_rate(torch.device("cpu")) > 1e8
