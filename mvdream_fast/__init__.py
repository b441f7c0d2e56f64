"""Multi-view diffusion for text-to-3D: four views of an object from a sentence, and a 3D asset from them.

Importing this package imports no torch and touches no device: public names are loaded on first use (PEP 562).
"""

from importlib import import_module
from typing import TYPE_CHECKING

from mvdream_fast._version import __version__

if TYPE_CHECKING:
    from mvdream_fast.pipeline import MVDreamPipeline
    from mvdream_fast.text_to_3d import Asset, TextTo3D

_LAZY = {
    "MVDreamPipeline": "mvdream_fast.pipeline",
    "TextTo3D": "mvdream_fast.text_to_3d",
    "Asset": "mvdream_fast.text_to_3d",
}
_LAZY_MODULES = {"ops": "ops", "camera": "camera", "schedule": "diffusion.schedule", "kernels": "kernels"}

__all__ = ["Asset", "MVDreamPipeline", "TextTo3D", "__version__"]


def __getattr__(name: str):
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    if name in _LAZY_MODULES:
        return import_module(f"mvdream_fast.{_LAZY_MODULES[name]}")
    raise AttributeError(f"module 'mvdream_fast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *_LAZY_MODULES])
