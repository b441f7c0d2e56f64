"""Models from and to files: the one door through which weights come in, and the only format that is written.

Nothing here ever opens a network connection or unpickles code. A model is found in places.py, its names are translated
in layouts.py, its configuration is told in recognise.py and foreign_config.py, and all is checked in manifest.py.
"""

import math
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from mvdream_fast.checkpoints import deepfloyd, layouts
from mvdream_fast.checkpoints.folder import new_folder
from mvdream_fast.checkpoints.foreign_config import Settings, check_settings, hints_of
from mvdream_fast.checkpoints.layouts import PartLayout, Slot
from mvdream_fast.checkpoints.manifest import PARTS, build, check_config, check_shapes, manifest, owner, printable
from mvdream_fast.checkpoints.places import PUBLISHED, WHERE_IF, find_model, is_own, is_published, weights_of
from mvdream_fast.checkpoints.recognise import recognise, stored_hints
from mvdream_fast.checkpoints.tensor_file import TensorFile, open_tensors
from mvdream_fast.core.errors import ArgumentError, ModelError, OutputError
from mvdream_fast.core.files import read_lines
from mvdream_fast.core.machine import in_format
from mvdream_fast.core.rng import Stream
from mvdream_fast.models.config import ModelConfig
from mvdream_fast.models.deepfloyd import UNet
from mvdream_fast.models.pixels import Codec
from mvdream_fast.models.t5 import T5Encoder, T5Tokenizer, Text, Words
from mvdream_fast.models.text import TextEncoder
from mvdream_fast.models.tokenizer import Tokenizer
from mvdream_fast.models.unet import MultiViewUNet
from mvdream_fast.models.vae import VAE

ENCODER_ONLY = "vae.encoder"  # a part: the VAE without its decoder
VOCABULARY, STAND_INS = "vocabulary.txt", "stand_ins.txt"


Part = TypeVar("Part")


def needed(part: Part | None, name: str) -> Part:
    """A part of a model. Raises RuntimeError where it was left out at loading."""
    if part is None:
        raise RuntimeError(f"the model must have its {name} here; load it with the part '{name}'")
    return part


@dataclass
class Model:
    """The parts of a multi-view diffusion model; those that were not asked for are None."""

    config: ModelConfig
    unet: UNet | None = None
    vae: Codec | None = None
    text: Text | None = None
    tokenizer: Words | None = None

    def whole(self) -> tuple[MultiViewUNet, Codec, TextEncoder, Tokenizer]:
        """All parts, to be trained.

        Raises: RuntimeError where one was left out at loading, ModelError where it is none of ours.
        """
        unet = needed(self.unet, "unet")
        if not isinstance(unet, MultiViewUNet):
            raise not_ours(self.config)
        return unet, needed(self.vae, "vae"), *self.words()

    def words(self) -> tuple[TextEncoder, Tokenizer]:
        """The text tower and its tokenizer, to be trained; raises as `whole`."""
        text, tokenizer = needed(self.text, "text"), needed(self.tokenizer, "text")
        if not isinstance(text, TextEncoder) or not isinstance(tokenizer, Tokenizer):
            raise not_ours(self.config)
        return text, tokenizer


def not_ours(config: ModelConfig) -> ModelError:
    """What to say where a model of other projects' classes should be trained or saved."""
    return ModelError(
        f"{config.name} is a model of {config.foreign}: it can be sampled and distilled from, but not trained, "
        "tuned or converted here; name one of Stable Diffusion's or MVDream's"
    )


def load_model(
    path_or_name: "str | Path | Source",
    dtype: torch.dtype | None = None,
    parts: Sequence[str] = PARTS,
    add_cameras: bool = False,
) -> Model:
    """A model from any of the known layouts, on the CPU, in evaluation mode, with every tensor checked.

    Args:
        path_or_name: a released .pt file, a diffusers-layout folder, a folder or a finished run of ours, "embedded", or
            a source that is open already.
        dtype: of the weights; None keeps the stored one (the widest, should a part mix them).
        parts: of "unet", "vae" (or "vae.encoder", without the decoder), "text" (with the tokenizer).
        add_cameras: take Stable Diffusion's own file or folder as well, to be trained: its new camera layers end in
            zeros, so that it begins as the 2D model it was, whatever the camera.

    Raises:
        ModelError: if there is no such model, or any tensor is missing, unexpected, misshapen, or not finite.
        ArgumentError: if a part is unknown.
    """
    for part in parts:
        if part not in (*PARTS, ENCODER_ONLY):
            raise ArgumentError(f"a part must be one of {', '.join((*PARTS, ENCODER_ONLY))}, got {part!r}")
    source = path_or_name if isinstance(path_or_name, Source) else open_source(path_or_name, add_cameras)
    for part in parts:
        source.check(part.split(".")[0])
    model = Model(source.config)
    for part in parts:
        module = _load_part(source, part, dtype)
        setattr(model, part.split(".")[0], module.eval())
    if isinstance(model.text, T5Encoder):
        model.tokenizer = T5Tokenizer(source.config.text, source.path / "tokenizer")
    elif model.text is not None:
        model.tokenizer = Tokenizer(source.config.text, source.vocabulary, source.stand_ins)
    return model


def _load_part(source: "Source", part: str, dtype: torch.dtype | None) -> nn.Module:
    name = part.split(".")[0]
    with torch.device("meta"):
        module = build(name, source.config)
    tensors = source.tensors(name, dtype)
    if part == ENCODER_ONLY and isinstance(module, VAE):
        module.drop_decoder()
        tensors = {key: t for key, t in tensors.items() if not key.startswith(("decoder.", "post_quant_conv."))}
    owner(name, module).load_state_dict(tensors, assign=True)
    return in_format(module, torch.channels_last)


@dataclass(frozen=True)
class Source:
    """A model on disk, recognised but not read: `tensors` reads and checks one part at a time."""

    path: Path
    layout: str  # in words
    config: ModelConfig
    files: dict[str, TensorFile]  # of each part
    layout_of: Callable[[str], PartLayout]
    vocabulary: list[str] | None = None
    stand_ins: dict[str, str] = field(default_factory=dict)  # see Tokenizer
    new_cameras: bool = False  # the file has no camera layers
    says_prediction: bool = True  # whether anything tells what the UNet predicts; else the configuration assumes noise

    def check(self, part: str) -> None:
        """Raises ModelError if a name, shape or dtype of the part is not as it must be; reads no data."""
        file, layout = self.files[part], self.layout_of(part)
        found = {name: shape for name, shape in file.shapes.items() if name not in layout.unused}
        cameras = {slot.name for name, slot in layout.slots.items() if name.startswith(layouts.CAMERA)}
        if cameras and layout.expected.keys() - found.keys() == cameras:
            raise ModelError(
                f"{self.path} is a model of single images, without camera layers; name a multi-view model, or train "
                "one from it with train --init"
            )
        check_shapes(str(file.path), layout.expected, found, file.dtypes)

    def tensors(self, part: str, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """A checked part's tensors under our names, views of the file where dtype allows. Raises ModelError.

        Without a dtype all have that of the part; T5's each its own.
        """
        dtype = dtype or (None if self._keeps_dtypes(part) else self.dtype(part))
        slots, ours = self.layout_of(part).slots, manifest(part, self.config)
        tensors = {name: _take(self.files[part], slot, ours[name], dtype) for name, slot in slots.items()}
        new = sorted(ours.keys() - slots.keys()) if self.new_cameras else []
        return tensors | {name: _new_camera(name, ours[name]).to(dtype) for name in new}

    def n_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of the parts in a pipeline: of the UNet in this type, of T5 as stored, of the others in float32."""
        sizes = {"unet": dtype.itemsize} | {
            part: self.dtype(part).itemsize for part in PARTS if self._keeps_dtypes(part)
        }
        return sum(sizes.get(p, 4) * sum(map(math.prod, manifest(p, self.config).values())) for p in PARTS)

    def _keeps_dtypes(self, part: str) -> bool:
        """Whether each tensor stays as it is stored: T5's do, which is run in float32 block by block."""
        return part == "text" and self.config.text.kind == "t5"

    def dtype(self, part: str) -> torch.dtype:
        """The dtype that is stored for the part; float32 should it be a mixture."""
        names = {self.files[part].dtypes[slot.name] for slot in self.layout_of(part).slots.values()}
        return getattr(torch, names.pop()) if len(names) == 1 else torch.float32


def _take(file: TensorFile, slot: Slot, shape: tuple[int, ...], dtype: torch.dtype | None) -> Tensor:
    try:
        tensor = file.read(slot.name)
    except Exception as error:  # a file that changed or shrank since it was opened
        raise ModelError(f"{file.path}: cannot read {printable(slot.name)}: {printable(str(error))}") from error
    dtype = dtype or tensor.dtype
    low, high = (bound.item() for bound in tensor.aminmax())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ModelError(f"{file.path}: {slot.name} holds NaN or infinity; download or convert the file again")
    if max(-low, high) > torch.finfo(dtype).max:
        raise ModelError(
            f"{file.path}: {slot.name} does not fit {str(dtype).removeprefix('torch.')}; choose another type"
        )
    if slot.piece is not None:
        tensor = tensor.chunk(3)[slot.piece]
    return tensor.reshape(shape).to(dtype)


def _new_camera(name: str, shape: tuple[int, ...]) -> Tensor:
    """Untrained camera layers: the same numbers in every process, and nothing comes out before they are trained."""
    first = name == layouts.CAMERA + "0.weight"
    return Stream(0, 0, name).normal(*shape) / math.sqrt(shape[1]) if first else torch.zeros(shape)


def open_source(path_or_name: str | Path, add_cameras: bool = False) -> Source:
    """Finds a model and recognises its layout and configuration; no weights are read.

    Raises:
        ModelError: if there is no model, or it is in no known layout.
    """
    path = find_model(path_or_name)
    if not path.is_dir():
        return _open_released(path, add_cameras)
    if is_own(path):
        return _open_own(path)
    return _open_published(path, add_cameras) if is_published(path) else _open_deepfloyd(path)


def _open_own(folder: Path) -> Source:
    config = ModelConfig.load(folder / "config.json")
    check_config(config)
    files = {part: open_tensors(folder / f"{part}.safetensors") for part in PARTS}
    lines = folder / VOCABULARY
    vocabulary = read_lines(lines, ModelError) if lines.exists() else None
    words = folder / STAND_INS
    return Source(
        folder, "folder of mvdream_fast", config, files, lambda part: layouts.own(part, config), vocabulary,
        read_stand_ins(words) if words.exists() else {},
    )  # fmt: skip


def read_stand_ins(path: Path) -> dict[str, str]:
    """Lines of a word, a space, and the words that the model reads instead.

    Raises: ModelError where there is no such file, or a line has no stand-in.
    """
    pairs = [line.split(maxsplit=1) for line in read_lines(path, ModelError)]
    for line, pair in enumerate(pairs, 1):
        if len(pair) != 2:
            raise ModelError(f"{path}, line {line}: it must be a word and its stand-in, as 'couch sofa', got {pair}")
    return dict(pairs)


def _open_released(path: Path, add_cameras: bool) -> Source:
    whole = open_tensors(path).unwrapped().renamed(_with_text_model)
    hints, says_prediction = stored_hints(str(path), whole)
    file = whole.without(layouts.ignored)
    config = recognise(str(path), file.shapes, hints)
    vae, text = file.under(layouts.VAE), file.under(layouts.TEXT)
    rest = file.without(lambda name: name in vae.shapes or name in text.shapes)
    files = {"unet": rest, "vae": vae, "text": text}
    plain = not any(name.startswith(layouts.UNET + layouts.CAMERA) for name in rest.shapes)

    def layout_of(part: str) -> PartLayout:
        layout = layouts.released(part, config, text.shapes)
        return layout.without(layouts.CAMERA) if plain and add_cameras and part == "unet" else layout

    # MVDream's own files predict noise; of Stable Diffusion's there are both kinds, and nothing in them says which.
    return Source(
        path, "released flat file", config, files, layout_of, new_cameras=plain and add_cameras,
        says_prediction=says_prediction or not plain,
    )  # fmt: skip


def _with_text_model(name: str) -> str:
    """Some files of SD 1.5 leave this part of transformers' names out, as transformers 5 does."""
    return re.sub(r"^cond_stage_model\.transformer\.(?!text_model\.)", layouts.TRANSFORMERS, name)


def _open_published(folder: Path, add_cameras: bool) -> Source:
    settings = Settings.read(folder)
    opened = (open_tensors(weights_of(folder / name)).unwrapped() for name in PUBLISHED)
    files = {part: file.without(layouts.ignored) for part, file in zip(PARTS, opened)}
    camera = folder / layouts.CAMERA_FOLDER
    if camera.is_dir():
        prefixed = open_tensors(weights_of(camera)).renamed(lambda name: f"{layouts.CAMERA_FOLDER}.{name}")
        files["unet"] = files["unet"].joined(prefixed)
    found = {part: file.shapes for part, file in files.items()}
    as_released = layouts.as_released(found)
    config = recognise(str(folder), as_released, hints_of(settings))
    check_settings(settings, config)
    plain = layouts.UNET + layouts.CAMERA + "0.weight" not in as_released

    def layout_of(part: str) -> PartLayout:
        layout = layouts.published(part, config, found[part])
        return layout.without(layouts.CAMERA) if plain and add_cameras and part == "unet" else layout

    return Source(
        folder, "diffusers folder", config, files, layout_of, new_cameras=plain and add_cameras,
        says_prediction=bool(settings["scheduler"]) or not plain,
    )  # fmt: skip


def _open_deepfloyd(folder: Path) -> Source:
    config = deepfloyd.configuration(folder)
    check_config(config)
    named = {"unet": "unet", "text": "text_encoder"}
    if absent := [name for name in (*named.values(), "tokenizer") if not (folder / name).is_dir()]:
        raise ModelError(f"{folder} is no whole DeepFloyd IF model: it has no {absent[0]}. {WHERE_IF}")
    files = {part: open_tensors(weights_of(folder / name)) for part, name in named.items()}
    files["vae"] = TensorFile(folder, {}, {}, lambda name: torch.empty(0))  # pixels have no weights
    return Source(folder, "DeepFloyd IF folder", config, files, lambda part: deepfloyd.part_layout(part, config))


def save_model(model: Model, folder: str | Path, overwrite: bool = False) -> None:
    """Writes our layout: config.json, a safetensors file for each part, vocabulary.txt where there are own rows, and
    stand_ins.txt where words have others in their place.

    The folder appears complete or not at all. With `overwrite`, a folder that holds a model is replaced.

    Raises:
        OutputError: if the folder exists (or is no model's), or cannot be written.
        ValueError: if a part is missing from the model.
    """
    modules = {"unet": model.unet, "vae": model.vae, "text": model.text}
    absent = [part for part, module in modules.items() if module is None]
    if absent or (model.vae is not None and not model.vae.has_decoder):
        raise ValueError(f"save_model: the model must have all parts, got none for {absent or 'the VAE decoder'}")
    vocabulary, stand_ins = (t.vocabulary, t.stand_ins) if (t := model.tokenizer) else ([], {})
    states = ((part, lambda p=part: owner(p, modules[p]).state_dict()) for part in PARTS)
    write_folder(Path(folder), model.config, states, vocabulary, stand_ins, overwrite)


def write_folder(
    folder: Path,
    config: ModelConfig,
    parts: Iterator[tuple[str, Callable[[], dict[str, Tensor]]]],
    vocabulary: list[str] | None,
    stand_ins: Mapping[str, str],
    overwrite: bool,
) -> None:
    """Writes one part at a time, each only read when its turn comes.

    Raises: OutputError, as `save_model` does; ModelError for a model of other projects' classes.
    """
    if config.foreign:
        raise not_ours(config)
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with new_folder(folder, overwrite) as temporary:
        for part, read in parts:
            tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in read().items()}
            n_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
            try:
                save_file(tensors, temporary / f"{part}.safetensors", metadata={"format": "pt"})
            except SafetensorError as error:
                raise OutputError(
                    f"cannot write {n_bytes / 1e9:.2f} GB to {folder}/{part}.safetensors: {error}"
                ) from error
            del tensors
        pairs = [f"{word} {stand_in}" for word, stand_in in stand_ins.items()]
        for name, entries in ((VOCABULARY, vocabulary), (STAND_INS, pairs)):
            if entries:
                (temporary / name).write_text("\n".join(entries) + "\n", encoding="utf-8")
        plain = temporary / "config.json"
        plain.write_text(config.to_json(), encoding="utf-8")
        for path in temporary.glob("*.safetensors"):  # safetensors makes them readable by the owner alone
            shutil.copymode(plain, path)
