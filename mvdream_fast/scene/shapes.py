"""The shapes that a run can optimise, by the name in their configurations' `shape`; no torch here."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from mvdream_fast.core.errors import ArgumentError, UserError
from mvdream_fast.core.schema import checked
from mvdream_fast.scene.nerf.config import NerfConfig
from mvdream_fast.scene.surface.config import SurfaceConfig
from mvdream_fast.scene.tets.config import TetsConfig, TexturedMeshConfig

ShapeConfig = NerfConfig | SurfaceConfig | TetsConfig | TexturedMeshConfig
SHAPES: dict[str, type[ShapeConfig]] = {
    "volume": NerfConfig,
    "surface": SurfaceConfig,
    "tets": TetsConfig,
    "textured-mesh": TexturedMeshConfig,
}
RAMPS = ("lambda_", "sdf_levels", "cos_anneal", "deviation_least")  # how the names of what changes over the steps begin


def names_of(cls: type[ShapeConfig]) -> set[str]:
    """The settings of a shape."""
    return {field.name for field in dataclasses.fields(cls)}


def class_for(settings: Mapping[str, Any]) -> type[ShapeConfig]:
    """The configuration that holds these settings: that of their `shape`, else the first one that has all of them."""
    named = (cls for name, cls in SHAPES.items() if name == settings.get("shape"))
    having = (cls for cls in SHAPES.values() if settings.keys() <= names_of(cls))
    return next(named, None) or next(having, NerfConfig)


def checked_shape(
    settings: Mapping[str, Any], source: str, error: type[UserError], names: Mapping[str, str] | None = None
) -> ShapeConfig:
    """The configuration of settings as they come from a file; the arguments, and what is raised, as in `checked`."""
    shape, names = settings.get("shape", "volume"), names or {}
    if shape not in [*SHAPES]:
        where = f"{source}: " if source else ""
        raise error(f"{where}{names.get('shape', 'shape')} must be one of {', '.join(SHAPES)}, got {shape!r}")
    return checked(class_for(settings), settings, source, error, names)


def checked_shapes(
    settings: Mapping[str, Any], source: str, error: type[UserError], names: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Settings of one shape, or, where none is named, of several that stages have, as their types want them; the
    arguments as above."""
    out: dict[str, Any] = {}
    for cls in (class_for(settings), *SHAPES.values()):
        has = settings.keys() if "shape" in settings else names_of(cls)
        own = {name: value for name, value in settings.items() if name in has and name not in out}
        shape = checked_shape(own, source, error, names)
        out |= {name: getattr(shape, name) for name in own}
    return out


def reshaped(config: ShapeConfig, shape: str | None, factor: float) -> ShapeConfig:
    """`config` as another shape, if it is one; what is that shape's own changes over a run `factor` times as long as
    that which its defaults are made for."""
    if shape in (None, config.shape):
        return config
    new, like = changed(config, shape=shape), names_of(type(config))
    ramps = {name: getattr(new, name) for name in names_of(type(new)) - like if name.startswith(RAMPS)}
    return changed(new, **{name: (a * factor, b, c, d * factor) for name, (a, b, c, d) in ramps.items()})


def changed(config: ShapeConfig, **changes: Any) -> ShapeConfig:
    """`config` with settings replaced. Another `shape` keeps those that both have.

    Raises ArgumentError for a shape that there is none of, and for settings of another one.
    """
    shape = changes.get("shape", config.shape)
    if shape not in [*SHAPES]:
        raise ArgumentError(f"shape must be one of {', '.join(SHAPES)}, got {shape!r}")
    cls = SHAPES[shape]
    foreign = sorted(changes.keys() - names_of(cls))
    if foreign:
        others = sorted(name for name, other in SHAPES.items() if foreign[0] in names_of(other))
        raise ArgumentError(
            f"{', '.join(foreign)} must be left out for the shape {shape}; it is a setting of {', '.join(others)}"
        )
    kept = {name: getattr(config, name) for name in names_of(type(config)) & names_of(cls) - {"shape"}}
    return cls(**kept | changes)
