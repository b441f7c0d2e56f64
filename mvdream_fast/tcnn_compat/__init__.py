"""tiny-cuda-nn's Python names over our ops: `from mvdream_fast import tcnn_compat as tcnn`.

`Encoding`, `Network` and `NetworkWithInputEncoding` with the arguments, attributes and JSON configurations of its
PyTorch bindings, and their one flat `params` in its layout: a `state_dict` goes both ways. On CPUs and GPUs; 3-D linear
hash and dense grids run natively (`ops.hash_encode`), the rest is plain torch. What differs:

- The arithmetic is float32. Half precision, the default as there, is the dtype of what comes out; `params` are not
  rounded, and between the output and them no gradient is, so that `loss_scale` and `jit_fusion` can be set and change
  nothing. Under a CPU's autocast, which joins no half with bfloat16, take `dtype=torch.float32`.
- Initial values have tiny-cuda-nn's distributions, not its random numbers.
- Every encoding and network has all second derivatives.
- Points of a grid are clamped to [0, 1] (there they wrap around), and NaN is refused on a CPU.
- Any batch size is computed as it is; `Network` and `NetworkWithInputEncoding` take `dtype=`, too.
- `params` are made on the current GPU where torch has one, as there, else on the CPU. An input on another device is an
  error.
"""

from mvdream_fast.tcnn_compat.modules import (
    Encoding,
    Module,
    Network,
    NetworkWithInputEncoding,
    free_temporary_memory,
    supports_jit_fusion,
)

__all__ = [
    "Encoding",
    "Module",
    "Network",
    "NetworkWithInputEncoding",
    "free_temporary_memory",
    "supports_jit_fusion",
]
