"""A training run from its flags: parts, sources, loop, sample sheets, and the model folder at the end.

The optimisations themselves are unet.py and vae.py.
"""

import copy
import dataclasses
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from mvdream_fast.checkpoints.open import Model, load_model, needed, save_model
from mvdream_fast.core import machine, run_folder
from mvdream_fast.core.errors import ArgumentError, DivergedError, InputFileError
from mvdream_fast.core.process_watch import watched
from mvdream_fast.core.processes import ALONE, Ranks, is_first, join, launched, leave, meeting_place
from mvdream_fast.core.rng import Stream
from mvdream_fast.data.batches import HELD_OUT, PICTURES, ImageSource, Shards
from mvdream_fast.data.shards import find_shards
from mvdream_fast.evaluation.classifier import is_installed, load_classifier
from mvdream_fast.evaluation.evaluator import Evaluator, EvaluatorConfig, load_evaluator, save_evaluator
from mvdream_fast.evaluation.reference import measure
from mvdream_fast.guidance.prompts import VIEW_WORDS
from mvdream_fast.models.vae import VAE
from mvdream_fast.training.cleaner import CLEANER_WIDTH, CleanerTrainer
from mvdream_fast.training.evaluator import (
    PATCH,
    Degradation,
    EvaluatorOptions,
    EvaluatorSource,
    EvaluatorTrainer,
    check_renders,
)
from mvdream_fast.training.flags import Flags
from mvdream_fast.training.initial_model import adjusted, initial_model, new_model, vocabulary_rows
from mvdream_fast.training.loop import Loop, LoopOptions, check_figures, save_samples
from mvdream_fast.training.matting import MATTING_WIDTH, MattingTrainer
from mvdream_fast.training.request import check_views, output_folder
from mvdream_fast.training.sharing import check_ranks, share_group
from mvdream_fast.training.sources import mixed_source
from mvdream_fast.training.touched import TouchedOptions, with_network
from mvdream_fast.training.unet import Parts, Trainer, TrainOptions
from mvdream_fast.training.update import check_same_kind
from mvdream_fast.training.vae import (
    Linear,
    VAEOptions,
    VAETrainer,
    linear_start,
    measure_scale,
    reconstruction,
    settle,
)

N_FIT, N_CHECK = 512, 256  # images for the linear bound and the latent scale; held-out images for the PSNR
SHEET_PROMPTS = 8
HALF_MAX = torch.finfo(torch.float16).max

NETWORKS = {"cleaner": (CleanerTrainer, CLEANER_WIDTH), "matting": (MattingTrainer, MATTING_WIDTH)}
PASSING = ("output", "resume", "device", "graphs", "threads", "workers", "given")  # not what a run is


def run_stage(args: Flags) -> int:
    """Trains as the flags say, once they are settled (request.py), and writes `output/model`; returns the exit code."""
    shards = Shards(args.data)
    check_ranks(args, launched()[0], shards)
    held_out = _beside(args.data, HELD_OUT)
    check_views(args, shards, held_out)
    folder = output_folder(args)
    if args.resume:  # before the record says that the run is of this stage
        check_same_kind(run_folder.load_latest_meta(folder / "checkpoints") or {}, f"train-{args.stage}")
    if not is_first():
        return _train(args, folder, shards, held_out)
    with run_folder.locked(folder):
        if not args.resume:
            _forget(folder)
        settings = {name: x for name, x in dataclasses.asdict(args).items() if name not in PASSING}
        record, where = {"kind": "training", "settings": settings}, {"device": str(_device(args))}
        run_folder.write_record(folder, "train", record, "checkpoints", anew=not args.resume, **where,
                                processes=launched()[0])  # fmt: skip
        return _train(args, folder, shards, held_out)


def _forget(folder: Path) -> None:
    """Removes what a run that died before its first checkpoint has logged: another one begins in its folder."""
    shutil.rmtree(folder / "samples", ignore_errors=True)
    (folder / "log.jsonl").unlink(missing_ok=True)


def _train(args: Flags, folder: Path, shards: Shards, held_out: Shards | None) -> int:
    if args.stage != "unet":
        stage = {"vae": _train_vae, "evaluator": _train_evaluator}.get(args.stage, _train_network)
        return stage(args, folder, shards, held_out)
    ranks = join()
    with watched(ranks, meeting_place()):
        code = _train_unet(args, folder, shards, held_out, ranks)
    leave(ranks)
    return code


def _beside(data: Path, split: str) -> Shards | None:
    """A split that need not be there."""
    return Shards(data, split) if find_shards(data, split) else None


def _near(shards: Shards, size: int) -> Shards:
    """The same at `size` pixels where that can be, else as they are."""
    return shards if shards.size % size else shards.at(size)


def _device(args: Flags) -> torch.device:
    """The device that is named, or a GPU; each process of a machine has a GPU of its own."""
    device = machine.choose_device(args.device)
    world, _, local = launched()
    if world > 1 and device == torch.device("cuda"):
        torch.cuda.set_device(local)
        return torch.device("cuda", local)
    return device


def _workers(args: Flags, device: torch.device) -> int:
    """Processes that draw batches. A CPU is busy with the model itself; a GPU would wait for the images."""
    if args.workers is not None:
        return args.workers
    free = machine.available_cores() // launched()[1] - 1
    return max(0, min(8, free)) if device.type == "cuda" else 0


def _given(args: Flags) -> dict:
    """The flags that were given of those that a stage's options have other defaults for."""
    names = ("batch_size", "lr", "warmup", "ema")
    return {name: value for name in names if (value := getattr(args, name)) is not None}


def _run(trainer, folder: Path, args: Flags, report: Callable[[], dict[str, float]], ranks: Ranks = ALONE) -> int:
    """The loop to its end, from the latest checkpoint on where that is asked for; its exit code."""
    loop = Loop(trainer, folder, _loop_options(args), report, ranks)
    if args.resume:
        loop.resume()
    return loop.run()


def _checked_images(shards: Shards, held_out: Shards | None, size: int) -> Tensor:
    """Images that an autoencoder is measured on, [N_CHECK, 3, size, size] in [-1, 1]."""
    return ImageSource((held_out or shards).at(size)).images(Stream(0, 0, "vae/check"), N_CHECK)


def _train_vae(args: Flags, folder: Path, shards: Shards, held_out: Shards | None) -> int:
    if args.init:
        model = adjusted(load_model(args.init, torch.float32), args.settings, args.seed)
    else:
        model = new_model(args.config, vocabulary_rows(args, folder, shards.captions()), args.seed, args.settings)
    vae = needed(model.vae, "vae")
    if not isinstance(vae, VAE):
        raise ArgumentError(f"--stage vae needs a model with an autoencoder, got {model.config.name}")
    size = model.config.vae.image_size
    source = ImageSource(shards.at(size))
    fit = source.images(Stream(args.seed, 0, "vae/fit"), N_FIT)
    check = _checked_images(shards, held_out, size)
    linear = Linear.fit(fit, model.config.vae.downsampling)
    bound = linear.bound(check, model.config.vae.latent_channels)
    if not args.init and len(model.config.vae.block_out_channels) == 1:
        try:
            linear_start(vae, linear)
        except ValueError as error:
            raise ArgumentError(f"--set must leave the autoencoder room to begin: {error}") from error
    device = _device(args)
    vae.to(device).train()
    options = VAEOptions(steps=args.steps, seed=args.seed, decoder_only=args.decoder_only, **_given(args))
    trainer = VAETrainer(model.config, vae, source, options, _workers(args, device), args.graphs)
    check = check.to(trainer.device)

    def report() -> dict[str, float]:
        with trainer.averaged():
            both = torch.cat([check[:8], vae.decode(vae.encode(check[:8])).clamp(-1, 1)]).unflatten(0, (2, 8))
            save_samples(folder, trainer.step, both / 2 + 0.5)
            return {"psnr_held_out": reconstruction(vae, check), "psnr_linear_bound": bound}

    code = _run(trainer, folder, args, report)
    with trainer.averaged():
        scale = vae.config.scale_factor if args.decoder_only else measure_scale(vae, fit.to(trainer.device))
        model.config = replace(model.config, vae=replace(model.config.vae, scale_factor=scale))
        settle(vae)
        model.vae = vae.cpu()
        save_model(model, folder / "model", overwrite=True)
    return code


def _train_network(args: Flags, folder: Path, shards: Shards, held_out: Shards | None) -> int:
    """The network of the decoder that the stage names, and nothing else of --init; a new one where there is none."""
    part, kind, width = args.stage, *NETWORKS[args.stage]
    if args.init is None:
        raise ArgumentError(f"--stage {part} must come with --init, which the record of {folder} does not name")
    model = with_network(load_model(args.init, torch.float32), part, width, args.seed)
    unet, vae, text, tokenizer = model.whole()
    if not isinstance(vae, VAE):
        raise ArgumentError(f"--stage {part} needs a model with an autoencoder, got {model.config.name}")
    device = _device(args)
    for module in (unet, vae, text):
        module.to(device)
    size = model.config.vae.image_size
    options = TouchedOptions(steps=args.steps, n_views=args.n_views, seed=args.seed, **_given(args))
    parts = Parts(model.config, unet, text, vae, tokenizer)
    trainer = kind(parts, vae, ImageSource(shards.at(size)), options)
    check = _checked_images(shards, held_out, size).to(device)

    def report() -> dict[str, float]:
        with trainer.averaged():
            rows, errors = trainer.checked()
            save_samples(folder, trainer.step, rows)
            return {"psnr_held_out": reconstruction(vae, check), **errors}

    code = _run(trainer, folder, args, report)
    with trainer.averaged():
        model.vae = vae.cpu()
        save_model(model, folder / "model", overwrite=True)
    return code


def _train_unet(args: Flags, folder: Path, shards: Shards, held_out: Shards | None, ranks: Ranks) -> int:
    pictures = _beside(args.data, PICTURES)
    texts = [*dict.fromkeys(text for split in (shards, pictures) if split for text in split.captions())]
    texts += VIEW_WORDS if args.view_words else ()
    model = initial_model(args, folder, texts)
    unet, vae, text, tokenizer = model.whole()
    unknown = tokenizer.encode(texts).unknown
    words = sorted({word for found in unknown for word in found})
    if words and ranks.first:
        print(f"{len(words)} words of the captions are outside the vocabulary: {', '.join(words[:8])}", flush=True)
    device = _device(args)
    for module in (unet, vae, text):
        module.to(device)
    unet.gradient_checkpointing = args.gradient_checkpointing
    parts = Parts(model.config, unet.train(), text.train(), vae, tokenizer)
    cache = (args.latents or folder / "latents") if args.cache_latents else None
    workers = _workers(args, device)
    for turn in range(2):  # the first process makes the cache's files, then the others open them
        if ranks.first == (turn == 0):
            source = mixed_source(cache, parts, shards.balanced(args.balance), pictures, workers, args.view_words)
        ranks.wait()
    trainer = Trainer(parts, source, _options(args), ranks, share_group(args, ranks.world), workers, args.graphs)
    validation = ImageSource((held_out or shards).at(parts.config.vae.image_size))
    prompts = list(args.sheet_prompts) or _sheet_prompts(shards, held_out)

    def report() -> dict[str, float]:
        with trainer.averaged():
            if not ranks.first:
                return {}
            figures = trainer.validate(validation)
            check_figures(trainer.step, figures)
            images = trainer.sample(prompts, args.n_views, args.sheet_guidance)
            save_samples(folder, trainer.step, images)
            (folder / "samples" / "prompts.txt").write_text("\n".join(prompts) + "\n", encoding="utf-8")
            _export(model, folder / "model")
            return figures

    code = _run(trainer, folder, args, report, ranks)
    if code:  # stopped without a last report
        with trainer.averaged():
            if ranks.first:
                _export(model, folder / "model")
    return code


def _train_evaluator(args: Flags, folder: Path, shards: Shards, held_out: Shards | None) -> int:
    """The evaluator, and what real renders score in its eyes: all of weights/evaluator but the prompts."""
    if held_out is None:
        raise InputFileError(f"no held-out shards in {args.data}; the evaluator's accuracy is measured on them")
    check_renders(held_out)
    vocabulary = vocabulary_rows(args, folder, shards.captions())
    torch.manual_seed(args.seed)
    config = EvaluatorConfig(vocabulary_size=len(vocabulary))
    shards, held_out = (_near(split, config.image_size) for split in (shards, held_out))
    device = _device(args)
    evaluator = Evaluator(config, vocabulary).to(device)
    fit = ImageSource(shards).images(Stream(args.seed, 0, "evaluator/fit"), N_FIT)
    options = EvaluatorOptions(steps=args.steps, seed=args.seed, **_given(args))
    degradation = Degradation(Linear.fit(fit, PATCH), config.image_size)
    trainer = EvaluatorTrainer(evaluator, EvaluatorSource(shards), degradation, options, _workers(args, device))

    def report() -> dict[str, float]:
        with trainer.averaged():
            _check_halves("evaluator", evaluator)
            save_evaluator(evaluator, folder / "model")
        saved = load_evaluator(folder / "model")  # measured as it ships: in half precision
        reference = measure(saved, shards, held_out, load_classifier() if is_installed() else None)
        saved.about = {"steps": trainer.step, "seed": args.seed, "orbits": len(shards), "held_out": reference.scores}
        check_figures(trainer.step, reference.scores)
        save_evaluator(saved, folder / "model")
        reference.save(folder / "model")
        return reference.scores

    return _run(trainer, folder, args, report)


def _options(args: Flags) -> TrainOptions:
    return TrainOptions(
        n_views=args.n_views,
        steps=args.steps,
        decay=args.decay,
        multi_view_share=args.multi_view_share,
        wide_share=args.wide_share,
        caption_dropout=args.caption_dropout,
        timestep_shift=args.timestep_shift,
        data_order=args.data_order,
        accumulate=args.accumulate,
        weighting=args.weighting,
        train_text=not args.freeze_text,
        autocast="none" if args.dtype == "fp32" else args.dtype,
        seed=args.seed,
        **_given(args),
    )


def _loop_options(args: Flags) -> LoopOptions:
    return LoopOptions(args.steps, args.checkpoint_minutes, args.sheet_minutes, rate_flag="--lr")


def _sheet_prompts(shards: Shards, held_out: Shards | None) -> list[str]:
    """Captions spread over the data: the last quarter held out, the others trained on."""
    n_new = SHEET_PROMPTS // 4 if held_out else 0
    out = []
    for source, n in ((shards, SHEET_PROMPTS - n_new), (held_out or shards, n_new)):
        out += [source.records[int((k + 0.5) * len(source) / n)].meta["caption"] for k in range(n)]
    return out


def _export(model: Model, folder: Path) -> None:
    """Writes the weights as a model folder in fp16. Raises DivergedError where that cannot hold them."""
    halves = {part: copy.deepcopy(getattr(model, part)).cpu().half() for part in ("unet", "vae", "text")}
    for part, module in halves.items():
        _check_halves(part, module)
    save_model(Model(model.config, tokenizer=model.tokenizer, **halves), folder, overwrite=True)


def _check_halves(part: str, module: nn.Module) -> None:
    """Raises DivergedError, naming the first of a module's weights that is too large for half precision."""
    for name, weight in module.state_dict().items():
        if not weight.half().isfinite().all():
            raise DivergedError(f"{name} of the {part} is beyond half precision's {HALF_MAX:g}")
