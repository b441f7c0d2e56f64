"""Evaluation of models and of finished text-to-3D runs: what is sampled or rendered, and which measures are taken.

The measures are measures.py's, the yardstick reference.py's; what needs no evaluator of ours is in independent.py and
runs.py. Flags and tables are the command's.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from mvdream_fast.checkpoints.folder import read_json
from mvdream_fast.core.errors import InputFileError
from mvdream_fast.core.files import read_lines
from mvdream_fast.data.batches import Shards
from mvdream_fast.evaluation import colours, runs
from mvdream_fast.evaluation import measures as ev
from mvdream_fast.evaluation.classifier import MISSING, Classifier, is_installed, load_classifier
from mvdream_fast.evaluation.evaluator import EVALUATOR_FOLDER, Evaluator, load_evaluator
from mvdream_fast.evaluation.independent import distances, look, naming
from mvdream_fast.evaluation.reference import ELEVATION_DEG, FOUR_DEG, PROMPTS, Reference, matching, measure
from mvdream_fast.evaluation.words import plain_words
from mvdream_fast.models.config import Mode
from mvdream_fast.models.tokenizer import check_prompt
from mvdream_fast.pipeline import MVDreamPipeline
from mvdream_fast.scene.asset import Asset

SIZE = 64  # of its images, as the training renders
TURN = 16  # views of a turntable: as many as the training data's orbits have
PROMPTS_AT_A_TIME = 4
EMPTY_OPACITY = 1e-3  # a turntable that never covers more than this share of an image shows nothing
AVERAGED = (
    "top1", "similarity", "janus", "shows_front", "azimuth_error_deg", "turn_overlap", "turn_colour_spread", "fog",
    "gradient", "views_gradient", "sharpness", "colours_kept", "named", "views_named", "agreement", "mesh_psnr",
    "mesh_overlap",
)  # fmt: skip
SEED_STRIDE = 1000  # so that no two (prompt, seed) share their noise
Say = Callable[[str], None]


@dataclass(frozen=True)
class Judge:
    """What everything is judged by."""

    evaluator: Evaluator
    reference: Reference
    prompts: list[str]  # the fixed list
    classifier: Classifier | None = None  # without it, what it would see is left out
    meanings: dict[str, str] = field(default_factory=dict)  # of prompts whose words the evaluator need not know

    def meaning(self, prompt: str) -> str:
        """The words that views of a prompt are matched with, however it is written."""
        words = plain_words(prompt)
        return self._meanings.get(words, words)

    @cached_property
    def _meanings(self) -> dict[str, str]:
        return {plain_words(asked): plain_words(meant) for asked, meant in self.meanings.items()}


@dataclass(frozen=True)
class SamplingOptions:
    """How a model is asked. `n_captions` and `n_prompts` cut what is sampled, not what it is told apart from; None is
    all. Without guidance_scale or uncond_mode it is what suits the model."""

    steps: int = 25
    guidance_scale: float | None = None
    uncond_mode: Mode | None = None
    seeds: int = 2  # for the held-out captions; the prompts are sampled once
    n_captions: int | None = None
    n_prompts: int | None = None


def read_prompts(path: Path | None = None) -> list[str]:
    """The prompts of a file, one a line, # for comments; by default the fixed list. Raises InputFileError."""
    return list(read_meanings(path))


def read_meanings(path: Path | None = None) -> dict[str, str]:
    """Prompt -> what it means: what follows the = of "a divan = a sofa", else the prompt itself. See read_prompts."""
    source = path or files("mvdream_fast") / "weights" / "evaluator" / PROMPTS
    rows = [line.strip() for line in read_lines(source) if line.strip() and not line.startswith("#")]
    pairs = [
        (asked.strip(), meant.strip() or asked.strip()) for asked, _, meant in (row.partition("=") for row in rows)
    ]
    for text in (text for pair in pairs for text in pair):
        check_prompt(text)
    words = [[plain_words(text) for text in texts] for texts in zip(*pairs)] or [[]]
    if any(len(set(texts)) < max(2, len(rows)) for texts in words):
        raise InputFileError(f"{source} must hold at least two prompts, each once, and no two of one meaning")
    return dict(pairs)


def load_judge(say: Say, evaluator: Path | None = None, prompts: Path | None = None, data: Path | None = None) -> Judge:
    """The judge that ships, or other parts of one; without the ImageNet classifier where it is not installed, which
    `say` is told.

    Args: evaluator: a folder. prompts: a list, one a line. data: shards whose held-out renders are the yardstick, in
        place of the figures beside the evaluator.
    """
    meanings, folder = read_meanings(prompts), evaluator or EVALUATOR_FOLDER
    judge, classifier = load_evaluator(folder), load_classifier() if is_installed() else None
    if classifier is None:
        say(f"{MISSING}; its figures are left out")
    if data is None:
        return Judge(judge, Reference.load(folder), list(meanings), classifier, meanings)
    real = measure(judge, Shards(data), Shards(data, "held_out"), classifier)
    return Judge(judge, real, list(meanings), classifier, meanings)


def is_new(text: str, captions: Iterable[str]) -> bool:
    """Whether captions have every word of a text between them, but none has all of its words (articles apart)."""
    bags = [_words(caption) for caption in captions]
    wanted = _words(text)
    return wanted <= set().union(*bags) and not any(wanted <= bag for bag in bags)


def _words(text: str) -> frozenset[str]:
    return frozenset(text.replace(",", " ").split()) - {"a", "an"}


@torch.no_grad()
def evaluate_model(pipeline: MVDreamPipeline, judge: Judge, options: SamplingOptions, say: Say) -> dict[str, Any]:
    """The measures of a model's four views: of held-out captions, and of the fixed prompts.

    Returns: "held_out" and "prompts", flat dicts of numbers; "real", the same of real renders; "seconds".
    """
    start = time.perf_counter()
    captions, prompts = judge.reference.captions, judge.prompts
    held = _sample(pipeline, captions[: options.n_captions], options, options.seeds, say)  # [S, n, V, 3, s, s]
    fixed = _sample(pipeline, prompts[: options.n_prompts], options, 1, say)
    meant = [judge.meaning(prompt) for prompt in prompts]
    result = {
        "held_out": _views(judge, held, captions) | _against_real(judge, held) | _independent(judge, held, captions),
        "prompts": _views(judge, fixed, meant) | _independent(judge, fixed, meant),
        "real": judge.reference.scores,
        "options": vars(options),
    }
    return result | {"seconds": time.perf_counter() - start}


def _sample(pipeline: MVDreamPipeline, texts: list[str], options: SamplingOptions, n_seeds: int, say: Say) -> Tensor:
    """Four views of each text, [S, n, V, 3, s, s] in [0, 1]."""
    out, start = [], time.perf_counter()
    jobs = [(seed, k) for seed in range(n_seeds) for k in range(0, len(texts), PROMPTS_AT_A_TIME)]
    for done, (seed, k) in enumerate(jobs, start=1):
        some = texts[k : k + PROMPTS_AT_A_TIME]
        views = pipeline(
            some, len(FOUR_DEG), ELEVATION_DEG, n_steps=options.steps, guidance_scale=options.guidance_scale,
            uncond_mode=options.uncond_mode, seed=SEED_STRIDE * seed + k, warn=lambda _: None,
        )  # fmt: skip
        out += [v.tensor for v in views]
        left = (time.perf_counter() - start) / done * (len(jobs) - done)
        say(f"sampled {len(out)} of {n_seeds * len(texts)} scenes, {left:.0f} s left")
    return torch.stack(out).unflatten(0, (n_seeds, len(texts)))


def _views(judge: Judge, views: Tensor, texts: list[str]) -> dict[str, float]:
    """Matching, sides and consistency of views [S, n, V, 3, s, s] of the first n texts, told apart among all texts."""
    evaluator = judge.evaluator
    n_seeds, n, n_views = views.shape[:3]
    features = evaluator.features(views.flatten(0, 2)).unflatten(0, (n_seeds, n, n_views))
    headings = evaluator.headings(features.flatten(0, 2))
    error = ev.angle_difference(headings.azimuth_deg.view(n_seeds, n, n_views), FOUR_DEG)
    fronts = torch.tensor([judge.reference.has_front(text) for text in texts[:n]])
    scores = matching(evaluator.embed_features(features), evaluator.embed_text(texts), evaluator.bags(texts))
    if fronts.any():
        seen = error[:, fronts]
        scores |= {"azimuth_error_deg": float(seen.median()), "azimuth_within_45": float((seen <= 45).float().mean())}
    cameras = runs.orbit(n_views)
    masks = [ev.silhouettes(scene) for scene in views.flatten(0, 1)]
    scores["hull_support"] = _mean([ev.hull_support(mask, cameras) for mask in masks])
    scores["colour_spread"] = _mean([ev.color_spread(v, m) for v, m in zip(views.flatten(0, 1), masks)])
    found = [colours.kept(v, m, text) for v, m, text in zip(views.flatten(0, 1), masks, texts[:n] * n_seeds)]
    kept = [share for share in found if share is not None]
    scores |= {"colours_kept": _mean(kept), "colours_of": len(kept)} if kept else {}
    return scores | {"scenes": n_seeds * n, "scenes_with_front": n_seeds * int(fronts.sum())}


def _against_real(judge: Judge, views: Tensor) -> dict[str, float]:
    """Frechet distance to the held-out renders, and diversity.

    The distance depends on the number of views: it is taken a seed at a time, and only where every caption was sampled,
    so that it compares with that of real renders.
    """
    scores = {}
    if views.shape[1] == len(judge.reference.captions):
        by_seed = [ev.moments(judge.evaluator.features(seed.flatten(0, 1))) for seed in views]
        scores["frechet"] = _mean([ev.frechet_distance(found, judge.reference.moments) for found in by_seed])
    if len(views) > 1:
        embeddings = torch.stack([judge.evaluator.embed_views(seed) for seed in views], dim=1)  # [n, S, E]
        scores["diversity"] = _mean([ev.spread(e) for e in embeddings])
    return scores


def _independent(judge: Judge, views: Tensor, texts: list[str]) -> dict[str, float]:
    """Sharpness of views [S, n, V, 3, s, s] of the first n texts, and what the classifier makes of them.

    Distances are taken a seed at a time, as in `_against_real`, but of whatever was sampled.
    """
    scores = {"gradient": ev.mean_gradient(views), "size": views.shape[-1]}
    if judge.classifier is None:
        return scores
    looks = [look(judge.classifier, seed, texts) for seed in views]
    scores |= naming([share for found in looks for share in found.named])
    if judge.reference.seen is not None:
        rest = judge.reference.seen.rest
        each = [distances(found.features.flatten(0, 1), rest) for found in looks]
        scores |= {name: _mean([x[name] for x in each]) for name in each[0]}
    return scores


def evaluate_run(folder: Path, judge: Judge) -> tuple[dict[str, Any], runs.Seen]:
    """The measures of one finished run, and what the classifier sees of it.

    Raises: InputFileError if the folder is no run, an unfinished one, or its views or mesh are damaged; ModelError if
    its asset is.
    """
    about = read_json(folder / "config.json")
    path = folder / "asset.safetensors"
    if not path.exists():
        raise InputFileError(
            f"{folder} has no asset.safetensors: the run is not finished; go on with sds --resume {folder}"
        )
    prompt = str(about.get("prompt", ""))
    asset = Asset.load(path)
    views = asset.render(runs.orbit(TURN), SIZE)
    azimuths = torch.arange(TURN) * (360.0 / TURN)
    judged = turntable(views.rgb.clamp(0, 1), views.opacity, azimuths, prompt, judge)
    figures, seen = runs.figures(folder, asset, judge.meaning(prompt), judge.classifier, judge.reference.seen)
    return {"run": str(folder), "prompt": prompt, **judged, **figures}, seen


@torch.no_grad()
def turntable(rgb: Tensor, opacity: Tensor, azimuth_deg: Tensor, prompt: str, judge: Judge) -> dict[str, Any]:
    """The measures of images rgb [V, 3, s, s] and opacities [V, s, s] from azimuths [V] around an object.

    `janus` and the azimuth error are None for objects without a front; `shows_front` is whether any view reads as one:
    without it, `janus` says nothing.
    """
    evaluator = judge.evaluator
    meant = judge.meaning(prompt)
    texts = list(dict.fromkeys([*map(judge.meaning, judge.prompts), meant]))
    bags = dict(zip(texts, evaluator.bags(texts)))
    texts = [text for text in texts if text == meant or bags[text] != bags[meant]]
    features = evaluator.features(rgb)
    similarity = evaluator.embed_features(features) @ evaluator.embed_text(texts).T
    hit = ev.top1(similarity[None], torch.tensor([texts.index(meant)]))
    headings = evaluator.headings(features)
    front = ev.reads_as_front(headings.azimuth_deg, headings.confidence)
    error = ev.angle_difference(headings.azimuth_deg, azimuth_deg).median()
    has_front, masks = judge.reference.has_front(meant), opacity > 0.5
    return {
        "top1": float(hit[0]),
        "similarity": float(similarity[texts.index(meant)]),
        "candidates": len(texts),
        "empty": bool(opacity.mean((1, 2)).max() < EMPTY_OPACITY),
        "janus": float(ev.is_janus(azimuth_deg, front)) if has_front else None,
        "shows_front": float(front.any()) if has_front else None,
        "azimuth_error_deg": float(error) if has_front else None,
        "turn_overlap": ev.neighbour_overlap(masks),
        "turn_colour_spread": ev.color_spread(rgb, masks),
        "colours_kept": colours.kept(rgb, masks, meant),
        "predicted_deg": [round(x, 1) for x in headings.azimuth_deg.tolist()],
    }


def summary(found: list[dict[str, Any]]) -> dict[str, float]:
    """Means over the runs that have a number; of fog, which no mean of few runs tells well, the median, too."""
    values = {name: [run[name] for run in found if run[name] is not None] for name in AVERAGED}
    counts = {"runs": len(found), "with_front": len(values["janus"]), "named_of": len(values["named"])}
    return {name: _mean(x) for name, x in values.items() if x} | {"fog_median": median(values["fog"])} | counts


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
