"""Cameras: where the views of an object stand, what of them the UNet is told, and the rays through their pixels.

World: Blender's, z up, right-handed; an object's front looks to -Y. A camera is a camera-to-world matrix with OpenGL
axes (x right, y up, looking along -z). Azimuth 0 stands at -Y, in front of the object; azimuths grow towards +X,
counter-clockwise seen from above. No pixel is shaded here. docs/cameras.md has the figure.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mvdream_fast.camera_sampling import CameraSampling
from mvdream_fast.core.arguments import array, finite, whole
from mvdream_fast.core.pinned import to_device
from mvdream_fast.core.rng import Stream

# (x, y, z) -> (x, -z, y): from a y-up world whose front is +Z (glTF, OpenGL) to the z-up world whose front is -Y.
Y_UP_TO_Z_UP = torch.tensor([[1.0, 0, 0, 0], [0, 0, -1, 0], [0, 1, 0, 0], [0, 0, 0, 1]], dtype=torch.float64)


@dataclass(frozen=True)
class Cameras:
    """Poses and vertical fields of view of V views; NumPy arrays and nested lists become tensors.

    Raises:
        ValueError: another shape, or no numbers.
    """

    c2w: Tensor  # [V, 4, 4]
    fovy: Tensor  # [V], radians

    def __post_init__(self):
        object.__setattr__(self, "c2w", array("Cameras", "c2w", self.c2w, "numbers [V, 4, 4]"))
        object.__setattr__(self, "fovy", array("Cameras", "fovy", self.fovy, "numbers [V]").to(self.c2w.device))
        if self.c2w.ndim != 3 or self.c2w.shape[1:] != (4, 4):
            raise ValueError(f"Cameras: c2w must be [V, 4, 4], got {list(self.c2w.shape)}; one matrix a view")
        if self.fovy.shape != self.c2w.shape[:1]:
            raise ValueError(f"Cameras: fovy must be [{len(self.c2w)}], got {list(self.fovy.shape)}; one angle a view")

    def __len__(self) -> int:
        return len(self.c2w)

    def to(self, device: torch.device | str) -> "Cameras":
        """The same cameras on another device."""
        return Cameras(to_device(self.c2w, device), to_device(self.fovy, device))


def check_cameras(op: str, cameras: object) -> Cameras:
    """The cameras. Raises ValueError for anything else: poses alone, most likely."""
    if not isinstance(cameras, Cameras):
        raise ValueError(
            f"{op}: cameras must be Cameras, got {type(cameras).__name__}; make them of c2w [V, 4, 4] and fovy [V]"
        )
    return cameras


@dataclass(frozen=True)
class Rays:
    """R = V*Hp*Wp rays, row-major within a view, views slowest; directions have unit length.

    Those of whole images carry their cameras and (Hp, Wp), for what draws images rather than rays.
    """

    rays_o: Tensor  # [R, 3]
    rays_d: Tensor  # [R, 3]
    cameras: Cameras | None = None
    size: tuple[int, int] | None = None


def get_camera(
    n_views: int,
    elevation_deg: float = 15.0,
    azimuth_start_deg: float = 0.0,
    azimuth_span_deg: float = 360.0,
    blender_coord: bool = True,
) -> Tensor:
    """What the UNet is told of `n_views` cameras around the unit sphere, looking at its centre.

    View k has azimuth start + k*span/n_views: the end of the span is left out, and unlike upstream's floating-point
    range, awkward spans give no extra view. `blender_coord=False` gives the same poses in a y-up world (front +Z).

    Returns: [V, 16] float32, row-major camera-to-world matrices.
    Raises: ValueError if n_views < 1, an angle isn't finite or the elevation isn't within -90..90 degrees.
    Source: MVDream, camera_utils.get_camera.
    """
    azimuths, elevations = _directions("get_camera", n_views, elevation_deg, azimuth_start_deg, azimuth_span_deg)
    c2w = _look_at_origin(azimuths, elevations, torch.ones_like(azimuths))
    if not blender_coord:
        c2w = Y_UP_TO_Z_UP.T @ c2w
    return c2w.reshape(-1, 16).float()


def orbit_cameras(
    n_views: int,
    elevation_deg: float = 15.0,
    azimuth_start_deg: float = 0.0,
    azimuth_span_deg: float = 360.0,
    distance: float = 3.0,
    fovy_deg: float = 40.0,
) -> Cameras:
    """The poses of `get_camera` at `distance` from the origin, with a field of view to render with.

    Returns: Cameras of V views.
    Raises: ValueError for what `get_camera` refuses, a distance that isn't positive or a field of view that isn't
        within 0..180 degrees.
    """
    op, remedy = "orbit_cameras", "3 frames a unit sphere at 40 deg"
    distance = finite(op, "distance", distance, remedy)
    if not distance > 0:
        raise ValueError(f"{op}: distance must be positive, got {distance:g}; {remedy}")
    fovy_deg = finite(op, "fovy_deg", fovy_deg, "it is in degrees")
    if not 0 < fovy_deg < 180:
        raise ValueError(f"{op}: fovy_deg must be within 0 and 180, got {fovy_deg:g}; it is in degrees")
    azimuths, elevations = _directions(op, n_views, elevation_deg, azimuth_start_deg, azimuth_span_deg)
    c2w = _look_at_origin(azimuths, elevations, torch.full_like(azimuths, distance))
    return Cameras(c2w.float(), torch.full((len(azimuths),), math.radians(fovy_deg)))


def evaluation_cameras(n_views: int = 4, elevation_deg: float = 15.0, azimuth_start_deg: float = 0.0) -> Cameras:
    """Evenly spaced cameras that frame the unit sphere; MVDream-threestudio's for evaluation. Cameras of V views."""
    return orbit_cameras(n_views, elevation_deg, azimuth_start_deg, 360.0, distance=3.0, fovy_deg=40.0)


def normalize_camera(c2w: Tensor) -> Tensor:
    """Moves cameras onto the unit sphere, which is how the UNet is told of them: only their rotation counts.

    A new tensor: the argument is left as it is (upstream writes into it). A camera at the origin stays there.

    Args: c2w [V, 4, 4] or [V, 16].
    Returns: [V, 16], dtype of the argument (of whole numbers float32).
    Raises: ValueError for another shape, or what is no array of numbers.
    Source: MVDream, camera_utils.normalize_camera.
    """
    c2w = array("normalize_camera", "c2w", c2w, "numbers [V, 4, 4] or [V, 16]")
    if c2w.ndim < 2 or tuple(c2w.shape[1:]) not in ((4, 4), (16,)):
        raise ValueError(f"normalize_camera: c2w must be [V, 4, 4] or [V, 16], got {list(c2w.shape)}; one pose a view")
    c2w = c2w.reshape(-1, 4, 4)
    wide = torch.promote_types(c2w.dtype, torch.float32)  # 1e-8 is 0 in float16
    position = c2w[:, :3, 3:].to(wide)  # [V, 3, 1]
    unit = (position / (_length(position, 1) + 1e-8)).to(c2w.dtype)
    return torch.cat([torch.cat([c2w[:, :3, :3], unit], dim=2), c2w[:, 3:]], dim=1).reshape(-1, 16)


def turned(c2w: Tensor, azimuth_deg: float) -> Tensor:
    """Cameras [V, 16] moved around the upright axis, z, by an angle. Returns [V, 16]."""
    angle = math.radians(azimuth_deg)
    turn = torch.eye(4, dtype=c2w.dtype, device=c2w.device)
    turn[0, 0] = turn[1, 1] = math.cos(angle)
    turn[1, 0], turn[0, 1] = math.sin(angle), -math.sin(angle)
    return (turn @ c2w.reshape(-1, 4, 4)).reshape(-1, 16)


def _length(x: Tensor, dim: int) -> Tensor:
    # Torch has no types for its norms.
    return x.norm(dim=dim, keepdim=True)  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]


def generate_rays(cameras: Cameras, height: int, width: int) -> Rays:
    """A ray through the centre of every pixel; pixel (0, 0) is the upper left one.

    The direction in the camera's axes is ((i + 0.5 - W/2)/f, -(j + 0.5 - H/2)/f, -1) with f = 0.5 H / tan(fovy/2), then
    rotated and normalised. Differentiable in the poses. An image of no pixels gives no rays.

    Returns: Rays of R = V*Hp*Wp, row-major, views slowest.
    Raises: ValueError for what is no Cameras, or a size that is no whole number.
    Source: threestudio, get_ray_directions and get_rays.
    """
    check_cameras("generate_rays", cameras)
    height = whole("generate_rays", "height", height, "it counts pixels", least=0)
    width = whole("generate_rays", "width", width, "it counts pixels", least=0)
    c2w, device = cameras.c2w, cameras.c2w.device
    focal = 0.5 * height / torch.tan(0.5 * cameras.fovy.to(c2w.dtype))  # [V]
    x = (torch.arange(width, device=device, dtype=c2w.dtype) + 0.5 - width / 2)[None, None, :] / focal[:, None, None]
    y = (torch.arange(height, device=device, dtype=c2w.dtype) + 0.5 - height / 2)[None, :, None] / focal[:, None, None]
    shape = (len(cameras), height, width)
    towards = torch.stack([x.expand(shape), -y.expand(shape), -torch.ones(shape, device=device, dtype=c2w.dtype)], -1)
    rays_d = torch.einsum("vij,vhwj->vhwi", c2w[:, :3, :3], towards)
    rays_d = rays_d / _length(rays_d, -1)
    rays_o = c2w[:, None, None, :3, 3].expand(*shape, 3)
    return Rays(rays_o.reshape(-1, 3), rays_d.reshape(-1, 3), cameras, (height, width))


def sample_cameras(
    config: CameraSampling, stream: Stream, n_groups: int = 1, azimuth_start_deg: float = -180.0
) -> Cameras:
    """Draws groups of views around the object: azimuths exactly 360/V degrees apart, one elevation, distance and
    field of view a group. The first view of a group lies in the first 360/V degrees from `azimuth_start_deg`. What
    `config.perturb` adds to that comes last.

    Returns: Cameras of n_groups*V views, the views of a group next to each other.
    Raises: ValueError if a count is below 1 or a range cannot be.
    Source: MVDream-threestudio, RandomMultiviewCameraIterableDataset.
    """
    n_groups = whole("sample_cameras", "n_groups", n_groups, "ask for 1")
    _check_sampling(config)
    start = finite("sample_cameras", "azimuth_start_deg", azimuth_start_deg, "it is in degrees")
    groups = [_sample_group(config, start, *map(float, stream.uniform(5))) for _ in range(n_groups)]
    c2w = torch.cat([g.c2w for g in groups])
    c2w = _perturbed(c2w, config.perturb, stream) if any(config.perturb) else c2w
    return Cameras(c2w, torch.cat([g.fovy for g in groups]))


_RANGES: dict[str, tuple[Callable[[Any], bool], str, str]] = {
    "elevation_range_deg": (lambda x: -90 <= x <= 90, "within -90 and 90", "it is in degrees"),
    "fovy_range_deg": (lambda x: 0 < x < 180, "within 0 and 180", "it is in degrees"),
    "distance_range": (lambda x: x > 0, "positive", "1 frames the object"),
}


def _check_sampling(config: CameraSampling) -> None:
    op = "sample_cameras"
    whole(op, "n_views", config.n_views, "4 is what the models were trained with")
    for name, (holds, wanted, remedy) in _RANGES.items():
        try:
            low, high = getattr(config, name)
        except (TypeError, ValueError):
            raise ValueError(f"{op}: {name} must be two numbers, got {getattr(config, name)!r}; {remedy}") from None
        low, high = (finite(op, name, x, remedy) for x in (low, high))
        if not low <= high:
            raise ValueError(f"{op}: {name} must be low..high, got {low:g}..{high:g}; swap the two numbers")
        if not (holds(low) and holds(high)):
            raise ValueError(f"{op}: {name} must be {wanted}, got {low:g}..{high:g}; {remedy}")


def _sample_group(
    config: CameraSampling, start_deg: float, branch: float, u_elevation: float, u_azimuth: float, u_fovy: float,
    u_distance: float,
) -> Cameras:  # fmt: skip
    """One group from five uniform numbers in [0, 1)."""
    fovy_deg = _between(config.fovy_range_deg, u_fovy)
    distance = _distance(config, fovy_deg, u_distance)
    start = start_deg + u_azimuth * 360 / config.n_views
    return orbit_cameras(config.n_views, _elevation_deg(config, branch, u_elevation), start, 360.0, distance, fovy_deg)


def _perturbed(c2w: Tensor, perturb: tuple[float, float, float], stream: Stream) -> Tensor:
    """Each of the poses [V, 4, 4] moved by itself; see CameraSampling. Source: threestudio, RandomCameraDataModule."""
    position, center, upward = perturb
    eye = c2w[:, :3, 3] + position * stream.uniform(len(c2w), 3, low=-1.0, high=1.0)
    backward = torch.nn.functional.normalize(eye - center * stream.normal(len(c2w), 3), dim=-1)
    up = torch.tensor([0.0, 0.0, 1.0]) + upward * stream.normal(len(c2w), 3)
    right = torch.nn.functional.normalize(torch.cross(up, backward, dim=-1), dim=-1)
    top = torch.stack([right, torch.cross(backward, right, dim=-1), backward, eye], -1)  # [V, 3, 4]
    return torch.cat([top, c2w[:, 3:]], 1)


def middle_cameras(config: CameraSampling, elevation_deg: float = 15.0, azimuth_start_deg: float = 0.0) -> Cameras:
    """The cameras of `pipeline(prompt)`'s views as `config` would stand them: middle field of view and distance.

    Returns: Cameras of n_views views, evenly around.
    """
    fovy_deg = _between(config.fovy_range_deg, 0.5)
    distance = _distance(config, fovy_deg, 0.5)
    return orbit_cameras(config.n_views, elevation_deg, azimuth_start_deg, 360.0, distance, fovy_deg)


def _distance(config: CameraSampling, fovy_deg: float, u: float) -> float:
    half = math.radians(fovy_deg) / 2
    scale = {"tan": math.tan(half), "sin": math.sin(half), "none": 1.0}[config.relative_distance]
    return _between(config.distance_range, u) / scale


def _elevation_deg(config: CameraSampling, branch: float, u: float) -> float:
    if config.elevations == "uniform" or branch < 0.5:
        return _between(config.elevation_range_deg, u)
    # As coded upstream: (elevation + 90)/180 taken for the area fraction of a sphere, so 0..30 degrees become 0..19.47.
    low, high = ((angle + 90) / 180 for angle in config.elevation_range_deg)
    return math.degrees(math.asin(2 * _between((low, high), u) - 1))


def _between(limits: tuple[float, float], u: float) -> float:
    return limits[0] + (limits[1] - limits[0]) * u


def _directions(
    op: str, n_views: int, elevation_deg: float, start_deg: float, span_deg: float
) -> tuple[Tensor, Tensor]:
    """n_views azimuths, the end of the span excluded, and as many times the elevation: radians, float64."""
    n_views = whole(op, "n_views", n_views, "4 is what the models were trained with")
    elevation_deg = finite(op, "elevation_deg", elevation_deg, "90 is straight above", -90, 90)
    start_deg = finite(op, "azimuth_start_deg", start_deg, "0 is in front of the object")
    span_deg = finite(op, "azimuth_span_deg", span_deg, "360 is a whole turn")
    azimuths = torch.deg2rad(start_deg + span_deg * torch.arange(n_views, dtype=torch.float64) / n_views)
    return azimuths, torch.full_like(azimuths, math.radians(elevation_deg))


def _look_at_origin(azimuth: Tensor, elevation: Tensor, distance: Tensor) -> Tensor:
    """Poses [V, 4, 4] of cameras that look at the origin with z upwards; defined at the poles too."""
    sin_a, cos_a, sin_e, cos_e = azimuth.sin(), azimuth.cos(), elevation.sin(), elevation.cos()
    zero = torch.zeros_like(azimuth)
    right = torch.stack([cos_a, sin_a, zero], -1)
    up = torch.stack([-sin_e * sin_a, sin_e * cos_a, cos_e], -1)
    backward = torch.stack([cos_e * sin_a, -cos_e * cos_a, sin_e], -1)
    top = torch.stack([right, up, backward, distance[:, None] * backward], -1)  # [V, 3, 4]
    bottom = torch.tensor([0.0, 0, 0, 1], dtype=top.dtype).expand(len(top), 1, 4)
    return torch.cat([top, bottom], dim=1)
