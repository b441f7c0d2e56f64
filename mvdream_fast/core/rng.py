"""Randomness as counter-based streams keyed by (seed, step, purpose), so that a resumed run draws the same bytes.

No generator state is ever saved: a stream is a pure function of its key (Philox 4x64, Salmon et al. 2011), drawn on the
CPU and moved to the device, so every device sees the same numbers; a draw waits for none.
"""

import hashlib

import numpy as np
import torch

from mvdream_fast.core.pinned import to_device


class Stream:
    """A reproducible source of random tensors; two streams with different keys are independent."""

    def __init__(self, seed: int, step: int, purpose: str):
        digest = hashlib.blake2b(f"{seed}/{step}/{purpose}".encode(), digest_size=16).digest()
        self._rng = np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))

    def normal(self, *shape: int, device: torch.device | str = "cpu") -> torch.Tensor:
        """Standard normal float32 of the given shape."""
        return to_device(_tensor(self._rng.standard_normal(shape, dtype=np.float32)), device)

    def uniform(
        self, *shape: int, low: float = 0.0, high: float = 1.0, device: torch.device | str = "cpu"
    ) -> torch.Tensor:
        """Uniform float32 in [low, high)."""
        return to_device(_tensor(self._rng.random(shape, dtype=np.float32) * (high - low) + low), device)

    def integers(self, low: int, high: int, *shape: int, device: torch.device | str = "cpu") -> torch.Tensor:
        """Uniform int64 in [low, high)."""
        return to_device(_tensor(self._rng.integers(low, high, shape, dtype=np.int64)), device)

    def permutation(self, n: int) -> torch.Tensor:
        """A random order of 0..n-1, int64 [n]."""
        return _tensor(self._rng.permutation(n).astype(np.int64))


def _tensor(numbers: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(numbers)  # pyright: ignore[reportUnknownMemberType] # torch leaves it unannotated
