"""A guided four-view UNet step: ours, diffusers' in both layouts, and what a CPU user would take instead.

Every contestant lives in a process of its own, with the same numbers in its weights; its memory is all of it.
"""

import functools

import psutil
import pytest
import torch
import unets
from contest import Goal, faster, size, sizes
from contestants import Contestant, Unavailable
from peers import CUDA

LAYOUTS = {"reference": torch.contiguous_format, "diffusers channels_last": torch.channels_last}  # both are diffusers
FULL = [
    "mini", "width-64", *(pytest.param(f"width-{width}", marks=pytest.mark.slow) for width in (128, 160, 320)),
]  # fmt: skip
GPU = ["mini", "sd21"]
BYTES_A_PARAMETER = 40  # that all contestants hold together: of a gigabyte of weights ONNX Runtime alone holds four


def contestants(model: str) -> list[Contestant]:
    step = functools.partial(functools.partial, unets.one_step, size=model)
    makes = {name: step(unets.diffusers, model, layout) for name, layout in LAYOUTS.items()}
    makes["diffusers graphed"] = step(unets.diffusers_graphed, model)
    fits = BYTES_A_PARAMETER * n_parameters(model) < psutil.virtual_memory().total
    for name, engine in (("OpenVINO", unets.openvino), ("ONNX Runtime", unets.onnxruntime)):
        try:
            if not fits:
                raise Unavailable("the machine has not the memory for it beside the others")
            makes[name] = step(engine, unets.onnx_file(model))  # made here, once, before the processes are started
        except Unavailable as error:
            makes[name] = functools.partial(unavailable, str(error))
    makes["ours"] = step(unets.ours, model)
    return [Contestant(name, make, apart=not CUDA) for name, make in makes.items()]


def n_parameters(model: str) -> int:
    return sum(shape.numel() for shape in unets.shapes_of(unets.size_of(model).unet).values())


def unavailable(reason: str):
    raise Unavailable(reason)


def better_layout(goal: float) -> Goal:
    names = (*LAYOUTS, "ours")

    def got(rows, _):
        return min(rows[name]["median_s"] for name in LAYOUTS) / rows["ours"]["median_s"]

    return Goal("speed of ours against diffusers' better layout", goal, got, names)


@pytest.mark.parametrize("model", sizes(GPU if CUDA else FULL, ["tiny"]))
@pytest.mark.timeout(3600)
def bench_step(contest, model):
    n = n_parameters(model)
    contest.run(
        f"UNet step {model}",
        "step",
        contestants(model),
        work={"images": 8, "parameters": n, "flop": unets.flop(model), "bytes": 4 * n},
        goals=[better_layout(1.3), faster(1.3, "OpenVINO"), faster(1.3, "ONNX Runtime")],
        budget_s=20,
        tolerance=3e-2 if CUDA else 1e-3,
    )


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("model", sizes(GPU if CUDA else ["mini", "width-64"], ["tiny"]))
def bench_compiled(contest, model):
    """diffusers' UNet under torch.compile, which takes minutes to compile."""
    builds = {"reference": unets.diffusers, "torch.compile": unets.diffusers_compiled, "ours": unets.ours}
    makes = {name: functools.partial(unets.one_step, build, model, size=model) for name, build in builds.items()}
    contest.run(
        f"UNet step {model}, compiled",
        "step",
        [Contestant(name, make, apart=True) for name, make in makes.items()],
        work={"images": 8, "flop": unets.flop(model)},
        goals=[faster(1.1, "torch.compile")],
        budget_s=20,
        tolerance=3e-2 if CUDA else 1e-3,
    )


def bench_threads(contest):
    """The embedded model's step, by threads."""
    model = size("mini", "tiny")
    make = functools.partial(unets.one_step, unets.ours, model, size=model)
    contest.scale(
        f"UNet step {model} by threads",
        "step",
        "threads",
        {n: {"ours": make} for n in sizes((1, 2), (1,))},
        work=lambda _: {"images": 8, "flop": unets.flop(model)},
        tolerance=1e-4,
    )
