"""Winograd's transformed weights, kept from call to call: for each convolution, up to a budget of memory.

They are four times as large as the weights. The convolutions themselves are called in functional.py.
"""

from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from mvdream_fast.ops import winograd_weights

# First come, first kept: a model visits its layers in the same order again and again, so the most recent would be
# thrown out just before they are wanted. What no longer fits is transformed on every call.
BUDGET_BYTES = 512 << 20
_N_SAMPLES = 61


@dataclass(frozen=True)
class _Entry:
    key: tuple
    samples: Tensor
    planes: Tensor


_kept: WeakKeyDictionary[nn.Module, _Entry] = WeakKeyDictionary()


def transformed_weights(module: nn.Conv2d) -> Tensor | None:
    """[36, C_out, C] of a convolution with channels-last weights, or None where they are not kept.

    Weights that were replaced or written to are transformed anew. Writes through `parameter.data` are noticed by
    samples of the values, which every training step, load or merge changes.
    """
    weight = module.weight.detach()
    if weight.is_inference():
        return None  # its versions are not counted
    key, samples = (weight.data_ptr(), weight._version, weight.shape, weight.stride()), _samples(weight)
    entry = _kept.get(module)
    if entry is not None and entry.key == key and torch.equal(entry.samples, samples):
        return entry.planes
    _kept.pop(module, None)
    if 4 * weight.nbytes + sum(e.planes.nbytes for e in _kept.values()) > BUDGET_BYTES:
        return None
    with torch.inference_mode(False), torch.no_grad():
        _kept[module] = _Entry(key, samples.clone(), winograd_weights(weight))
    return _kept[module].planes


def _samples(weight: Tensor) -> Tensor:
    flat = weight.permute(0, 2, 3, 1).view(-1)
    return flat[:: max(1, len(flat) // _N_SAMPLES)]
