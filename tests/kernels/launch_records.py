"""What the launches of a process with a stub for a driver are, as JSON: run by test_launch.py, in a process of its own.

`python launch_records.py FOLDER REPORT`: REPORT is a regular expression on the kernel report's workloads.
"""

import dis
import json
import re
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2] / "benchmarks")]

import stub_driver  # noqa: E402 (the path comes first)


def records_of(stub, call) -> dict:
    """The launches of a call by Triton, then by what was kept of it; and whether Triton was asked for those."""
    from triton.runtime.jit import JITFunction

    asked, run = [], JITFunction.run

    def counted(self, *args, **kwargs):
        asked.append(self.__name__)
        return run(self, *args, **kwargs)

    with stub_driver.same_addresses() as rewind:
        with stub_driver.by_triton():
            call()
        by_triton = stub_driver.taken(stub)
        rewind()
        call()  # what Triton compiled is kept
        rewind()
        stub_driver.taken(stub)
        JITFunction.run = counted
        call()
        JITFunction.run = run
    return {"triton": by_triton, "ours": stub_driver.taken(stub), "asked": asked}


def of_the_report(stub, pattern: str) -> dict:
    from kernel_report import workloads

    workloads.DEVICE = "cpu"
    chosen = [w for w in (*workloads.workloads(), *small(workloads)) if re.fullmatch(pattern, w.name)]
    return {w.name: records_of(stub, lambda w=w: w.call(90)) for w in chosen}


def small(workloads):
    """Every kernel on tensors that compile in a moment, sizes of one among them."""
    call = workloads.attention((4, 2, 24, 2, 16), camera=True)
    yield workloads.Workload("small attention", False, call)
    yield workloads.Workload("small attention of one", False, workloads.attention((1, 1, 1, 1, 8), camera=False))
    yield workloads.Workload("small group_norm", False, workloads.group_norm((2, 6, 3, 5), "float32", True, 3))
    yield workloads.Workload("small geglu", False, workloads.geglu(5, 24, "float16"))
    yield workloads.Workload("small geglu of one", False, workloads.geglu(1, 1, "float16"))
    yield workloads.Workload("small sds", False, workloads.sds("float32", (4, 2, 3, 3), 2))
    yield workloads.Workload("small embedding", False, workloads.embedding("float16", 3, 16, 8, 20))


def of_another_kind(stub) -> dict:
    """Launches that are not the kept one: tensors aligned in another way, a hook, an error, another device."""
    import torch
    import triton
    from mvdream_fast.kernels import geglu

    from mvdream_fast import _C

    x = torch.empty(5, 48, dtype=torch.float16)
    shifted = torch.empty(5 * 48 + 1, dtype=torch.float16)[1:].view(5, 48)
    cases = {"aligned": records_of(stub, lambda: geglu.forward(x))}
    cases["shifted"] = records_of(stub, lambda: geglu.forward(shifted))
    cases["aligned again"] = records_of(stub, lambda: geglu.forward(x))
    told = []
    hooks = triton.knobs.runtime.launch_enter_hook
    hooks.add(told.append)
    cases["hooked"] = records_of(stub, lambda: geglu.forward(x)) | {"told": len(told)}
    hooks.remove(told.append)
    hooks.calls.clear()
    for name, device, count in (("from another device", 1, 2), ("from a new thread", -1, 1)):
        geglu.forward(x)
        stub_driver.taken(stub)
        stub.stub_set_device(device, count)
        geglu.forward(x)
        cases[name] = {"ours": stub_driver.taken(stub), "device": stub.stub_device()}
        stub.stub_set_device(0, 1)
    launch, _ = geglu._forward_launch(x.shape, (), x.dtype, x.device)
    cases["kept"] = {
        name: _C.launch_record("k", launch.binary.function, 1, 128, 0, 0, 3, kinds, values, id, None) is not None
        for name, kinds, values in (
            ("as compiled", "ppiiill", (48, 5, 24, 0, 0)),
            ("one more", "ppiiilll", (48, 5, 24, 0, 0, 0)),
            ("one less", "ppiiil", (48, 5, 24, 0)),
            ("a wider one", "pplliil", (48, 5, 24, 0, 0)),
        )
    }
    stub.stub_fail_next(700)
    try:
        geglu.forward(x)
    except RuntimeError as error:
        cases["an error"] = {"text": str(error)}
    return cases


def of_the_ops(stub) -> dict:
    """Calls as a UNet makes them: their launches, and what Python did that a good call need not do."""
    import importlib

    import torch

    from mvdream_fast import ops

    attention_op = sys.modules["mvdream_fast.ops.cross_view_attention"]
    q, k, v = torch.empty(4, 24, 3, 2, 16, dtype=torch.float16).unbind(2)
    x, w = torch.empty(2, 6, 3, 5, dtype=torch.float16), torch.empty(6, dtype=torch.float16)
    emb, abar = torch.empty(2, 6, dtype=torch.float16), torch.full((1,), 0.5)
    rows, z = torch.empty(5, 48, dtype=torch.float16), torch.empty(4, 2, 3, 3)
    hidden = (torch.empty(16), torch.empty(16, 16), torch.empty(16))
    mlps = [ops.MLP(torch.empty(16, n), *hidden) for n in (8, 16)]
    weights = (torch.empty(20, 16), torch.empty(20))
    t, camera = torch.empty(3, dtype=torch.int64), torch.empty(3, 16)
    calls = {
        "cross_view_attention": lambda: ops.cross_view_attention(q, k, v, 2),
        "group_norm_silu": lambda: ops.group_norm_silu(x, w, w, 3, 1e-5, emb),
        "geglu": lambda: ops.geglu(rows),
        "time_camera_embedding": lambda: ops.time_camera_embedding(t, camera, *mlps, *weights),
        "sds_target": lambda: ops.sds_target(z, z, z, z, None, abar, 50.0, n_views=2),
    }
    found = {}
    with torch.no_grad():
        for name, call in calls.items():
            call(), call()
            stub_driver.taken(stub)
            idle = []
            capability, torch.cuda.get_device_capability = torch.cuda.get_device_capability, idle.append
            importer, importlib.import_module = importlib.import_module, idle.append
            sentences = formatted_by(call)
            torch.cuda.get_device_capability, importlib.import_module = capability, importer
            found[name] = {"ours": stub_driver.taken(stub), "sentences": sentences, "idle": list(map(str, idle))}
        attention_op.TORCH_FROM, attention_op.SHORTEST = {(90, 16): 48}, 48
        for name, change in (("torch's", {}), ("cameras", {"camera_k": torch.empty(4, 2, 16, dtype=q.dtype)})):
            ops.cross_view_attention(q, k, v, 2, **change)
            found[name] = {"ours": stub_driver.taken(stub)}
        ops.cross_view_attention(q[::2], k[::2], v[::2], 2)
        found["strided"] = {"ours": stub_driver.taken(stub)}
        torch.use_deterministic_algorithms(True)
        ops.cross_view_attention(q, k, v, 2)
        found["deterministic"] = {"ours": stub_driver.taken(stub)}
    return found


def formatted_by(call) -> list[str]:
    """Where a call in mvdream_fast put a sentence together (an f-string with values in it)."""
    places = []

    def trace(frame, event, _):
        if "mvdream_fast" not in frame.f_globals.get("__name__", ""):
            return None
        frame.f_trace_opcodes = True
        if event == "opcode" and dis.opname[frame.f_code.co_code[frame.f_lasti]] in ("FORMAT_VALUE", "FORMAT_SIMPLE"):
            places.append(f"{frame.f_code.co_name}:{frame.f_lineno}")
        return trace

    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(None)
    return places


if __name__ == "__main__":
    stub = stub_driver.install(Path(sys.argv[1]))
    facts = {"report": of_the_report(stub, sys.argv[2])}
    if sys.argv[2].startswith("small"):
        facts |= {"others": of_another_kind(stub), "ops": of_the_ops(stub)}
    print(json.dumps(facts))
