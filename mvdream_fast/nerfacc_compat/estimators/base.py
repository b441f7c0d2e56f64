"""What every estimator is: `occ_grid` and `prop_net` are."""

import torch
from torch import nn


class AbstractEstimator(nn.Module):
    """Finds samples of rays, and learns where they are worth it."""

    _dummy: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("_dummy", torch.empty(0), persistent=False)

    @property
    def device(self) -> torch.device:
        """Where its buffers are."""
        return self._dummy.device

    def sampling(self, *args, **kwargs):
        """Samples along rays; each estimator has its own arguments."""
        raise NotImplementedError(f"sampling: {type(self).__name__} must define it, got none; override it")

    def update_every_n_steps(self, *args, **kwargs) -> None:
        """One update in training, where it is time."""
        raise NotImplementedError(f"update_every_n_steps: {type(self).__name__} must define it, got none; override it")
