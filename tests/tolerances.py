"""One table of tolerances, and the rule by which a low-precision result is judged. Looser numbers carry their cause."""

import torch
from torch import Tensor

# Largest absolute error of a float32 result against its float32 reference, for outputs of order 1.
PARITY = {
    "composite": 2e-6,  # float64 sums, rounded once
    "composite.gradients": 1e-5,
    "antialias": 1e-6,
    "antialias.gradients": 1e-5,
    "cross_view_attention": 5e-6,
    "field": 2e-6,
    "field.gradients": 1e-5,  # sums over all samples, in another order
    "geglu": 1e-6,
    "group_norm_silu": 1e-5,  # 1/std multiplies the rounding of x + emb
    "hash_encode": 2e-6,
    "hash_encode.gradients": 5e-6,
    "instruction_sets": 1e-5,  # fused multiply-adds or none, and exp by other polynomials
    "interpolate": 1e-6,
    "interpolate.gradients": 1e-5,
    "packed_scan": 1e-5,  # running sums of up to 30 terms
    "rasterize": 1e-6,  # of the largest: slopes and gradients of slivers are large
    "render": 1e-5,  # elementwise functions differ in the last place with a sample's place in the vector registers
    "render.fused": 2e-5,  # each product of the networks as three of tf32
    "second_derivatives": 1e-5,
    "sds_target": 1e-4,  # guidance 50 times latents / sqrt(abar): results of order 100
    "texture": 1e-6,
    "texture.gradients": 1e-5,  # float32 sums over all pixels of a texel
    "time_camera_embedding": 2e-5,  # three layers of sums over up to 1280 values
}


def close(name: str, out: Tensor, ref: Tensor) -> None:
    """`out` within the table's tolerance of `ref`, relative for values above 1."""
    torch.testing.assert_close(out.double(), ref.double(), atol=PARITY[name], rtol=PARITY[name])


def close_to_largest(name: str, out: Tensor, ref: Tensor, factor: float = 1.0) -> None:
    """`out` within the table's tolerance of `ref`, relative to its largest value: sums of products in another order.

    `factor` loosens that; its cause stands where it is used.
    """
    assert out.shape == ref.shape
    if ref.numel():
        error, largest = (out.double() - ref.double()).abs().max().item(), ref.abs().max().item()
        assert error <= factor * PARITY[name] * max(1.0, largest), f"{name}: error {error:.3e} of {largest:.3e}"


def within_flash_rule(out: Tensor, plain: Tensor, exact: Tensor, terms: float = 1.0, ulps: float = 2) -> None:
    """flash-attention's rule: the error is at most twice that of plain PyTorch in the same precision, plus 2 ulp.

    `exact` is the float64 result for the same rounded inputs; an ulp is that of the largest exact value, or of `terms`,
    the size of what a result is summed from, where its terms cancel.
    """
    assert out.dtype == plain.dtype
    assert out.shape == plain.shape == exact.shape
    if not exact.numel():
        return
    ulp = torch.finfo(out.dtype).eps * max(terms, exact.abs().max().item())
    error, allowed = _error(out, exact), 2 * _error(plain, exact) + ulps * ulp
    assert error <= allowed, f"error {error:.3e}, allowed {allowed:.3e} ({error / max(ulp, 1e-30):.1f} ulp)"


def _error(x: Tensor, exact: Tensor) -> float:
    return (x.double() - exact).abs().max().item()
