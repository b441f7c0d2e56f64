"""What the native ops do where memory ends within a parallel region: an error that Python can catch, never an end."""

import os
import subprocess
import sys

import pytest

MOST = 240.0  # MB
HEADER = f"""
import resource, torch
from mvdream_fast import ops

torch.manual_seed(0)


def end_somewhere(op, step=2.0):
    "Calls op with ever more memory until it has enough, from less than its scratch takes."
    op()
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    seen, spare = set(), 0.0
    while "enough" not in seen and spare < {MOST}:
        spare += step
        resource.setrlimit(resource.RLIMIT_AS, (used + int(spare * 2**20), hard))
        try:
            op()
        except (MemoryError, RuntimeError) as error:
            seen.add(type(error).__name__)
        else:
            seen.add("enough")
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
    print(sorted(seen), spare)


def outlines():
    "So many small triangles that most pixels have an outline beside them."
    n = 20_000
    pos = (torch.rand(n, 1, 4) * 2 - 1 + torch.rand(n, 3, 4) * 0.05).view(-1, 4)
    pos[:, 3] = 1.0
    tri = torch.arange(3 * n, dtype=torch.int32).view(n, 3)
    return torch.rand(1, 512, 512, 1), ops.rasterize(pos, tri, (512, 512)).rast, pos, tri, ops.edge_topology(tri)
"""
OPS = {
    "composite": """
n = 4_000_000
inputs = torch.ones(n), torch.ones(n, 3), torch.arange(n).float(), torch.arange(n) + 1.0
end_somewhere(lambda: ops.composite(*inputs, packed_info=torch.tensor([[0, n]])))
""",
    "composite's gradient": """
n = 1_000_000
sigmas, rest = torch.ones(n, requires_grad=True), (torch.ones(n, 3), torch.arange(n).float(), torch.arange(n) + 1.0)
loss = ops.composite(sigmas, *rest, packed_info=torch.tensor([[0, n]])).rgb.sum()
end_somewhere(lambda: torch.autograd.grad(loss, sigmas, retain_graph=True), 1.0)
""",
    "rasterize": """
pos = torch.rand(300_000, 4) * 8 - 4  # most have a corner behind the camera: they are cut
tri = torch.arange(300_000, dtype=torch.int32).view(-1, 3)
end_somewhere(lambda: ops.rasterize(pos, tri, (32, 32)))
""",
    "antialias": """
args = outlines()
end_somewhere(lambda: ops.antialias(*args), 0.5)
""",
    "antialias's gradient": """
color, rast, pos, tri, topology = outlines()
pos.requires_grad_()
loss = ops.antialias(color, rast, pos, tri, topology).sum()
end_somewhere(lambda: torch.autograd.grad(loss, pos, retain_graph=True), 0.5)
""",
}


@pytest.mark.timeout(600)  # a process that imports torch
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits a process's memory, as Linux counts it")
@pytest.mark.parametrize("name", OPS)
def test_memory_that_ends_in_a_parallel_region_is_an_error(name):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "100000", "MALLOC_ARENA_MAX": "1"}
    done = subprocess.run(
        [sys.executable, "-c", HEADER + OPS[name]], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    assert "MemoryError" in done.stdout
    assert "enough" in done.stdout
