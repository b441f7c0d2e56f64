"""Vertex attributes at the pixels of `rasterize`, and how fast they change from pixel to pixel."""

from typing import Literal

import torch
from torch import Tensor

from mvdream_fast.ops._edges import (
    BACKENDS,
    address,
    check_same_device,
    is_batched,
    load_native,
    new_result,
    queue_of,
    require,
    runs_natively,
    vmap_error,
)
from mvdream_fast.ops._registered import differentiable, register
from mvdream_fast.ops._triangles import check_as, check_faces, check_rast


def interpolate(
    attr: Tensor,
    rast: Tensor,
    tri: Tensor,
    rast_db: Tensor | None = None,
    diff_attrs: Literal["all"] | list[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Attributes of the vertices, blended with the barycentric weights of each pixel; zeros where there is no triangle.

    attr: [V, A] for all images, or [B, V, A]. rast, rast_db: [B, Hp, Wp, 4] of `rasterize`. tri: [F, 3] int32.
    diff_attrs: the numbers of the attributes whose derivatives are wanted, which needs rast_db; "all" or a list.

    Differentiable in attr, rast (through u and v) and rast_db; a second time through the plain-torch reference. float32
    runs natively, on a CPU with the same bits for any number of threads; float64 is plain torch. On CUDA a triangle or
    a vertex that there is not makes zeros instead of an error, which would wait for the GPU.

    Returns: attributes [B, Hp, Wp, A] and derivatives [B, Hp, Wp, 2 n] of the n attributes in diff_attrs, each as
    (d/dX, d/dY) with X and Y in pixels; n is 0 without.
    Raises: ValueError, TypeError, RuntimeError for unfitting arguments, and for numbers of triangles and vertices that
    there are not (CPU).
    Source: Laine et al., Modular Primitives for High-Performance Differentiable Rendering (2020), section 3.2.
    """
    chosen = _check(attr, rast, tri, rast_db, diff_attrs)
    if torch.compiler.is_compiling() and attr.dtype == torch.float32:
        return torch.ops.mvdream_fast.interpolate(attr, rast, tri, rast_db, chosen)
    if not runs_natively(attr, rast, rast_db, devices=BACKENDS):
        _check_values(attr, rast, tri)
        return interpolate_ref(attr, rast, tri, rast_db, chosen)
    return _Interpolate.apply(attr, rast, tri, rast_db, chosen)


def interpolate_ref(
    attr: Tensor, rast: Tensor, tri: Tensor, rast_db: Tensor | None, diff_attrs: list[int]
) -> tuple[Tensor, Tensor]:
    """The same in plain torch; differentiable any number of times."""
    covered = rast[..., 3] > 0
    image, row, column = covered.nonzero().unbind(-1)
    corners = tri.long()[rast[covered][:, 3].long() - 1]  # [K, 3]
    a, b, c = (attr[corners] if attr.ndim == 2 else attr[image[:, None], corners]).unbind(1)  # [K, A] each
    u, v = rast[covered][:, :2, None].unbind(1)
    places, n_attr = (image, row, column), attr.shape[-1]
    out = attr.new_zeros(*covered.shape, n_attr).index_put(places, c + u * (a - c) + v * (b - c))
    out_da = attr.new_zeros(*covered.shape, 2 * len(diff_attrs))
    if rast_db is None or not diff_attrs:
        return out, out_da
    du, dv = rast_db[covered].unflatten(-1, (2, 2)).unbind(1)  # [K, 2] each: along X, along Y
    slopes = (a - c)[:, diff_attrs, None] * du[:, None] + (b - c)[:, diff_attrs, None] * dv[:, None]
    return out, out_da.index_put(places, slopes.flatten(1))


def _forward(attr, rast, tri, rast_db, diff_attrs) -> tuple[Tensor, Tensor]:
    attr, rast, tri, rast_db = attr.contiguous(), rast.contiguous(), tri.contiguous(), _contiguous(rast_db)
    native, n_attr = load_native("interpolate", attr), attr.shape[-1]
    out, out_da = (new_result(attr, *rast.shape[:3], n) for n in (n_attr, 2 * len(diff_attrs)))
    args, _alive = _arguments(attr, rast, tri, rast_db, diff_attrs)
    status = native.interpolate_forward(args, *map(address, (out, out_da)), queue_of(attr))
    _refuse(status, len(tri), attr.shape[-2])
    return out, out_da


def _backward(cotangents, kept, wanted, attr, rast, tri, rast_db, diff_attrs) -> list[Tensor | None]:
    attr, rast, tri, rast_db = attr.contiguous(), rast.contiguous(), tri.contiguous(), _contiguous(rast_db)
    d_out, d_out_da = map(_contiguous, cotangents)
    native = load_native("interpolate", attr)
    args, _alive = _arguments(attr, rast, tri, rast_db, diff_attrs)
    d_attr, d_rast = (new_result(x, *x.shape) if want else None for x, want in zip((attr, rast), wanted))
    d_db = new_result(rast_db, *rast_db.shape) if rast_db is not None and wanted[3] else None
    if d_attr is not None and not rast.shape[0]:
        d_attr.zero_()  # no image writes it
    addresses = map(address, (d_out, d_out_da, d_attr, d_rast, d_db))
    native.interpolate_backward(args, *addresses, queue_of(attr))
    return [d_attr, d_rast, None, d_db]


def _arguments(attr, rast, tri, rast_db, diff_attrs):
    """The native arguments, and a tensor that must live as long as they do."""
    chosen = torch.tensor(diff_attrs, dtype=torch.int32).to(attr.device)
    n_images, height, width, _ = rast.shape
    n_vertices, n_attr = attr.shape[-2:]
    sizes = [n_images, height * width, n_vertices, len(tri), n_vertices * n_attr if attr.ndim == 3 else 0]
    addresses = map(address, (attr, rast, rast_db, tri, chosen))
    return load_native("interpolate").Attributes(*addresses, sizes, n_attr, len(diff_attrs)), chosen


def _contiguous(x: Tensor | None) -> Tensor | None:
    return x if x is None else x.contiguous()


def _empty(attr, rast, tri, rast_db, diff_attrs) -> tuple[Tensor, Tensor]:
    widths = (attr.shape[-1], 2 * len(diff_attrs))
    out, out_da = (attr.new_empty(*rast.shape[:3], n) for n in widths)
    return out, out_da


_Interpolate = differentiable(_forward, _backward, n_outputs=2, twice=interpolate_ref)
_registered = differentiable(_forward, _backward, n_outputs=2)
register(
    "interpolate(Tensor attr, Tensor rast, Tensor tri, Tensor? rast_db, SymInt[] diff_attrs) -> (Tensor, Tensor)",
    cpu=_registered,
    cuda=_registered,
    fake=_empty,
)


def _check(attr, rast, tri, rast_db, diff_attrs) -> list[int]:
    """The attributes whose derivatives are wanted, as a list."""
    op = "interpolate"
    if is_batched(attr, rast, tri, rast_db):
        raise vmap_error(op)
    check_rast(op, rast)
    shape = (None, None) if getattr(attr, "ndim", 0) == 2 else (len(rast), None, None)
    check_as(op, "attr", attr, shape, "rast", rast)
    check_faces(op, tri)
    check_same_device(op, attr=attr, rast=rast, tri=tri, rast_db=rast_db)
    if diff_attrs is None:
        return []
    require(rast_db is not None, op, "rast_db", "given with diff_attrs", None, "pass what rasterize returns")
    check_as(op, "rast_db", rast_db, tuple(rast.shape), "rast", rast)
    n_attr = attr.shape[-1]
    chosen = list(range(n_attr)) if diff_attrs == "all" else list(diff_attrs)
    fits = all(isinstance(i, int) and 0 <= i < n_attr for i in chosen)
    require(fits, op, "diff_attrs", f'"all" or numbers in [0, {n_attr})', diff_attrs, "choose attributes of attr")
    return chosen


def _check_values(attr: Tensor, rast: Tensor, tri: Tensor) -> None:
    """What the native op finds as it goes."""
    faces = rast[..., 3]
    if faces.numel() and not (faces.min() >= 0 and faces.max() <= len(tri)):
        _refuse(3, len(tri), attr.shape[-2])
    if tri.numel() and not (tri.min() >= 0 and tri.max() < attr.shape[-2]):
        _refuse(3, len(tri), attr.shape[-2])


def _refuse(status: int, n_faces: int, n_vertices: int) -> None:
    wanted = f"of a mesh with {n_faces} triangles and {n_vertices} vertices"
    require(
        status == 0, "interpolate", "rast", wanted, "a triangle or vertex outside", "pass rast, tri and attr of one"
    )
