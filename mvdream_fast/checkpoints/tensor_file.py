"""Files of named tensors, opened without running anything in them: torch's zip pickles and safetensors.

What the tensors should be is not known here; see manifest.py and layouts.py.
"""

import re
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mvdream_fast.checkpoints.manifest import Shapes, printable
from mvdream_fast.core.errors import ModelError

_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
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

    def without(self, drop: Callable[[str], bool]) -> "TensorFile":
        """The same file, but for the names that `drop` is true of."""
        return replace(self, shapes={name: shape for name, shape in self.shapes.items() if not drop(name)})

    def under(self, prefix: str) -> "TensorFile":
        """The same file, but only the names that begin with the prefix (and keep it)."""
        return self.without(lambda name: not name.startswith(prefix))


def open_tensors(path: Path) -> TensorFile:
    """Opens a .pt or .safetensors file, told apart by content.

    Raises:
        ModelError: if the file is missing, truncated, of another format, or holds anything but plain tensors.
    """
    try:
        if path.exists() and not path.is_file():
            raise ModelError(f"{path} must be a regular file")
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}") from error
    return _open_pickle(path) if magic.startswith(b"PK") else _open_safetensors(path)


def _open_pickle(path: Path) -> TensorFile:
    """torch.save's zip format, through weights_only alone: a refused file is never tried in any other way."""
    if tuple(int(n) for n in torch.__version__.split(".")[:2]) < (2, 6):
        raise ModelError(f"torch {torch.__version__} cannot read pickles safely (CVE-2025-32434); install torch >= 2.6")
    _check_zip(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols; what matters is raised
            tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a hostile file can raise anything
        reason = printable(str(error).partition("\n")[0]) or type(error).__name__
        raise ModelError(f"{path} was refused, nothing in it was run: {reason}. Download it again") from error
    if not isinstance(tensors, dict) or not all(isinstance(name, str) for name in tensors):
        raise ModelError(f"{path} must hold a flat dictionary of tensors, got {_describe(tensors)}")
    for name, tensor in tensors.items():
        _check_tensor(path, name, tensor)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    dtypes = {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in tensors.items()}
    return TensorFile(path, shapes, dtypes, tensors.__getitem__)


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
    if not plain or not tensor.is_contiguous():
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
        dtypes = {name: _DTYPES.get(s.get_dtype(), s.get_dtype()) for name, s in slices.items()}
    except Exception as error:
        reason = printable(str(error)) or type(error).__name__
        raise ModelError(
            f"{path} is no readable .safetensors or .pt file ({reason}); download or convert it again"
        ) from error
    return TensorFile(path, shapes, dtypes, file.get_tensor)
