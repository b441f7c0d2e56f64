"""Lens distortion in OpenCV's two camera models, and its inverse. Points uv [..., 2] lie on the plane z = 1.

Coefficients come in OpenCV's order, [N] for all points or [..., N] one set a point.
Source: OpenCV's documentation of calib3d ("Detailed Description") and of its namespace fisheye.
"""

import math

import torch
from torch import Tensor

from mvdream_fast.nerfacc_compat._inputs import check_fits, check_tensor, floats, promoted
from mvdream_fast.ops._edges import require

COEFFICIENTS = (0, 1, 2, 4, 5, 8, 12)  # k1 k2 p1 p2 k3 k4 k5 k6 s1 s2 s3 s4, cut where OpenCV and nerfacc cut it


@torch.no_grad()
def opencv_lens_undistortion(uv: Tensor, params: Tensor, eps: float = 1e-6, iters: int = 10) -> Tensor:
    """Where points [..., 2] of a distorted image lie without distortion: Newton's method, from the points themselves.

    params: [N] or [..., N], (k1, k2, p1, p2, k3, k4, k5, k6, s1, s2, s3, s4) or its first 0, 1, 2, 4, 5 or 8. A point
    stays where it is in a step whose Jacobian's determinant is below eps. Not differentiable.

    Returns: [..., 2] in the dtype of uv. Raises: ValueError for shapes that don't fit; TypeError.
    """
    return _opencv_lens_undistortion(uv, params, eps, iters)


@torch.no_grad()
def opencv_lens_undistortion_fisheye(uv: Tensor, params: Tensor, eps: float = 1e-6, iters: int = 10) -> Tensor:
    """The same for a fisheye lens, params [4] or [..., 4] (k1, k2, k3, k4): Newton's method on the angle.

    A point that no direction in front of the camera is seen at, or that isn't found to eps in `iters` steps, is NaN
    (nerfacc leaves it unset).
    """
    op = "opencv_lens_undistortion_fisheye"
    params = _check(op, uv, params, (4,))
    require(iters > 0, op, "iters", "at least 1", iters, "ten is enough for a lens")
    distance = uv.double().norm(dim=-1)
    theta, found = distance.clamp(max=math.pi / 2), torch.zeros_like(distance, dtype=torch.bool)
    k = params.double().unbind(-1)
    for _ in range(iters):
        seen, slope = _fisheye_angle(theta, k)
        step = (seen - distance) / slope
        theta = torch.where(found, theta, theta - step)
        found |= step.abs() < eps
    found &= (theta >= 0) & (theta < math.pi / 2)
    scale = torch.where(distance > 0, torch.tan(theta) / distance, 1.0)
    return (uv * torch.where(found, scale, math.nan)[..., None]).to(uv.dtype)


def _opencv_lens_distortion(uv: Tensor, params: Tensor) -> Tensor:
    """Where points [..., 2] are seen through the lens; differentiable."""
    padded = _padded("_opencv_lens_distortion", uv, params)
    return _distorted(floats(uv).unbind(-1), padded)[0].to(promoted(uv, params))


def _opencv_lens_distortion_fisheye(uv: Tensor, params: Tensor, eps: float = 1e-10) -> Tensor:
    """The same through a fisheye lens; eps is the distance from the centre below which a point stays there."""
    params = _check("_opencv_lens_distortion_fisheye", uv, params, (4,))
    distance = floats(uv).norm(dim=-1)
    seen, _ = _fisheye_angle(torch.atan(distance), floats(params).unbind(-1))
    return (uv * (seen / distance.clamp(min=eps))[..., None]).to(promoted(uv, params))


def _opencv_lens_undistortion(uv: Tensor, params: Tensor, eps: float = 1e-6, iters: int = 10) -> Tensor:
    """`opencv_lens_undistortion`, differentiable through its steps."""
    params = _padded("opencv_lens_undistortion", uv, params)
    target = point = floats(uv)
    for _ in range(iters):
        image, (xx, xy, yx, yy) = _distorted(point.unbind(-1), params)
        dx, dy = (image - target).unbind(-1)
        det = xx * yy - xy * yx
        usable = det.abs() > eps
        step = torch.stack([dx * yy - dy * xy, dy * xx - dx * yx], -1) / torch.where(usable, det, 1)[..., None]
        point = torch.where(usable[..., None], point - step, point)
    return point.to(uv.dtype)


def _distorted(point: tuple[Tensor, ...], params: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The point [..., 2] that the lens shows, and the Jacobian (dx/du, dx/dv, dy/du, dy/dv).

    r = u^2 + v^2; radial d = (1 + k1 r + k2 r^2 + k3 r^3) / (1 + k4 r + k5 r^2 + k6 r^3);
    x = u d + 2 p1 u v + p2 (r + 2 u^2) + s1 r + s2 r^2, y = v d + p1 (r + 2 v^2) + 2 p2 u v + s3 r + s4 r^2.
    """
    u, v = point
    k1, k2, p1, p2, k3, k4, k5, k6, s1, s2, s3, s4 = params.unbind(-1)
    r = u * u + v * v
    above, below = 1 + r * (k1 + r * (k2 + r * k3)), 1 + r * (k4 + r * (k5 + r * k6))
    d = above / below
    d_above, d_below = k1 + r * (2 * k2 + r * 3 * k3), k4 + r * (2 * k5 + r * 3 * k6)
    d_r = (d_above - d * d_below) / below
    x = u * d + 2 * p1 * u * v + p2 * (r + 2 * u * u) + r * (s1 + r * s2)
    y = v * d + 2 * p2 * u * v + p1 * (r + 2 * v * v) + r * (s3 + r * s4)
    x_r, y_r = u * d_r + s1 + 2 * r * s2, v * d_r + s3 + 2 * r * s4  # with u and v held
    xx, xy = d + 2 * p1 * v + 6 * p2 * u + 2 * u * x_r, 2 * p1 * u + 2 * p2 * v + 2 * v * x_r
    yx, yy = 2 * p2 * v + 2 * p1 * u + 2 * u * y_r, d + 2 * p2 * u + 6 * p1 * v + 2 * v * y_r
    return torch.stack([x, y], -1), (xx, xy, yx, yy)


def _fisheye_angle(theta: Tensor, k: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """theta (1 + k1 theta^2 + k2 theta^4 + k3 theta^6 + k4 theta^8), and its derivative."""
    k1, k2, k3, k4 = k
    t = theta * theta
    return (
        theta * (1 + t * (k1 + t * (k2 + t * (k3 + t * k4)))),
        1 + t * (3 * k1 + t * (5 * k2 + t * (7 * k3 + t * 9 * k4))),
    )


def _padded(op: str, uv: Tensor, params: Tensor) -> Tensor:
    """All twelve coefficients, in at least float32."""
    params = floats(_check(op, uv, params, COEFFICIENTS))
    return torch.nn.functional.pad(params, (0, COEFFICIENTS[-1] - params.shape[-1]))


def _check(op: str, uv: Tensor, params: Tensor, counts: tuple[int, ...]) -> Tensor:
    check_tensor(op, "uv", uv)
    require(uv.shape[-1] == 2, op, "uv", "of shape [..., 2]", list(uv.shape), "pass points of the plane z = 1")
    check_tensor(op, "params", params)
    n, some = params.shape[-1], " or ".join(map(str, counts))
    require(n in counts, op, "params", f"of {some} coefficients in OpenCV's order", n, "fill up with zeros")
    check_fits(op, "params", params, (*uv.shape[:-1], n), uv)
    return params
