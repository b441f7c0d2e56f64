"""What real renders score: the yardstick of every evaluation, measured on shards once and kept beside the evaluator.

The measures are measures.py's; models and runs are measured in judging.py.
"""

import json
import math
from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mvdream_fast.camera import Cameras, orbit_cameras
from mvdream_fast.checkpoints.folder import read_json
from mvdream_fast.checkpoints.tensor_file import open_tensors
from mvdream_fast.core.errors import InputFileError, ModelError
from mvdream_fast.core.files import atomic_write
from mvdream_fast.core.images import GREY
from mvdream_fast.core.rng import Stream
from mvdream_fast.data.backgrounds import on_background
from mvdream_fast.data.batches import Record, Shards
from mvdream_fast.evaluation import colours
from mvdream_fast.evaluation import measures as ev
from mvdream_fast.evaluation.classifier import Classifier
from mvdream_fast.evaluation.evaluator import EVALUATOR_FOLDER, Evaluator
from mvdream_fast.evaluation.independent import RealSeen, look, naming, real_fog, real_gradients
from mvdream_fast.evaluation.words import plain_words
from mvdream_fast.rendering.furniture import furniture_noun

TENSORS, NUMBERS, PROMPTS = "reference.safetensors", "reference.json", "prompts.txt"
N_CAPTIONS = 40
FOUR_DEG = torch.arange(4) * 90.0  # where the pipeline's four views stand
ELEVATION_DEG = 15.0
FOVY_DEG, DISTANCE = 40.0, 1.025 / math.sin(math.radians(20))  # the middle of the training cameras
HAS_FRONT = 0.15  # opposite_difference of a front at least


@dataclass(frozen=True)
class Reference:
    """Real renders of held-out objects, in the eyes of one evaluator.

    captions: n, one an object. embeddings: unit, [n, O, E], of four views of each of O orbits. moments: of the features
    of the views of all orbits but the first. fronts: caption or noun -> opposite_difference. scores: what the renders
    themselves score in each measure. seen: what the ImageNet classifier makes of them, where one was at hand.
    """

    captions: list[str]
    embeddings: Tensor
    moments: tuple[Tensor, Tensor]
    fronts: dict[str, float]
    scores: dict[str, float]
    seen: RealSeen | None = None

    def has_front(self, prompt: str) -> bool:
        """Whether objects of this caption, or of the longest noun in it that was rendered, look different behind."""
        words = f" {plain_words(prompt)} "
        known = [name for name in self._fronts if f" {name} " in words]
        return bool(known) and self._fronts[max(known, key=len)] >= HAS_FRONT

    @cached_property
    def _fronts(self) -> dict[str, float]:
        """`fronts` by the form in which a prompt is looked up."""
        return {plain_words(name): front for name, front in self.fronts.items()}

    def save(self, folder: Path) -> None:
        """Writes reference.safetensors and reference.json. Raises OutputError."""
        from safetensors.torch import save

        mean, cov = (x.float().contiguous() for x in self.moments)
        tensors = {"embeddings": self.embeddings.half().contiguous(), "mean": mean, "cov": cov}
        if self.seen is not None:
            tensors["seen"] = self.seen.features.half().contiguous()
        atomic_write(folder / TENSORS, save(tensors))
        rounded = {name: round(x, 4) for name, x in sorted(self.fronts.items())}
        numbers = {"captions": self.captions, "scores": self.scores, "fronts": rounded}
        atomic_write(folder / NUMBERS, json.dumps(numbers, indent=1) + "\n")

    @staticmethod
    def load(folder: Path = EVALUATOR_FOLDER) -> "Reference":
        """Reads what `save` wrote. Raises ModelError for anything else."""
        file, numbers = open_tensors(folder / TENSORS), read_json(folder / NUMBERS)
        try:
            embeddings, mean, cov = (file.read(name).float() for name in ("embeddings", "mean", "cov"))
            reference = Reference(
                [str(x) for x in numbers["captions"]], embeddings, (mean.double(), cov.double()),
                {str(k): float(v) for k, v in numbers["fronts"].items()},
                {str(k): float(v) for k, v in numbers["scores"].items()},
                RealSeen(file.read("seen").float()) if "seen" in file.shapes else None,
            )  # fmt: skip
        except Exception as error:
            raise ModelError(f"{folder} holds no whole reference of real renders: {error}") from error
        if len(reference.captions) != len(embeddings):
            raise ModelError(f"{folder / NUMBERS} has {len(reference.captions)} captions, {TENSORS} {len(embeddings)}")
        seen = reference.seen
        if seen is not None and (seen.features.ndim != 4 or len(seen.features) != len(embeddings)):
            raise ModelError(f"{folder / TENSORS}: seen must be of {len(embeddings)}, got {list(seen.features.shape)}")
        return reference


@dataclass(frozen=True)
class Orbit:
    """A rendered orbit: images [V, 3, s, s] in [0, 1] on grey, opacities [V, s, s] in [0, 1], azimuths [V]."""

    record: Record
    images: Tensor
    opacity: Tensor
    azimuth_deg: Tensor

    @staticmethod
    def read(shards: Shards, i: int) -> "Orbit":
        """The orbit of one record of the shards."""
        record, views = shards.records[i], shards.views(i)
        images = on_background(views, torch.full((3,), GREY)) / 2 + 0.5
        opacity = torch.from_numpy(views[..., 3] / np.float32(255))
        return Orbit(record, images, opacity, torch.tensor(record.meta["azimuth_deg"]) % 360)

    @property
    def masks(self) -> Tensor:
        """Silhouettes, bool [V, s, s]."""
        return self.opacity > 0.5

    @property
    def four(self) -> list[int]:
        """The views nearest to where the pipeline's stand."""
        return [int(ev.angle_difference(self.azimuth_deg, wanted).argmin()) for wanted in FOUR_DEG]

    def cameras(self, which: list[int]) -> Cameras:
        """Where these views stand, but with the middle field of view: a generated view's is unknown."""
        elevation = float(self.record.meta["elevation_deg"])
        one = [orbit_cameras(1, elevation, float(self.azimuth_deg[k]), 360.0, DISTANCE, FOVY_DEG) for k in which]
        return Cameras(torch.cat([c.c2w for c in one]), torch.cat([c.fovy for c in one]))


@torch.no_grad()
def measure(evaluator: Evaluator, train: Shards, held_out: Shards, classifier: Classifier | None = None) -> Reference:
    """Measures real renders: the first 40 held-out objects in their own colours, and training ones for comparison.

    Without a classifier the figures that need one are left out.
    Raises: InputFileError if there are no two held-out objects of different captions.
    """
    objects = held_out_orbits(held_out)
    orbits = [Orbit.read(held_out, i) for picks in objects.values() for i in picks]
    n, n_orbits = len(objects), len(orbits) // len(objects)
    features = torch.stack([evaluator.features(o.images[o.four]) for o in orbits]).unflatten(0, (n, n_orbits))
    embeddings = evaluator.embed_features(features)  # [n, O, E]
    rest = ev.moments(features[:, 1:].flatten(0, 2) if n_orbits > 1 else features.flatten(0, 2))
    text = evaluator.embed_text(list(objects))
    fronts = {}
    for caption, group in zip(objects, _grouped(orbits, n_orbits)):
        fronts[caption] = sum(ev.opposite_difference(o.images, o.masks) for o in group) / len(group)
    scores = {
        **matching(embeddings.transpose(0, 1), text, evaluator.bags(list(objects))),
        "frechet": ev.frechet_distance(ev.moments(features[:, 0].flatten(0, 1)), rest),
        "frechet_other_objects": ev.frechet_distance(_others(evaluator, train, n), rest),
        "diversity": _diversity(evaluator, train),
        **_sides(evaluator, [o for o in orbits if fronts[o.record.meta["caption"]] >= HAS_FRONT]),
        **_consistency(orbits),
        **real_gradients(torch.cat([o.images[o.four] for o in orbits])),
        **real_fog(torch.stack([group[0].opacity for group in _grouped(orbits, n_orbits)])),
        "held_out_objects": n,
        "held_out_objects_with_front": sum(front >= HAS_FRONT for front in fronts.values()),
    }
    seen, named = (None, {}) if classifier is None else see_real(classifier, orbits, list(objects))
    return Reference(list(objects), embeddings, rest, _fronts_of_nouns(train) | fronts, scores | named, seen)


def see_real(classifier: Classifier, orbits: list[Orbit], captions: list[str]) -> tuple[RealSeen, dict[str, float]]:
    """What the classifier makes of n captions' objects, whose orbits lie next to each other, and what they score."""
    n_orbits = len(orbits) // len(captions)
    views = torch.stack([o.images[o.four] for o in orbits])
    found = look(classifier, views, [caption for caption in captions for _ in range(n_orbits)])
    seen = RealSeen(found.features.unflatten(0, (len(captions), n_orbits)))
    return seen, naming(found.named) | seen.scores()


def held_out_orbits(shards: Shards) -> dict[str, list[int]]:
    """The records of the first 40 objects in their own colours, by caption; as many for each as all have."""
    objects: dict[str, list[int]] = defaultdict(list)
    for i, record in enumerate(shards.records):
        if not record.meta["painted"]:
            objects[record.meta["caption"]].append(i)
    if len(objects) < 2:
        raise InputFileError("the held-out shards must hold at least two objects of different captions")
    first = dict(list(objects.items())[:N_CAPTIONS])
    n_orbits = min(len(picks) for picks in first.values())
    return {caption: picks[:n_orbits] for caption, picks in first.items()}


def matching(embeddings: Tensor, text: Tensor, bags: Sequence[Hashable]) -> dict[str, float]:
    """Retrieval by unit embeddings [S, n, E], S samples of each of the first n of m captions [m, E].

    bags: of the captions, as `Evaluator.bags` has them. Of those of one bag none is a rival of another: to the
    evaluator they are one sentence, and the tie would be a miss.
    """
    similarity = embeddings @ text.T  # [S, n, m]
    truth = torch.arange(similarity.shape[1])
    own = similarity[:, truth, truth]
    same = torch.tensor([[i != j and bag == bags[i] for j, bag in enumerate(bags)] for i in truth.tolist()])
    similarity = similarity.masked_fill(same.to(similarity.device), -torch.inf)
    ranks = (similarity >= own[..., None]).sum(-1)
    hits = torch.stack([ev.top1(s, truth) for s in similarity])
    top5 = (ranks <= 5).float().mean()
    return {"top1": float(hits.float().mean()), "top5": float(top5), "similarity": float(own.mean())}


def _grouped(items: list, size: int) -> list[list]:
    return [items[k : k + size] for k in range(0, len(items), size)]


def _sides(evaluator: Evaluator, orbits: list[Orbit]) -> dict[str, float]:
    """Azimuth errors, and how often the Janus score would accuse a real object; of objects with a front."""
    if not orbits:
        return {}
    headings = [evaluator.headings(evaluator.features(o.images)) for o in orbits]
    errors = torch.cat([ev.angle_difference(h.azimuth_deg, o.azimuth_deg) for h, o in zip(headings, orbits)])
    fronts = [ev.reads_as_front(h.azimuth_deg, h.confidence) for h in headings]
    accused = [ev.is_janus(o.azimuth_deg, front) for o, front in zip(orbits, fronts)]
    return {
        "azimuth_error_deg": float(errors.median()),
        "azimuth_within_45": float((errors <= 45).float().mean()),
        "janus": sum(accused) / len(accused),
        "shows_front": sum(bool(front.any()) for front in fronts) / len(fronts),
    }


def _consistency(orbits: list[Orbit]) -> dict[str, float]:
    """Of four views, segmented as generated ones must be; and of the whole turn, with the renders' own silhouettes."""
    hull, color, overlap, turn, kept = [], [], [], [], []
    for o in orbits:
        views = o.images[o.four]
        masks = ev.silhouettes(views)
        hull.append(ev.hull_support(masks, o.cameras(o.four)))
        color.append(ev.color_spread(views, masks))
        overlap.append(ev.neighbour_overlap(o.masks))
        turn.append(ev.color_spread(o.images, o.masks))
        share = colours.kept(views, masks, o.record.meta["caption"])
        kept += [] if share is None else [share]
    names = ("hull_support", "colour_spread", "turn_overlap", "turn_colour_spread", "colours_kept")
    return {name: sum(x) / len(x) for name, x in zip(names, (hull, color, overlap, turn, kept)) if x}


def _others(evaluator: Evaluator, train: Shards, n: int) -> tuple[Tensor, Tensor]:
    """Moments of four views of n training orbits: how far other real objects are."""
    picks = Stream(0, 0, "reference/others").permutation(len(train))[:n].tolist()
    orbits = [Orbit.read(train, i) for i in picks]
    return ev.moments(torch.cat([evaluator.features(o.images[o.four]) for o in orbits]))


def _diversity(evaluator: Evaluator, train: Shards, n_captions: int = 60, n_each: int = 4) -> float:
    """Mean spread of different training objects of one caption: how unlike real answers to one prompt are."""
    groups: dict[str, dict[str, int]] = defaultdict(dict)
    for i, record in enumerate(train.records):
        groups[record.meta["caption"]].setdefault(record.meta["id"], i)
    several = [list(group.values())[:n_each] for group in groups.values() if len(group) > 1]
    spreads = []
    for k in Stream(0, 0, "reference/diversity").permutation(len(several))[:n_captions].tolist():
        orbits = [Orbit.read(train, i) for i in several[k]]
        spreads.append(ev.spread(evaluator.embed_views(torch.stack([o.images[o.four] for o in orbits]))))
    return sum(spreads) / len(spreads) if spreads else 0.0


def _fronts_of_nouns(train: Shards) -> dict[str, float]:
    """Noun -> mean opposite_difference of its training objects, one orbit each."""
    values: dict[str, list[float]] = defaultdict(list)
    seen: set[str] = set()
    for i, record in enumerate(train.records):
        if record.meta["id"] not in seen and not record.meta["painted"]:
            seen.add(record.meta["id"])
            orbit = Orbit.read(train, i)
            # Shards from before there was a noun in them were all worded as the furniture catalogue is.
            noun = record.meta.get("noun") or furniture_noun(record.meta["name"])
            values[noun].append(ev.opposite_difference(orbit.images, orbit.masks))
    return {noun: sum(x) / len(x) for noun, x in values.items()}
