"""Low-rank adapters (LoRA, through peft) on the UNet's attention projections, and the plain weights they stand for.

Training them is a trainer's job; the model that is saved has none left.
"""

import copy
from collections.abc import Mapping
from typing import Protocol, TypeGuard, TypeVar

import torch
from torch import Tensor, nn

from mvdream_fast.core.errors import ArgumentError, ModelError

# Those of diffusers' DreamBooth script. The embedding's linear layers stay plain: so the UNet joins them into one.
TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
NAME = "default"  # peft's, of the only adapter

Module = TypeVar("Module", bound=nn.Module)


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
    Raises: ArgumentError where peft is not installed, ModelError where nothing can be wrapped, or is already.
    Source: Hu et al. 2021, "LoRA"; the scale alpha / rank is 1.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ArgumentError(
            "low-rank adapters (--lora-rank, --guidance vsd) need peft; install mvdream_fast[train], or go without them"
        ) from error
    kind = type(module).__name__
    if adapted(module):
        raise ModelError(f"a {kind} has low-rank adapters already; merge them into its weights (lora.merged_state)")
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(TARGETS), lora_dropout=0.0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            inject_adapter_in_model(config, module)
        except ValueError as error:  # peft's, of layers that are not there or that it knows no adapter for
            raise ModelError(
                f"a {kind} has no layers that low-rank adapters go around ({', '.join(TARGETS)}, each a Linear or a "
                "convolution); take another model, or go without them"
            ) from error
    return adapted(module)


def adapted_twin(module: Module, rank: int, seed: int = 0) -> Module:
    """A second module with adapters around the weights of the first: they are the same Parameters, frozen in both.

    Returns: the twin. The first stays without adapters, and a weight that is loaded into one is in the other.
    Raises: as `add_adapters`.
    """
    shared = {id(x): x for x in (*module.parameters(), *module.buffers())}
    twin = copy.deepcopy(module, shared)
    add_adapters(twin, rank, seed)
    return twin


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
