"""Whether a module does what its class says and nothing else, so that its weights may be read instead of calling it.

Fused paths (functional.py, unet.py) and graphs (captured.py) ask here, so that both pass over nothing.
"""

from typing import TypeGuard, TypeVar

from torch import nn
from torch.nn.modules.module import _has_any_global_hook

Kind = TypeVar("Kind", bound=nn.Module)


def is_plain(module: nn.Module, kind: type[Kind], size: int = 1) -> TypeGuard[Kind]:
    """Whether a module is exactly of a class, untouched, and no hook is on all modules.

    A convolution also has to keep an image's size, with windows of size x size, zeros around it and one group.
    """
    if type(module) is not kind or not is_untouched(module) or hooked_everywhere():
        return False
    return not isinstance(module, nn.Conv2d) or _keeps_size(module, size)


def is_untouched(module: nn.Module) -> bool:
    """Whether a module has no hook, and its class's forward. Of every layer at every call, so it reads the dicts."""
    return not is_hooked(module) and not is_patched(module)


def is_hooked(module: nn.Module) -> bool:
    """Whether a hook is on it."""
    held = module.__dict__
    return bool(
        held["_forward_hooks"] or held["_forward_pre_hooks"] or held["_backward_hooks"] or held["_backward_pre_hooks"]
    )


def is_patched(module: nn.Module) -> bool:
    """Whether it has a forward of its own, as some adapters give it."""
    return "forward" in module.__dict__


def hooked_everywhere() -> bool:
    """Whether a hook is on all modules there are."""
    return bool(_has_any_global_hook())


def _keeps_size(conv: nn.Conv2d, size: int) -> bool:
    half = size // 2
    return (
        conv.kernel_size == (size, size)
        and conv.padding == (half, half)
        and conv.stride == conv.dilation == (1, 1)
        and conv.groups == 1
        and conv.padding_mode == "zeros"
    )
