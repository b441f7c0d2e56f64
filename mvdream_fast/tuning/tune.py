"""One tuning of a model on photos, from a settled plan to the model folder at its end.

The optimisation is dreambooth.py's; flags and folders are runs.py's.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mvdream_fast.checkpoints.manifest import owner
from mvdream_fast.checkpoints.open import Model, load_model, open_source, write_folder
from mvdream_fast.core import run_folder
from mvdream_fast.core.errors import ModelError
from mvdream_fast.core.images import GREY
from mvdream_fast.data.backgrounds import on_background
from mvdream_fast.data.batches import Source
from mvdream_fast.models.config import ModelConfig
from mvdream_fast.models.lora import add_adapters, merged_state
from mvdream_fast.models.tokenizer import SPECIAL_ROWS, check_prompt
from mvdream_fast.training.loop import Loop, LoopOptions, save_samples
from mvdream_fast.training.unet import Parts
from mvdream_fast.tuning.dreambooth import DreamBoothOptions, DreamBoothTrainer
from mvdream_fast.tuning.photos import PhotoSource


@dataclass(frozen=True)
class Plan:
    """A run as it was asked for: every number settled, and the configuration of the model that it begins from; graphs,
    whether a GPU is given CUDA graphs."""

    settings: dict[str, Any]
    config: ModelConfig
    graphs: bool = True

    @property
    def options(self) -> DreamBoothOptions:
        """The trainer's options, from the run's settings."""
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


def load_parts(plan: Plan, device: torch.device) -> Parts:
    """The model in float32, with the token's row and, where asked for, adapters."""
    settings = plan.settings
    model = load_model(settings["model"], torch.float32)
    add_token(model, settings["instance_token"])
    unet, vae, text, tokenizer = model.whole()
    _name_words(tokenizer, settings["instance_prompt"], settings["instance_token"])
    if settings["lora_rank"]:
        unet.requires_grad_(False)
        add_adapters(unet, settings["lora_rank"], settings["seed"])
    for module in (unet, vae, text):
        module.to(device)
    unet.gradient_checkpointing = settings["gradient_checkpointing"]
    return Parts(model.config, unet.train(), text.train(settings["train_text_encoder"]), vae, tokenizer)


def add_token(model: Model, token: str) -> None:
    """A row of its own for the word, in a model whose tower has a subset of CLIP's rows; the others have all of them.

    The row begins as the mean of all rows: it means nothing yet, and the frozen tower can be tuned around it.
    """
    text, tokenizer = model.words()
    if model.config.text.vocabulary != "subset" or f"<word:{check_prompt(token)}>" in tokenizer.vocabulary:
        return  # a model that was tuned before has it
    text = text.with_token(torch.arange(len(SPECIAL_ROWS), len(tokenizer.vocabulary)))
    model.text = text
    model.tokenizer = tokenizer.with_token(token)
    model.config = replace(model.config, text=text.config)


def _name_words(tokenizer: Any, prompt: str, token: str) -> None:
    """Says what the text tower will not see of the prompt, and into what CLIP's table cuts the token."""
    encoded = tokenizer.encode([prompt, token])
    for word, stand_in in encoded.replaced[0]:
        print(f"of the prompt, {word!r} was not trained on: it is read as {stand_in!r}")
    for words, what in ((encoded.cut[0], "cut off"), (encoded.unknown[0], "not known to the model")):
        if words:
            print(f"of the prompt, {', '.join(map(repr, words))} {'are' if len(words) > 1 else 'is'} {what}")
    n_tokens = encoded.lengths[1] - 2
    if n_tokens > 1:
        print(f"{token!r} is {n_tokens} tokens of CLIP's vocabulary; a rare word of one, such as sks, is clearer")


def photo_source(plan: Plan, photos: np.ndarray, parts: Parts) -> PhotoSource:
    """The photos on grey, encoded once."""
    latents = encoded(parts, on_background(photos, torch.full((3,), GREY)))
    return PhotoSource(latents, plan.settings["instance_prompt"], encoded=True)


@torch.no_grad()
def encoded(parts: Parts, images: Tensor) -> Tensor:
    """Latents of images [n, 3, Hp, Wp] in [-1, 1]: the posterior's means, one image at a time.

    Not samples: training caches the means too, and a small autoencoder's posterior is wide enough to tell.
    """
    device = next(parts.unet.parameters()).device
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
    trainer = DreamBoothTrainer(parts, source, options, plan.graphs)
    prompt = settings["validation_prompt"] or settings["instance_prompt"]

    def report() -> dict[str, float]:
        save_samples(folder, trainer.step, trainer.sample([prompt], 4, settings["guidance_scale"]))
        return trainer.validate(source, {"photos": False})

    every = {"checkpoint_steps": settings["checkpointing_steps"], "report_steps": settings["validation_steps"]}
    loop = Loop(trainer, folder, LoopOptions(steps or options.steps, 0.0, 0.0, **every), report)
    if not loop.resume() and prepare:
        prepare(trainer)
    code = loop.run()
    if not code:
        export(plan, parts, model or folder / "model")
    return code


def export(plan: Plan, parts: Parts, folder: Path) -> None:
    """Writes a plain model folder, adapters merged, in the type that the first model was stored in."""
    dtype = open_source(plan.settings["model"]).dtype("unet")
    modules = {"unet": parts.unet, "vae": parts.vae, "text": parts.text}

    def state(part: str) -> dict[str, Tensor]:
        return {name: tensor.to(dtype) for name, tensor in merged_state(owner(part, modules[part])).items()}

    words, states = parts.tokenizer, ((part, lambda part=part: state(part)) for part in modules)
    # Asked without a prompt as it was tuned, in 2D mode, it shows the subject, which guidance would lead away from.
    config = replace(parts.config, guidance=replace(parts.config.guidance, uncond_mode="3d"))
    write_folder(folder, config, states, words.vocabulary, words.stand_ins, True)


def latest(folder: Path) -> tuple[int, dict[str, Tensor], dict]:
    """A tuning's last checkpoint. Raises ModelError where there is none."""
    saved = run_folder.load_latest(folder / "checkpoints")
    if saved is None:
        raise ModelError(f"{folder} holds no checkpoint; its stage has to be run first")
    return saved
