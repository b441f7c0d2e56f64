"""What Python and the launch of one call cost, as JSON in microseconds: `python benchmarks/launch_overhead.py`.

CUDA's driver is a stub that does nothing (tests/cuda_stub), so that no GPU is needed, and none is measured: tensors lie
on the CPU, which is also where their memory comes from. Each call is made under no_grad, as a UNet makes it, by our own
launch and by Triton's of the same plan.
"""

import json
import sys
import tempfile
import timeit
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import stub_driver


def calls():
    """MVDream's level of 32 x 32 latents, eight images of four views, float16, by name."""
    import torch
    from mvdream_fast.kernels import cross_view_attention, geglu, group_norm_silu

    from mvdream_fast import ops

    q, k, v = torch.empty(8, 1024, 3, 5, 64, dtype=torch.float16).unbind(2)
    x = torch.empty(8, 320, 32, 32, dtype=torch.float16, memory_format=torch.channels_last)
    weight, emb = torch.empty(320, dtype=torch.float16), torch.empty(8, 320, dtype=torch.float16)
    rows = torch.empty(8, 1024, 2560, dtype=torch.float16)
    return {
        "ops.cross_view_attention": lambda: ops.cross_view_attention(q, k, v, 4),
        "ops.group_norm_silu": lambda: ops.group_norm_silu(x, weight, weight, 32, 1e-5, emb),
        "ops.geglu": lambda: ops.geglu(rows),
        "kernels.cross_view_attention.forward": lambda: cross_view_attention.forward(
            q, k, v, 4, None, None, None, 0.125, keep=False
        ),
        "kernels.group_norm_silu.forward": lambda: group_norm_silu.forward(
            x, weight, weight, 32, 1e-5, emb, True, keep=False
        ),
        "kernels.geglu.forward": lambda: geglu.forward(rows),
    }


def fastest(call, repeat=100, number=50):
    """Microseconds of a call: what a busy machine adds is not the call's."""
    return round(1e6 * min(timeit.repeat(call, repeat=repeat, number=number)) / number, 2)


def main():
    import torch

    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        stub = stub_driver.install(Path(folder))
        stub.stub_write_log(0)
        times = {}
        for name, call in calls().items():
            call()  # compiled, and kept
            ours = fastest(call)
            with stub_driver.by_triton():
                times[name] = {"triton": fastest(call), "ours": ours}
    print(json.dumps(times))


if __name__ == "__main__":
    main()
