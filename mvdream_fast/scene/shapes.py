"""The shapes that a run can optimise, by the name in their configurations' `shape`; no torch here."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from mvdream_fast.core.errors import ArgumentError
from mvdream_fast.scene.nerf.config import NerfConfig
from mvdream_fast.scene.surface.config import SurfaceConfig

ShapeConfig = NerfConfig | SurfaceConfig
SHAPES: dict[str, type[ShapeConfig]] = {"volume": NerfConfig, "surface": SurfaceConfig}


def names_of(cls: type[ShapeConfig]) -> set[str]:
    """The settings of a shape."""
    return {field.name for field in dataclasses.fields(cls)}


def class_for(settings: Mapping[str, Any]) -> type[ShapeConfig]:
    """The configuration that holds these settings: that of their `shape`, else the first one that has all of them."""
    named = SHAPES.get(settings.get("shape", ""))
    having = (cls for cls in SHAPES.values() if settings.keys() <= names_of(cls))
    return named or next(having, NerfConfig)


def changed(config: ShapeConfig, **changes: Any) -> ShapeConfig:
    """`config` with settings replaced. Another `shape` keeps those that both have.

    Raises ArgumentError for settings of another shape.
    """
    cls = SHAPES.get(changes.get("shape", config.shape), type(config))
    foreign = sorted(changes.keys() - names_of(cls))
    if foreign:
        others = sorted(name for name, other in SHAPES.items() if foreign[0] in names_of(other))
        raise ArgumentError(
            f"{', '.join(foreign)} must be left out for the shape {cls.shape}; it is a setting of {', '.join(others)}"
        )
    kept = {name: getattr(config, name) for name in names_of(type(config)) & names_of(cls) - {"shape"}}
    return cls(**kept | changes)
