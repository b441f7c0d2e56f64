"""From the diffusion step and the camera to what every ResBlock adds: sinusoid, two MLPs, and all projections at once.

The weights belong to models/unet.py, which stacks the projections of its ResBlocks into one matrix.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mvdream_fast.ops._edges import check_float, is_batched, vmap_error

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
    """Linear(silu(time_mlp(sinusoid(t)) + camera_mlp(camera))), the projections of all ResBlocks in one product.

    Without a camera the second MLP is skipped (2D mode). The camera part may come precomputed, since it is constant
    over the steps of a run: pass `camera_embedding` from `ops.camera_embedding` instead of `camera`. Not
    differentiable in t. Computed in the weights' dtype; under autocast only the result is cast.

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
    if is_batched(t, camera, projections_weight, camera_embedding):
        raise vmap_error(OP)
    with torch.autocast(t.device.type, enabled=False):
        out = time_camera_embedding_ref(
            t,
            camera,
            time_mlp,
            camera_mlp,
            projections_weight,
            projections_bias,
            camera_embedding=camera_embedding,
        )
    return _autocast(out)


def camera_embedding(camera: Tensor, camera_mlp: MLP) -> Tensor:
    """The camera's part [B*V, E] of the embedding, to be computed once and passed to every step."""
    return _mlp(camera.to(camera_mlp.w0.dtype), camera_mlp)


def sinusoid(t: Tensor, width: int) -> Tensor:
    """[B*V] -> [B*V, width] float32: cosines, then sines, of t * 10000^(-i / (width / 2))."""
    half = width // 2
    i = torch.arange(half, device=t.device, dtype=torch.float32)
    angles = t.float()[:, None] * torch.exp(i * (-math.log(MAX_PERIOD) / half))
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


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
    emb = _mlp(sinusoid(t, time_mlp.w0.shape[1]).to(dtype), time_mlp)
    if camera is not None:
        emb = emb + _mlp(camera.to(dtype), camera_mlp)
    if camera_embedding is not None:
        emb = emb + camera_embedding
    return F.linear(F.silu(emb), projections_weight, projections_bias)


def _mlp(x: Tensor, mlp: MLP) -> Tensor:
    w0, b0, w2, b2 = mlp
    return F.linear(F.silu(F.linear(x, w0, b0)), w2, b2)


def _autocast(out: Tensor) -> Tensor:
    device = out.device.type
    return out.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else out


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
    if t.ndim != 1:
        raise ValueError(f"{OP}: t must be [B*V], got {tuple(t.shape)}; expand a single step to the batch")
    if weight.ndim != 2 or bias.shape != weight.shape[:1]:
        raise ValueError(
            f"{OP}: projections_weight and projections_bias must be [K, E] and [K], got {tuple(weight.shape)} and "
            f"{tuple(bias.shape)}; stack the ResBlocks' linear layers"
        )
    n_images, width = t.shape[0], weight.shape[1]
    _check_mlp("time_mlp", time_mlp, width, weight)
    if time_mlp[0].shape[1] % 2:
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
    w0, b0, w2, b2 = mlp
    if w0.ndim != 2 or w0.shape[0] != width or b0.shape != (width,) or b2.shape != b0.shape:
        raise ValueError(f"{OP}: {name}.w0, b0, b2 must be [{width}, K0], [{width}], [{width}]; see projections_weight")
    if w2.shape != (width, width):
        raise ValueError(f"{OP}: {name}.w2 must be [E, E] = [{width}, {width}], got {tuple(w2.shape)}; E is "
                         "projections_weight's second axis")  # fmt: skip
    for x in mlp:
        _check_home(name, x, weight, x.dtype)


def _check_rows(name: str, x: Tensor, shape: tuple[int, int], weight: Tensor) -> None:
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
