"""From the diffusion step and the camera to what every ResBlock adds: sinusoid, two MLPs, and all projections at once.

The weights belong to models/unet.py, which stacks the projections of its ResBlocks into one matrix.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mvdream_fast.ops._edges import (
    by_name,
    check_float,
    check_tensors,
    is_autocast,
    is_batched,
    is_followed,
    run_kernels,
    vmap_error,
)
from mvdream_fast.ops._registered import differentiable, register

OP = "time_camera_embedding"
MAX_PERIOD = 10000.0


class MLP(NamedTuple):
    """The weights of Linear - SiLU - Linear, in torch's layout [out, in]."""

    w0: Tensor  # [E, K0]
    b0: Tensor  # [E]
    w2: Tensor  # [E, E]
    b2: Tensor  # [E]


def time_camera_embedding(
    t: Tensor,
    camera: Tensor | None,
    time_mlp: MLP,
    camera_mlp: MLP | None,
    projections_weight: Tensor,
    projections_bias: Tensor,
    *,
    camera_embedding: Tensor | None = None,
) -> Tensor:
    """Linear(silu(time_mlp(sinusoid(t)) + camera_mlp(camera))), the projections of all ResBlocks in one GEMM.

    Without a camera the second MLP is skipped (2D mode). The camera part may come precomputed, since it is constant
    over the steps of a run: pass `camera_embedding` from `ops.camera_embedding` instead of `camera`. Not
    differentiable in t. Computed in the weights' dtype; under autocast only the result is cast (float64 stays). On CUDA
    weights that are not contiguous are copied. First derivatives only there, and in a compiled graph.

    Args:
        t: [B*V] diffusion steps, integers or floats.
        camera: [B*V, 16] flattened camera-to-world matrices, or None.
        time_mlp: weights with w0 [E, 2F], F frequencies.
        camera_mlp: weights with w0 [E, 16]; needed with `camera`, else ignored.
        projections_weight, projections_bias: [K, E] and [K].
        camera_embedding: [B*V, E] or None; not together with `camera`.

    Returns:
        [B*V, K] in the weights' dtype.

    Raises:
        ValueError, TypeError: shapes, dtypes, or both forms of the camera.
        RuntimeError: tensors on two devices, under vmap, or a CUDA tensor without Triton.

    Source: Shi et al. 2023, "MVDream", section 3.2; the sinusoid is latent diffusion's, cosines first.
    """
    _check(t, camera, time_mlp, camera_mlp, projections_weight, projections_bias, camera_embedding)
    camera_weights = (None,) * 4 if camera is None or camera_mlp is None else camera_mlp
    if t.requires_grad:
        t = t.detach()
    arguments = (t, camera, camera_embedding, *time_mlp, *camera_weights, projections_weight, projections_bias)
    if by_name(projections_weight):
        return _autocast(torch.ops.mvdream_fast.time_camera_embedding(*arguments)[0])
    if is_batched(*arguments):
        raise vmap_error(OP)
    if t.is_cuda:
        followed = is_followed(*arguments)
        return _autocast(_TimeCameraEmbedding.apply(*arguments) if followed else _forward_kernels(*arguments)[0])
    if not torch.is_autocast_enabled("cpu"):
        return _forward_cpu(*arguments)[0]
    return _autocast(_without_autocast(*arguments)[0])


def camera_embedding(camera: Tensor, camera_mlp: MLP) -> Tensor:
    """The camera's part [B*V, E] of the embedding, to be computed once and passed to every step.

    camera: [B*V, 16] or, with matching weights, any [B*V, K0]. In the weights' dtype, under autocast as well.

    Raises: ValueError, TypeError: shapes, dtypes. RuntimeError: tensors on two devices.
    """
    check_tensors(OP, camera=camera)
    w0 = _weights("camera_mlp", camera_mlp)[0]
    _check_mlp("camera_mlp", camera_mlp, w0.shape[0] if w0.ndim else 0, w0)
    if camera.ndim != 2 or camera.shape[1] != w0.shape[1]:
        raise ValueError(f"{OP}: camera must be [B*V, {w0.shape[1]}], got {list(camera.shape)}; flatten each matrix")
    _check_home("camera", camera, w0)
    if not is_autocast(w0):
        return _mlp(camera.to(w0.dtype), camera_mlp)
    with torch.autocast(w0.device.type, enabled=False):
        return _mlp(camera.to(w0.dtype), camera_mlp)


def sinusoid(t: Tensor, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """[B*V] -> [B*V, width]: cosines, then sines, of t * 10000^(-i / (width / 2)), computed at least in float32."""
    half = width // 2
    wide = torch.promote_types(dtype, torch.float32)
    i = torch.arange(half, device=t.device, dtype=wide)
    angles = t.to(wide)[:, None] * torch.exp(i * (-math.log(MAX_PERIOD) / half))
    return torch.cat([angles.cos(), angles.sin()], dim=-1).to(dtype)


def time_camera_embedding_ref(
    t: Tensor,
    camera: Tensor | None,
    time_mlp: MLP,
    camera_mlp: MLP | None,
    projections_weight: Tensor,
    projections_bias: Tensor,
    *,
    camera_embedding: Tensor | None = None,
) -> Tensor:
    """time_camera_embedding in plain torch; any device, differentiable."""
    dtype = projections_weight.dtype
    emb = _mlp(sinusoid(t, time_mlp.w0.shape[1], dtype), time_mlp)
    if camera is not None and camera_mlp is not None:
        emb = emb + _mlp(camera.to(dtype), camera_mlp)
    if camera_embedding is not None:
        emb = emb + camera_embedding.to(dtype)
    return F.linear(F.silu(emb), projections_weight, projections_bias)


def _mlp(x: Tensor, mlp: MLP) -> Tensor:
    w0, b0, w2, b2 = mlp
    return F.linear(F.silu(F.linear(x, w0, b0)), w2, b2)


def _forward_cpu(t, camera, camera_embedding, w0, b0, w2, b2, c0, d0, c2, d2, weight, bias):
    """The projections, and what the backward needs: emb and the hidden layers of both MLPs before their SiLU."""
    hidden_t = F.linear(sinusoid(t, w0.shape[1], weight.dtype), w0, b0)
    emb = F.linear(F.silu(hidden_t), w2, b2)
    hidden_c = None
    if camera is not None:
        hidden_c = F.linear(camera.to(weight.dtype), c0, d0)
        emb = emb + F.linear(F.silu(hidden_c), c2, d2)
    if camera_embedding is not None:
        emb = emb + camera_embedding.to(weight.dtype)
    return F.linear(F.silu(emb), weight, bias), emb, hidden_t, hidden_c


def _backward_cpu(
    d_out, emb, hidden_t, hidden_c, t, camera, time_mlp, camera_mlp, weight
) -> dict[str, Tensor | tuple[Tensor, ...]]:
    """Gradients by name, as `kernels.time_camera_embedding.backward` gives them."""
    d_emb = (d_out @ weight) * _d_silu(emb)
    wave = sinusoid(t, time_mlp[0].shape[1], weight.dtype)
    d_hidden = (d_emb @ time_mlp[2]) * _d_silu(hidden_t)
    grads = {"weight": d_out.t() @ F.silu(emb), "bias": d_out.sum(0), "emb": d_emb}
    grads["time_mlp"] = (d_hidden.t() @ wave, d_hidden.sum(0), d_emb.t() @ F.silu(hidden_t), d_emb.sum(0))
    if camera is not None:
        d_hidden = (d_emb @ camera_mlp[2]) * _d_silu(hidden_c)
        x = camera.to(weight.dtype)
        grads["camera_mlp"] = (d_hidden.t() @ x, d_hidden.sum(0), d_emb.t() @ F.silu(hidden_c), d_emb.sum(0))
        grads["camera"] = (d_hidden @ camera_mlp[0]).to(camera.dtype)
    return grads


def _d_silu(x: Tensor) -> Tensor:
    gate = torch.sigmoid(x)
    return gate * (1 + x * (1 - gate))


def _forward_kernels(t, camera, camera_embedding, *weights):
    weights = [None if x is None else x.contiguous() for x in weights]
    arguments = (t, camera, camera_embedding, weights[:4], weights[4:8], *weights[8:], _allow_tf32(weights[8]))
    return run_kernels(OP, "projections_weight", weights[8], "forward", *arguments)


def _backward_kernels(*arguments):
    weight = arguments[-1]
    return run_kernels(OP, "projections_weight", weight, "backward", *arguments, _allow_tf32(weight))


def _pull(backward):
    """The backward of the op's arguments around one that gives gradients by name."""

    def pull(cotangents, kept, wanted, t, camera, camera_embedding, *weights):
        grads = backward(*cotangents, *kept, t, camera, weights[:4], weights[4:8], weights[8])
        d_embedding = None if camera_embedding is None else grads["emb"].to(camera_embedding.dtype)
        d_camera_mlp = grads.get("camera_mlp", (None,) * 4)
        return None, grads.get("camera"), d_embedding, *grads["time_mlp"], *d_camera_mlp, grads["weight"], grads["bias"]

    return pull


def _without_autocast(*arguments):
    with torch.autocast("cpu", enabled=False):  # a graph's backend may leave the caller's on
        return _forward_cpu(*arguments)


def _fake(t, camera, camera_embedding, *weights):
    n_images, (n_projections, hidden) = t.shape[0], weights[8].shape
    outs = [weights[8].new_empty((n_images, n)) for n in (n_projections, hidden, hidden)]
    return *outs, None if camera is None else weights[8].new_empty((n_images, hidden))


def _allow_tf32(weight: Tensor) -> bool:
    return weight.dtype == torch.float32 and bool(torch.backends.cuda.matmul.allow_tf32)


_TimeCameraEmbedding = differentiable(_forward_kernels, _pull(_backward_kernels), keeps=(1, 2, 3))
register(
    "time_camera_embedding(Tensor t, Tensor? camera, Tensor? camera_embedding, Tensor w0, Tensor b0, Tensor w2,"
    " Tensor b2, Tensor? c0, Tensor? d0, Tensor? c2, Tensor? d2, Tensor weight, Tensor bias)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    cpu=differentiable(_without_autocast, _pull(_backward_cpu), keeps=(1, 2, 3)),
    cuda=_TimeCameraEmbedding,
    fake=_fake,
)


def _autocast(out: Tensor) -> Tensor:
    casts = is_autocast(out) and out.dtype != torch.float64
    return out.to(torch.get_autocast_dtype(out.device.type)) if casts else out


def _check(
    t: Tensor,
    camera: Tensor | None,
    time_mlp: MLP,
    camera_mlp: MLP | None,
    weight: Tensor,
    bias: Tensor,
    camera_embedding: Tensor | None,
) -> None:
    check_float(OP, "projections_weight", weight)
    check_tensors(OP, t=t, projections_bias=bias)
    if t.ndim != 1:
        raise ValueError(f"{OP}: t must be [B*V], got {tuple(t.shape)}; expand a single step to the batch")
    if weight.ndim != 2 or bias.shape != weight.shape[:1]:
        raise ValueError(
            f"{OP}: projections_weight and projections_bias must be [K, E] and [K], got {tuple(weight.shape)} and "
            f"{tuple(bias.shape)}; stack the ResBlocks' linear layers"
        )
    n_images, width = t.shape[0], weight.shape[1]
    _check_mlp("time_mlp", time_mlp, width, weight)
    if time_mlp[0].shape[1] % 2 or not time_mlp[0].shape[1]:
        raise ValueError(f"{OP}: time_mlp.w0 must be [E, 2F], got {tuple(time_mlp[0].shape)}; half cosine, half sine")
    if camera is not None:
        if camera_embedding is not None:
            raise ValueError(f"{OP}: camera must be None with camera_embedding, got both; pass one of them")
        if camera_mlp is None:
            raise ValueError(f"{OP}: camera_mlp must be given with camera, got None; pass camera=None for 2D mode")
        _check_mlp("camera_mlp", camera_mlp, width, weight)
        _check_rows("camera", camera, (n_images, camera_mlp[0].shape[1]), weight)
    if camera_embedding is not None:
        _check_rows("camera_embedding", camera_embedding, (n_images, width), weight)
    _check_home("t", t, weight)
    _check_home("projections_bias", bias, weight, bias.dtype)


def _check_mlp(name: str, mlp: MLP, width: int, weight: Tensor) -> None:
    w0, b0, w2, b2 = _weights(name, mlp)
    if w0.ndim != 2 or w0.shape[0] != width or b0.shape != (width,) or b2.shape != b0.shape:
        got = f"{list(w0.shape)}, {list(b0.shape)} and {list(b2.shape)}"
        raise ValueError(
            f"{OP}: {name}.w0, b0 and b2 must be [{width}, K0], [{width}] and [{width}], got {got}; "
            "E is projections_weight's second axis"
        )
    if w2.shape != (width, width):
        raise ValueError(f"{OP}: {name}.w2 must be [E, E] = [{width}, {width}], got {tuple(w2.shape)}; E is "
                         "projections_weight's second axis")  # fmt: skip
    for x in mlp:
        _check_home(name, x, weight, x.dtype)


def _weights(name: str, mlp: MLP) -> MLP:
    if not isinstance(mlp, tuple) or len(mlp) != 4:
        raise TypeError(f"{OP}: {name} must be an MLP (w0, b0, w2, b2), got {type(mlp).__name__}; pass ops.MLP(...)")
    if not all(isinstance(x, Tensor) for x in mlp):
        check_tensors(OP, **{f"{name}.{part}": x for part, x in zip(MLP._fields, mlp)})
    return mlp


def _check_rows(name: str, x: Tensor, shape: tuple[int, int], weight: Tensor) -> None:
    check_tensors(OP, **{name: x})
    if x.shape != shape:
        raise ValueError(f"{OP}: {name} must be {list(shape)}, got {list(x.shape)}; one row per image")
    check_float(OP, name, x)
    _check_home(name, x, weight)


def _check_home(name: str, x: Tensor, weight: Tensor, dtype: torch.dtype | None = None) -> None:
    if x.device != weight.device:
        raise RuntimeError(
            f"{OP}: {name} must be on the device of projections_weight, got {x.device} and {weight.device}; move one"
        )
    if dtype is not None and dtype != weight.dtype:
        raise TypeError(f"{OP}: {name} must be {weight.dtype} as projections_weight, got {dtype}; convert it first")
