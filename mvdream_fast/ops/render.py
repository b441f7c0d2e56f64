"""Inference rendering: march, field and composite in rounds, with early termination and no memory for every sample."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from mvdream_fast.ops._edges import (
    address,
    aligned,
    check_probability,
    check_same_device,
    check_shaped,
    check_tensors,
    is_batched,
    is_watched,
    load_native,
    plain32,
    require,
    thread_count,
    vmap_error,
)
from mvdream_fast.ops._march_checks import check_march, raise_for
from mvdream_fast.ops.composite import composite_ref, composite_samples
from mvdream_fast.ops.field import HashGridField, native_of
from mvdream_fast.ops.march_rays import (
    Samples,
    march_args,
    march_rays,
    march_rays_ref,
    optical_depth,
    positions_ref,
    visible_ref,
)

Field = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]

_RAYS_PER_CHUNK = 16384
_SAMPLES_PER_ROUND = 1 << 18  # about what a level of the paper's hash grid wants to be gathered at once


class RenderedImage(NamedTuple):
    """What `render` returns: rgb [R, 3], opacity [R], depth [R], n_samples (field evaluations)."""

    rgb: torch.Tensor
    opacity: torch.Tensor
    depth: torch.Tensor
    n_samples: int


@torch.no_grad()
def render(
    rays_o: torch.Tensor,
    rays_d: torch.Tensor,
    field: Field,
    aabb: torch.Tensor | Sequence[float],
    occupancy_bits: torch.Tensor,
    resolution: int | Sequence[int],
    step_size: float,
    background: torch.Tensor | None = None,
    near: float | torch.Tensor = 0.0,
    far: float | torch.Tensor = math.inf,
    alpha_thre: float = 0.0,
    early_stop_eps: float = 1e-4,
) -> RenderedImage:
    """Colour, opacity and depth of rays through a field, without gradients and without memory for every sample.

    The pixels are those of march_rays, prune_samples and composite in a row, to the bit where the field's value at a
    point does not depend on the batch around it; but a ray that has become opaque is not evaluated further.
    field: positions [P, 3] -> (sigmas [P], rgb [P, 3]), called with some 100,000 points. On CUDA `ops.HashGridField`,
    or what says by its method `hash_grid_field()` that it is the same as one (field.Volume does), is not called but
    evaluated in one kernel with the march and the sums; any other is called for blocks of rays.
    The other arguments are those of `march_rays`, `prune_samples` and `composite`; near and far are numbers, or [R].

    Returns: RenderedImage. Raises: what the three ops raise.
    """
    if is_batched(*(x for x in (rays_o, rays_d, background, near, far) if isinstance(x, torch.Tensor))):
        raise vmap_error("render")
    box, shape = check_march("render", rays_o, rays_d, aabb, occupancy_bits, resolution, step_size, None, near, far)
    if background is not None:
        check_tensors("render", background=background)
        check_shaped("render", "background", background, (3,) if background.ndim == 1 else (rays_o.shape[0], 3))
        check_same_device("render", rays_o=rays_o, background=background)
    check_probability("render", "alpha_thre", alpha_thre)
    check_probability("render", "early_stop_eps", early_stop_eps)
    run = _render_by_ops if is_watched() else _render_cuda if rays_o.is_cuda else _render_cpu
    return run(
        *(rays_o, rays_d, field, box, occupancy_bits, shape, step_size, background, near, far),
        *(alpha_thre, early_stop_eps),
    )


@torch.no_grad()
def render_ref(
    rays_o,
    rays_d,
    field,
    aabb,
    occupancy_bits,
    resolution,
    step_size,
    background=None,
    near=0.0,
    far=math.inf,
    alpha_thre=0.0,
    early_stop_eps=1e-4,
) -> RenderedImage:
    """The same with the reference ops, some thousand rays at a time and every sample of them evaluated."""
    grid, bounds = (aabb, occupancy_bits, resolution, step_size), (near, far)
    ops = (march_rays_ref, positions_ref, _composite_samples_ref)
    return _in_blocks(*ops, rays_o, rays_d, field, grid, bounds, background, alpha_thre, early_stop_eps)


def _in_blocks(
    march, positions_of, composite, rays_o, rays_d, field, grid, bounds, background, alpha_thre, early_stop_eps
) -> RenderedImage:
    n_rays, n_samples = rays_o.shape[0], 0
    rgb, opacity, depth = rays_o.new_zeros(n_rays, 3), rays_o.new_zeros(n_rays), rays_o.new_zeros(n_rays)
    for i in range(0, n_rays, _RAYS_PER_CHUNK // 4):
        part = slice(i, i + _RAYS_PER_CHUNK // 4)
        samples = march(rays_o[part], rays_d[part], *grid, None, *(_bound(x, part) for x in bounds))
        positions = positions_of(samples, rays_o[part], rays_d[part])
        sigmas, colors = (x.to(positions.dtype) for x in _evaluate(field, positions))
        n_samples += samples.n_samples
        keep = visible_ref(samples, sigmas, alpha_thre, early_stop_eps)
        kept, behind = samples.select(keep), _rows(background, part)
        out = composite(sigmas[keep], colors[keep], kept, behind)
        rgb[part], opacity[part], depth[part] = out.rgb, out.opacity, out.depth
    return RenderedImage(rgb, opacity, depth, n_samples)


def _composite_samples_ref(sigmas, rgb, samples, background):
    return composite_ref(sigmas, rgb, samples.t_starts, samples.t_ends, samples.packed_info, background)


def _render_cuda(
    rays_o, rays_d, field, box, bits, shape, step_size, background, near, far, alpha_thre, early_stop_eps
) -> RenderedImage:
    known, thresholds = fusable(field), (alpha_thre, early_stop_eps)
    march, _alive = march_args("render", rays_o, rays_d, box, bits, shape, step_size, None, near, far)
    raise_for("render", load_native("render", rays_o).march_status(march))
    if known is not None:
        return _render_fused(rays_o, known, march, background, *thresholds)
    grid = (rays_o, rays_d, field, box, bits, shape, step_size, background, near, far)
    return _render_by_ops(*grid, *thresholds)


def _render_by_ops(
    rays_o, rays_d, field, box, bits, shape, step_size, background, near, far, alpha_thre, early_stop_eps
) -> RenderedImage:
    grid, bounds = (box, bits, shape, step_size), (near, far)
    ops = (march_rays, Samples.positions, composite_samples)
    return _in_blocks(*ops, rays_o, rays_d, field, grid, bounds, background, alpha_thre, early_stop_eps)


def fusable(field: Field) -> HashGridField | None:
    """What a kernel can evaluate in the field's place; None for a field that only a call can evaluate."""
    if isinstance(field, HashGridField) and type(field) is HashGridField:
        known = field
    else:
        ask: Callable[[], HashGridField | None] | None = getattr(field, "hash_grid_field", None)
        known = ask() if callable(ask) else None
    return known if known is not None and known.table.dtype == torch.float32 else None


def _render_fused(rays_o, field, march, background, alpha_thre, early_stop_eps) -> RenderedImage:
    native = load_native("render", rays_o)
    check_same_device("render", rays_o=rays_o, table=field.table)
    parameters = [
        aligned(x.detach().resolve_neg()) for x in (field.table, *field.density_weights, *field.feature_weights)
    ]
    behind = None if background is None else plain32(background)
    stride = 3 if behind is not None and behind.ndim == 2 else 0
    depths = optical_depth(1 - alpha_thre), optical_depth(early_stop_eps)
    outputs = rgb, opacity, depth = _empty(rays_o)
    native_field = native_of(field.spec, len(field.density_weights), parameters)
    n_samples = native.render(native_field, march, *depths, address(behind), stride, *map(address, outputs))
    return RenderedImage(rgb, opacity, depth, n_samples)


def _empty(rays_o: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    n_rays = len(rays_o)
    rgb, opacity, depth = (rays_o.new_empty(*size, dtype=torch.float32) for size in ((n_rays, 3), (n_rays,), (n_rays,)))
    return rgb, opacity, depth


def _evaluate(field: Field, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What the field says of these positions, checked: the extension reads as many numbers as there are positions."""
    found = field(positions)
    is_pair = isinstance(found, (tuple, list)) and len(found) == 2
    got = type(found).__name__
    require(is_pair, "render", "sigmas and rgb of the field", "a pair", got, "return both", TypeError)
    sigmas, rgb = found
    check_shaped("render", "sigmas of the field", sigmas, (len(positions),))
    check_shaped("render", "rgb of the field", rgb, (len(positions), 3))
    check_same_device("render", **{"rays_o": positions, "sigmas of the field": sigmas, "rgb of the field": rgb})
    return sigmas, rgb


def _rows(background: torch.Tensor | None, part: slice) -> torch.Tensor | None:
    return background[part] if background is not None and background.ndim == 2 else background


def _bound(value: float | torch.Tensor, part: slice) -> float | torch.Tensor:
    """near or far of some of the rays."""
    return value[part] if isinstance(value, torch.Tensor) and value.ndim else value


def _render_cpu(
    rays_o, rays_d, field, box, bits, shape, step_size, background, near, far, alpha_thre, early_stop_eps
) -> RenderedImage:
    native, n_rays = load_native("render"), rays_o.shape[0]
    march, _alive = march_args("render", rays_o, rays_d, box, bits, shape, step_size, None, near, far)
    raise_for("render", native.march_status(march))
    depths = optical_depth(1 - alpha_thre), optical_depth(early_stop_eps)
    outputs = rgb, opacity, depth = _empty(rays_o)
    behind = None if background is None else plain32(background)
    n_samples = 0
    for i in range(0, n_rays, _RAYS_PER_CHUNK):
        part = slice(i, min(i + _RAYS_PER_CHUNK, n_rays))
        state, n = _rounds(native, march.rays(i, part.stop - i), part.stop - i, field, *depths)
        own = _rows(behind, part)
        stride = 3 if own is not None and own.ndim == 2 else 0
        pixels = (address(x[part]) for x in outputs)
        native.render_finish(state.data_ptr(), part.stop - i, address(own), stride, *pixels)
        n_samples += n
    return RenderedImage(rgb, opacity, depth, n_samples)


def _rounds(native, args, n_rays: int, field: Field, least: float, most: float) -> tuple[torch.Tensor, int]:
    """What every ray of a chunk gathers, and the number of samples evaluated for it."""
    state = torch.zeros(n_rays, native.RENDER_STATE, dtype=torch.float64)
    state[:, 1] = 1  # transmittance
    cursor, live = torch.zeros(n_rays, dtype=torch.int64), torch.arange(n_rays)
    offsets, slots = torch.empty(n_rays + 1, dtype=torch.int64), torch.empty(0, dtype=torch.float32)
    n_samples, n_threads = 0, thread_count()
    while live.numel():
        per_round = max(1, min(256, _SAMPLES_PER_ROUND // live.numel()))
        if slots.numel() < 2 * per_round * live.numel():
            slots = slots.new_empty(2 * per_round * live.numel())
        buffers = map(address, (cursor, offsets, slots, state))
        gathering = native.RenderRound(live.data_ptr(), live.numel(), per_round, *buffers)
        n = native.render_march(args, gathering)
        positions = slots.new_empty(n, 3)
        native.render_positions(args, gathering, positions.data_ptr())
        if n:
            sigmas, rgb = (plain32(x) for x in _evaluate(field, positions))
            native.render_composite(gathering, sigmas.data_ptr(), rgb.data_ptr(), least, most, n_threads)
        n_samples += n
        live = live[cursor[live] >= 0]
    return state, n_samples
