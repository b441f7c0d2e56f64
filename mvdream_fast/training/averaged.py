"""What the trainers of a single module share: one AdamW update with its moving average, and the state of a resume.

Losses and batches are the trainers' own (vae.py, evaluator.py); the loop is loop.py's.
"""

import dataclasses
import math
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mvdream_fast.core.errors import DivergedError, ModelError
from mvdream_fast.training.learning_rate import rate
from mvdream_fast.training.unet import check_same_model, exchanged, restore_moments


class Options(Protocol):
    """The settings that an update goes by, a dataclass; the learning rate falls to zero over `steps`."""

    steps: int
    lr: float
    warmup: int
    ema: float
    clip: float


class AveragedTrainer:
    """One optimisation of a module's trainable weights; the state is weights, EMA, Adam's moments and the step.

    Args: `about`, what a checkpoint must agree with (kind, config and, where there is one, vocabulary).
    """

    def __init__(self, module: nn.Module, optimizer: torch.optim.Optimizer, options: Options, about: dict[str, Any]):
        self.optimizer, self.options, self.about, self.step = optimizer, options, about, 0
        self.named = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.parameters = list(self.named.values())
        self.device = self.parameters[0].device
        self.ema = [p.detach().clone() for p in self.parameters]

    def update(self, loss: Tensor) -> float:
        """Takes one step down the loss; returns its gradient norm. Raises DivergedError before a weight is touched."""
        options = self.options
        if not math.isfinite(loss.item()):
            raise DivergedError(f"the loss is {loss.item()} at step {self.step}; resume with a smaller learning rate")
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.parameters, options.clip).item()
        for group in self.optimizer.param_groups:
            group["lr"] = options.lr * rate(self.step, options.warmup, options.steps, options.steps, "cosine")
        self.optimizer.step()
        self.step += 1
        with torch.no_grad():
            # The average warms up, so that a short run isn't the random start's average.
            decay = min(options.ema, self.step / (self.step + 10))
            torch._foreach_lerp_(self.ema, self.parameters, 1 - decay)
        return norm

    def averaged(self):
        """Inside, the module holds the EMA weights."""
        return exchanged(self.parameters, self.ema)

    def state(self) -> dict[str, Tensor]:
        """Everything that a resumed run needs, by name."""
        tensors = {}
        for (name, p), average in zip(self.named.items(), self.ema):
            tensors |= {f"model.{name}": p.detach(), f"ema.{name}": average}
            tensors |= {f"adam.{key}.{name}": value for key, value in self.optimizer.state.get(p, {}).items()}
        return tensors

    def meta(self) -> dict[str, Any]:
        return {**self.about, "options": dataclasses.asdict(self.options)}

    def restore(self, step: int, tensors: dict[str, Tensor], meta: dict) -> None:
        """Takes over a checkpoint's state. Raises ModelError when it is of another configuration."""
        check_same_model(meta, self.meta())
        missing = sorted(set(self.named) - {name.removeprefix("model.") for name in tensors})
        if missing:
            raise ModelError(f"the checkpoint has no weights named {missing[0]}; name another folder with -o")
        with torch.no_grad():
            for (name, p), average in zip(self.named.items(), self.ema):
                p.copy_(tensors[f"model.{name}"])
                average.copy_(tensors[f"ema.{name}"])
                restore_moments(self.optimizer, p, name, tensors)
        self.step = step
