"""Public ops that are given what is no tensor: one sentence with the op and the argument, never an AttributeError."""

import inspect

import numpy as np
import pytest
import torch

from mvdream_fast import ops

NO_CALLS = {"winograd_pays"}  # a question about tensors that an op would take
OPS = [
    name for name in ops.__all__
    if inspect.isfunction(getattr(ops, name)) and not name.endswith("_ref") and name not in NO_CALLS
]  # fmt: skip


def required(op) -> list[str]:
    return [p.name for p in inspect.signature(op).parameters.values() if p.default is p.empty]


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("value", [None, np.ones((4, 6, 2, 8), np.float32), [1.0, 2.0], "x", 3])
def test_nothing_but_foreign_things(name, value):
    op = getattr(ops, name)
    with pytest.raises((TypeError, ValueError), match=r"^\w+: [\w.\[\]]+ must be .+, got .+; .+"):
        op(*[value] * len(required(op)))


def x(*shape):
    return torch.ones(shape)


MLP = ops.MLP(x(8, 6), x(8), x(8, 8), x(8))
CALLS = {
    "geglu": {"x": x(2, 4)},
    "group_norm_silu": {"x": x(2, 4, 3, 3), "weight": x(4), "bias": x(4), "n_groups": 2, "emb": x(2, 4)},
    "cross_view_attention": {"q": x(4, 3, 2, 8), "k": x(4, 3, 2, 8), "v": x(4, 3, 2, 8), "n_views": 2,
                             "camera_q": x(4, 2, 8), "camera_k": x(4, 2, 8), "camera_v": x(4, 2, 8)},
    "winograd_conv3x3": {"x": x(1, 2, 4, 4), "weight": x(3, 2, 3, 3), "bias": x(3)},
    "sds_target": {name: x(4, 2, 3, 3) for name in ("z", "z_t", "noise_pred_cond", "noise_pred_uncond", "noise")}
                  | {"alphas_cumprod_t": torch.tensor(0.5), "guidance_scale": 2.0},
    "time_camera_embedding": {"t": x(4), "camera": x(4, 6), "time_mlp": ops.MLP(x(8, 8), x(8), x(8, 8), x(8)),
                              "camera_mlp": MLP, "projections_weight": x(5, 8), "projections_bias": x(5)},
    "camera_embedding": {"camera": x(4, 6), "camera_mlp": MLP},
    "composite": {"sigmas": x(3), "rgb": x(3, 3), "t_starts": x(3), "t_ends": x(3) * 2,
                  "packed_info": torch.tensor([[0, 3]]), "background": x(3)},
}  # fmt: skip


TENSORS = [(name, arg) for name, args in CALLS.items() for arg, value in args.items() if torch.is_tensor(value)]


@pytest.mark.parametrize(("name", "argument"), TENSORS)
@pytest.mark.parametrize("kind", ["array", "list"])
def test_one_foreign_argument_among_good_ones(name, argument, kind):
    """Each call is good; with one tensor as an array or a list (or a number) instead, that one is named."""
    good, op = CALLS[name], getattr(ops, name)
    op(**good)
    foreign = good[argument].numpy() if kind == "array" else good[argument].tolist()
    sentence = rf"^\w+: {argument} must be a tensor, got {type(foreign).__name__}; pass a tensor$"
    with pytest.raises(TypeError, match=sentence):
        op(**good | {argument: foreign})
