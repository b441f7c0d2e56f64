"""The one place where the kind of a representation is chosen, by its configuration."""

from typing import Any

from mvdream_fast.core.errors import ModelError
from mvdream_fast.core.rng import Stream
from mvdream_fast.scene.base import Representation, RepresentationConfig
from mvdream_fast.scene.nerf.config import NerfConfig
from mvdream_fast.scene.nerf.nerf import Nerf
from mvdream_fast.scene.shapes import checked_shape, class_for, names_of
from mvdream_fast.scene.surface.config import SurfaceConfig
from mvdream_fast.scene.surface.surface import Surface


def new_representation(config: RepresentationConfig, seed: int = 0, lit: bool = False) -> Representation:
    """A fresh representation. lit: it will be shaded, so it has to know its normals."""
    if isinstance(config, NerfConfig):
        return Nerf(config, Stream(seed, 0, "volume"), lit)
    if isinstance(config, SurfaceConfig):
        return Surface(config, Stream(seed, 0, "volume"), lit)
    raise TypeError(
        f"new_representation: config must be NerfConfig or SurfaceConfig, got {type(config).__name__}; name its "
        "representation here"
    )


def config_from_dict(values: dict[str, Any], source: str) -> RepresentationConfig:
    """The configuration in a file's values; the others, such as those of the run around it, are passed over.

    Raises ModelError naming the value that cannot be.
    """
    names = names_of(class_for({"shape": values.get("shape", "volume")}))
    return checked_shape({name: value for name, value in values.items() if name in names}, source, ModelError)
