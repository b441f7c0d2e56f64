"""Low-rank adapters (LoRA, through peft) on the UNet's attention projections, and the plain weights they stand for.

Training them is a trainer's job; the model that is saved has none left.
"""

from collections.abc import Mapping
from typing import Protocol, TypeGuard

import torch
from torch import Tensor, nn

from mvdream_fast.core.errors import ArgumentError

# Those of diffusers' DreamBooth script. The embedding's linear layers must stay plain: the UNet joins them.
TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
NAME = "default"  # peft's, of the only adapter


class Adapted(Protocol):
    """What peft makes of a Linear, as far as it is used here: the pair of matrices of each adapter, and its scale."""

    scaling: dict[str, float]
    lora_A: Mapping[str, nn.Linear]
    lora_B: Mapping[str, nn.Linear]


def is_adapted(layer: nn.Module) -> TypeGuard[Adapted]:
    """Whether a module has an adapter around it."""
    return hasattr(layer, "lora_A")


def add_adapters(module: nn.Module, rank: int, seed: int = 0) -> list[Adapted]:
    """Wraps the attention projections in place and freezes everything else; at first the outputs are unchanged.

    Returns: the wrapped layers.
    Raises: ArgumentError where peft is not installed, or nothing can be wrapped.
    Source: Hu et al. 2021, "LoRA"; the scale alpha / rank is 1.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ArgumentError(
            "low-rank adapters need peft; install mvdream_fast[train], or leave --lora-rank out"
        ) from error
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(TARGETS), lora_dropout=0.0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, module)
    return adapted(module)


def adapted(module: nn.Module) -> list[Adapted]:
    """The wrapped layers, in order."""
    return [layer for layer in module.modules() if is_adapted(layer)]


def change(layer: Adapted) -> Tensor:
    """What a wrapped layer adds to its weight: scale * B A, [out, in]; differentiable in both."""
    return layer.scaling[NAME] * (layer.lora_B[NAME].weight @ layer.lora_A[NAME].weight)


@torch.no_grad()
def merged_state(module: nn.Module) -> dict[str, Tensor]:
    """The state dict of the same module without adapters: their changes added to the weights, plain names.

    The module itself is left as it is.
    """
    state = {
        name.replace(".base_layer.", "."): tensor
        for name, tensor in module.state_dict().items()
        if ".lora_" not in name
    }
    for name, layer in module.named_modules():
        if is_adapted(layer):
            weight = f"{name}.weight"
            state[weight] = state[weight] + change(layer).to(state[weight].dtype)
    return state
