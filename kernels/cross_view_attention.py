"""Flash attention over the tokens of all views of a scene, camera vectors added as the tiles are loaded; Triton.

Formula, with i and j running over the V*N tokens of a scene and cam(i) the camera row of i's view:
    q'_i = q_i + cam_q(i), k'_j = k_j + cam_k(j), v'_j = v_j + cam_v(j)
    P_ij = exp(scale q'_i k'_j - L_i), L_i = log sum_j exp(scale q'_i k'_j), out_i = sum_j P_ij v'_j
    delta_i = sum_d out_id d_out_id, dS_ij = P_ij (d_out_i v'_j - delta_i)
    d_q = scale dS k', d_k = scale dS^T q', d_v = P^T d_out; a camera row's gradient is the sum over its view's tokens
Logarithms are to the base 2 inside. L is kept as its two parts, the largest score and the logarithm of the rest: their
rounded sum would cost P as many digits as L has before the point. Every sum has a fixed order (no atomics), so repeats
are bit-equal.
Source: Dao 2023, "FlashAttention-2", algorithms 1 and 2.
"""

import math

import torch
import triton
import triton.language as tl
from mvdream_fast.kernels._attention_rows import load_tile, store_tile, sum_tokens
from mvdream_fast.kernels._attention_tiles import Tile, backward_tile, block_width, forward_tile
from mvdream_fast.kernels._launch import Launch, by_layout
from torch import Tensor

Sizes = tuple[int, ...]  # a shape, or the strides of a tensor
Cameras = tuple[Sizes | None, Sizes | None, Sizes | None]  # strides of the camera vectors that there are
NO_CAMERAS: Cameras = (None, None, None)
# Multiply-add contraction is chosen here, not by Triton's default, which differs between versions.
OPTIONS = {"enable_fp_fusion": True}
LOG2_E = math.log2(math.e)
SMALLEST = 2.0**-126  # the smallest normal float32
SUM_ROWS = 32


@triton.jit
def key_scores(
    queries, k, camera_k, scene, head, cols, views, tokens, k_strides, camera_k_strides,
    D: tl.constexpr, BLOCK_D: tl.constexpr, FLAT: tl.constexpr, EVEN: tl.constexpr, ALIGN: tl.constexpr,
    CAMERA_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The keys of `cols`, and the queries' products with them, unscaled."""
    keys = load_tile(
        k, camera_k, scene, head, cols, views, tokens, k_strides, camera_k_strides,
        D, BLOCK_D, FLAT, EVEN, ALIGN, CAMERA_K,
    )  # fmt: skip
    return keys, tl.dot(queries, tl.trans(keys), input_precision=PRECISION)


@triton.jit
def attention_forward(
    q, k, v, camera_q, camera_k, camera_v, out, peaks, log_sums,
    q_strides, k_strides, v_strides, camera_q_strides, camera_k_strides, camera_v_strides,
    views, tokens, heads, scale_log2,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, FLAT: tl.constexpr,
    EVEN: tl.constexpr, ALIGN: tl.constexpr, CAMERA_Q: tl.constexpr, CAMERA_K: tl.constexpr, CAMERA_V: tl.constexpr,
    PRECISION: tl.constexpr, AHEAD: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M queries of one head of one scene against all its keys. KEEP stores what the backward needs.

    AHEAD asks for the next tile's scores before this tile's softmax, so that tensor cores work during exponentials.
    """
    length = views * tokens
    n_blocks = tl.cdiv(length, BLOCK_M)
    pair = tl.program_id(0) // n_blocks
    scene, head = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    rows = (tl.program_id(0) % n_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    queries = load_tile(
        q, camera_q, scene, head, rows, views, tokens, q_strides, camera_q_strides,
        D, BLOCK_D, FLAT, EVEN, ALIGN, CAMERA_Q,
    )  # fmt: skip
    peak, total = tl.full([BLOCK_M], float("-inf"), tl.float32), tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if AHEAD:
        _, ahead = key_scores(
            queries, k, camera_k, scene, head, tl.arange(0, BLOCK_N), views, tokens, k_strides, camera_k_strides,
            D, BLOCK_D, FLAT, EVEN, ALIGN, CAMERA_K, PRECISION,
        )  # fmt: skip
    for start in range(0, length, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        if AHEAD:
            scores = ahead
            following = (start + BLOCK_N) % length + tl.arange(0, BLOCK_N)  # after the last tile, one that is not used
            _, ahead = key_scores(
                queries, k, camera_k, scene, head, following, views, tokens, k_strides, camera_k_strides,
                D, BLOCK_D, FLAT, EVEN, ALIGN, CAMERA_K, PRECISION,
            )  # fmt: skip
        else:
            _, scores = key_scores(
                queries, k, camera_k, scene, head, cols, views, tokens, k_strides, camera_k_strides,
                D, BLOCK_D, FLAT, EVEN, ALIGN, CAMERA_K, PRECISION,
            )  # fmt: skip
        if not EVEN:
            scores = tl.where((cols < length)[None, :], scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        # An unfused product would lose the digits that the largest score has before the point.
        weights = tl.exp2(tl.fma(scores, scale_log2, -(new_peak * scale_log2)[:, None]))
        shrink = tl.exp2((peak - new_peak) * scale_log2)
        total = total * shrink + tl.sum(weights, 1)
        values = load_tile(
            v, camera_v, scene, head, cols, views, tokens, v_strides, camera_v_strides,
            D, BLOCK_D, FLAT, EVEN, ALIGN, CAMERA_V,
        )  # fmt: skip
        acc = tl.dot(weights.to(values.dtype), values, acc * shrink[:, None], input_precision=PRECISION)
        peak = new_peak
    store_tile(out, acc / total[:, None], scene, head, rows, views, tokens, heads, D, BLOCK_D, EVEN)
    if KEEP:
        line = (scene * heads + head) * length
        tl.store(peaks + line + rows, peak * scale_log2, mask=rows < length)
        tl.store(log_sums + line + rows, tl.log2(total), mask=rows < length)


@triton.jit
def attention_delta(
    out, d_out, delta, out_strides, d_out_strides, views, tokens, heads,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, EVEN: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """delta_i = sum_d out_id d_out_id for BLOCK_M rows."""
    length = views * tokens
    n_blocks = tl.cdiv(length, BLOCK_M)
    pair = tl.program_id(0) // n_blocks
    scene, head = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    rows = (tl.program_id(0) % n_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    x = load_tile(
        out, out, scene, head, rows, views, tokens, out_strides, out_strides, D, BLOCK_D, False, EVEN, ALIGN, False
    )
    y = load_tile(
        d_out, d_out, scene, head, rows, views, tokens, d_out_strides, d_out_strides,
        D, BLOCK_D, False, EVEN, ALIGN, False,
    )  # fmt: skip
    sums = tl.sum(x.to(tl.float32) * y.to(tl.float32), 1)
    tl.store(delta + (scene * heads + head) * length + rows, sums, mask=rows < length)


@triton.jit
def attention_backward_kv(
    q, k, v, camera_q, camera_k, camera_v, d_out, peaks, log_sums, delta, d_k, d_v,
    q_strides, k_strides, v_strides, d_out_strides, camera_q_strides, camera_k_strides, camera_v_strides,
    views, tokens, heads, scale, scale_log2,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, FLAT: tl.constexpr,
    FLAT_D_OUT: tl.constexpr, EVEN: tl.constexpr, ALIGN: tl.constexpr,
    CAMERA_Q: tl.constexpr, CAMERA_K: tl.constexpr, CAMERA_V: tl.constexpr, PRECISION: tl.constexpr,
    AHEAD: tl.constexpr,
):  # fmt: skip
    """One program: d_k and d_v of BLOCK_N keys of one head of one scene, over all its queries; scores transposed.

    AHEAD asks for d_out v' before the exponentials of the scores.
    """
    length = views * tokens
    n_blocks = tl.cdiv(length, BLOCK_N)
    pair = tl.program_id(0) // n_blocks
    scene, head = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    cols = (tl.program_id(0) % n_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    keys = load_tile(
        k, camera_k, scene, head, cols, views, tokens, k_strides, camera_k_strides,
        D, BLOCK_D, FLAT, EVEN, ALIGN, CAMERA_K,
    )  # fmt: skip
    values = load_tile(
        v, camera_v, scene, head, cols, views, tokens, v_strides, camera_v_strides,
        D, BLOCK_D, FLAT, EVEN, ALIGN, CAMERA_V,
    )  # fmt: skip
    acc_k = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    acc_v = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    line = (scene * heads + head) * length
    for start in range(0, length, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        queries = load_tile(
            q, camera_q, scene, head, rows, views, tokens, q_strides, camera_q_strides,
            D, BLOCK_D, FLAT, EVEN, ALIGN, CAMERA_Q,
        )  # fmt: skip
        # A row past the end has an infinite peak, hence weight zero.
        row_peak = tl.load(peaks + line + rows, mask=rows < length, other=float("inf"))
        row_log_sum = tl.load(log_sums + line + rows, mask=rows < length, other=0.0)
        scores = tl.dot(keys, tl.trans(queries), input_precision=PRECISION)
        if AHEAD:
            cotangent = load_tile(
                d_out, d_out, scene, head, rows, views, tokens, d_out_strides, d_out_strides,
                D, BLOCK_D, FLAT_D_OUT, EVEN, ALIGN, False,
            )  # fmt: skip
            d_weights = tl.dot(values, tl.trans(cotangent), input_precision=PRECISION)
        exponents = tl.fma(scores, scale_log2, -row_peak[None, :])
        weights = tl.exp2(exponents - row_log_sum[None, :])
        if not AHEAD:
            cotangent = load_tile(
                d_out, d_out, scene, head, rows, views, tokens, d_out_strides, d_out_strides,
                D, BLOCK_D, FLAT_D_OUT, EVEN, ALIGN, False,
            )  # fmt: skip
        acc_v = tl.dot(weights.to(cotangent.dtype), cotangent, acc_v, input_precision=PRECISION)
        if not AHEAD:
            d_weights = tl.dot(values, tl.trans(cotangent), input_precision=PRECISION)
        row_delta = tl.load(delta + line + rows, mask=rows < length, other=0.0)
        d_scores = weights * (d_weights - row_delta[None, :])
        acc_k = tl.dot(d_scores.to(queries.dtype), queries, acc_k, input_precision=PRECISION)
    store_tile(d_k, acc_k * scale, scene, head, cols, views, tokens, heads, D, BLOCK_D, EVEN)
    store_tile(d_v, acc_v, scene, head, cols, views, tokens, heads, D, BLOCK_D, EVEN)


@triton.jit
def attention_backward_q(
    q, k, v, camera_q, camera_k, camera_v, d_out, peaks, log_sums, delta, d_q,
    q_strides, k_strides, v_strides, d_out_strides, camera_q_strides, camera_k_strides, camera_v_strides,
    views, tokens, heads, scale, scale_log2,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, FLAT: tl.constexpr,
    FLAT_D_OUT: tl.constexpr, EVEN: tl.constexpr, ALIGN: tl.constexpr,
    CAMERA_Q: tl.constexpr, CAMERA_K: tl.constexpr, CAMERA_V: tl.constexpr, PRECISION: tl.constexpr,
    AHEAD: tl.constexpr,
):  # fmt: skip
    """One program: d_q of BLOCK_M queries of one head of one scene, over all its keys; AHEAD as above."""
    length = views * tokens
    n_blocks = tl.cdiv(length, BLOCK_M)
    pair = tl.program_id(0) // n_blocks
    scene, head = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    rows = (tl.program_id(0) % n_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    queries = load_tile(
        q, camera_q, scene, head, rows, views, tokens, q_strides, camera_q_strides,
        D, BLOCK_D, FLAT, EVEN, ALIGN, CAMERA_Q,
    )  # fmt: skip
    cotangent = load_tile(
        d_out, d_out, scene, head, rows, views, tokens, d_out_strides, d_out_strides,
        D, BLOCK_D, FLAT_D_OUT, EVEN, ALIGN, False,
    )  # fmt: skip
    line = (scene * heads + head) * length
    row_peak = tl.load(peaks + line + rows, mask=rows < length, other=float("inf"))
    row_log_sum = tl.load(log_sums + line + rows, mask=rows < length, other=0.0)
    row_delta = tl.load(delta + line + rows, mask=rows < length, other=0.0)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(0, length, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        keys, scores = key_scores(
            queries, k, camera_k, scene, head, cols, views, tokens, k_strides, camera_k_strides,
            D, BLOCK_D, FLAT, EVEN, ALIGN, CAMERA_K, PRECISION,
        )  # fmt: skip
        if AHEAD:
            values = load_tile(
                v, camera_v, scene, head, cols, views, tokens, v_strides, camera_v_strides,
                D, BLOCK_D, FLAT, EVEN, ALIGN, CAMERA_V,
            )  # fmt: skip
            d_weights = tl.dot(cotangent, tl.trans(values), input_precision=PRECISION)
        if not EVEN:
            scores = tl.where((cols < length)[None, :], scores, float("-inf"))
        exponents = tl.fma(scores, scale_log2, -row_peak[:, None])
        weights = tl.exp2(exponents - row_log_sum[:, None])
        if not AHEAD:
            values = load_tile(
                v, camera_v, scene, head, cols, views, tokens, v_strides, camera_v_strides,
                D, BLOCK_D, FLAT, EVEN, ALIGN, CAMERA_V,
            )  # fmt: skip
            d_weights = tl.dot(cotangent, tl.trans(values), input_precision=PRECISION)
        d_scores = weights * (d_weights - row_delta[:, None])
        acc = tl.dot(d_scores.to(keys.dtype), keys, acc, input_precision=PRECISION)
    store_tile(d_q, acc * scale, scene, head, rows, views, tokens, heads, D, BLOCK_D, EVEN)


def forward(
    q: Tensor, k: Tensor, v: Tensor, views: int,
    camera_q: Tensor | None, camera_k: Tensor | None, camera_v: Tensor | None,
    scale: float, allow_tf32: bool = False, tile: Tile | None = None, keep: bool = True,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """[B*V, N, H, D] and, where it is kept for the backward, the log-sum-exp's two parts [2, B, H, V*N] float32.

    `views` = 1 attends within a view; `tile` overrides the tile sizes (for tests).
    """
    cameras = _camera_strides(camera_q, camera_k, camera_v)
    launch = _forward_launch(
        q.shape, q.stride(), k.stride(), v.stride(), cameras, q.dtype, q.device, views, scale, allow_tf32, keep, tile
    )
    out, lse = torch.empty_like(q, memory_format=torch.contiguous_format), None
    peaks = log_sums = out  # not written
    if keep:
        images, tokens, heads, _ = q.shape
        lse = torch.empty((2, images // views, heads, views * tokens), dtype=torch.float32, device=q.device)
        peaks, log_sums = lse.unbind()
    if launch:
        vectors = (q, q, q) if cameras is NO_CAMERAS else _pointers(q, camera_q, camera_k, camera_v)
        launch(q, k, v, *vectors, out, peaks, log_sums)
    return out, lse


@by_layout
def _forward_launch(
    shape: Sizes, q: Sizes, k: Sizes, v: Sizes, cameras: Cameras, dtype: torch.dtype, device: torch.device,
    views: int, scale: float, allow_tf32: bool, keep: bool, tile: Tile | None,
) -> Launch | None:  # fmt: skip
    """The forward kernel for these shapes and strides; None where there is nothing to do."""
    images, tokens, heads, width = shape
    if not math.prod(shape):
        return None
    align, flat = _align(dtype.itemsize, q, k, v, *cameras), _flat(views, tokens, q, k, v)
    if tile is None:
        whole, block_d = flat and width == block_width(width), block_width(width)
        tile = forward_tile(block_d, dtype.itemsize, _capability(device), align > 1, whole, cameras != NO_CAMERAS)
    programs = triton.cdiv(views * tokens, tile.BLOCK_M) * (images // views) * heads
    settings = _constants(views, tokens, width, cameras, allow_tf32, tile)
    settings |= {"FLAT": flat, "ALIGN": align, "KEEP": keep}
    values = (q, k, v, *_or_unread(cameras), views, tokens, heads, _scale_log2(scale))
    return Launch(attention_forward, programs, values, settings)


def backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, views: int,
    camera_q: Tensor | None, camera_k: Tensor | None, camera_v: Tensor | None,
    scale: float, allow_tf32: bool = False, tile: Tile | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """d_q, d_k, d_v [B*V, N, H, D] contiguous, and the camera rows' gradients [B*V, H, D] (None where none came)."""
    cameras = (camera_q, camera_k, camera_v)
    launches = _backward_launches(
        q.shape, q.stride(), k.stride(), v.stride(), _camera_strides(*cameras), out.stride(), d_out.stride(),
        q.dtype, q.device, views, scale, allow_tf32, tile,
    )  # fmt: skip
    d_q, d_k, d_v = (torch.empty(q.shape, dtype=q.dtype, device=q.device) for _ in range(3))
    if launches:
        of_delta, of_kv, of_q = launches
        peaks, log_sums = lse.unbind()
        delta = torch.empty_like(peaks)
        inputs = (q, k, v, *_pointers(q, *cameras), d_out, peaks, log_sums, delta)
        of_delta(out, d_out, delta)
        of_kv(*inputs, d_k, d_v)
        of_q(*inputs, d_q)
    d_cameras = (None if c is None else _sum_tokens(d, c) for c, d in zip(cameras, (d_q, d_k, d_v)))
    return d_q, d_k, d_v, *d_cameras


@by_layout
def _backward_launches(
    shape: Sizes, q: Sizes, k: Sizes, v: Sizes, cameras: Cameras, out: Sizes, d_out: Sizes,
    dtype: torch.dtype, device: torch.device, views: int, scale: float, allow_tf32: bool, tile: Tile | None,
) -> tuple[Launch, Launch, Launch] | None:  # fmt: skip
    """delta's kernel, that of d_k and d_v, and that of d_q; None where there is nothing to do."""
    images, tokens, heads, width = shape
    if not math.prod(shape):
        return None
    tile = tile or backward_tile(block_width(width), dtype.itemsize, _capability(device))
    pairs, length = (images // views) * heads, views * tokens
    constants = _constants(views, tokens, width, cameras, allow_tf32, tile)
    delta = {name: constants[name] for name in ("D", "BLOCK_D", "BLOCK_M", "EVEN")}
    delta |= {"ALIGN": _align(dtype.itemsize, out, d_out), **OPTIONS}
    constants |= {"FLAT": _flat(views, tokens, q, k, v), "FLAT_D_OUT": _flat(views, tokens, d_out)}
    constants |= {"ALIGN": _align(dtype.itemsize, q, k, v, d_out, *cameras)}
    values = (q, k, v, d_out, *_or_unread(cameras), views, tokens, heads, float(scale), _scale_log2(scale))
    queries, keys = (triton.cdiv(length, block) * pairs for block in (tile.BLOCK_M, tile.BLOCK_N))
    return (
        Launch(attention_delta, queries, (out, d_out, views, tokens, heads), delta),
        Launch(attention_backward_kv, keys, values, constants),
        Launch(attention_backward_q, queries, values, constants),
    )


def _sum_tokens(d_x: Tensor, camera: Tensor) -> Tensor:
    images, tokens, heads, width = d_x.shape
    out = torch.empty((images, heads, width), dtype=camera.dtype, device=camera.device)
    if out.numel():
        _sum_launch(images, tokens, heads, width, out.dtype, out.device)(d_x, out)
    return out


@by_layout
def _sum_launch(
    images: int, tokens: int, heads: int, width: int, dtype: torch.dtype, device: torch.device
) -> Launch:  # fmt: skip
    settings = {"D": width, "BLOCK_D": block_width(width), "BLOCK_N": SUM_ROWS, **OPTIONS}
    return Launch(sum_tokens, images * heads, (tokens, heads), settings)


def _capability(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device) if device.type == "cuda" else (8, 0)
    return 10 * major + minor


def _scale_log2(scale: float) -> float:
    """A scale of zero is replaced by one that rounds every weight alike: zero times a masked score, which is minus
    infinity, would be NaN, and a test for it in the kernel would cost every other call."""
    return max(scale * LOG2_E, SMALLEST)


def _flat(views: int, tokens: int, *strides: Sizes) -> bool:
    return views == 1 or all(x[0] == tokens * x[1] for x in strides)


def _align(itemsize: int, *strides: Sizes | None) -> int:
    """Numbers in 16 bytes where every row of every tensor starts at a multiple of so many, and 1 otherwise."""
    whole = 16 // itemsize
    given = (x for x in strides if x is not None)
    return whole if all(x[-1] == 1 and not any(s % whole for s in x[:-1]) for x in given) else 1


def _constants(
    views: int, tokens: int, width: int, cameras: Cameras, allow_tf32: bool, tile: Tile
) -> dict[str, object]:  # fmt: skip
    """What every kernel with products is told, Triton's options among it."""
    length = views * tokens
    return tile._asdict() | {
        "D": width,
        "BLOCK_D": block_width(width),
        "EVEN": length % tile.BLOCK_M == 0 and length % tile.BLOCK_N == 0,
        "CAMERA_Q": cameras[0] is not None,
        "CAMERA_K": cameras[1] is not None,
        "CAMERA_V": cameras[2] is not None,
        "PRECISION": "tf32" if allow_tf32 else "ieee",
        **OPTIONS,
    }


def _pointers(other: Tensor, *cameras: Tensor | None) -> list[Tensor]:
    """A pointer that is never read stands for a camera that is not there."""
    return [other if c is None else c for c in cameras]


def _camera_strides(camera_q: Tensor | None, camera_k: Tensor | None, camera_v: Tensor | None) -> Cameras:
    if camera_q is camera_k is camera_v is None:
        return NO_CAMERAS
    q, k, v = (None if c is None else c.stride() for c in (camera_q, camera_k, camera_v))
    return q, k, v


def _or_unread(cameras: Cameras) -> list[Sizes]:
    return [(0, 0, 1) if strides is None else strides for strides in cameras]
