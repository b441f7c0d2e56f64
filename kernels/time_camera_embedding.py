"""Time and camera MLPs, their sum, and all ResBlock projections in Triton: one kernel of small GEMMs, by flags.

Formula: s = [cos(t f) | sin(t f)], f_i = 10000^(-2i / width); hidden_t = W0 s + b0; hidden_c = C0 camera + c0
    emb = W2 silu(hidden_t) + b2 + C2 silu(hidden_c) + c2; out = P silu(emb) + p
The SiLU is applied where a GEMM loads its input, so that only what the backward needs is written. The backward
uses the same kernel with the weight transposed and silu' in its epilogue, and one kernel for weights and biases.
Source: Shi et al. 2023, "MVDream", section 3.2.
"""

import math

import torch
import triton
import triton.language as tl
from mvdream_fast.kernels._launch import Launch, by_layout
from torch import Tensor

Sizes = tuple[int, ...]  # a shape, or the strides of a tensor
OPTIONS = {"enable_fp_fusion": True, "num_warps": 4, "num_stages": 3}
ROWS, OUT, IN = 16, 64, 64  # tile: a batch of images is one tile of rows
PLAIN, SILU, SINUSOID = 0, 1, 2  # what is done to a GEMM's input as it is loaded
MAX_PERIOD = 10000.0


@triton.jit
def _load_input(x, row, col, row_inside, n_in, row_stride, log_step, KIND: tl.constexpr):
    """[rows, cols] of a GEMM's input, float32; for the sinusoid x is the vector of steps."""
    inside = row_inside[:, None] & (col < n_in)[None, :]
    if KIND == 2:
        half = n_in // 2
        step = tl.load(x + row, mask=row_inside, other=0).to(tl.float32)
        frequency = tl.exp(-log_step * (col % half).to(tl.float32))
        angle = step[:, None] * frequency[None, :]
        return tl.where(inside, tl.where((col < half)[None, :], tl.cos(angle), tl.sin(angle)), 0.0)
    value = tl.load(x + row[:, None] * row_stride + col[None, :], mask=inside, other=0.0).to(tl.float32)
    if KIND == 1:
        value = value * tl.sigmoid(value)
    return value


@triton.jit
def _product(
    acc, x, weight, row, out, rows, n_in, n_out, row_stride, out_stride, in_stride, log_step,
    KIND: tl.constexpr, BLOCK_IN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc + f(x) weight^T, the input's axis in order."""
    for start in range(0, n_in, BLOCK_IN):
        col = (start + tl.arange(0, BLOCK_IN)).to(tl.int64)
        a = _load_input(x, row, col, row < rows, n_in, row_stride, log_step, KIND)
        inside = (col < n_in)[:, None] & (out < n_out)[None, :]
        w = tl.load(weight + col[:, None] * in_stride + out[None, :] * out_stride, mask=inside, other=0.0)
        acc = tl.dot(a.to(w.dtype), w, acc, input_precision=PRECISION)
    return acc


@triton.jit
def dense(
    x, weight, bias, x2, weight2, bias2, addend, pre, y,
    rows, n_in, n_in2, n_out, row_stride, row_stride2, out_stride, in_stride, log_step,
    KIND: tl.constexpr, SECOND: tl.constexpr, ADD: tl.constexpr, BIAS: tl.constexpr, D_SILU: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y = f(x) weight^T [+ bias] [+ silu(x2) weight2^T + bias2] [+ addend] [* silu'(pre)]; y [rows, n_out]."""
    n_blocks = tl.cdiv(n_out, BLOCK_OUT)
    row = ((tl.program_id(0) // n_blocks) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    out = ((tl.program_id(0) % n_blocks) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)).to(tl.int64)
    acc = tl.zeros([BLOCK_R, BLOCK_OUT], tl.float32)
    acc = _product(
        acc, x, weight, row, out, rows, n_in, n_out, row_stride, out_stride, in_stride, log_step,
        KIND, BLOCK_IN, PRECISION,
    )  # fmt: skip
    if SECOND:
        acc = _product(
            acc, x2, weight2, row, out, rows, n_in2, n_out, row_stride2, n_in2, 1, log_step, 1, BLOCK_IN, PRECISION
        )
        acc += tl.load(bias2 + out, mask=out < n_out, other=0.0).to(tl.float32)[None, :]
    if BIAS:
        acc += tl.load(bias + out, mask=out < n_out, other=0.0).to(tl.float32)[None, :]
    inside = (row < rows)[:, None] & (out < n_out)[None, :]
    at = row[:, None] * n_out + out[None, :]
    if ADD:
        acc += tl.load(addend + at, mask=inside, other=0.0).to(tl.float32)
    if D_SILU:
        z = tl.load(pre + at, mask=inside, other=0.0).to(tl.float32)
        gate = tl.sigmoid(z)
        acc = acc * gate * (1 + z * (1 - gate))
    tl.store(y + at, acc.to(y.dtype.element_ty), mask=inside)


@triton.jit
def dense_backward_weight(
    d_y, x, d_weight, d_bias, rows, n_in, n_out, row_stride, log_step,
    KIND: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """d_weight [n_out, n_in] = d_y^T f(x), d_bias [n_out] = column sums of d_y; rows in order."""
    n_blocks = tl.cdiv(n_in, BLOCK_IN)
    block = tl.program_id(0) % n_blocks
    out = ((tl.program_id(0) // n_blocks) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)).to(tl.int64)
    col = (block * BLOCK_IN + tl.arange(0, BLOCK_IN)).to(tl.int64)
    acc = tl.zeros([BLOCK_OUT, BLOCK_IN], tl.float32)
    sums = tl.zeros([BLOCK_OUT], tl.float32)
    for start in range(0, rows, BLOCK_R):
        row = (start + tl.arange(0, BLOCK_R)).to(tl.int64)
        inside = (row < rows)[:, None] & (out < n_out)[None, :]
        d = tl.load(d_y + row[:, None] * n_out + out[None, :], mask=inside, other=0.0)
        a = _load_input(x, row, col, row < rows, n_in, row_stride, log_step, KIND)
        acc = tl.dot(tl.trans(d), a.to(d.dtype), acc, input_precision=PRECISION)
        sums += tl.sum(d.to(tl.float32), 0)
    inside = (out < n_out)[:, None] & (col < n_in)[None, :]
    tl.store(d_weight + out[:, None] * n_in + col[None, :], acc.to(d_weight.dtype.element_ty), mask=inside)
    if block == 0:
        tl.store(d_bias + out, sums.to(d_bias.dtype.element_ty), mask=out < n_out)


def forward(
    t: Tensor, camera: Tensor | None, camera_embedding: Tensor | None,
    time_mlp: tuple[Tensor, ...], camera_mlp: tuple[Tensor, ...] | None, weight: Tensor, bias: Tensor,
    allow_tf32: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """out [B*V, K], and for the backward: emb, hidden_t and hidden_c [B*V, E]; weights are contiguous."""
    w0, b0, w2, b2 = time_mlp
    hidden_t = _dense(t, w0, b0, SINUSOID, allow_tf32)
    hidden_c, second = None, None
    if camera is not None:
        hidden_c = _dense(camera.to(weight.dtype), camera_mlp[0], camera_mlp[1], PLAIN, allow_tf32)
        second = (hidden_c, camera_mlp[2], camera_mlp[3])
    emb = _dense(hidden_t, w2, b2, SILU, allow_tf32, second=second, addend=camera_embedding)
    return _dense(emb, weight, bias, SILU, allow_tf32), emb, hidden_t, hidden_c


def backward(
    d_out: Tensor, emb: Tensor, hidden_t: Tensor, hidden_c: Tensor | None, t: Tensor, camera: Tensor | None,
    time_mlp: tuple[Tensor, ...], camera_mlp: tuple[Tensor, ...] | None, weight: Tensor, allow_tf32: bool = False,
) -> dict[str, Tensor | tuple[Tensor, ...]]:  # fmt: skip
    """Gradients by name: weight, bias, emb (that of camera_embedding), time_mlp; with a camera, camera, camera_mlp."""
    d_out = d_out.contiguous()
    d_weight, d_bias = _dense_backward_weight(d_out, emb, SILU, weight, allow_tf32)
    d_emb = _dense(d_out, weight.t(), None, PLAIN, allow_tf32, pre=emb)
    grads = {"weight": d_weight, "bias": d_bias, "emb": d_emb}
    d_hidden = _dense(d_emb, time_mlp[2].t(), None, PLAIN, allow_tf32, pre=hidden_t)
    grads["time_mlp"] = (
        *_dense_backward_weight(d_hidden, t, SINUSOID, time_mlp[0], allow_tf32),
        *_dense_backward_weight(d_emb, hidden_t, SILU, time_mlp[2], allow_tf32),
    )
    if camera is not None:
        x = camera.to(weight.dtype)
        d_hidden = _dense(d_emb, camera_mlp[2].t(), None, PLAIN, allow_tf32, pre=hidden_c)
        grads["camera_mlp"] = (
            *_dense_backward_weight(d_hidden, x, PLAIN, camera_mlp[0], allow_tf32),
            *_dense_backward_weight(d_emb, hidden_c, SILU, camera_mlp[2], allow_tf32),
        )
        grads["camera"] = _dense(d_hidden, camera_mlp[0].t(), None, PLAIN, allow_tf32).to(camera.dtype)
    return grads


def _dense(
    x: Tensor, weight: Tensor, bias: Tensor | None, kind: int, allow_tf32: bool, *,
    second: tuple[Tensor, Tensor, Tensor] | None = None, addend: Tensor | None = None, pre: Tensor | None = None,
) -> Tensor:  # fmt: skip
    x, others = x.contiguous(), (bias, addend, pre)
    x2, weight2, bias2 = second or (x, weight, weight)
    launch = _dense_launch(
        x.shape, weight.shape, weight.stride(), weight2.shape[1], weight.device,
        tuple(None if a is None else a.dtype for a in (x, weight, *others)), kind, allow_tf32, second is not None,
    )  # fmt: skip
    y = torch.empty((x.shape[0], weight.shape[0]), dtype=weight.dtype, device=x.device)
    if launch:
        launch(
            x, weight, weight if bias is None else bias, x2, weight2, bias2,
            y if addend is None else addend.contiguous(), y if pre is None else pre, y,
        )  # fmt: skip
    return y


@by_layout
def _dense_launch(
    x: Sizes, weight: Sizes, weight_strides: Sizes, n_in2: int, device: torch.device,
    dtypes: tuple[torch.dtype | None, ...], kind: int, allow_tf32: bool, second: bool,
) -> Launch | None:  # fmt: skip
    """The kernel for a contiguous x; dtypes: of x, weight, bias, addend and pre, None where there is none."""
    n_out, n_in = weight
    rows = x[0]
    if not rows * n_out:
        return None
    _, kept_in, bias, addend, pre = dtypes
    block_out = OUT if kept_in.itemsize == 2 else OUT // 2  # exact float32 GEMMs keep more in registers
    block_in = IN // 4 if kind == SINUSOID else IN  # sin and cos take registers
    stride = math.prod(x[1:])
    values = (rows, n_in, n_in2, n_out, stride, n_in2 if second else stride, *weight_strides, _log_step(n_in))
    settings = {
        "KIND": kind, "SECOND": second, "ADD": addend is not None, "BIAS": bias is not None, "D_SILU": pre is not None,
        "BLOCK_R": ROWS, "BLOCK_OUT": block_out, "BLOCK_IN": block_in, "PRECISION": "tf32" if allow_tf32 else "ieee",
        **OPTIONS,
    }  # fmt: skip
    return Launch(dense, triton.cdiv(rows, ROWS) * triton.cdiv(n_out, block_out), values, settings)


def _dense_backward_weight(
    d_y: Tensor, x: Tensor, kind: int, weight: Tensor, allow_tf32: bool
) -> tuple[Tensor, Tensor]:
    n_out, n_in = weight.shape
    x = x.contiguous()
    launch = _backward_weight_launch(
        x.shape, n_out, n_in, (d_y.dtype, x.dtype, weight.dtype), x.device, kind, allow_tf32
    )
    d_weight = torch.empty((n_out, n_in), dtype=weight.dtype, device=x.device)
    d_bias = torch.empty(n_out, dtype=weight.dtype, device=x.device)
    if launch:
        launch(d_y, x, d_weight, d_bias)
    return d_weight, d_bias


@by_layout
def _backward_weight_launch(
    x: Sizes, n_out: int, n_in: int, dtypes: tuple[torch.dtype, ...], device: torch.device, kind: int, allow_tf32: bool
) -> Launch | None:  # fmt: skip
    if not n_out * n_in:
        return None
    settings = {
        "KIND": kind, "BLOCK_R": ROWS, "BLOCK_OUT": OUT, "BLOCK_IN": IN, "PRECISION": "tf32" if allow_tf32 else "ieee",
        **OPTIONS,
    }  # fmt: skip
    values = (x[0], n_in, n_out, math.prod(x[1:]), _log_step(n_in))
    return Launch(dense_backward_weight, triton.cdiv(n_out, OUT) * triton.cdiv(n_in, IN), values, settings)


def _log_step(width: int) -> float:
    return math.log(MAX_PERIOD) / max(width // 2, 1)
