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
from torch import Tensor

# Multiply-add contraction is chosen here, not by Triton's default, which differs between versions.
OPTIONS = {"enable_fp_fusion": True}
LOG2_E = math.log2(math.e)
SMALLEST = 2.0**-126  # the smallest normal float32
SUM_ROWS = 32


@triton.jit
def token_offsets(scene, rows, views, tokens, strides, FLAT: tl.constexpr):
    """int64 offsets of the rows (token numbers within a scene) of a [B*V, N, H, D] tensor, head and width apart."""
    first = scene * views
    if FLAT:  # the batch stride is N token strides: the views of a scene follow each other
        return first * strides[0] + rows.to(tl.int64) * strides[1]
    return (first + rows // tokens) * strides[0] + (rows % tokens).to(tl.int64) * strides[1]


@triton.jit
def inside_mask(rows, cols, length, D: tl.constexpr, EVEN: tl.constexpr):
    """Which of [rows, cols] there are; EVEN says that no tile has a row past the end, and only the padding is left."""
    mask = (cols < D)[None, :]
    if not EVEN:
        mask = (rows < length)[:, None] & mask
    return mask


@triton.jit
def load_tile(
    x, camera, scene, head, rows, views, tokens, strides, camera_strides,
    D: tl.constexpr, BLOCK_D: tl.constexpr, FLAT: tl.constexpr, EVEN: tl.constexpr, ALIGN: tl.constexpr,
    CAMERA: tl.constexpr,
):  # fmt: skip
    """[rows, BLOCK_D] of one head, zero outside, with each row's camera vector added and rounded as torch would."""
    cols = tl.arange(0, BLOCK_D)
    starts = token_offsets(scene, rows, views, tokens, strides, FLAT) + head * strides[2]
    if ALIGN > 1:  # Triton knows no stride that does not divide by 16, and would load a head of 40 number by number
        starts = tl.multiple_of(starts, ALIGN)
    pointers = x + starts[:, None] + cols.to(tl.int64)[None, :] * strides[3]
    if EVEN and D == BLOCK_D:
        tile = tl.load(pointers)
    else:
        tile = tl.load(pointers, mask=inside_mask(rows, cols, views * tokens, D, EVEN), other=0.0)
    if CAMERA:
        image = scene * views + rows // tokens
        starts = image * camera_strides[0] + head * camera_strides[1]
        if ALIGN > 1:
            starts = tl.multiple_of(starts, ALIGN)
        vectors = camera + starts[:, None] + cols.to(tl.int64)[None, :] * camera_strides[2]
        if EVEN and D == BLOCK_D:
            vector = tl.load(vectors)
        else:
            vector = tl.load(vectors, mask=inside_mask(rows, cols, views * tokens, D, EVEN), other=0.0)
        tile = (tile.to(tl.float32) + vector.to(tl.float32)).to(tile.dtype)
    return tile


@triton.jit
def store_tile(
    x, tile, scene, head, rows, views, tokens, heads,
    D: tl.constexpr, BLOCK_D: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Writes [rows, BLOCK_D] of one head into a contiguous [B*V, N, H, D]."""
    cols = tl.arange(0, BLOCK_D)
    offsets = ((scene * views * tokens + rows) * heads + head) * D
    pointers = x + offsets[:, None] + cols[None, :]
    if EVEN and D == BLOCK_D:
        tl.store(pointers, tile.to(x.dtype.element_ty))
    else:
        tl.store(pointers, tile.to(x.dtype.element_ty), mask=inside_mask(rows, cols, views * tokens, D, EVEN))


@triton.jit
def attention_forward(
    q, k, v, camera_q, camera_k, camera_v, out, peaks, log_sums,
    q_strides, k_strides, v_strides, camera_q_strides, camera_k_strides, camera_v_strides,
    views, tokens, heads, scale_log2,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, FLAT: tl.constexpr,
    EVEN: tl.constexpr, ALIGN: tl.constexpr,
    CAMERA_Q: tl.constexpr, CAMERA_K: tl.constexpr, CAMERA_V: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M queries of one head of one scene against all its keys."""
    length = views * tokens
    n_blocks = tl.cdiv(length, BLOCK_M)
    pair = tl.program_id(0) // n_blocks
    scene, head = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    rows = (tl.program_id(0) % n_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    queries = load_tile(
        q, camera_q, scene, head, rows, views, tokens, q_strides, camera_q_strides,
        D, BLOCK_D, FLAT, EVEN, ALIGN, CAMERA_Q,
    )  # fmt: skip
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(0, length, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        keys = load_tile(
            k, camera_k, scene, head, cols, views, tokens, k_strides, camera_k_strides,
            D, BLOCK_D, FLAT, EVEN, ALIGN, CAMERA_K,
        )  # fmt: skip
        scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
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
):  # fmt: skip
    """One program: d_k and d_v of BLOCK_N keys of one head of one scene, over all its queries; scores transposed."""
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
        exponents = tl.fma(scores, scale_log2, -row_peak[None, :])
        weights = tl.exp2(exponents - row_log_sum[None, :])
        cotangent = load_tile(
            d_out, d_out, scene, head, rows, views, tokens, d_out_strides, d_out_strides,
            D, BLOCK_D, FLAT_D_OUT, EVEN, ALIGN, False,
        )  # fmt: skip
        acc_v = tl.dot(weights.to(cotangent.dtype), cotangent, acc_v, input_precision=PRECISION)
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
):  # fmt: skip
    """One program: d_q of BLOCK_M queries of one head of one scene, over all its keys."""
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
        keys = load_tile(
            k, camera_k, scene, head, cols, views, tokens, k_strides, camera_k_strides,
            D, BLOCK_D, FLAT, EVEN, ALIGN, CAMERA_K,
        )  # fmt: skip
        scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
        if not EVEN:
            scores = tl.where((cols < length)[None, :], scores, float("-inf"))
        exponents = tl.fma(scores, scale_log2, -row_peak[:, None])
        weights = tl.exp2(exponents - row_log_sum[:, None])
        values = load_tile(
            v, camera_v, scene, head, cols, views, tokens, v_strides, camera_v_strides,
            D, BLOCK_D, FLAT, EVEN, ALIGN, CAMERA_V,
        )  # fmt: skip
        d_weights = tl.dot(cotangent, tl.trans(values), input_precision=PRECISION)
        d_scores = weights * (d_weights - row_delta[:, None])
        acc = tl.dot(d_scores.to(keys.dtype), keys, acc, input_precision=PRECISION)
    store_tile(d_q, acc * scale, scene, head, rows, views, tokens, heads, D, BLOCK_D, EVEN)


@triton.jit
def sum_tokens(x, out, tokens, heads, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr):
    """[B*V, N, H, D] contiguous -> [B*V, H, D], one head of one image a program, in the order of the tokens."""
    image, head = (tl.program_id(0) // heads).to(tl.int64), tl.program_id(0) % heads
    cols = tl.arange(0, BLOCK_D)
    acc = tl.zeros([BLOCK_D], tl.float32)
    for start in range(0, tokens, BLOCK_N):
        rows = start + tl.arange(0, BLOCK_N)
        offsets = ((image * tokens + rows) * heads + head)[:, None] * D + cols[None, :]
        inside = (rows < tokens)[:, None] & (cols < D)[None, :]
        acc += tl.sum(tl.load(x + offsets, mask=inside, other=0.0).to(tl.float32), 0)
    tl.store(out + (image * heads + head) * D + cols, acc.to(out.dtype.element_ty), mask=cols < D)


def block_width(width: int) -> int:
    """The head width padded to what a tensor core takes."""
    return max(16, triton.next_power_of_2(width))


def forward_tile(block_d: int, itemsize: int, capability: int, aligned: bool, whole: bool) -> dict[str, int]:
    """BLOCK_M, BLOCK_N, num_warps, num_stages of the forward kernel for a compute capability (86 is 8.6).

    `aligned` as `_align` says: otherwise every number is loaded by an address of its own, which takes registers.
    `whole`: heads are not padded and tokens flat as in `token_offsets`; otherwise masks and addresses take some too.

    This and `backward_tile` are the whole list of configurations; report.py compiles each, and none of these spills.
    """
    if itemsize == 4:  # exact float32 GEMMs keep whole rows in registers
        # Where a tile of 32 keys leaves just over 128 registers, ptxas takes 128 and spills.
        if block_d <= 64:
            return _tile(64, 16 if capability // 10 == 10 else 32, 8, 1)
        return _tile(32, 16 if block_d > 128 or capability == 80 else 32, 8, 1)
    if not aligned:
        return _tile(64, 32, 4, 2) if block_d <= 64 else _tile(64, 32, 8, 2) if block_d == 128 else _tile(32, 16, 8, 1)
    if block_d <= 64:
        # Tensor cores of 9.x read keys from shared memory; elsewhere they pass through registers.
        if capability // 10 == 9:
            return _tile(128 if whole else 64, 64, 4, 3)
        return _tile(128, 128, 8, 3) if capability // 10 == 10 else _tile(128, 32, 4, 3)
    if block_d == 128:
        return _tile(128, 64, 8, 2)
    return _tile(64, 16 if _small_shared(capability) else 32, 8, 2)


def backward_tile(block_d: int, itemsize: int, capability: int) -> dict[str, int]:
    """The same for both backward kernels; they hold two accumulators, so their tiles are smaller.

    Some spill: d_q of float32 heads above 64 on every device, 95 to 140 instructions; the others are in
    docs/gpu_predicted.md.
    """
    if itemsize == 4:
        return _tile(32, 32, 8, 1) if block_d <= 64 else _tile(16, 32, 8, 1) if block_d == 128 else _tile(16, 16, 8, 1)
    if block_d <= 64:
        return _tile(64, 64, 4, 2) if capability // 10 in (9, 10) else _tile(64, 32, 4, 2)
    if block_d == 128:
        return _tile(64, 32 if _small_shared(capability) else 64, 8, 2)
    return _tile(32, 32, 8, 1)


def _small_shared(capability: int) -> bool:
    """Whether a block has 99 KB of shared memory, as on consumer cards, and not 163 or more."""
    return capability in (86, 89) or capability >= 120


def _tile(block_m: int, block_n: int, num_warps: int, num_stages: int) -> dict[str, int]:
    return {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": num_warps, "num_stages": num_stages}


def _capability(x: Tensor) -> int:
    major, minor = torch.cuda.get_device_capability(x.device) if x.is_cuda else (8, 0)
    return 10 * major + minor


def forward(
    q: Tensor, k: Tensor, v: Tensor, views: int,
    camera_q: Tensor | None, camera_k: Tensor | None, camera_v: Tensor | None,
    scale: float, allow_tf32: bool = False, tile: dict[str, int] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """[B*V, N, H, D] and the log-sum-exp's two parts [2, B, H, V*N] float32; `views` = 1 attends within a view.

    `tile` overrides the tile sizes (for tests).
    """
    images, tokens, heads, width = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((2, images // views, heads, views * tokens), dtype=torch.float32, device=q.device)
    cameras = (camera_q, camera_k, camera_v)
    align, flat = _align(q, k, v, *cameras), _flat(views, q, k, v)
    whole = flat and width == block_width(width)
    tile = tile or forward_tile(block_width(width), q.element_size(), _capability(q), align > 1, whole)
    grid = (triton.cdiv(views * tokens, tile["BLOCK_M"]) * (images // views) * heads,)
    if q.numel():
        attention_forward[grid](
            q, k, v, *_pointers(cameras, q), out, *lse, *_strides(q, k, v), *_camera_strides(cameras),
            views, tokens, heads, _scale_log2(scale),
            **_constants(views, tokens, width, cameras, allow_tf32, tile), FLAT=flat, ALIGN=align,
            **tile, **OPTIONS,
        )  # fmt: skip
    return out, lse


def backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, views: int,
    camera_q: Tensor | None, camera_k: Tensor | None, camera_v: Tensor | None,
    scale: float, allow_tf32: bool = False, tile: dict[str, int] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """d_q, d_k, d_v [B*V, N, H, D] contiguous, and the camera rows' gradients [B*V, H, D] (None where none came)."""
    images, tokens, heads, width = q.shape
    length, pairs = views * tokens, (images // views) * heads
    tile = tile or backward_tile(block_width(width), q.element_size(), _capability(q))
    cameras = (camera_q, camera_k, camera_v)
    d_q, d_k, d_v = (torch.empty(q.shape, dtype=q.dtype, device=q.device) for _ in range(3))
    if q.numel():
        delta = torch.empty_like(lse[0])
        constants = _constants(views, tokens, width, cameras, allow_tf32, tile)
        attention_delta[(triton.cdiv(length, tile["BLOCK_M"]) * pairs,)](
            out, d_out, delta, out.stride(), d_out.stride(), views, tokens, heads,
            D=width, BLOCK_D=constants["BLOCK_D"], BLOCK_M=tile["BLOCK_M"], EVEN=constants["EVEN"],
            ALIGN=_align(out, d_out), **OPTIONS,
        )  # fmt: skip
        inputs = (q, k, v, *_pointers(cameras, q), d_out, *lse, delta)
        layout = (*_strides(q, k, v, d_out), *_camera_strides(cameras), views, tokens, heads, scale, _scale_log2(scale))
        constants |= {"FLAT": _flat(views, q, k, v), "FLAT_D_OUT": _flat(views, d_out)}
        constants |= {"ALIGN": _align(q, k, v, d_out, *cameras)}
        grid = (triton.cdiv(length, tile["BLOCK_N"]) * pairs,)
        attention_backward_kv[grid](*inputs, d_k, d_v, *layout, **constants, **tile, **OPTIONS)
        grid = (triton.cdiv(length, tile["BLOCK_M"]) * pairs,)
        attention_backward_q[grid](*inputs, d_q, *layout, **constants, **tile, **OPTIONS)
    d_cameras = (None if c is None else _sum_tokens(d, c) for c, d in zip(cameras, (d_q, d_k, d_v)))
    return d_q, d_k, d_v, *d_cameras


def _sum_tokens(d_x: Tensor, camera: Tensor) -> Tensor:
    images, tokens, heads, width = d_x.shape
    out = torch.empty((images, heads, width), dtype=camera.dtype, device=camera.device)
    if out.numel():
        grid = (images * heads,)
        sum_tokens[grid](d_x, out, tokens, heads, D=width, BLOCK_D=block_width(width), BLOCK_N=SUM_ROWS, **OPTIONS)
    return out


def _scale_log2(scale: float) -> float:
    """A scale of zero is replaced by one that rounds every weight alike: zero times a masked score, which is minus
    infinity, would be NaN, and a test for it in the kernel would cost every other call."""
    return max(scale * LOG2_E, SMALLEST)


def _flat(views: int, *tensors: Tensor) -> bool:
    return views == 1 or all(x.stride(0) == x.shape[1] * x.stride(1) for x in tensors)


def _align(*tensors: Tensor | None) -> int:
    """Numbers in 16 bytes where every row of every tensor starts at a multiple of so many, and 1 otherwise."""
    whole = 16 // tensors[0].element_size()
    given = (x for x in tensors if x is not None)
    return whole if all(x.stride(-1) == 1 and not any(s % whole for s in x.stride()[:-1]) for x in given) else 1


def _constants(
    views: int, tokens: int, width: int, cameras: tuple[Tensor | None, ...], allow_tf32: bool, tile: dict[str, int]
) -> dict[str, object]:  # fmt: skip
    block_d = block_width(width)
    length = views * tokens
    return {
        "D": width,
        "BLOCK_D": block_d,
        "EVEN": length % tile["BLOCK_M"] == 0 and length % tile["BLOCK_N"] == 0,
        "CAMERA_Q": cameras[0] is not None,
        "CAMERA_K": cameras[1] is not None,
        "CAMERA_V": cameras[2] is not None,
        "PRECISION": "tf32" if allow_tf32 else "ieee",
    }


def _pointers(cameras: tuple[Tensor | None, ...], other: Tensor) -> list[Tensor]:
    """A pointer that is never read stands for a camera that is not there."""
    return [other if c is None else c for c in cameras]


def _strides(*tensors: Tensor) -> list[tuple[int, ...]]:
    return [x.stride() for x in tensors]


def _camera_strides(cameras: tuple[Tensor | None, ...]) -> list[tuple[int, ...]]:
    return [(0, 0, 1) if c is None else c.stride() for c in cameras]
