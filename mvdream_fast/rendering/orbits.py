"""The cameras of a rendered object: orbits of evenly spaced azimuths at one elevation, field of view and distance.

Presets: "embedded" (the shipped model's training cameras) and "paper" (MVDream's published rendering).
"""

import math
from dataclasses import dataclass

import numpy as np

from mvdream_fast.camera_sampling import CameraSampling


@dataclass(frozen=True)
class OrbitPreset:
    """Ranges from which each orbit draws once; all its views share the draw."""

    n_views: int
    random_offset: bool  # an azimuth offset within one step per orbit, or azimuths from 0
    elevation_deg: tuple[float, float]
    fovy_deg: tuple[float, float]
    fit: str  # what Mesh.normalised makes of the object
    distance: tuple[float, float]  # factor range; see `orbit`


_MINI = CameraSampling.mini()
PRESETS = {
    # The unit ball stays in the image: distance = factor / sin(fov / 2).
    "embedded": OrbitPreset(16, True, _MINI.elevation_range_deg, _MINI.fovy_range_deg, "sphere", _MINI.distance_range),
    # Source: MVDream (arXiv 2308.16512), data rendering: distance = 0.5 x NDC focal length x U[0.9, 1.1].
    "paper": OrbitPreset(32, False, (0, 30), (15, 60), "box", (0.9, 1.1)),
}


@dataclass(frozen=True)
class Orbit:
    """c2w [V, 4, 4] float32 with OpenGL axes, fovy [V] float32 radians, and what they were made of (degrees)."""

    c2w: np.ndarray
    fovy: np.ndarray
    azimuth_deg: np.ndarray
    elevation_deg: float
    distance: float


def orbit(preset: OrbitPreset, numbers: np.ndarray) -> Orbit:
    """The orbit that four uniform numbers in [0, 1) choose: offset, elevation, field of view, distance factor."""
    u = [float(x) for x in numbers]
    step = 360 / preset.n_views
    azimuth = step * (np.arange(preset.n_views) + (u[0] if preset.random_offset else 0.0))
    elevation = _between(preset.elevation_deg, u[1])
    half = math.radians(_between(preset.fovy_deg, u[2])) / 2
    factor = _between(preset.distance, u[3])
    distance = factor / math.sin(half) if preset.fit == "sphere" else 0.5 * factor / math.tan(half)
    c2w = np.stack([look_at_origin(a, elevation, distance) for a in azimuth])
    fovy = np.full(preset.n_views, 2 * half, np.float32)
    return Orbit(c2w, fovy, azimuth, elevation, distance)


def _between(bounds: tuple[float, float], u: float) -> float:
    return bounds[0] + (bounds[1] - bounds[0]) * u


def look_at_origin(azimuth_deg: float, elevation_deg: float, distance: float) -> np.ndarray:
    """c2w [4, 4] float32: azimuth 0 stands at -Y and looks at the front, increasing towards +X; z is up."""
    a, e = math.radians(azimuth_deg), math.radians(elevation_deg)
    backward = np.array([math.sin(a) * math.cos(e), -math.cos(a) * math.cos(e), math.sin(e)])
    right = np.array([math.cos(a), math.sin(a), 0.0])
    pose = np.eye(4)
    pose[:3, 0], pose[:3, 1], pose[:3, 2] = right, np.cross(backward, right), backward
    pose[:3, 3] = distance * backward
    return pose.astype(np.float32)
