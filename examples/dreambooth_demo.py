"""DreamBooth on objects that the embedded model never saw: does it take their identity in, and what does it forget?

    python examples/dreambooth_demo.py SHARDS [--out dreambooth_demo] [--model embedded]

SHARDS is what `python -m mvdream_fast.render sweethome3d` writes. For each of three held-out objects, four renders from
random cameras are the photos; another orbit of the object is kept to judge by. The model is tuned on the photos, an
asset is made from the tuned and from the untuned model, and both are compared with the object. For the first object the
preservation weight is varied and DreamBooth3D's three-stage way is taken too. Writes table.md, figures.json and
comparison.png. What is there already is not made again, so that a stopped run goes on.
"""

import argparse
import dataclasses
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from mvdream_fast import dreambooth
from mvdream_fast.camera import Cameras, orbit_cameras
from mvdream_fast.checkpoints.open import load_model, open_source
from mvdream_fast.core.cli import set_threads
from mvdream_fast.core.images import GREY, to_image
from mvdream_fast.core.rng import Stream
from mvdream_fast.data.backgrounds import on_background
from mvdream_fast.data.batches import ImageSource, Shards
from mvdream_fast.evaluation import measures as ev
from mvdream_fast.evaluation.evaluator import EVALUATOR_FOLDER, Evaluator, load_evaluator
from mvdream_fast.evaluation.judging import read_prompts
from mvdream_fast.evaluation.reference import DISTANCE, ELEVATION_DEG, FOVY_DEG
from mvdream_fast.pipeline import MVDreamPipeline
from mvdream_fast.scene.asset import Asset
from mvdream_fast.text_to_3d import TextTo3D
from mvdream_fast.training.unet import Parts, Trainer, TrainOptions
from mvdream_fast.tuning import runs
from mvdream_fast.tuning.dreambooth3d import PseudoViews

SUBJECTS = {"scopia-simple-sofa-simple-sofa": "sofa", "katorlegaz-scooter-scooter": "scooter",
            "blendswap-cc-0-osakachair-osakachair": "chair"}  # fmt: skip
N_PHOTOS, N_SEEDS = 4, 4
KINDS = {"max_train_steps": int, "learning_rate": float, "train_text_encoder": bool, "lora_rank": int}  # --tuning


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", type=Path)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--evaluator", type=Path, default=EVALUATOR_FOLDER, help="folder of the evaluator")
    parser.add_argument("--prompts", type=Path, help="the other prompts (default: the evaluator's fixed list)")
    parser.add_argument("--out", type=Path, default=Path("dreambooth_demo"))
    parser.add_argument("--lambdas", type=float, nargs="+", default=[0, 1, 3000], help="of the first object's tunings")
    parser.add_argument("--preset", default="fast", help="of the assets")
    parser.add_argument("--sds-steps", type=int, help="default: the preset's")
    parser.add_argument("--tuning", nargs="*", default=[], metavar="NAME=VALUE", help="other flags of the tuning")
    parser.add_argument("--sampling-steps", type=int, default=20, help="of sampled views")
    parser.add_argument("--guidance-scale", type=float, help="of sampled views (default: the model's own)")
    parser.add_argument("--objects", type=int, default=len(SUBJECTS), help="how many of the three")
    parser.add_argument("--no-stages", action="store_true", help="leave out DreamBooth3D")
    parser.add_argument("--threads", type=int)
    return parser.parse_args()


@dataclass(frozen=True)
class Subject:
    """One held-out object: its photos' folder, and another orbit of it, [V, 3, s, s] in [0, 1], with its cameras."""

    key: str
    noun: str
    photos: Path
    orbit: Tensor
    cameras: Cameras

    @property
    def prompt(self) -> str:
        return f"a photo of a sks {self.noun}"


def prepare(shards: Shards, key: str, noun: str, folder: Path) -> Subject:
    """The object's first orbit is for judging; photos are drawn from the other unpainted ones."""
    orbits = [i for i, r in enumerate(shards.records) if r.meta["id"] == key and not r.meta["painted"]]
    if len(orbits) < 2:
        raise SystemExit(f"{key} must have two unpainted orbits in the held-out shards, got {len(orbits)}")
    folder.mkdir(parents=True, exist_ok=True)
    stream = Stream(0, 0, f"photos of {key}")
    for k in range(N_PHOTOS):
        views = shards.views(orbits[1 + int(stream.integers(0, len(orbits) - 1))])
        Image.fromarray(views[int(stream.integers(0, len(views)))]).save(folder / f"{k}.png")
    meta = shards.records[orbits[0]].meta
    cameras = Cameras(torch.tensor(meta["c2w"]).reshape(-1, 4, 4), torch.tensor(meta["fovy"]))
    return Subject(key, noun, folder, on_background(shards.views(orbits[0]), torch.full((3,), GREY)) / 2 + 0.5, cameras)


def tune(args: argparse.Namespace, subject: Subject, folder: Path, **more) -> float:
    """A run of the dreambooth command in `folder`, unless it is there; returns its seconds."""
    note = folder.parent / f"{folder.name}.seconds"  # the name may have a point in it
    if not note.exists():
        flags = dreambooth.Flags(
            instance_data_dir=subject.photos, instance_prompt=subject.prompt, model=args.model, output=folder,
            threads=args.threads,
        )  # fmt: skip
        given = dict(pair.split("=") for pair in args.tuning)
        more = {name: KINDS[name](value) for name, value in given.items()} | more
        if (folder / "config.json").exists():
            flags = dataclasses.replace(flags, resume_from_checkpoint="latest")
        start = time.perf_counter()
        code = runs.run_flags(dataclasses.replace(flags, **more))
        if code:
            raise SystemExit(code)
        note.write_text(f"{time.perf_counter() - start:.1f}")
    return float(note.read_text())


def grow(args: argparse.Namespace, model: str, prompt: str, path: Path) -> Asset:
    """Score distillation of the prompt, unless its asset is there."""
    if not path.exists():
        print(f"{path}: {prompt}", flush=True)
        steps = {"steps": args.sds_steps} if args.sds_steps else {}
        path.parent.mkdir(parents=True, exist_ok=True)
        pipeline = MVDreamPipeline.from_pretrained(model)
        TextTo3D(pipeline)(prompt, args.preset, checkpoints=path.with_suffix(".ckpt"), **steps).save(path)
    return Asset.load(path)


@torch.no_grad()
def sample(args: argparse.Namespace, model: str, prompts: list[str], seed: int = 0) -> Tensor:
    """Four views of each prompt, [n, 4, 3, s, s]."""
    pipeline = MVDreamPipeline.from_pretrained(model)
    rows = []
    for k in range(0, len(prompts), 4):
        views = pipeline(
            prompts[k : k + 4], n_steps=args.sampling_steps, guidance_scale=args.guidance_scale, seed=seed + k,
            suffix="", warn=lambda _: None,
        )  # fmt: skip
        rows += [view.tensor for view in views]
    return torch.stack(rows)


@torch.no_grad()
def likeness(evaluator: Evaluator, views: Tensor, subject: Subject) -> float:
    """Cosine of the evaluator's image embeddings: of views [V, 3, s, s] and of the object's own orbit."""
    a, b = evaluator.embed_views(views[None]), evaluator.embed_views(subject.orbit[None])
    return float((a * b).sum())


def aligned_psnr(renders: Tensor, orbit: Tensor) -> float:
    """The best over turns: views of an orbit are evenly spaced, so a turn by one view's angle is a roll."""
    errors = [(renders.roll(k, 0) - orbit).square().mean() for k in range(len(orbit))]
    return float(-10 * torch.log10(torch.stack(errors).min()))


def judge_asset(evaluator: Evaluator, asset: Asset, subject: Subject) -> dict[str, float]:
    renders = asset.render(subject.cameras, subject.orbit.shape[-1]).rgb.clamp(0, 1)
    return {"similarity": likeness(evaluator, renders, subject), "psnr": aligned_psnr(renders, subject.orbit)}


def judge_samples(args: argparse.Namespace, evaluator: Evaluator, model: str, prompt: str, subject: Subject) -> dict:
    """Identity and agreement of the views, over a few seeds."""
    views = sample(args, model, [prompt] * N_SEEDS)
    cameras = orbit_cameras(4, ELEVATION_DEG, 0.0, 360.0, DISTANCE, FOVY_DEG)
    hulls = [ev.hull_support(ev.silhouettes(four), cameras) for four in views]
    return {
        "similarity": sum(likeness(evaluator, four, subject) for four in views) / len(views),
        "consistency": sum(hulls) / len(hulls),
    }


def forgetting(args: argparse.Namespace, evaluator: Evaluator, model: str, train: Shards, prompts: list[str]) -> dict:
    """The denoising loss on the training set, and how often other prompts' views are told apart."""
    whole = load_model(model, torch.float32)
    parts = Parts(whole.config, whole.unet, whole.text, whole.vae, whole.tokenizer)
    losses = Trainer(parts, ImageSource(train), TrainOptions(ema=0.0)).validate(ImageSource(train))
    views = sample(args, model, prompts)
    with torch.no_grad():
        similarity = evaluator.embed_views(views) @ evaluator.embed_text(prompts).T
    return {**losses, "r_precision": float(ev.top1(similarity, torch.arange(len(prompts))).float().mean())}


def comparison(rows: list[tuple[Tensor, ...]]) -> Image.Image:
    """Rows of groups of views; a white gap between the groups."""
    lines = []
    for groups in rows:
        gap = torch.ones(3, groups[0].shape[-2], 8)
        lines.append(torch.cat([x for group in groups for x in (*group.clamp(0, 1), gap)][:-1], dim=2))
    wide = max(line.shape[2] for line in lines)
    lines = [torch.nn.functional.pad(line, (0, wide - line.shape[2]), value=1.0) for line in lines]
    return to_image(torch.cat(lines, 1))


def table(figures: dict) -> str:
    out = ["| object | model | views: similarity | views: consistency | asset: similarity | asset: PSNR | tuning |",
           "|---|---|---|---|---|---|---|"]  # fmt: skip
    for noun, models in figures["identity"].items():
        for name, f in models.items():
            seconds = f"{f['seconds']:.0f} s" if f.get("seconds") else ""
            views, asset = f["views"], f.get("asset", {})
            cells = [f"{views['similarity']:.3f}", f"{views['consistency']:.3f}"]
            cells += [f"{asset[key]:.{n}f}" if key in asset else "" for key, n in (("similarity", 3), ("psnr", 2))]
            out.append(f"| {noun} | {name} | {' | '.join(cells)} | {seconds} |")
    out += ["", "| model | multi-view loss | 2D loss | R-precision | views: similarity |", "|---|---|---|---|---|"]
    for name, f in figures["forgetting"].items():
        similarity = f"{f['similarity']:.3f}" if "similarity" in f else ""
        out.append(
            f"| {name} | {f['val_multi_view']:.4f} | {f['val_2d']:.4f} | {f['r_precision']:.3f} | {similarity} |"
        )
    return "\n".join(out) + "\n"


class Figures:
    """Figures that are kept in a file as they come, and not measured twice."""

    def __init__(self, path: Path):
        self.path = path
        self.data = json.loads(path.read_text()) if path.exists() else {"identity": {}, "forgetting": {}}

    def add(self, keys: tuple[str, ...], measure: Callable[[], dict]) -> None:
        place = self.data
        for key in keys[:-1]:
            place = place.setdefault(key, {})
        if keys[-1] not in place:
            place[keys[-1]] = measure()
            print(" / ".join(keys), json.dumps(place[keys[-1]]), flush=True)
            self.path.write_text(json.dumps(self.data, indent=1) + "\n")


@dataclass
class Demo:
    """What every part of the demonstration needs."""

    args: argparse.Namespace
    evaluator: Evaluator
    figures: Figures

    def identity(
        self, subject: Subject, name: str, model: str, prompt: str, asset: Asset, seconds: float | None
    ) -> Tensor:
        """Measures one way to one object; returns four renders of its asset."""
        self.figures.add(
            ("identity", subject.noun, name),
            lambda: {
                "views": judge_samples(self.args, self.evaluator, model, prompt, subject),
                "asset": judge_asset(self.evaluator, asset, subject),
                "seconds": seconds,
            },
        )
        return asset.render(subject.cameras, subject.orbit.shape[-1]).rgb[::4]

    def two_steps(self, subject: Subject, weight: float) -> tuple[Tensor, ...]:
        """Untuned and tuned; returns the object and both assets."""
        folder = self.args.out / subject.noun
        tuned = folder / f"lambda-{weight:g}"
        seconds = tune(self.args, subject, tuned, lambda_preserve=weight)
        shown = [subject.orbit[::4]]
        for name, model, prompt, spent in (
            ("untuned", self.args.model, f"a {subject.noun}", None),
            ("tuned", str(tuned / "model"), subject.prompt, seconds),
        ):
            asset = grow(self.args, model, prompt, folder / f"{name}.safetensors")
            shown.append(self.identity(subject, name, model, prompt, asset, spent))
        return tuple(shown)

    def three_steps(self, subject: Subject, weight: float) -> tuple[Tensor, ...]:
        """DreamBooth3D; returns the object, the asset and a group of pseudo views."""
        folder, args = self.args.out / subject.noun / "stages", self.args
        more = {"stages": "dreambooth3d", "sds_preset": args.preset, "sds_steps": args.sds_steps}
        seconds = tune(args, subject, folder, lambda_preserve=weight, **more)
        asset = Asset.load(folder / "6-volume/asset.safetensors")
        renders = self.identity(subject, "three stages", str(folder / "model"), subject.prompt, asset, seconds)
        return subject.orbit[::4], renders, PseudoViews.load(folder / "4-pseudo/views.safetensors").images[0]

    def forgotten(self, subject: Subject, train: Shards, prompts: list[str]) -> None:
        args, evaluator = self.args, self.evaluator
        self.figures.add(("forgetting", "untuned"), lambda: forgetting(args, evaluator, args.model, train, prompts))
        for value in args.lambdas:
            folder = args.out / subject.noun / f"lambda-{value:g}"
            tune(args, subject, folder, lambda_preserve=value)
            model = str(folder / "model")
            self.figures.add(
                ("forgetting", f"{subject.noun}, lambda {value:g}"),
                lambda m=model: {
                    **forgetting(args, evaluator, m, train, prompts),
                    "similarity": judge_samples(args, evaluator, m, subject.prompt, subject)["similarity"],
                },
            )


def main() -> None:
    args = parse_arguments()
    args.threads = set_threads(args.threads)
    train, held_out = Shards(args.shards), Shards(args.shards, "held_out")
    subjects = [prepare(held_out, key, noun, args.out / noun / "photos") for key, noun in SUBJECTS.items()]
    subjects = subjects[: args.objects]
    demo = Demo(args, load_evaluator(args.evaluator), Figures(args.out / "figures.json"))
    weight = runs.recipe(open_source(args.model).config)["lambda_preserve"]
    rows = [demo.two_steps(subject, weight) for subject in subjects]
    demo.forgotten(subjects[0], train, read_prompts(args.prompts))
    if not args.no_stages:
        rows.insert(1, demo.three_steps(subjects[0], weight))
    (args.out / "table.md").write_text(table(demo.figures.data))
    comparison(rows).save(args.out / "comparison.png")
    print(table(demo.figures.data))


if __name__ == "__main__":
    main()
