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


def field_of(positions):
    return positions.norm(dim=-1), positions.abs()


RAYS = {"rays_o": -2 * torch.eye(3), "rays_d": torch.eye(3)}
GRID = {
    "aabb": (-1, -1, -1, 1, 1, 1),
    "occupancy_bits": torch.full((1,), 255, dtype=torch.uint8),
    "resolution": 2,
    "step_size": 0.25,
}
PACKED = torch.tensor([[0, 3]])
TABLE = ops.HashGrid(2, 2, 8, 4, 1.5)
TRI = torch.tensor([[0, 1, 2]], dtype=torch.int32)
POS = torch.tensor([[-0.8, -0.8, 0, 1], [0.8, -0.7, 0, 1], [0.1, 0.8, 0, 1]])
RAST = ops.rasterize(POS, TRI, (4, 4)).rast
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
                  "packed_info": PACKED, "background": x(3)},
    "packed_scan": {"values": x(3), "packed_info": PACKED},
    "march_rays": RAYS | GRID | {"jitter": x(3) / 2, "near": x(3), "far": 9 * x(3)},
    "prune_samples": {"samples": ops.Samples(x(3), 2 * x(3), PACKED), "sigmas": x(3)},
    "traverse_grids": RAYS | {"binaries": torch.ones(1, 2, 2, 2, dtype=torch.bool),
                              "aabbs": torch.tensor([[-1.0, -1, -1, 1, 1, 1]]), "near": x(3), "far": 9 * x(3),
                              "step_size": 0.25, "rays_mask": torch.ones(3, dtype=torch.bool)},
    "update_occupancy": {"ema": x(3), "values": x(2), "cells": torch.tensor([0, 2])},
    "render": RAYS | GRID | {"field": field_of, "background": x(3), "near": x(3), "far": 9 * x(3)},
    "hash_encode": {"positions": x(2, 3), "table": x(TABLE.n_entries, 2), "grid": TABLE},
    "field": {"positions": x(2, 3), "table": x(TABLE.n_entries, 2), "density_weights": [x(16, 4), x(1, 16)],
              "feature_weights": [x(16, 4), x(3, 16)], "spec": ops.FieldSpec(TABLE)},
    "field_density": {"positions": x(2, 3), "table": x(TABLE.n_entries, 2),
                      "density_weights": [x(16, 4), x(1, 16)], "spec": ops.FieldSpec(TABLE)},
    "rasterize": {"pos": POS, "tri": TRI, "resolution": (4, 4)},
    "interpolate": {"attr": x(3, 2), "rast": RAST, "tri": TRI, "rast_db": x(1, 4, 4, 4), "diff_attrs": "all"},
    "antialias": {"color": x(1, 4, 4, 3), "rast": RAST, "pos": POS, "tri": TRI, "topology": ops.edge_topology(TRI)},
    "edge_topology": {"tri": TRI},
    "texture": {"tex": x(1, 4, 4, 3), "uv": x(1, 2, 2, 2), "uv_da": x(1, 2, 2, 4),
                "filter_mode": "linear-mipmap-linear"},
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


def test_every_op_has_a_call():
    assert sorted(CALLS) == sorted(OPS)


def foreign_numbers():
    """An op, an argument that is a number or several, and what is none."""
    whole = ("2", None, [2], 2.5)
    numbers = {"step_size": ("x", None, [0.1]), "alpha_thre": ("x", [0.1]), "early_stop_eps": ("x", [0.1])}
    numbers |= {"decay": ("x", [0.1]), "threshold": ("x", [0.1]), "cone_angle": ("x", [0.1])}
    numbers |= {"resolution": whole, "max_samples": ("2", [2], 2.5), "aabb": ("x", None, [[0.0] * 3] * 2, ["x"] * 6)}
    numbers |= {"near": ("x", [0.1] * 3, np.zeros(3)), "far": ("x", [0.1] * 3, None), "jitter": ("x", 0.5)}
    names = ("march_rays", "prune_samples", "traverse_grids", "update_occupancy", "render")
    parameters = {name: inspect.signature(getattr(ops, name)).parameters for name in names}
    return [(op, name, x) for op in names for name in numbers for x in numbers[name] if name in parameters[op]]


@pytest.mark.parametrize(("name", "argument", "value"), foreign_numbers())
def test_foreign_numbers_of_the_packed_ops(name, argument, value):
    sentence = rf"^{name}: {argument} must be [^,]+.*, got .+; .+"
    with pytest.raises((TypeError, ValueError), match=sentence):
        getattr(ops, name)(**CALLS[name] | {argument: value})


@pytest.mark.parametrize("field", [lambda p: p[:, 0], lambda p: {"sigmas": p[:, 0]}, lambda p: (p[:, 0], None)])
def test_fields_that_return_something_else(field):
    with pytest.raises((TypeError, ValueError), match=r"^render: (sigmas and )?rgb of the field must be"):
        ops.render(**CALLS["render"] | {"field": field})


def test_numbers_of_other_libraries():
    """Are taken as what they are."""
    call = CALLS["march_rays"]
    wanted = ops.march_rays(**call | {"near": 1.0, "far": 9.0}).t_starts
    for two, step in ((np.int64(2), np.float32(0.25)), (torch.tensor(2), torch.tensor(0.25))):
        for resolution in (two, [two] * 3):
            numbers = {"resolution": resolution, "step_size": step, "max_samples": np.int64(1 << 40)}
            near = {"near": np.float32(1), "far": torch.tensor(9.0)}
            assert torch.equal(ops.march_rays(**call | numbers | near).t_starts, wanted)


@pytest.mark.parametrize("jitter", [0.5, [0.5] * 3, "x"])
def test_a_graph_does_not_take_a_foreign_jitter_for_none(jitter):
    call = CALLS["march_rays"] | {"jitter": jitter}
    compiled = torch.compile(lambda rays_o: ops.march_rays(**call | {"rays_o": rays_o}).t_starts, backend="eager")
    with pytest.raises(TypeError, match=r"^march_rays: jitter must be a tensor, got \w+; pass a tensor"):
        compiled(RAYS["rays_o"])


def test_grids_of_another_dtype_are_refused():
    call = CALLS["traverse_grids"]
    with pytest.raises(TypeError, match=r"^traverse_grids: binaries must be bool, got torch.float32; "):
        ops.traverse_grids(**call | {"binaries": call["binaries"].float()})
    with pytest.raises(ValueError, match="^traverse_grids: max_samples must be None or at least 0, got -5; "):
        ops.traverse_grids(**call, max_samples=-5)
