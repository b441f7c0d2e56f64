"""The paper's ablations at the size of the embedded model: one budget for every variant, one table and one figure.

    python examples/ablations_data.py SHARDS -o DATA
    python examples/ablations.py --data DATA -o WORK [--steps 1500] [--docs docs]

As the paper starts from Stable Diffusion, a UNet that knows only single images is trained first (`--steps-2d`), on
the autoencoder and the text tower of --base (a model folder, or "embedded"), which stay as they are; every variant goes
on from it. WORK/base/model can be the --start of other runs.
Stopped and started again with the same flags, it goes on where it was; `--only` names some variants.
On a GPU, which one small model leaves idle, `--jobs` variants are trained side by side.
The table goes into DOCS/ablations.md between its two marks, the figure beside it.
"""

import argparse
import json
import math
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from mvdream_fast import evaluate, train
from mvdream_fast.checkpoints.open import load_model
from mvdream_fast.core.files import atomic_write
from mvdream_fast.core.images import to_image
from mvdream_fast.core.machine import choose_device
from mvdream_fast.core.run_folder import JsonlLog
from mvdream_fast.data.batches import ImageSource, Shards
from mvdream_fast.pipeline import MVDreamPipeline
from mvdream_fast.training.sources import source_of
from mvdream_fast.training.unet import Parts, Trainer, TrainOptions

COLUMNS = {
    "val_multi_view": "loss, multi-view",
    "val_2d": "loss, 2D",
    "azimuth_error_deg": "azimuth error (deg)",
    "azimuth_within_45": "within 45 deg",
    "hull_support": "consistency",
    "top1": "R-precision",
    "frechet": "Fréchet distance",
}
N_VIEWS = 4  # of the first variant; all others see as many images a step
VALIDATION_BATCH = 8  # scenes
BEGIN, END = "<!-- results: written by examples/ablations.py -->", "<!-- end of the results -->"
N_PROMPTS = 3
LATENTS = "latents"  # the cache that all share


def unet(view_mixing: str = "3d", camera_in: str = "time") -> tuple[str, ...]:
    """The settings of a UNet: those of the paper, but for what is named."""
    return f"unet.view_mixing={view_mixing}", f"unet.camera_in={camera_in}"


SINGLE = unet("2d", "none")


@dataclass(frozen=True)
class Variant:
    """What is changed against the first one, and the question that this answers."""

    question: str
    label: str
    settings: tuple[str, ...] = unet()
    n_views: int = N_VIEWS
    multi_view_share: float = 0.7


VARIANTS = {
    "mvdream": Variant("as published", "3D attention, camera in the time embedding, 30 % 2D, 4 views"),
    "attention-2d": Variant("how views meet", "2D attention only", unet(view_mixing="2d")),
    "attention-temporal": Variant(
        "how views meet", "2D attention, then attention over the views at each pixel", unet(view_mixing="temporal")
    ),
    "camera-text": Variant("where the camera goes", "camera as a text token", unet(camera_in="text")),
    "camera-attention": Variant(
        "where the camera goes", "camera in queries, keys and values", unet(camera_in="attention")
    ),
    "camera-none": Variant("where the camera goes", "no camera", unet(camera_in="none")),
    "no-2d": Variant("what the 2D share does", "multi-view steps only", multi_view_share=1.0),
    "views-2": Variant("how many views", "2 views a scene", n_views=2),
    "views-1": Variant("how many views", "1 view a scene", n_views=1),
}


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of shards, some of them held out")
    parser.add_argument("--start", help="2D model that all start from (default: it is trained first)")
    parser.add_argument("--base", default="embedded", help="model whose autoencoder and text tower all share")
    parser.add_argument("--config", default="mini", help="configuration of the UNet that is varied")
    parser.add_argument("-o", "--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--docs", type=Path, help="folder of ablations.md and its figure (default: OUT)")
    parser.add_argument("--steps", type=int, default=1500, help="updates of each variant")
    parser.add_argument("--steps-2d", type=int, default=2000, help="updates of the 2D model that all start from")
    parser.add_argument("--batch-size", type=int, default=8, help=f"scenes an update, of {N_VIEWS} images")
    parser.add_argument("--only", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--timestep-shift", type=float, default=3.0, help="of every training; cameras decide in noise")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--lr-2d", type=float, default=1e-3)
    parser.add_argument("--prompts", nargs="+", help=f"of the figure (default: the first {N_PROMPTS} captions)")
    parser.add_argument("--guidance-scale", type=float, default=5.0)
    parser.add_argument("--sampling-steps", type=int, default=25, help="of the figure and the evaluator")
    parser.add_argument("--quick", action="store_true", help="evaluate on 12 captions instead of 40")
    parser.add_argument("--no-evaluator", dest="evaluator", action="store_false", help="losses and the figure alone")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="arithmetic of the training")
    parser.add_argument("--jobs", type=int, default=1, help="variants that are trained and judged at once")
    parser.add_argument("--threads", type=int, help="CPU threads of each")
    args = parser.parse_args(argv)
    captions = (record.meta["caption"] for record in held_out(args.data).records)
    args.prompts = args.prompts or list(dict.fromkeys(captions))[:N_PROMPTS]
    return args


def held_out(data: Path) -> Shards:
    """The renders that no variant sees."""
    return Shards(data, "held_out")


def train_2d(args: argparse.Namespace) -> Path:
    """Trains the model of single images, or what is left of it. Returns its folder, or --start."""
    if args.start:
        return Path(args.start)
    flags = common_flags(args, "base", args.steps_2d, args.lr_2d, ema=0.998)
    return train_once(replace(flags, config=args.config, vae=args.base, text=args.base, batch_size=args.batch_size,
                              settings=SINGLE, multi_view_share=0.0), budget_2d(args))  # fmt: skip


def budget_2d(args: argparse.Namespace) -> dict[str, object]:
    """All that decides the weights of the model of single images, but for the data."""
    names = ("steps_2d", "lr_2d", "batch_size", "timestep_shift", "dtype", "config", "base", "start")
    return {name: getattr(args, name) for name in names}


def train_variant(args: argparse.Namespace, name: str, start: Path) -> Path:
    """Trains a variant from the 2D model, or what is left of it. Returns its model folder."""
    variant = VARIANTS[name]
    flags = common_flags(args, name, args.steps, args.lr, ema=0.99)
    n_views, share = variant.n_views, variant.multi_view_share
    flags = replace(flags, init=str(start), settings=variant.settings, n_views=n_views, multi_view_share=share,
                    batch_size=args.batch_size * N_VIEWS // n_views,
                    workers=1 if args.jobs > 1 else None)  # fmt: skip
    return train_once(flags, {"steps": args.steps, "lr": args.lr} | budget_2d(args))


def common_flags(args: argparse.Namespace, name: str, steps: int, lr: float, ema: float) -> train.Flags:
    return train.Flags(
        data=args.data, output=args.out / name, freeze_text=True, cache_latents=True, latents=args.out / LATENTS,
        steps=steps, lr=lr, warmup=min(100, steps // 4), decay=steps // 5, ema=ema, timestep_shift=args.timestep_shift,
        sheet_minutes=0.0, sheet_prompts=tuple(args.prompts), sheet_guidance=args.guidance_scale, threads=args.threads,
        dtype=args.dtype, device=None if args.device == "auto" else args.device,
    )  # fmt: skip


def train_once(flags: train.Flags, budget: dict[str, object]) -> Path:
    """Trains, or finishes a run that was stopped; does nothing where it is done. Returns its model.

    A folder keeps to the budget that it was begun with: a checkpoint of another start would be neither.
    """
    kept, done = flags.output / "budget.json", flags.output / "done"
    if kept.exists() and json.loads(kept.read_text()) != budget:
        raise SystemExit(f"{flags.output} was begun with another budget; name another folder with -o")
    if not done.exists():
        flags.output.mkdir(parents=True, exist_ok=True)
        atomic_write(kept, json.dumps(budget))
        train.main(replace(flags, resume=(flags.output / "checkpoints" / "LATEST").exists()))
        done.touch()
    return flags.output / "model"


def scores(args: argparse.Namespace, name: str, model: Path) -> dict:
    """The measures of a variant, kept beside it."""
    path = args.out / name / "scores.json"
    if not path.exists():
        records = JsonlLog(args.out / name / "log.jsonl").read()
        seconds = [r["seconds_per_step"] for r in records if "seconds_per_step" in r]
        spent = {"minutes": args.steps * sum(seconds) / max(len(seconds), 1) / 60}
        atomic_write(path, json.dumps(spent | validation(args.data, model) | judged(args, model)))
    return json.loads(path.read_text())


def validation(data: Path, folder: Path) -> dict[str, float]:
    """The loss in both modes on held-out renders; four views for all, however many a variant was trained with."""
    model, source = load_model(folder, torch.float32), ImageSource(held_out(data))
    parts = Parts(model.config, model.unet, model.text, model.vae, model.tokenizer)
    return Trainer(parts, source, TrainOptions(batch_size=VALIDATION_BATCH, n_views=N_VIEWS)).validate(source)


def judged(args: argparse.Namespace, model: Path) -> dict:
    """What the evaluator says of four views of the held-out captions, and of their renders; nothing if it isn't asked.

    The fixed prompts are about other objects: those of the figure stand in.
    """
    if not args.evaluator:
        return {}
    with tempfile.TemporaryDirectory() as folder:
        report, prompts = Path(folder) / "report.json", Path(folder) / "prompts.txt"
        prompts.write_text("\n".join(args.prompts) + "\n", encoding="utf-8")
        evaluate.main(evaluate.Flags(
            targets=(str(model),), json=report, data=args.data, prompts=prompts, seeds=1, quick=args.quick, quiet=True,
            steps=args.sampling_steps, guidance_scale=args.guidance_scale, device=args.device, threads=args.threads,
        ))  # fmt: skip
        found = json.loads(report.read_text())["models"][str(model)]
        return found["held_out"] | {"real": found["real"]}


def table(args: argparse.Namespace, results: dict[str, dict]) -> str:
    """Markdown: a row for each variant, the same budget for all."""
    each = args.batch_size * N_VIEWS
    minutes = [r["minutes"] for r in results.values()]
    head = ["question", "variant", *COLUMNS.values()]
    measured = {(VARIANTS[name].question, VARIANTS[name].label): found for name, found in results.items()}
    measured["", "real renders"] = next(iter(results.values())).get("real", {})
    rows = [[*name, *(_figure(found.get(key)) for key in COLUMNS)] for name, found in measured.items()]
    lines = [" | ".join(row) for row in (head, ["---"] * len(head), *rows)]
    start = "" if args.start else f" of {args.steps_2d * each:,} images"
    budget = (
        f"From one 2D model{start}: {args.steps} steps of {each} images each ({args.steps * each:,} images; "
        f"{min(minutes):.1f} to {max(minutes):.1f} minutes a variant"
        f"{f', {args.jobs} at once' if args.jobs > 1 else ''}), {time.strftime('%Y-%m-%d')}."
    )
    return "\n".join([budget, "", *(f"| {line} |" for line in lines), "", "![four views of each](ablations.png)"])


def _figure(value: float | None) -> str:
    return "" if value is None or not math.isfinite(value) else f"{value:.3g}"


def views(args: argparse.Namespace, name: str, model: Path) -> Path:
    """Draws four views of each prompt, side by side, beside a variant. Returns the file."""
    path = args.out / name / "views.png"
    if not path.exists():
        pipeline = MVDreamPipeline.from_pretrained(model, args.device)
        how = {"n_steps": args.sampling_steps, "guidance_scale": args.guidance_scale, "seed": 0}
        drawn = pipeline(args.prompts, N_VIEWS, **how, warn=lambda _: None)
        strip = torch.cat([view for scene in drawn for view in scene.tensor], dim=2)  # [3, s, n * V * s]
        to_image(strip).save(path)
    return path


def figure(files: dict[str, Path]) -> Image.Image:
    """The views of each variant in a row, its name above."""
    rows = []
    for name, path in files.items():
        pixels = Image.open(path)
        row = Image.new("RGB", (pixels.width, pixels.height + 14), "white")
        row.paste(pixels, (0, 14))
        ImageDraw.Draw(row).text((2, 1), f"{name}: {VARIANTS[name].label}", fill="black")
        rows.append(row)
    whole = Image.new("RGB", (rows[0].width, sum(row.height for row in rows)))
    for k, row in enumerate(rows):
        whole.paste(row, (0, k * row.height))
    return whole


def write(path: Path, text: str) -> None:
    """Puts the results between the marks of a page, or makes a page of them alone."""
    page = path.read_text(encoding="utf-8") if path.exists() else f"# Ablations\n\n{BEGIN}\n{END}\n"
    before, _, rest = page.partition(BEGIN)
    _, mark, after = rest.partition(END)
    if not mark:
        raise SystemExit(f"{path} must hold the lines {BEGIN} and {END}; put them where the results belong")
    atomic_write(path, f"{before}{BEGIN}\n{text}\n{END}{after}")


def trained_and_judged(args: argparse.Namespace, start: Path, name: str) -> tuple[Path, dict]:
    """The drawn views of a variant and its measures."""
    print(f"{name}: {VARIANTS[name].label}", flush=True)
    model = train_variant(args, name, start)
    drawn, found = views(args, name, model), scores(args, name, model)
    print(
        f"{name}: " + " ".join(f"{key} {found[key]:.4g}" for key in ("minutes", *COLUMNS) if key in found), flush=True
    )
    return drawn, found


def fill_latents(args: argparse.Namespace, start: Path) -> None:
    """Encodes all views before several processes read them, which may not make the cache's files at once."""
    model = load_model(start, torch.float32, ("vae",))
    device = choose_device(args.device)
    source_of(args.out / LATENTS, model.config, model.vae.to(device), Shards(args.data), device).fill()


@contextmanager
def mapping(jobs: int) -> Iterator[Callable]:
    """`map`, or the same with so many processes; spawned, as a forked one could not use the GPU."""
    if jobs == 1:
        yield map
    else:
        with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
            yield pool.map


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    docs = args.docs or args.out
    start = train_2d(args)
    if args.jobs > 1:
        fill_latents(args, start)
    with mapping(args.jobs) as each:
        found = dict(zip(args.only, each(partial(trained_and_judged, args, start), args.only)))
    docs.mkdir(parents=True, exist_ok=True)
    figure({name: drawn for name, (drawn, _) in found.items()}).save(docs / "ablations.png")
    write(docs / "ablations.md", table(args, {name: measures for name, (_, measures) in found.items()}))
    print(docs / "ablations.md")


if __name__ == "__main__":
    main()
