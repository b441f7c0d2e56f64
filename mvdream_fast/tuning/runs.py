"""A DreamBooth run from its flags: its plan, what it will need, its folder, and which way it goes.

One tuning is tune.py's, the three-stage way dreambooth3d.py's.
"""

import contextlib
import dataclasses
import os
import shlex
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mvdream_fast.checkpoints.open import not_ours, open_source
from mvdream_fast.core import cli, machine, run_folder
from mvdream_fast.core.errors import ArgumentError, InputFileError
from mvdream_fast.core.files import read_json
from mvdream_fast.core.images import png_bytes
from mvdream_fast.distill.recipes import preset_for, resolve_config
from mvdream_fast.models.config import NAMED, ModelConfig
from mvdream_fast.training import step_estimate
from mvdream_fast.tuning.dreambooth3d import FULL_MODEL, TUNINGS, run_stages
from mvdream_fast.tuning.photos import list_photos, load_photo
from mvdream_fast.tuning.tune import Plan, load_parts, photo_source, tune

RECIPES = {
    "paper": {"max_train_steps": 600, "learning_rate": 2e-6, "lambda_preserve": 1.0},
    "mini": {"max_train_steps": 400, "learning_rate": 2e-4, "lambda_preserve": 1000.0},
}
# not what a run is
PASSING = ("output", "resume_from_checkpoint", "dry_run", "device", "graphs", "threads", "quiet", "given")
OBEYED = ("max_train_steps", "checkpointing_steps", "validation_steps", "validation_prompt")  # by a run that goes on


def run_flags(flags: Any) -> int:
    """A whole run from the command's flags (a dataclass of dreambooth.py's fields); returns the exit code."""
    given = dataclasses.asdict(flags)
    quiet = open(os.devnull, "w") if given["quiet"] else None  # noqa: SIM115
    with contextlib.ExitStack() as stack:
        if quiet:
            stack.enter_context(contextlib.redirect_stdout(stack.enter_context(quiet)))
        return _resume(given, cli.given(flags)) if given["resume_from_checkpoint"] else _begin(given)


def _begin(given: dict[str, Any]) -> int:
    config = _configuration(given["model"], given["dry_run"])
    plan = make_plan(given, config)
    paths = list_photos(given["instance_data_dir"], print)
    size = plan.settings["resolution"]
    photos = np.stack([load_photo(path, size, given["fit"]) for path in paths])
    device = machine.choose_device(given["device"])
    step = announce(plan, len(photos), device)
    if given["dry_run"]:
        return 0
    step_estimate.check_memory(step, str(device), _advice(plan.settings))
    output, prompt = given["output"], plan.settings["instance_prompt"]
    step_estimate.check_disk(output or run_folder.OUTPUTS, disk_bytes(step, plan), "checkpoints and the tuned model")
    folder = run_folder.new_folder(output, run_folder.OUTPUTS, prompt, plan.settings["seed"])
    with run_folder.locked(folder):
        write_run(folder, plan.settings, photos, device)
        return _go(plan, photos, folder, device)


def _resume(given: dict[str, Any], named: Collection[str]) -> int:
    """What the run is stays as it was begun: of the flags that were named, those that ask for another are refused."""
    folder = run_folder.resolve_resume(given["resume_from_checkpoint"], run_folder.OUTPUTS, given["output"])
    settings = read_run(folder, set(given) - set(PASSING))
    begun, config = settings["max_train_steps"], open_source(settings["model"]).config
    asked = {name: given[name] for name in named if name in settings}
    settings |= {name: asked.pop(name) for name in OBEYED if name in asked}
    cli.check_resumed(
        {name: (x, settings[name]) for name, x in asked.items() if _settled(name, x, config) != settings[name]}
    )
    if settings["max_train_steps"] != begun:
        _check_steps(folder, settings, begun)
    plan = Plan(settings, config, given["graphs"])
    names = sorted((folder / "photos").glob("*.png"))
    if not names:
        raise InputFileError(f"{folder / 'photos'} holds no photos; start the run again")
    photos = np.stack([load_photo(path, settings["resolution"]) for path in names])
    device = machine.choose_device(given["device"])
    step = announce(plan, len(photos), device)
    if given["dry_run"]:
        return 0
    step_estimate.check_memory(step, str(device), _advice(settings))
    with run_folder.locked(folder):
        _write_record(folder, settings, device)
        return _go(plan, photos, folder, device)


def _check_steps(folder: Path, settings: dict[str, Any], begun: int) -> None:
    """Refuses another number of steps than the `begun` one where the run has gone too far for it. Raises ArgumentError.

    What follows the full tuning of dreambooth3d is made of it, and no stage is repeated.
    """
    steps, done = settings["max_train_steps"], run_folder.latest_step(folder / _checkpoints(folder, settings))
    if steps < done:
        raise ArgumentError(f"--max-train-steps must be at least the {done} that are done, got {steps}")
    if settings["stages"] == "dreambooth3d":
        if (folder / FULL_MODEL).exists():
            raise ArgumentError(
                f"--max-train-steps must stay {begun}, as {FULL_MODEL} is there already, got {steps}; leave it out, "
                "or begin a new run"
            )
        _check_partial_steps(settings)


def _checkpoints(folder: Path, settings: dict[str, Any]) -> str:
    """Where in the run's folder the checkpoints are that have come furthest."""
    if settings["stages"] != "dreambooth3d":
        return "checkpoints"
    return max((f"{name}/checkpoints" for name in TUNINGS), key=lambda name: run_folder.latest_step(folder / name))


def _check_partial_steps(settings: dict[str, Any]) -> None:
    partial, steps = settings["partial_steps"], settings["max_train_steps"]
    if partial > steps:
        raise ArgumentError(f"--partial-steps must be at most --max-train-steps, {steps}, got {partial}")


def _settled(name: str, value: Any, config: ModelConfig) -> Any:
    """A flag as a run keeps it: folders by their whole paths, and the preset of the volumes by its name."""
    if name == "sds_preset" and value == "auto":
        return preset_for(config.vae.image_size)
    if name == "instance_data_dir" or (name == "model" and Path(value).exists()):
        return str(Path(value).resolve())
    return value


def _go(plan: Plan, photos: np.ndarray, folder: Path, device: torch.device) -> int:
    with machine.memory_errors(_advice(plan.settings)):
        if plan.settings["stages"] == "dreambooth3d":
            code = run_stages(plan, photos, folder, device)
        else:
            parts = load_parts(plan, device)
            code = tune(plan, parts, photo_source(plan, photos, parts), folder)
    if code:
        print(f"dreambooth: stopped; go on with --resume-from-checkpoint {folder}", file=sys.stderr)
    else:
        prompt = shlex.quote(plan.settings["instance_prompt"])
        print(f"the tuned model: {folder / 'model'}")
        print(f"python -m mvdream_fast.sds --model {shlex.quote(str(folder / 'model'))} --prompt {prompt}", flush=True)
    return code


def _configuration(model: str, dry_run: bool) -> ModelConfig:
    """Of the model that was named. A dry run may name a configuration, whose weights need not be there."""
    if dry_run and model in NAMED and not Path(model).exists():
        return NAMED[model]
    return open_source(model).config


def recipe(config: ModelConfig) -> dict[str, Any]:
    """What a run of this model does where nothing is said: the paper's numbers, or those measured for small models."""
    return RECIPES[preset_for(config.vae.image_size)]


def make_plan(given: dict[str, Any], config: ModelConfig) -> Plan:
    """Settles what was left open. Raises ArgumentError for numbers that do not fit the model or each other."""
    if config.foreign:
        raise not_ours(config)
    settings = {name: _settled(name, value, config) for name, value in given.items() if name not in PASSING}
    for name, value in recipe(config).items():
        if settings[name] is None:
            settings[name] = value
    settings["resolution"] = settings["resolution"] or config.vae.image_size
    settings["partial_steps"] = settings["partial_steps"] or max(1, settings["max_train_steps"] // 4)
    resolve_config(settings["sds_preset"])
    factor = config.vae.downsampling * 2 ** (len(config.unet.channel_mult) - 1)
    if settings["resolution"] % factor or settings["resolution"] > 4 * config.vae.image_size:
        raise ArgumentError(
            f"--resolution must be a multiple of {factor} up to {4 * config.vae.image_size} for this model, "
            f"got {settings['resolution']}; it was trained at {config.vae.image_size}"
        )
    if settings["stages"] == "dreambooth3d":
        _check_partial_steps(settings)
    return Plan(settings, config, given["graphs"])


def announce(plan: Plan, n_photos: int, device: torch.device) -> step_estimate.Estimate:
    """Says what will be done and what a step of it takes; nothing is allocated for it."""
    s, half = plan.settings, plan.settings["mixed_precision"] != "no"
    step = step_estimate.estimate_step(
        plan.config, s["train_batch_size"], s["resolution"], accumulate=s["gradient_accumulation_steps"], half=half,
        checkpointing=s["gradient_checkpointing"], lora_rank=s["lora_rank"], train_text=s["train_text_encoder"],
        graphs=plan.graphs and device.type == "cuda",
    )  # fmt: skip
    rate = step_estimate.measured_rate(device, half and device.type == "cuda")
    seconds = step.flops / rate
    print(
        f"{s['model']} ({plan.config.name}, {step.trained / 1e6:.1f} M weights to tune) on {device}; "
        f"{n_photos} photos of {s['resolution']} px; {s['max_train_steps']} steps of "
        f"{s['gradient_accumulation_steps'] * s['train_batch_size']}; learning rate {s['learning_rate']:g}, "
        f"lambda {s['lambda_preserve']:g}, seed {s['seed']}"
    )
    parts = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in step.memory.items() if size >= 2**20)
    print(f"a step takes about {step.total / 2**30:.2f} GB ({parts})")
    print(
        f"and {step.flops / 1e12:.3g} TFLOP: {seconds:.3g} s at the {rate / 1e9:.0f} GFLOP/s of this machine's matrix "
        f"products, {seconds * s['max_train_steps'] / 60:.2g} min for all; expect one to three times that",
        flush=True,
    )
    return step


def _advice(settings: dict[str, Any]) -> str:
    tries = [("lora_rank", "--lora-rank 16"), ("gradient_checkpointing", "--gradient-checkpointing")]
    ways = [way for name, way in tries if not settings[name]]
    if settings["train_batch_size"] > 1:
        ways.append("--train-batch-size 1 with --gradient-accumulation-steps")
    return f"try {' or '.join(ways)}" if ways else "take a machine with more memory"


def disk_bytes(step: step_estimate.Estimate, plan: Plan) -> int:
    """Two checkpoints of weights and moments, a third while it is written, and the model; for every stage."""
    weights = step.memory["UNet weights"] + step.memory["text tower and autoencoder"]
    n_tunings = len(TUNINGS) if plan.settings["stages"] == "dreambooth3d" else 1
    return n_tunings * (3 * 3 * 4 * step.trained + weights)


def write_run(folder: Path, settings: dict[str, Any], photos: np.ndarray, device: torch.device) -> None:
    """The photos as they are trained on, and the run's record."""
    from PIL import Image

    (folder / "photos").mkdir()
    for i, photo in enumerate(photos):
        run_folder.atomic_write(folder / "photos" / f"{i:02d}.png", png_bytes(Image.fromarray(photo)))
    _write_record(folder, settings, device)


def _write_record(folder: Path, settings: dict[str, Any], device: torch.device) -> None:
    record = {"kind": "dreambooth", "settings": settings}
    run_folder.write_record(folder, "dreambooth", record, _checkpoints(folder, settings), device=str(device))


def read_run(folder: Path, names: set[str]) -> dict[str, Any]:
    """The settings of a run folder, which must have these names. Raises InputFileError."""
    path = folder / "config.json"
    try:
        data = read_json(path)
        if data["kind"] != "dreambooth":
            raise ValueError(f"it describes a {data['kind']}")
        if set(data["settings"]) != names:
            raise ValueError(f"{', '.join(sorted(set(data['settings']) ^ names))} missing or unknown")
        return dict(data["settings"])
    except (InputFileError, ValueError, KeyError, TypeError) as error:
        raise InputFileError(f"{path} is not the configuration of a dreambooth run: {error}") from error
