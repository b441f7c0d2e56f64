"""The evaluator: a small contrastive image-text model with a view-azimuth head, and the files that it is kept in.

What is measured with it is measures.py's, how it is trained training/evaluator.py's. It knows the training set's
domain only: its figures are in-domain retrieval, not a CLIP score.
"""

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvdream_fast.checkpoints.folder import read_json
from mvdream_fast.checkpoints.manifest import check_shapes
from mvdream_fast.checkpoints.tensor_file import open_tensors
from mvdream_fast.core.errors import ModelError
from mvdream_fast.core.files import atomic_write, make_folder, read_lines, replace_file
from mvdream_fast.core.machine import in_format
from mvdream_fast.core.schema import Checked, checked
from mvdream_fast.models.config import FORMAT_VERSION, TextConfig
from mvdream_fast.models.functional import conv3x3
from mvdream_fast.models.tokenizer import Tokenizer
from mvdream_fast.ops import group_norm_silu

EVALUATOR_FOLDER = Path(__file__).parents[1] / "weights" / "evaluator"
KIND = "evaluator"
WEIGHTS, VOCABULARY, CONFIG = "evaluator.safetensors", "vocabulary.txt", "config.json"
MAX_SCALE = 100.0  # of the similarities in the loss. Source: CLIP (Radford et al. 2021)
IMAGES_AT_A_TIME = 128
N_SILENT = 3  # the vocabulary's first rows, which are no words: padding, start and end


@dataclass(frozen=True)
class EvaluatorConfig(Checked):
    """Sizes. The image is cut into 4 x 4 patches first; each entry of `channels` is a level of half the resolution."""

    image_size: int = 64  # of the embedded model's views; where a thing's front is seen in little, it is at that size
    channels: tuple[int, ...] = (32, 64, 128, 224)
    blocks: int = 2  # of a level
    features: int = 128  # width of what both heads read, and of the Frechet distance
    embedding: int = 128
    n_azimuths: int = 24
    text_width: int = 128
    context_length: int = 24
    vocabulary_size: int = 1024

    @property
    def text(self) -> TextConfig:
        """What the tokenizer goes by."""
        return TextConfig(context_length=self.context_length, vocabulary="subset", vocabulary_size=self.vocabulary_size)


@dataclass(frozen=True)
class Heading:
    """The azimuths that images seem to be taken from: azimuth_deg [n] in 0..360, confidence [n] from 0 to 1.

    The confidence is the length of the mean direction over the head's distribution: near 0 where an object looks the
    same from several sides.
    """

    azimuth_deg: Tensor
    confidence: Tensor


class Block(nn.Module):
    """A pre-activated residual block of two 3 x 3 convolutions; the second begins at zero."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm1, self.conv1 = Norm(channels), nn.Conv2d(channels, channels, 3, padding=1)
        self.norm2, self.conv2 = Norm(channels), nn.Conv2d(channels, channels, 3, padding=1)
        for parameter in self.conv2.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, L, width] -> the same shape."""
        return x + conv3x3(self.conv2, self.norm2(conv3x3(self.conv1, self.norm1(x))))


class Norm(nn.GroupNorm):
    """Group norm in groups of 16 channels, and SiLU."""

    def __init__(self, channels: int):
        super().__init__(channels // 16, channels)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, h, w] -> the same shape."""
        return group_norm_silu(x, self.weight, self.bias, self.num_groups, self.eps)


class ImageTower(nn.Module):
    """Images [n, 3, s, s] in [0, 1] to features [n, F]."""

    PATCH = 4

    def __init__(self, config: EvaluatorConfig):
        super().__init__()
        layers: list[nn.Module] = []
        before = 3 * self.PATCH**2
        for level, channels in enumerate(config.channels):
            layers.append(nn.Conv2d(before, channels, 3, padding=1, stride=1 if level == 0 else 2))
            layers += [Block(channels) for _ in range(config.blocks)]
            before = channels
        self.layers, self.norm = nn.Sequential(*layers), Norm(before)
        # Quadrants, not the mean of everything: where something is tells from which side it is seen.
        self.out = nn.Linear(4 * before, config.features)
        self.pool = nn.AvgPool2d(config.image_size // self.PATCH // 2 ** (len(config.channels) - 1) // 2)
        in_format(self, torch.channels_last)

    def forward(self, images: Tensor) -> Tensor:
        """images [n, 3, Hp, Wp] -> features [n, width]."""
        x = F.pixel_unshuffle(images * 2 - 1, self.PATCH).contiguous(memory_format=torch.channels_last)
        return F.silu(self.out(self.pool(self.norm(self.layers(x))).flatten(1)))


class TextTower(nn.Module):
    """Token ids [B, L] to embeddings [B, E]: the mean of the word-pieces, and two layers. Captions need no grammar."""

    def __init__(self, config: EvaluatorConfig):
        super().__init__()
        width = config.text_width
        self.tokens = nn.Embedding(config.vocabulary_size, width)
        self.hidden, self.out = nn.Linear(width, 2 * width), nn.Linear(2 * width, config.embedding)

    def forward(self, ids: Tensor) -> Tensor:
        """token ids [B, L] -> features [B, width]."""
        words = (ids >= N_SILENT).float()
        mean = torch.bmm(words[:, None], self.tokens(ids))[:, 0] / words.sum(1, keepdim=True).clamp_min(1)
        return self.out(F.gelu(self.hidden(mean)))


class Evaluator(nn.Module):
    """Judges images by sentences and by the side they are seen from. Images are [n, 3, Hp, Wp] in [0, 1] everywhere.

    `about` is what config.json says besides the sizes: how it was trained, and its accuracy on held-out objects.
    """

    def __init__(self, config: EvaluatorConfig, vocabulary: Sequence[str], about: dict[str, Any] | None = None):
        super().__init__()
        _check(config)
        self.config, self.about = config, dict(about or {})
        self.tokenizer = Tokenizer(config.text, vocabulary)
        self.images, self.text = ImageTower(config), TextTower(config)
        self.match = nn.Linear(config.features, config.embedding)
        self.azimuth = nn.Linear(config.features, config.n_azimuths)
        self.log_scale = nn.Parameter(torch.tensor(math.log(10.0)))

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return self.log_scale.device

    @property
    def scale(self) -> Tensor:
        """What similarities are multiplied by before the softmax of the loss."""
        return self.log_scale.exp().clamp(max=MAX_SCALE)

    def features(self, images: Tensor) -> Tensor:
        """[n, 3, Hp, Wp] in [0, 1] of any size -> features [n, F].

        Raises: ValueError if the images have another shape.
        """
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"Evaluator.features: images must be [n, 3, Hp, Wp], got {list(images.shape)}")
        size = self.config.image_size
        if images.shape[2] != size or images.shape[3] != size:
            images = F.adaptive_avg_pool2d(images, size)
        parts = images.to(self.device).split(IMAGES_AT_A_TIME)
        return torch.cat([self.images(part) for part in parts])

    def embed_features(self, features: Tensor) -> Tensor:
        """Features [..., V, F] of the views of objects -> unit embeddings of the objects [..., E]."""
        return F.normalize(self.match(features).mean(-2), dim=-1)

    def embed_views(self, views: Tensor) -> Tensor:
        """Views [B, V, 3, Hp, Wp] of B objects -> unit embeddings [B, E], the views' mean."""
        return self.embed_features(self.features(views.flatten(0, 1)).unflatten(0, views.shape[:2]))

    def embed_text(self, texts: Sequence[str]) -> Tensor:
        """Sentences -> unit embeddings [B, E]."""
        return self.embed_ids(self.tokenizer.encode(list(texts)).ids)

    def embed_ids(self, ids: Tensor) -> Tensor:
        """Token ids [B, L] -> unit embeddings [B, E]."""
        return F.normalize(self.text(ids.to(self.device)), dim=-1)

    def bags(self, texts: Sequence[str]) -> list[tuple[Sequence[int], Sequence[str]]]:
        """What each sentence is made of: its word-pieces without their order, and the words that are not read.

        Sentences of one bag say the same here. Those that differ in unknown words alone embed alike, too, but do not.
        """
        found = self.tokenizer.encode(list(texts))
        pieces = (tuple(sorted(i for i in ids if i >= N_SILENT)) for ids in found.ids.tolist())
        unread = (tuple(sorted({*unknown, *cut})) for unknown, cut in zip(found.unknown, found.cut))
        return [*zip(pieces, unread)]

    def headings(self, features: Tensor) -> Heading:
        """Features [n, F] -> the azimuths that the images seem to be taken from."""
        shares = self.azimuth(features).softmax(-1)
        angles = torch.arange(self.config.n_azimuths, device=features.device) * (2 * math.pi / self.config.n_azimuths)
        x, y = shares @ angles.cos(), shares @ angles.sin()
        return Heading(torch.rad2deg(torch.atan2(y, x)) % 360, torch.hypot(x, y))


def _check(config: EvaluatorConfig) -> None:
    side = config.image_size / ImageTower.PATCH / 2 ** (len(config.channels) - 1)
    numbers = [v for value in vars(config).values() for v in (value if isinstance(value, tuple) else (value,))]
    if not all(1 <= number <= 1 << 16 for number in numbers):
        raise ModelError(f"the evaluator's sizes must be from 1 to {1 << 16}, got {config}")
    if side < 2 or side % 2 or any(channels % 16 for channels in config.channels):
        raise ModelError(f"the evaluator's last level must be an even square, its channels sixteens, got {config}")


def save_evaluator(evaluator: Evaluator, folder: Path) -> None:
    """Writes weights in fp16, vocabulary and, last, config.json with `about`; each file whole or not at all.

    Raises: OutputError.
    """
    from safetensors.torch import save

    make_folder(folder)
    tensors = {name: tensor.detach().cpu().half().contiguous() for name, tensor in evaluator.state_dict().items()}
    data = save(tensors, {"format": "pt"})
    replace_file(folder / WEIGHTS, lambda temporary: temporary.write_bytes(data), len(data))
    atomic_write(folder / VOCABULARY, "\n".join(evaluator.tokenizer.vocabulary) + "\n")
    about = {"kind": KIND, "format": FORMAT_VERSION, "sizes": dataclasses.asdict(evaluator.config), **evaluator.about}
    atomic_write(folder / CONFIG, json.dumps(about, indent=2) + "\n")


def load_evaluator(folder: Path = EVALUATOR_FOLDER) -> Evaluator:
    """Reads what `save_evaluator` wrote, in float32 on the CPU, with every tensor checked; by default the one shipped.

    Raises: ModelError if anything is missing, unreadable, misshapen or not finite.
    """
    about = read_json(folder / CONFIG)
    if about.pop("kind", None) != KIND or about.pop("format", None) != FORMAT_VERSION:
        raise ModelError(f"{folder} holds no evaluator: its {CONFIG} must say kind {KIND}, format {FORMAT_VERSION}")
    config = checked(EvaluatorConfig, about.pop("sizes", None), f"{folder / CONFIG}: sizes", ModelError)
    vocabulary = read_lines(folder / VOCABULARY, ModelError)
    with torch.device("meta"):
        evaluator = Evaluator(config, vocabulary, about)
    file = open_tensors(folder / WEIGHTS)
    expected = {name: tuple(tensor.shape) for name, tensor in evaluator.state_dict().items()}
    check_shapes(str(file.path), expected, file.shapes, file.dtypes)
    tensors = {name: file.read(name).float() for name in expected}
    broken = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if broken:
        raise ModelError(f"{file.path} holds numbers that are not finite in {broken[0]}; install the package again")
    evaluator.load_state_dict(tensors, assign=True)
    return in_format(evaluator, torch.channels_last).eval()
