"""Files of named tensors, opened without running anything in them: torch's zip pickles, safetensors, shards of either.

What the tensors should be is not known here; see manifest.py and layouts.py.
"""

import re
import warnings
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mvdream_fast.checkpoints.folder import read_json
from mvdream_fast.checkpoints.manifest import Shapes, printable
from mvdream_fast.core.errors import ModelError

_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_WRAPPERS = ("module.", "_orig_mod.", "model.", "unet.")
_SHARDS = (".safetensors", ".bin")
_FOREIGN = {  # by the first bytes
    b"version ": "a pointer of Git LFS and not the weights; fetch them with `git lfs pull`",
    b"GGUF": "in GGUF, whose weights are quantised; name the .safetensors or .pt that it was made from",
    b"\x80\x02\x8a\nl\xfc\x9cF": "in torch.save's format before 1.6; save it again, best as .safetensors",
    b"<!DOCTYP": "a web page and not the weights; download them again",
}
_MAX_PICKLE_BYTES = 16 << 20  # names and shapes only; a released file has about 0.2 MB of them
_TORCH_ENTRY = re.compile(
    r"[^/]+/(data\.pkl|data/[0-9]+|byteorder|version|\.format_version|\.storage_alignment|\.data/serialization_id)"
)


@dataclass(frozen=True)
class TensorFile:
    """Names, shapes and dtypes of a file, and a reader of one tensor; the data stay on disk (memory-mapped)."""

    path: Path
    shapes: Shapes
    dtypes: dict[str, str]
    read: Callable[[str], Tensor]
    metadata: dict[str, str] = field(default_factory=dict)  # what safetensors keep beside their tensors

    def without(self, drop: Callable[[str], bool]) -> "TensorFile":
        """The same file, but for the names that `drop` is true of."""
        return replace(self, shapes={name: shape for name, shape in self.shapes.items() if not drop(name)})

    def under(self, prefix: str) -> "TensorFile":
        """The same file, but only the names that begin with the prefix (and keep it)."""
        return self.without(lambda name: not name.startswith(prefix))

    def renamed(self, rename: Callable[[str], str]) -> "TensorFile":
        """The same file under other names."""
        stored = {rename(name): name for name in self.shapes}
        shapes = {new: self.shapes[name] for new, name in stored.items()}
        dtypes = {new: self.dtypes[name] for new, name in stored.items()}
        return replace(self, shapes=shapes, dtypes=dtypes, read=lambda name: self.read(stored[name]))

    def unwrapped(self) -> "TensorFile":
        """The same file without the prefix that a module's wrapper (DDP, torch.compile, ...) puts before all names."""
        prefix = next((p for p in _WRAPPERS if self.shapes and all(name.startswith(p) for name in self.shapes)), None)
        return self if prefix is None else self.renamed(lambda name: name.removeprefix(prefix)).unwrapped()

    def joined(self, other: "TensorFile") -> "TensorFile":
        """Both files as one; what both hold is read from the other."""

        def read(name: str) -> Tensor:
            return (other if name in other.shapes else self).read(name)

        return replace(self, shapes=self.shapes | other.shapes, dtypes=self.dtypes | other.dtypes, read=read)


def open_tensors(path: Path) -> TensorFile:
    """Opens a .pt or .safetensors file, told apart by content, or the shards that an index (.index.json) names.

    Raises:
        ModelError: if the file is missing, truncated, of another format, or holds anything but plain tensors.
    """
    if path.name.endswith(".json") and ".index." in path.name:
        return _open_shards(path)
    try:
        if path.exists() and not path.is_file():
            raise ModelError(f"{path} must be a regular file")
        with path.open("rb") as file:
            magic = file.read(8)
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}") from error
    what = next((what for start, what in _FOREIGN.items() if magic.startswith(start)), None)
    if what:
        raise ModelError(f"{path} is {what}")
    return _open_pickle(path) if magic.startswith(b"PK") else _open_safetensors(path)


def _open_shards(index: Path) -> TensorFile:
    said = read_json(index).get("weight_map")
    if not isinstance(said, dict) or not said or not all(isinstance(name, str) for name in said.values()):
        raise ModelError(f"{index} must say in weight_map in which file each tensor is")
    places: dict[str, str] = said
    if wrong := sorted(name for name in places.values() if name != Path(name).name or not name.endswith(_SHARDS)):
        raise ModelError(f"{index} must name .safetensors or .bin files beside it, got {printable(wrong[0])}")
    files = {name: open_tensors(index.with_name(name)) for name in sorted(set(places.values()))}
    absent = sorted(name for name, place in places.items() if name not in files[place].shapes)
    if absent:
        raise ModelError(f"{index} says that {printable(absent[0])} is in {printable(places[absent[0]])}; it is not")
    owned = (file.without(lambda name, p=place: places.get(name) != p) for place, file in files.items())
    return replace(reduce(TensorFile.joined, owned), path=index)


def _open_pickle(path: Path) -> TensorFile:
    """torch.save's zip format, through weights_only alone: a refused file is never tried in any other way."""
    if tuple(int(n) for n in torch.__version__.split(".")[:2]) < (2, 6):
        raise ModelError(f"torch {torch.__version__} cannot read pickles safely (CVE-2025-32434); install torch >= 2.6")
    _check_zip(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols; what matters is raised
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a hostile file can raise anything
        reason = printable(str(error).partition("\n")[0]) or type(error).__name__
        raise ModelError(
            f"{path} was refused, nothing in it was run: {reason}. Download it again, or where it holds more than "
            "weights, save these alone as .safetensors"
        ) from error
    tensors = _weights(path, loaded)
    for name, tensor in tensors.items():
        _check_tensor(path, name, tensor)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    dtypes = {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in tensors.items()}
    return TensorFile(path, shapes, dtypes, tensors.__getitem__)


def _weights(path: Path, loaded: Any) -> Mapping[str, Any]:
    """The weights in what torch.load returned: all of it, or what a training's checkpoint has one level down."""
    if isinstance(loaded, Mapping) and not any(isinstance(value, Tensor) for value in loaded.values()):
        inner = {key: value for key, value in loaded.items() if _all_tensors(value)}
        if "state_dict" in inner or len(inner) == 1:  # Lightning's name for it, or the only one
            loaded = inner.get("state_dict") or next(iter(inner.values()))
        elif inner:
            raise ModelError(f"{path} must hold one set of weights, got {_describe(inner)}; save the wanted one alone")
    if not isinstance(loaded, Mapping) or not all(isinstance(name, str) for name in loaded):
        raise ModelError(f"{path} must hold a flat dictionary of tensors, got {_describe(loaded)}")
    return loaded


def _all_tensors(value: Any) -> bool:
    return isinstance(value, Mapping) and bool(value) and all(isinstance(tensor, Tensor) for tensor in value.values())


def _check_zip(path: Path) -> None:
    """Refuses what torch.save would not have written: compression (bombs), a huge pickle, TorchScript, duplicates."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except Exception as error:
        raise ModelError(f"{path} is damaged or cut short ({printable(str(error))}); download it again") from error
    seen: set[str] = set()
    for entry in entries:
        problem = ""
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size > _size_limit(path, entry.filename):
            problem = "is compressed or too large"
        elif not _TORCH_ENTRY.fullmatch(entry.filename) or entry.filename in seen:
            problem = "does not belong there"
        if problem:
            raise ModelError(f"{path} was not written by torch.save: {printable(entry.filename)} {problem}")
        seen.add(entry.filename)


def _size_limit(path: Path, name: str) -> int:
    return _MAX_PICKLE_BYTES if name.endswith(".pkl") else path.stat().st_size


def _check_tensor(path: Path, name: str, tensor: Any) -> None:
    if not isinstance(tensor, Tensor):
        raise ModelError(f"{path} must hold a flat dictionary of tensors, but {printable(name)} is {_describe(tensor)}")
    plain = tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized
    dense = tensor.is_contiguous() or (tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last))
    if not plain or not dense:
        raise ModelError(f"{path}: {printable(name)} must be a plain, contiguous tensor on the CPU")


def _describe(value: Any) -> str:
    keys = f" with the keys {printable(', '.join(map(str, list(value)[:5])))}" if isinstance(value, dict) else ""
    return f"a {type(value).__name__}{keys}"


def _open_safetensors(path: Path) -> TensorFile:
    from safetensors import safe_open

    try:
        file = safe_open(path, framework="pt")
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
        shapes = {name: tuple(s.get_shape()) for name, s in slices.items()}
        dtypes = {name: _DTYPES.get(s.get_dtype()) or str(s.get_dtype()) for name, s in slices.items()}
    except Exception as error:
        reason = printable(str(error)) or type(error).__name__
        raise ModelError(
            f"{path} is no readable .safetensors or .pt file ({reason}); download or convert it again"
        ) from error
    return TensorFile(path, shapes, dtypes, file.get_tensor, file.metadata() or {})
