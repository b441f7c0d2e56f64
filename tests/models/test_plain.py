"""When a module's weights may be read instead of calling it."""

import pytest
import torch
from torch import nn
from torch.nn.modules import module as everywhere

from mvdream_fast.models.plain import is_plain, is_untouched


class Own(nn.Linear):
    """A class of its own."""


HOOKS = {
    "register_forward_hook": lambda *_: None,
    "register_forward_pre_hook": lambda *_: None,
    "register_full_backward_hook": lambda *_: None,
    "register_full_backward_pre_hook": lambda *_: None,
}


def test_a_layer_as_torch_makes_it():
    assert is_plain(nn.Linear(2, 2), nn.Linear)
    assert is_plain(nn.Conv2d(2, 2, 1), nn.Conv2d)
    assert is_plain(nn.Conv2d(2, 2, 3, padding=1), nn.Conv2d, 3)
    assert is_plain(nn.GroupNorm(1, 2), nn.GroupNorm)
    assert not is_plain(nn.Linear(2, 2), nn.Conv2d)
    assert not is_plain(Own(2, 2), nn.Linear)
    assert is_untouched(Own(2, 2))
    assert not is_plain(torch.nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)), nn.Linear)


@pytest.mark.parametrize("name", HOOKS)
def test_a_hook_ends_with_its_handle(name):
    layer = nn.Linear(2, 2)
    handle = getattr(layer, name)(HOOKS[name])
    assert not is_plain(layer, nn.Linear)
    assert not is_untouched(layer)
    handle.remove()
    assert is_plain(layer, nn.Linear)
    of_all = getattr(everywhere, name.replace("register_", "register_module_"))(HOOKS[name])
    try:
        assert not is_plain(layer, nn.Linear)
    finally:
        of_all.remove()
    assert is_plain(layer, nn.Linear)


def test_a_forward_of_its_own():
    layer = nn.Linear(2, 2)
    layer.forward = lambda x: x
    assert not is_plain(layer, nn.Linear)
    del layer.forward
    assert is_plain(layer, nn.Linear)


@pytest.mark.parametrize(
    "changed",
    [
        {"padding_mode": "circular"}, {"groups": 2}, {"stride": 2}, {"dilation": 2, "padding": 2}, {"padding": 0},
        {"padding": "same"}, {"kernel_size": 5, "padding": 2}, {"kernel_size": 1, "padding": 0},
        {"kernel_size": (3, 1), "padding": (1, 0)},
    ],
    ids=str,
)  # fmt: skip
def test_a_convolution_of_another_kind(changed):
    conv = nn.Conv2d(2, 2, **{"kernel_size": 3, "padding": 1} | changed)
    assert not is_plain(conv, nn.Conv2d, 3)
