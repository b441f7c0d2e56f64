"""A DreamBooth run from its flags: what it will need, its folder, the tuning, and the model folder at the end.

The optimisation is dreambooth.py's, the three-stage way dreambooth3d.py's.
"""

import contextlib
import dataclasses
import io
import os
import shlex
import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from mvdream_fast.checkpoints.manifest import owner
from mvdream_fast.checkpoints.open import Model, load_model, open_source, write_folder
from mvdream_fast.core import cli, machine, run_folder
from mvdream_fast.core.errors import ArgumentError, InputFileError, ModelError
from mvdream_fast.core.files import read_json
from mvdream_fast.core.rng import Stream
from mvdream_fast.data.batches import Source, composite
from mvdream_fast.distill import memory
from mvdream_fast.distill.recipes import preset_for, resolve_config
from mvdream_fast.models.config import NAMED, ModelConfig
from mvdream_fast.models.lora import add_adapters, merged_state
from mvdream_fast.models.tokenizer import SPECIAL_ROWS
from mvdream_fast.training import estimate
from mvdream_fast.training.loop import Loop, LoopOptions, sheet
from mvdream_fast.training.unet import Parts
from mvdream_fast.tuning.dreambooth import DreamBoothOptions, DreamBoothTrainer
from mvdream_fast.tuning.photos import PhotoSource, list_photos, load_photo

if TYPE_CHECKING:
    from mvdream_fast.dreambooth import Flags

RECIPES = {
    "paper": {"max_train_steps": 600, "learning_rate": 2e-6, "lambda_preserve": 1.0, "partial_steps": 150},
    "mini": {"max_train_steps": 400, "learning_rate": 2e-4, "lambda_preserve": 3000.0, "partial_steps": 100},
}
PASSING = ("output", "resume_from_checkpoint", "dry_run", "device", "threads", "quiet", "given")  # not what a run is
OBEYED = ("max_train_steps", "checkpointing_steps", "validation_steps", "validation_prompt")  # by a run that goes on
GREY = 0.5  # the background that models are mostly trained on
VALIDATION_DRAWS = 4


@dataclass(frozen=True)
class Plan:
    """A run as it was asked for: every number settled, and the configuration of the model that it begins from."""

    settings: dict[str, Any]
    config: ModelConfig

    @property
    def options(self) -> DreamBoothOptions:
        s = self.settings
        return DreamBoothOptions(
            batch_size=s["train_batch_size"],
            lr=s["learning_rate"],
            warmup=s["lr_warmup_steps"],
            weight_decay=s["adam_weight_decay"],
            accumulate=s["gradient_accumulation_steps"],
            clip=s["max_grad_norm"],
            train_text=s["train_text_encoder"],
            autocast="none" if s["mixed_precision"] == "no" else s["mixed_precision"],
            seed=s["seed"],
            steps=s["max_train_steps"],
            preservation=s["lambda_preserve"],
            lr_scheduler=s["lr_scheduler"],
            betas=(s["adam_beta1"], s["adam_beta2"]),
            adam_eps=s["adam_epsilon"],
        )


def run_flags(flags: "Flags") -> int:
    """A whole run from the command's flags; returns the exit code."""
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
    estimate.check_memory(step, memory.available(str(device)), _advice(plan.settings))
    output, prompt = given["output"], plan.settings["instance_prompt"]
    estimate.check_disk(output or run_folder.OUTPUTS, disk_bytes(step, plan), "checkpoints and the tuned model")
    folder = run_folder.new_folder(output, run_folder.OUTPUTS, prompt, plan.settings["seed"])
    with run_folder.locked(folder):
        write_run(folder, plan.settings, photos, device)
        return _go(plan, photos, folder, device)


def _resume(given: dict[str, Any], named: Collection[str]) -> int:
    """What the run is stays as it was begun: of the flags that were named, those that ask for another are refused."""
    folder = run_folder.resolve_resume(given["resume_from_checkpoint"], run_folder.OUTPUTS, given["output"])
    settings = read_run(folder, set(given) - set(PASSING))
    asked = {name: given[name] for name in named if name in settings}
    settings |= {name: asked.pop(name) for name in OBEYED if name in asked}
    cli.check_resumed(
        {name: (value, settings[name]) for name, value in asked.items() if _is_other(value, settings[name])}
    )
    done = run_folder.latest_step(folder / "checkpoints")
    if settings["max_train_steps"] < done:
        raise ArgumentError(
            f"--max-train-steps must be at least the {done} that are done, got {settings['max_train_steps']}"
        )
    plan = Plan(settings, open_source(settings["model"]).config)
    names = sorted((folder / "photos").glob("*.png"))
    if not names:
        raise InputFileError(f"{folder / 'photos'} holds no photos; start the run again")
    photos = np.stack([load_photo(path, settings["resolution"]) for path in names])
    device = machine.choose_device(given["device"])
    step = announce(plan, len(photos), device)
    if given["dry_run"]:
        return 0
    estimate.check_memory(step, memory.available(str(device)), _advice(settings))
    with run_folder.locked(folder):
        _write_record(folder, settings, device)
        return _go(plan, photos, folder, device)


def _is_other(asked: Any, has: Any) -> bool:
    """Whether a flag differs from a run's setting, which is settled: paths whole, no "auto"."""
    return asked not in ("auto", has) and not (isinstance(has, str) and str(Path(asked).resolve()) == has)


def _go(plan: Plan, photos: np.ndarray, folder: Path, device: torch.device) -> int:
    with machine.memory_errors(_advice(plan.settings)):
        if plan.settings["stages"] == "dreambooth3d":
            from mvdream_fast.tuning.dreambooth3d import run_stages

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
    settings = {name: value for name, value in given.items() if name not in PASSING}
    for name, value in recipe(config).items():
        if settings[name] is None:
            settings[name] = value
    settings["resolution"] = settings["resolution"] or config.vae.image_size
    if settings["sds_preset"] == "auto":
        settings["sds_preset"] = preset_for(config.vae.image_size)
    resolve_config(settings["sds_preset"])
    factor = config.vae.downsampling * 2 ** (len(config.unet.channel_mult) - 1)
    if settings["resolution"] % factor or settings["resolution"] > 4 * config.vae.image_size:
        raise ArgumentError(
            f"--resolution must be a multiple of {factor} up to {4 * config.vae.image_size} for this model, "
            f"got {settings['resolution']}; it was trained at {config.vae.image_size}"
        )
    if settings["partial_steps"] > settings["max_train_steps"]:
        if settings["stages"] == "dreambooth3d":
            raise ArgumentError(
                f"--partial-steps must be at most --max-train-steps, {settings['max_train_steps']}, "
                f"got {settings['partial_steps']}"
            )
        settings["partial_steps"] = settings["max_train_steps"]
    if Path(settings["model"]).exists():
        settings["model"] = str(Path(settings["model"]).resolve())
    settings["instance_data_dir"] = str(Path(settings["instance_data_dir"]).resolve())
    return Plan(settings, config)


def announce(plan: Plan, n_photos: int, device: torch.device) -> estimate.Estimate:
    """Says what will be done and what a step of it takes; nothing is allocated for it."""
    s, half = plan.settings, plan.settings["mixed_precision"] != "no"
    step = estimate.estimate_step(
        plan.config, s["train_batch_size"], s["resolution"], accumulate=s["gradient_accumulation_steps"], half=half,
        checkpointing=s["gradient_checkpointing"], lora_rank=s["lora_rank"], train_text=s["train_text_encoder"],
    )  # fmt: skip
    rate = estimate.measured_rate(device, half and device.type == "cuda")
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


def disk_bytes(step: estimate.Estimate, plan: Plan) -> int:
    """Two checkpoints of weights and moments, a third while it is written, and the model; for every stage."""
    weights = step.memory["UNet weights"] + step.memory["text tower and autoencoder"]
    n_tunings = 3 if plan.settings["stages"] == "dreambooth3d" else 1
    return n_tunings * (3 * 3 * 4 * step.trained + weights)


def write_run(folder: Path, settings: dict[str, Any], photos: np.ndarray, device: torch.device) -> None:
    """The photos as they are trained on, cmd.txt, and last config.json, which makes the folder a run to go on with."""
    from PIL import Image

    (folder / "photos").mkdir()
    for i, photo in enumerate(photos):
        run_folder.atomic_write(folder / "photos" / f"{i:02d}.png", png(Image.fromarray(photo)))
    run_folder.atomic_write(
        folder / "cmd.txt", shlex.join(["python", "-m", "mvdream_fast.dreambooth", *sys.argv[1:]]) + "\n"
    )
    _write_record(folder, settings, device)


def _write_record(folder: Path, settings: dict[str, Any], device: torch.device) -> None:
    where = {"device": str(device), "threads": torch.get_num_threads()}
    run_folder.write_record(
        folder, {"kind": "dreambooth", "settings": settings}, run_folder.latest_step(folder / "checkpoints"), **where
    )


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


def load_parts(plan: Plan, device: torch.device) -> Parts:
    """The model in float32, with the token's row and, where asked for, adapters."""
    settings = plan.settings
    model = load_model(settings["model"], torch.float32)
    add_token(model, settings["instance_token"])
    _name_words(model.tokenizer, settings["instance_prompt"], settings["instance_token"])
    if settings["lora_rank"]:
        model.unet.requires_grad_(False)
        add_adapters(model.unet, settings["lora_rank"], settings["seed"])
    for module in (model.unet, model.vae, model.text):
        module.to(device)
    model.unet.gradient_checkpointing = settings["gradient_checkpointing"]
    text = model.text.train(settings["train_text_encoder"])
    return Parts(model.config, model.unet.train(), text, model.vae, model.tokenizer)


def add_token(model: Model, token: str) -> None:
    """A row of its own for the word, in a model whose tower has a subset of CLIP's rows; the others have all of them.

    The row begins as the mean of all rows: it means nothing yet, and the frozen tower can be tuned around it.
    """
    if model.config.text.vocabulary != "subset" or f"<word:{token.lower()}>" in model.tokenizer.vocabulary:
        return  # a model that was tuned before has it
    model.text = model.text.with_token(torch.arange(len(SPECIAL_ROWS), len(model.tokenizer.vocabulary)))
    model.tokenizer = model.tokenizer.with_token(token)
    model.config = dataclasses.replace(model.config, text=model.text.config)


def _name_words(tokenizer: Any, prompt: str, token: str) -> None:
    """Says what the text tower will not see of the prompt, and into what CLIP's table cuts the token."""
    encoded = tokenizer.encode([prompt, token])
    for words, what in ((encoded.cut[0], "cut off"), (encoded.unknown[0], "not known to the model")):
        if words:
            print(f"of the prompt, {', '.join(map(repr, words))} {'are' if len(words) > 1 else 'is'} {what}")
    n_tokens = encoded.lengths[1] - 2
    if n_tokens > 1:
        print(f"{token!r} is {n_tokens} tokens of CLIP's vocabulary; a rare word of one, such as sks, is clearer")


def photo_source(plan: Plan, photos: np.ndarray, parts: Parts) -> PhotoSource:
    """The photos on grey, encoded once."""
    latents = encoded(parts, composite(photos, torch.full((3,), GREY)))
    return PhotoSource(latents, plan.settings["instance_prompt"], encoded=True)


@torch.no_grad()
def encoded(parts: Parts, images: Tensor) -> Tensor:
    """Latents of images [n, 3, Hp, Wp] in [-1, 1]: the posterior's means, one image at a time.

    Not samples: training caches the means too, and a small autoencoder's posterior is wide enough to tell.
    """
    device = next(parts.vae.parameters()).device
    return torch.cat([parts.vae.encode(image[None].to(device)).cpu() for image in images])


def tune(
    plan: Plan,
    parts: Parts,
    source: Source,
    folder: Path,
    *,
    options: DreamBoothOptions | None = None,
    steps: int | None = None,
    model: Path | None = None,
    prepare: Callable[[DreamBoothTrainer], None] | None = None,
) -> int:
    """Trains (or goes on) to `steps` (default: the options') and writes `model` (default: `folder/model`).

    Args: prepare is called with a fresh trainer that has no checkpoint of its own yet.
    Returns: the exit code; there is no model yet where it is not 0.
    """
    settings, options = plan.settings, options or plan.options
    folder.mkdir(exist_ok=True)
    trainer = DreamBoothTrainer(parts, source, options)
    prompt = settings["validation_prompt"] or settings["instance_prompt"]

    def report() -> dict[str, float]:
        views = trainer.sample([prompt], 4, settings["guidance_scale"]).cpu()
        (folder / "samples").mkdir(exist_ok=True)
        run_folder.atomic_write(folder / "samples" / f"{trainer.step:06d}.png", png(sheet(views)))
        return {"val_photos": validate(trainer)}

    every = {"checkpoint_steps": settings["checkpointing_steps"], "report_steps": settings["validation_steps"]}
    loop = Loop(trainer, folder, LoopOptions(steps or options.steps, 0.0, 0.0, **every), report)
    if not loop.resume() and prepare:
        prepare(trainer)
    code = loop.run()
    if not code:
        export(plan, parts, model or folder / "model")
    return code


@torch.no_grad()
def validate(trainer: DreamBoothTrainer) -> float:
    """The denoising loss on the first photos at steps spread over the schedule, with fixed noise."""
    total, o, n_timesteps = 0.0, trainer.options, trainer.parts.config.schedule.n_timesteps
    for i in range(VALIDATION_DRAWS):
        stream = Stream(0, i, "validation/photos")
        batch = trainer.source.batch(stream, o.batch_size, 1, False)
        n = len(batch.captions)
        t = (torch.arange(n) * VALIDATION_DRAWS + i + 0.5) / (n * VALIDATION_DRAWS) * n_timesteps
        total += trainer.loss(batch, stream, 0.0, t.long()).item()
    return total / VALIDATION_DRAWS


def export(plan: Plan, parts: Parts, folder: Path) -> None:
    """Writes a plain model folder, adapters merged, in the type that the first model was stored in."""
    dtype = open_source(plan.settings["model"]).dtype("unet")
    modules = {"unet": parts.unet, "vae": parts.vae, "text": parts.text}

    def state(part: str) -> dict[str, Tensor]:
        return {name: tensor.to(dtype) for name, tensor in merged_state(owner(part, modules[part])).items()}

    vocabulary = parts.tokenizer.vocabulary
    write_folder(folder, parts.config, ((part, lambda part=part: state(part)) for part in modules), vocabulary, True)


def png(image: Any) -> bytes:
    """A PIL image as a file's content."""
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def latest(folder: Path) -> tuple[int, dict[str, Tensor], dict]:
    """A tuning's last checkpoint. Raises ModelError where there is none."""
    saved = run_folder.load_latest(folder / "checkpoints")
    if saved is None:
        raise ModelError(f"{folder} holds no checkpoint; its stage has to be run first")
    return saved
