"""Hash grids against Dr.Jit's, which calls itself compatible with tiny-cuda-nn: values and both gradients."""

import numpy as np
import pytest
import torch
from reference.tcnn_formulas import draw, refill

from mvdream_fast import tcnn_compat as tcnn

dr = pytest.importorskip("drjit", reason="drjit is not installed")
if not dr.has_backend(dr.JitBackend.LLVM):
    pytest.skip("Dr.Jit finds no LLVM library", allow_module_level=True)
from drjit.llvm.ad import ArrayXf, Float  # noqa: E402
from drjit.nn import HashGridEncoding  # noqa: E402


# Dr.Jit rounds a dense level's rows to a multiple of the features, not of 8: these grids have no level that differs.
@pytest.mark.parametrize(
    ("dims", "n_features", "log2_size", "growth", "base"),
    [(3, 2, 15, 1.447269237440378, 16), (3, 8, 12, 1.3, 5), (2, 4, 10, 2.0, 8), (4, 2, 14, 2.0, 4)],
)
def test_hash_grid(dims, n_features, log2_size, growth, base):
    options = {"n_levels": 5, "n_features_per_level": n_features, "base_resolution": base, "per_level_scale": growth}
    config = {"otype": "HashGrid", "log2_hashmap_size": log2_size, **options}
    ours = tcnn.Encoding(dims, config, dtype=torch.float32).cpu()
    theirs = HashGridEncoding(Float, dims, hashmap_size=2**log2_size, torchngp_compat=True, **options)
    assert theirs.n_params == ours.params.numel()
    theirs.data = Float(refill(ours).astype(np.float32))
    x, d_out = draw(1000, dims).cpu(), torch.randn(1000, ours.n_output_dims)
    points = ArrayXf(x.numpy().T.copy())
    dr.enable_grad(theirs.data, points)
    out = theirs(points)
    dr.backward(dr.sum(dr.sum(out * ArrayXf(d_out.numpy().T.copy()))))
    y = ours(x.requires_grad_())
    y.backward(d_out)
    # It computes the levels' scales in float64: at a scale of 70 the last place of a coordinate is 8e-6 of a cell.
    for got, wanted in ((y, out), (x.grad, dr.grad(points)), (ours.params.grad, dr.grad(theirs.data))):
        wanted = torch.from_numpy(np.array(wanted).T.copy())
        assert got.shape == wanted.shape
        torch.testing.assert_close(got, wanted, rtol=0, atol=5e-5 * max(1.0, wanted.abs().max().item()))
