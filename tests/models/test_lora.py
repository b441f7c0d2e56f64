"""A twin with adapters, and what cannot have any."""

import pytest
import torch

from mvdream_fast.core.errors import ArgumentError, ModelError
from mvdream_fast.models import lora


class Attention(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.to_q = torch.nn.Linear(6, 6)
        self.register_buffer("scale", torch.tensor(2.0))

    def forward(self, x):
        return self.to_q(x) * self.scale


def test_a_twin_has_the_tensors_of_the_first_and_adapters_of_its_own():
    first, x = Attention(), torch.ones(1, 6)
    twin = lora.adapted_twin(first, 2)
    assert twin.to_q.base_layer.weight is first.to_q.weight
    assert twin.scale is first.scale
    assert type(first.to_q) is torch.nn.Linear
    assert [name for name, p in twin.named_parameters() if p.requires_grad] == [
        "to_q.lora_A.default.weight", "to_q.lora_B.default.weight"
    ]  # fmt: skip
    assert torch.equal(first(x), twin(x))
    with torch.no_grad():
        twin.to_q.lora_B["default"].weight.fill_(0.5)
        first.to_q.weight.fill_(1.0)
        first.to_q.bias.zero_()
    assert torch.equal(first(x), torch.full((1, 6), 12.0))
    torch.testing.assert_close(twin(x), first(x) + 2 * (0.5 * twin.to_q.lora_A["default"].weight.sum()).expand(1, 6))


def test_adapters_begin_by_their_seed_whatever_was_drawn_before():
    weights = []
    for seed in (3, 3, 4):
        torch.rand(1)
        weights.append(lora.adapted_twin(Attention(), 2, seed).to_q.lora_A["default"].weight)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[1], weights[2])


def test_what_cannot_have_adapters_is_told(monkeypatch):
    with pytest.raises(ModelError, match=r"a Linear has no layers that low-rank adapters go around \(to_q, "):
        lora.add_adapters(torch.nn.Linear(2, 2), 4)
    odd = Attention()
    odd.to_q = torch.nn.PReLU()
    with pytest.raises(ModelError, match=r"an? Attention has no layers that .* each a Linear or a convolution"):
        lora.add_adapters(odd, 4)
    with pytest.raises(ModelError, match=r"Attention has low-rank adapters already; merge them"):
        lora.adapted_twin(lora.adapted_twin(Attention(), 2), 2)
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(ArgumentError, match=r"need peft; install mvdream_fast\[train\]"):
        lora.add_adapters(Attention(), 4)
