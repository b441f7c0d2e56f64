"""How numbers of Python reach a device without waiting for it: through page-locked memory, in its stream's order."""

import torch
from torch import Tensor


def to_device(x: Tensor, device: torch.device | str) -> Tensor:
    """`x` on a device; from a CPU to CUDA the caller goes on at once, and may change or drop `x`, unless that is
    page-locked itself: such a tensor has to stay as it is.

    The buffer between is torch's, whose allocator lends it again only once the copies out of it are done.
    """
    device = torch.device(device)
    if not copies_wait(x.device, device):
        return x.to(device)
    own = x if x.is_pinned() else x.pin_memory()
    return own.to(device, non_blocking=True)


def copies_wait(source: torch.device, target: torch.device) -> bool:
    """Whether a copy of ordinary memory between two devices waits for the one it goes to."""
    return source.type == "cpu" and target.type == "cuda"
