"""DreamBooth's optimisation: a few photos of one subject in 2D mode, and a pull back to the weights it started from.

The loss is L_LDM + lambda * ||theta - theta_0||_1 / N, where theta are the UNet's weights (all N of them, the camera
embedding's too; a text tower that is tuned along is not held back). Photos are photos.py's, one tuning is
tune.py's.
"""

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from mvdream_fast.core import reads
from mvdream_fast.data.batches import Source
from mvdream_fast.models.lora import Adapted, adapted, change
from mvdream_fast.training.learning_rate import rate
from mvdream_fast.training.unet import Parts, Trainer, TrainOptions


@dataclass(frozen=True)
class DreamBoothOptions(TrainOptions):
    """What shapes the numbers of a run. The defaults are MVDreamBooth's for the full-size model.

    Source: Shi et al. 2023, "MVDream", on multi-view DreamBooth; the weight decay is not published.
    """

    batch_size: int = 4  # photos a step
    n_views: int = 1
    lr: float = 2e-6
    warmup: int = 0
    weight_decay: float = 0.0
    ema: float = 0.0  # a few hundred steps have nothing to average, and it is a copy of the weights
    multi_view_share: float = 0.0
    caption_dropout: float = 0.0
    train_text: bool = False
    steps: int = 600
    preservation: float = 1.0  # lambda
    lr_scheduler: Literal["constant", "linear", "cosine"] = "constant"
    betas: tuple[float, float] = (0.9, 0.999)
    adam_eps: float = 1e-8


class Pull(Protocol):
    """A preservation term."""

    def backward(self) -> float:
        """Adds its gradient to the parameters' gradients; returns ||theta - theta_0||_1 / N, without lambda."""
        ...


class Preservation:
    """lambda * ||theta - theta_0||_1 / N of weights that are trained themselves; theta_0 is what they hold now.

    Source: Shi et al. 2023, "MVDream", on multi-view DreamBooth.
    """

    def __init__(self, parameters: list[nn.Parameter], weight: float):
        self.parameters, self.weight = parameters, weight
        self.initial = [p.detach().clone() for p in parameters]
        self.n = sum(p.numel() for p in parameters)

    @torch.no_grad()
    def backward(self) -> float:
        """As `Pull`. The gradient is lambda / N times the sign of each change, 0 where there is none."""
        sums: list[Tensor] = []
        unused: dict[int, tuple[nn.Parameter, Tensor]] = {}  # in 2D mode the camera embedding
        for p, initial in zip(self.parameters, self.initial):
            moved = p - initial
            if p.grad is None:
                unused[len(sums)] = p, moved.sign()
            elif self.weight:
                p.grad.add_(moved.sign(), alpha=self.weight / self.n)
            sums.append(moved.abs_().sum().double())  # in pairs; dtype=float64 would copy the tensor
        distances: list[float] = reads.read(torch.stack(sums))
        for i, (p, sign) in unused.items():
            if self.weight and distances[i]:  # once multi-view steps have moved it
                p.grad = sign.mul_(self.weight / self.n)
        return sum(distances) / self.n


class AdapterPreservation:
    """The same of a UNet whose weights stand still under low-rank adapters: theta - theta_0 is what those add.

    Args: n is the number of the UNet's own weights.
    """

    def __init__(self, layers: list[Adapted], n: int, weight: float):
        self.layers, self.n, self.weight = layers, n, weight

    def backward(self) -> float:
        """As `Pull`; a layer at a time."""
        norms: list[Tensor] = []
        for layer in self.layers:
            norm = change(layer).abs().sum()
            norms.append(norm.detach())
            if self.weight:
                (norm * (self.weight / self.n)).backward()
        return sum(reads.read(torch.stack(norms))) / self.n


class DreamBoothTrainer(Trainer):
    """A Trainer of photos: no moving average, and the preservation term beside the denoising loss.

    theta_0 is what the UNet holds when this is made; `restore` and `begin_from` then set theta.
    """

    kind = "dreambooth"
    options: DreamBoothOptions

    def __init__(self, parts: Parts, source: Source, options: DreamBoothOptions, graphs: bool = True):
        super().__init__(parts, source, options, graphs=graphs)
        for group in self.optimizer.param_groups:
            group.update(betas=options.betas, eps=options.adam_eps)
        self.distance = 0.0
        layers, weight = adapted(parts.unet), options.preservation
        if layers:
            n = sum(p.numel() for name, p in parts.unet.named_parameters() if ".lora_" not in name)
            self.preservation: Pull = AdapterPreservation(layers, n, weight)
        else:
            self.preservation = Preservation(list(parts.unet.parameters()), weight)

    def train_step(self) -> dict[str, float]:
        """One update; `loss` is the whole of it at the weights before the update, `denoising` its first part."""
        record = super().train_step()
        whole = record["loss"] + self.options.preservation * self.distance
        return {**record, "loss": whole, "denoising": record["loss"], "distance": self.distance}

    def add_gradients(self) -> None:
        """Adds the preservation term's gradient to the loss's."""
        self.distance = self.preservation.backward()

    def lr_share(self) -> float:
        """The learning rate at this step, as a share of its highest."""
        return lr_share(self.options, self.step)


def lr_share(options: DreamBoothOptions, step: int) -> float:
    """The share of the learning rate at a step: a linear warm-up, then constant, or down to zero at the last step."""
    if options.lr_scheduler == "constant":
        return rate(step, options.warmup, options.steps, 0)
    decay = max(options.steps - options.warmup, 1)
    return rate(step, options.warmup, options.steps, decay, options.lr_scheduler)
