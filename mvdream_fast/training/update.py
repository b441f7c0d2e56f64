"""What all trainers share: one AdamW update with its moving average, and the state that a resumed run goes on from.

Losses and batches are the trainers' own (unet.py, vae.py, evaluator.py); the loop is loop.py's.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from mvdream_fast.core import processes
from mvdream_fast.core.errors import DivergedError, ModelError
from mvdream_fast.core.processes import ALONE, Ranks
from mvdream_fast.training.learning_rate import rate


class Options(Protocol):
    """The settings that an update goes by, a dataclass. Without an `ema` the average is the weights themselves."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def steps(self) -> int: ...
    @property
    def lr(self) -> float: ...
    @property
    def warmup(self) -> int: ...
    @property
    def ema(self) -> float: ...
    @property
    def clip(self) -> float: ...


class BaseTrainer:
    """One optimisation of a module's trainable weights. `step` is the number of updates done so far.

    The state is weights, EMA, Adam's moments and the step. Of several processes (`ranks`) that share the module's
    memory, the first one shows the average in `shown`, a whole copy of it.

    Args: about, what a checkpoint must agree with (kind, config and, where there is one, vocabulary); half: the loss
        is scaled, as float16's range needs.
    """

    def __init__(
        self, module: nn.Module, optimizer: torch.optim.Optimizer, options: Options, about: dict[str, Any],
        half: bool = False, ranks: Ranks = ALONE, shown: nn.Module | None = None,
    ):  # fmt: skip
        self.optimizer, self.options, self.about, self.ranks, self.step = optimizer, options, about, ranks, 0
        self.named = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.parameters = list(self.named.values())
        self.device = self.parameters[0].device
        self.shown = self.parameters if shown is None else [p for p in shown.parameters() if p.requires_grad]
        self.ema = [p.detach().float().clone() for p in self.parameters] if options.ema else []
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=half)
        self._averaged = False

    def check_finite(self, loss: float) -> None:
        """Raises DivergedError for a loss that is no number; what to do about it the loop adds (loop.py)."""
        if not math.isfinite(loss):
            raise DivergedError(f"the loss is {loss} at step {self.step}")

    @torch.no_grad()
    def check_weights(self) -> None:
        """Raises DivergedError, on all processes, where a weight or its average is not finite.

        The device is waited for, so this is for what writes weights, not for every step.
        """
        shares = (processes.local(x) for x in (*self.parameters, *self.ema))
        finite = torch.stack([share.isfinite().all() for share in shares]).all().item()
        if self.ranks.largest(int(not finite))[0]:
            raise DivergedError(f"a weight is no longer finite at step {self.step}")

    def update(self) -> float:
        """Takes one step down the gradients that backward left; returns their norm.

        Raises DivergedError for a norm that is not finite, before a weight is touched; a scaler leaves such a step out.
        """
        self.scaler.unscale_(self.optimizer)
        self.add_gradients()
        norm = processes.number(nn.utils.clip_grad_norm_(self.parameters, self.options.clip))
        if not (math.isfinite(norm) or self.scaler.is_enabled()):
            raise DivergedError(f"the norm of the gradients is {norm} at step {self.step}")
        for group in self.optimizer.param_groups:
            group["lr"] = self.options.lr * self.lr_share()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        if self.ema:
            # The average warms up, so that a short run isn't the random start's average.
            decay = min(self.options.ema, self.step / (self.step + 10))
            with torch.no_grad():
                # Torch's stubs don't name these two as its own.
                torch._foreach_lerp_(  # pyright: ignore[reportPrivateImportUsage]
                    self.ema, [p.float() for p in self.parameters], 1 - decay
                )
        return norm if math.isfinite(norm) else 0.0  # a step that the scaler left out

    def scale(self) -> Tensor:
        """What a loss is multiplied by before its backward, a scalar on the device; 1 but for float16."""
        return self.scaler.scale(torch.ones((), device=self.device))

    def descend(self, loss: Tensor) -> float:
        """One update down a scalar; returns its gradients' norm. Raises DivergedError before a weight is touched."""
        self.check_finite(loss.item())
        self.scaler.scale(loss).backward()
        return self.update()

    def add_gradients(self) -> None:
        """Adds to the gradients what is not in the loss that was scaled."""

    def lr_share(self) -> float:
        """The learning rate of the coming update, as a share of the highest: it falls to zero over `steps`."""
        options = self.options
        return rate(self.step, options.warmup, options.steps, options.steps, "cosine")

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the module (on the first process) holds the EMA weights; outside it is as before, bit for bit.

        All processes enter together; what the first does inside may enter again.
        """
        average = self.ema or self.parameters
        if self._averaged or average is self.shown:
            yield
            return
        average = [processes.whole(a, self.ranks) for a in average]
        shown = self.shown if self.ranks.first else []
        kept = [p.detach().clone() for p in shown]
        self._averaged = True
        try:
            _fill(shown, average)
            yield
        finally:
            _fill(shown, kept)
            self._averaged = False

    def state(self) -> dict[str, Tensor]:
        """Everything that a resumed run needs, by name, as this process holds it."""
        tensors = {f"model.{name}": p.detach() for name, p in self.named.items()}
        tensors |= {f"ema.{name}": average for name, average in zip(self.named, self.ema)}
        for name, p in self.named.items():
            tensors |= {f"adam.{key}.{name}": value for key, value in self.optimizer.state.get(p, {}).items()}
        return tensors

    def like(self) -> dict[str, Tensor]:
        """The weight that each tensor of a state has the shape and the place of, by the tensor's name."""
        kinds = ("model", "ema", "adam.exp_avg", "adam.exp_avg_sq")
        return {f"{kind}.{name}": p for kind in kinds for name, p in self.named.items()}

    def meta(self) -> dict[str, Any]:
        """What a checkpoint says of the run: kind, configuration, options."""
        return {**self.about, "options": dataclasses.asdict(self.options), "scaler": self.scaler.state_dict()}

    def restore(self, step: int, tensors: dict[str, Tensor], meta: dict) -> None:
        """Takes over a checkpoint's state. Raises ModelError when it is of another configuration."""
        self.begin_from(tensors, meta)
        for name, p in self.named.items():
            if f"adam.step.{name}" in tensors:
                # in the weight's memory layout, as AdamW itself makes them
                moments = {key: torch.empty_like(p).copy_(processes.placed(tensors[f"adam.{key}.{name}"], p))
                           for key in ("exp_avg", "exp_avg_sq")}  # fmt: skip
                self.optimizer.state[p] = {"step": tensors[f"adam.step.{name}"].to(p.device), **moments}
        if meta.get("scaler"):
            self.scaler.load_state_dict(meta["scaler"])
        self.step = step

    @torch.no_grad()
    def begin_from(self, tensors: dict[str, Tensor], meta: dict) -> None:
        """Takes over a checkpoint's weights alone. Raises ModelError when it is of another configuration."""
        check_same_model(meta, self.meta())
        held = {f"model.{name}": p for name, p in self.named.items()}
        held |= {f"ema.{name}": average for name, average in zip(self.named, self.ema)}
        if missing := sorted(held.keys() - tensors.keys()):
            raise ModelError(f"the checkpoint has no {missing[0]}; it was trained with other options")
        for name, tensor in held.items():
            tensor.copy_(processes.placed(tensors[name], tensor))


@torch.no_grad()
def _fill(parameters: Sequence[Tensor], values: list[Tensor]) -> None:
    if parameters:
        torch._foreach_copy_([*parameters], values)  # pyright: ignore[reportPrivateImportUsage] # as above


def check_same_kind(found: dict, kind: str) -> None:
    """Raises ModelError where a checkpoint's meta is of another kind of trainer."""
    if found.get("kind") != kind:
        raise ModelError(f"the checkpoint is of {found.get('kind')}, not of {kind}; name another folder with -o")


def check_same_model(found: dict, wanted: dict) -> None:
    """Raises ModelError naming what differs between a checkpoint's meta and the run's."""
    check_same_kind(found, wanted["kind"])
    for part, value in wanted["config"].items():
        other = found["config"].get(part, value if part == "guidance" else None)  # which no weight depends on
        if isinstance(value, dict) and other:
            other = value | other  # what an older version did not write: the weights' shapes are checked anyway
        if other != value:
            keys = [k for k in value if other.get(k) != value[k]] if isinstance(value, dict) and other else [part]
            raise ModelError(
                f"the checkpoint is of another configuration: {part}.{keys[0]} differs; "
                "resume with the flags it was started with, or name another folder with -o"
            )
    if found.get("vocabulary") != wanted.get("vocabulary"):
        raise ModelError("the checkpoint has another vocabulary; resume with the shards it was started with")
