"""Training of the evaluator: batches with hard negatives, images softened as generated ones are, and the two losses.

The loop that calls it (checkpoints, log, signals) is loop.py; what the evaluator measures is evaluation/measures.py's.
"""

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from mvdream_fast.core.errors import InputFileError
from mvdream_fast.core.images import GREY
from mvdream_fast.core.rng import Stream
from mvdream_fast.data.ahead import Ahead
from mvdream_fast.data.backgrounds import on_background
from mvdream_fast.data.batches import SUFFIX, Record, Shards, view_group
from mvdream_fast.evaluation.evaluator import Evaluator
from mvdream_fast.evaluation.measures import opposite_difference
from mvdream_fast.evaluation.reference import HAS_FRONT, Orbit
from mvdream_fast.training.update import BaseTrainer
from mvdream_fast.training.vae import Linear

PATCH = 8  # of the embedded autoencoder; Linear softens by its patches
COMPONENTS = (8, 64)  # that a softened image keeps of each patch's 192


@dataclass(frozen=True)
class EvaluatorOptions:
    """What shapes the numbers of a run. The learning rate falls to zero over `steps`."""

    steps: int = 1500
    batch_size: int = 96  # scenes
    n_views: int = 1  # many scenes teach more than many views of few
    more_captions: int = 160  # beside the batch's own
    lr: float = 2e-3
    warmup: int = 50
    weight_decay: float = 0.05
    ema: float = 0.99
    azimuth: float = 3.0  # weight of its loss: at 1 it was still near chance after 1,900 updates
    clip: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class EvaluatorBatch:
    """B scenes of V views.

    images [B, V, 3, Hp, Wp] in [0, 1]; azimuth_deg [B, V]; fronts bool [B], whether the object has one; captions
    B + more; also_true bool [B, B + more]: captions that are not the scene's own, but say nothing wrong about it.
    """

    images: Tensor
    azimuth_deg: Tensor
    fronts: Tensor
    captions: list[str]
    also_true: Tensor


def check_renders(shards: Shards) -> None:
    """Refuses what is no render of objects by their ids: pictures, and shards of other programs.

    Raises: InputFileError naming the shard and what its JSON lacks of all that is learned from or measured.
    """
    for record in shards.records:
        for name, (kind, holds) in _NEEDED.items():
            if not holds(record):
                raise InputFileError(
                    f"{record.path}: {name} of {record.meta['key']} must be {kind}, got "
                    f"{repr(record.meta.get(name))[:80]}; render it again"
                )


def _is_number(x: object) -> bool:
    return isinstance(x, int | float) and -math.inf < x < math.inf


def _has_azimuths(record: Record) -> bool:
    azimuths = record.meta.get("azimuth_deg")
    return isinstance(azimuths, list) and len(azimuths) == record.n_views and all(map(_is_number, azimuths))


_NEEDED: dict[str, tuple[str, Callable[[Record], bool]]] = {  # of a record's JSON
    "id": ("a text", lambda record: isinstance(record.meta.get("id"), str)),
    "azimuth_deg": ("a finite number for each view", _has_azimuths),
    "elevation_deg": ("a finite number", lambda record: _is_number(record.meta.get("elevation_deg"))),
    "painted": ("true or false", lambda record: isinstance(record.meta.get("painted"), bool)),
    "name": ("a text", lambda record: isinstance(record.meta.get("noun") or record.meta.get("name"), str)),
}


class EvaluatorSource:
    """Batches from shards. Scenes come in pairs of one asset, in other colours: what tells a chair from a red chair.

    Raises: InputFileError, as check_renders.
    """

    def __init__(self, shards: Shards):
        check_renders(shards)
        self.shards = shards
        self.true = [frozenset((r.meta["caption"], *r.meta["variants"])) for r in shards.records]
        by_asset: dict[str, list[int]] = defaultdict(list)
        for i, record in enumerate(shards.records):
            by_asset[record.meta["id"]].append(i)
        self.siblings = [by_asset[r.meta["id"]] for r in shards.records]
        self.has_front = lru_cache(maxsize=None)(self._has_front)  # of an asset, named by its first record

    def batch(self, stream: Stream, n_scenes: int, n_views: int, n_more: int) -> EvaluatorBatch:
        """The batch that the stream's key stands for."""
        firsts = stream.integers(0, len(self.shards), -(-n_scenes // 2)).tolist()
        others = [self._sibling(i, u) for i, u in zip(firsts, stream.uniform(len(firsts)).tolist())]
        picks = [*firsts, *others][:n_scenes]
        which = [view_group(self.shards.records[i].n_views, n_views, stream) for i in picks]
        colors = backgrounds(stream, n_scenes)
        images = torch.stack([on_background(self.shards.views(i)[w], c) for i, w, c in zip(picks, which, colors)])
        azimuths = torch.tensor(
            [[self.shards.records[i].meta["azimuth_deg"][k] for k in w] for i, w in zip(picks, which)]
        )
        more = stream.integers(0, len(self.shards), n_more).tolist()
        captions = [self.shards.caption(i, stream) for i in [*picks, *more]]
        plain = [caption.removesuffix(SUFFIX) for caption in captions]
        true = torch.tensor([[text in self.true[i] for text in plain] for i in picks])
        own = torch.eye(n_scenes, len(captions), dtype=torch.bool)
        fronts = torch.tensor([self.has_front(self.siblings[i][0]) for i in picks])
        images, azimuths = mirrored(images / 2 + 0.5, azimuths, stream.uniform(n_scenes) < 0.5)
        return EvaluatorBatch(images, azimuths, fronts, captions, true & ~own)

    def _has_front(self, i: int) -> bool:
        if self.shards.records[i].meta.get("has_front") is False:  # its source says so
            return False
        orbit = Orbit.read(self.shards, i)
        return opposite_difference(orbit.images, orbit.masks) >= HAS_FRONT

    def _sibling(self, i: int, u: float) -> int:
        """Another orbit of the same asset, if there is one."""
        others = [j for j in self.siblings[i] if j != i] or [i]
        return others[int(u * len(others))]


def mirrored(images: Tensor, azimuth_deg: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
    """Scenes [B, V, 3, Hp, Wp] and their azimuths [B, V], those of `which`, bool [B], as in a mirror.

    What is seen there from an azimuth a is the mirrored object from -a, an object as good as the first: twice as many
    of them, for the head that has to tell sides of objects that it never saw.
    """
    flipped = torch.where(which[:, None, None, None, None], images.flip(-1), images)
    return flipped, torch.where(which[:, None], -azimuth_deg, azimuth_deg) % 360


def backgrounds(stream: Stream, n: int) -> Tensor:
    """Flat colours [n, 3] in [0, 1]: half grey, as the diffusion model's data mostly is, some white, the rest any."""
    u, colors = stream.uniform(n, 1), stream.uniform(n, 3)
    return torch.where(u < 0.5, GREY, torch.where(u < 0.65, 1.0, colors))


class Degradation:
    """Makes renders look like what generated views and rendered volumes are: softer, noisier, off in size and light.

    A third of the images keeps the best few components of each patch, which is what a small autoencoder would; a
    third is blurred; all are moved a little, and dimmed, brightened and given noise.
    """

    def __init__(self, linear: Linear, size: int):
        if linear.patch != PATCH:
            raise ValueError(f"Degradation: linear must be of patches of {PATCH} pixels, got {linear.patch}")
        self.linear, self.size = linear, size

    def __call__(self, images: Tensor, stream: Stream) -> Tensor:
        """[n, 3, Hp, Wp] in [0, 1] -> [n, 3, size, size]."""
        n = len(images)
        kind = stream.uniform(n, 1, 1, 1)
        n_kept = int(stream.integers(*COMPONENTS, 1))
        patched = self._patched(images, n_kept)
        images = torch.where(kind < 1 / 3, patched, torch.where(kind < 2 / 3, _blurred(images, stream), images))
        images = _moved(F.adaptive_avg_pool2d(images, self.size), stream)
        gain, lift = 1 + 0.2 * (2 * stream.uniform(n, 1, 1, 1) - 1), 0.05 * (2 * stream.uniform(n, 1, 1, 1) - 1)
        strength = 0.06 * stream.uniform(n, 1, 1, 1).square()
        return (images * gain + lift + strength * stream.normal(*images.shape)).clamp(0, 1)

    def _patched(self, images: Tensor, n_kept: int) -> Tensor:
        """The images, [n, 3, Hp, Wp], from the first components of their patches."""
        kept, mean = self.linear.directions[:, :n_kept], self.linear.mean
        pixels = F.pixel_unshuffle(images * 2 - 1, PATCH).movedim(1, -1)
        pixels = (pixels - mean) @ kept @ kept.T + mean
        return F.pixel_shuffle(pixels.movedim(-1, 1), PATCH) / 2 + 0.5


def _blurred(images: Tensor, stream: Stream) -> Tensor:
    """A binomial blur, once or twice as wide."""
    wide = F.avg_pool2d(F.avg_pool2d(images, 3, 1, 1, count_include_pad=False), 3, 1, 1, count_include_pad=False)
    return torch.lerp(images, wide, stream.uniform(len(images), 1, 1, 1, low=0.5, high=1.0))


def _moved(images: Tensor, stream: Stream) -> Tensor:
    """Scaled by up to 12 %, shifted by up to a twentieth of the side; the border is drawn out."""
    n = len(images)
    scale = torch.exp(0.12 * (2 * stream.uniform(n) - 1))
    shift = (2 * stream.uniform(n, 2) - 1) * 0.1
    theta = torch.cat([torch.diag_embed(scale[:, None].expand(n, 2)), shift[..., None]], 2)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)


def contrastive(image: Tensor, text: Tensor, scale: Tensor, also_true: Tensor) -> Tensor:
    """The symmetric loss of unit embeddings [B, E] and [B + more, E], true pairs first; scalar.

    Texts that are true of an image besides its own are no negatives, in neither direction.

    Source: Radford et al. 2021 (CLIP); the extra texts count in the images' direction.
    """
    n = len(image)
    logits = (scale * image @ text.T).masked_fill(also_true, -math.inf)
    own = torch.arange(n, device=image.device)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits[:, :n].T, own)) / 2


def azimuth_loss(logits: Tensor, azimuth_deg: Tensor) -> Tensor:
    """Cross-entropy of the bins' logits [n, K] against an azimuth [n], shared by the two bins that it lies between."""
    n_bins = logits.shape[-1]
    place = azimuth_deg % 360 / 360 * n_bins
    low = place.floor()
    share, low = place - low, low.long() % n_bins
    if not len(logits):
        return logits.sum()  # no object of the batch has a front
    logs = logits.log_softmax(-1)
    near, far = (logs.gather(1, bins[:, None])[:, 0] for bins in (low, (low + 1) % n_bins))
    return -((1 - share) * near + share * far).mean()


class EvaluatorTrainer(BaseTrainer):
    """One optimisation of the evaluator. `workers` more processes draw the coming batches."""

    options: EvaluatorOptions

    def __init__(
        self, evaluator: Evaluator, source: EvaluatorSource, degradation: Degradation, options: EvaluatorOptions,
        workers: int = 0,
    ):  # fmt: skip
        self.evaluator, self.source, self.degradation = evaluator, source, degradation
        matrices = [p for p in evaluator.parameters() if p.ndim > 1]
        others = [p for p in evaluator.parameters() if p.ndim <= 1]
        groups = [{"params": matrices, "weight_decay": options.weight_decay}, {"params": others, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=options.lr, betas=(0.9, 0.98), fused=True)
        sizes = {k: list(v) if isinstance(v, tuple) else v for k, v in vars(evaluator.config).items()}
        about = {"kind": "train-evaluator", "config": {"sizes": sizes}, "vocabulary": evaluator.tokenizer.vocabulary}
        super().__init__(evaluator, optimizer, options, about)
        self.ahead = Ahead(self.draw, workers)

    def draw(self, step: int) -> tuple[EvaluatorBatch, Tensor]:
        """The scenes of an update, softened to [B, V, 3, size, size], and their captions' token ids; on the CPU."""
        options = self.options
        stream = Stream(options.seed, step, "evaluator")
        batch = self.source.batch(stream, options.batch_size, options.n_views, options.more_captions)
        images = self.degradation(batch.images.flatten(0, 1), stream).unflatten(0, batch.images.shape[:2])
        return replace(batch, images=images), self.evaluator.tokenizer.encode(batch.captions).ids

    def train_step(self) -> dict[str, float]:
        """One update; raises DivergedError before a weight is touched."""
        match, azimuth = self.losses(*self.ahead(self.step))
        loss = match + self.options.azimuth * azimuth
        norm = self.descend(loss)
        return {"loss": loss.item(), "match": match.item(), "azimuth": azimuth.item(), "grad_norm": norm}

    def losses(self, batch: EvaluatorBatch, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Contrastive loss, of single views and, where there are several, of their mean alike; and azimuth loss."""
        evaluator, device = self.evaluator, self.evaluator.device
        features = evaluator.features(batch.images.flatten(0, 1))
        text, also_true = evaluator.embed_ids(ids), batch.also_true.to(device)
        scenes = features.unflatten(0, batch.images.shape[:2])
        sets = [scenes] if batch.images.shape[1] == 1 else [scenes, *scenes.split(1, dim=1)]
        match = [contrastive(evaluator.embed_features(views), text, evaluator.scale, also_true) for views in sets]
        sides = evaluator.azimuth(scenes[batch.fronts]).flatten(0, 1)
        azimuth = azimuth_loss(sides, batch.azimuth_deg[batch.fronts].flatten().to(device))
        return torch.stack(match).mean(), azimuth
