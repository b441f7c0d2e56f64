"""The one place where the kind of a representation is chosen, by its configuration."""

from typing import Any

from mvdream_fast.core.errors import ModelError
from mvdream_fast.core.rng import Stream
from mvdream_fast.scene.base import HasMesh, Representation, RepresentationConfig
from mvdream_fast.scene.nerf.config import NerfConfig
from mvdream_fast.scene.nerf.nerf import Nerf
from mvdream_fast.scene.shapes import SHAPES, checked_shape, class_for, names_of
from mvdream_fast.scene.surface.config import SurfaceConfig
from mvdream_fast.scene.surface.surface import Surface
from mvdream_fast.scene.tets.config import TetsConfig, TexturedMeshConfig
from mvdream_fast.scene.tets.tets import Tets
from mvdream_fast.scene.tets.textured import TexturedMesh


def new_representation(config: RepresentationConfig, seed: int = 0, lit: bool = False) -> Representation:
    """A fresh representation. lit: it will be shaded, so it has to know its normals, which a mesh always does."""
    stream = Stream(seed, 0, "volume")
    if isinstance(config, NerfConfig):
        return Nerf(config, stream, config.normals if lit else "none")
    if isinstance(config, SurfaceConfig):
        return Surface(config, stream, config.sdf_normals if lit else "none")
    if isinstance(config, TetsConfig):
        return Tets(config, stream)
    if isinstance(config, TexturedMeshConfig):
        return TexturedMesh(config, stream=stream)
    known = ", ".join(kind.__name__ for kind in SHAPES.values())
    raise TypeError(
        f"new_representation: config must be one of {known}, got {type(config).__name__}; name its representation here"
    )


def begun(config: RepresentationConfig, source: HasMesh, seed: int = 0) -> Representation:
    """A representation that begins as a mesh. Raises DivergedError where there is none."""
    if isinstance(config, TetsConfig):
        return Tets.from_representation(config, source, seed)
    raise TypeError(f"begun: config must be a TetsConfig, got {type(config).__name__}; only tetrahedra take a mesh")


def handed_over(config: RepresentationConfig, source: Representation, seed: int = 0) -> Representation:
    """A representation that shows what another one has become. Raises DivergedError where that has no mesh."""
    if isinstance(config, TetsConfig):
        return begun(config, source, seed)
    if isinstance(config, TexturedMeshConfig):
        return TexturedMesh.from_representation(config, source, seed)
    raise TypeError(
        f"handed_over: config must be one of a mesh, got {type(config).__name__}; only those start from another's"
    )


def config_from_dict(values: dict[str, Any], source: str) -> RepresentationConfig:
    """The configuration in a file's values; the others, such as those of the run around it, are passed over.

    Raises ModelError naming the value that cannot be.
    """
    names = names_of(class_for({"shape": values.get("shape", "volume")}))
    return checked_shape({name: value for name, value in values.items() if name in names}, source, ModelError)
