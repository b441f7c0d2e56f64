"""`python -m mvdream_fast.kernels.report`: what can be known about the Triton kernels without a GPU.

Every launcher is called on tensors without storage while its launches are recorded; each recorded launch is compiled
ahead of time for each architecture and read back from the machine code. Times are predicted from datasheets.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

BASELINE = Path(__file__).resolve().parent.parent / "benchmarks" / "gpu_static.json"
GROWTH = 1.10


@dataclass(frozen=True)
class Report:
    """Compiles every Triton kernel for GPUs that are not there: registers, spills, tensor cores, predicted times."""

    archs: tuple[Literal[80, 90, 100, 120], ...] = (80, 90, 100, 120)
    """Compute capabilities: 80 is an A100, 90 an H100, 100 a B200, 120 an RTX 5090."""
    only: str = ""
    """A regular expression on "workload/kernel"; everything when empty."""
    quick: bool = False
    """Only the main shapes: what the test suite compiles on every run."""
    check: bool = False
    """Compare with the kept file and exit 1 on a spill, a lost tensor-core instruction, or more than 10 % growth."""
    output: Path | None = None
    """The JSON file to write to, where rows that are not compiled now stay; nothing is written when omitted."""


@dataclass(frozen=True)
class GPU:
    """A datasheet: dense rates in FLOP/s, bytes/s, and the limits of one multiprocessor that bound occupancy."""

    name: str
    tensor: float  # float16 products, float32 sums
    scalar: float  # float32
    bandwidth: float
    warps: int
    blocks: int
    shared: int
    registers: int = 65536


GPUS = {
    80: GPU("A100 SXM 80 GB", 312e12, 19.5e12, 2.039e12, 64, 32, 164 * 1024),
    90: GPU("H100 SXM", 989e12, 67e12, 3.35e12, 64, 32, 228 * 1024),
    100: GPU("B200", 2250e12, 75e12, 8.0e12, 64, 32, 228 * 1024),
    120: GPU("RTX 5090", 209.5e12, 104.8e12, 1.792e12, 48, 24, 100 * 1024),
}
TENSOR_CORE = r"\b(?:U?TC[HQO]?MMA|UTC[A-Z]*MMA|[HQ]GMMA|[HQ]MMA)\b"


@dataclass(frozen=True)
class Workload:
    """A call of launchers on tensors of the device "meta", for one compute capability."""

    name: str
    quick: bool
    call: Callable[[int], None]


def _empty(*shape: int, dtype: str = "float16"):
    import torch

    return torch.empty(shape, dtype=getattr(torch, dtype), device="meta")


def attention(shape: tuple[int, ...], *, dtype: str = "float16", camera: bool, tf32: bool = False, flat: bool = True):
    """Forward and backward on slices of a packed projection; the tiles are those of the compute capability."""

    def call(capability: int) -> None:
        from mvdream_fast.kernels import cross_view_attention as kernels

        images, views, tokens, heads, width = shape
        packed = _empty(images if flat else 2 * images, tokens, 3, heads, width, dtype=dtype)
        q, k, v = (packed if flat else packed[::2]).unbind(2)
        cameras = [_empty(images, heads, width, dtype=dtype) if camera else None] * 3
        block_d, itemsize, major = kernels.block_width(width), q.element_size(), capability // 10
        d_out = _empty(images, tokens, heads, width, dtype=dtype)
        tile = kernels.forward_tile(block_d, itemsize, major, flat)
        out, lse = kernels.forward(q, k, v, views, *cameras, 0.125, tf32, tile)
        tile = kernels.backward_tile(block_d, itemsize, major)
        kernels.backward(d_out, q, k, v, out, lse, views, *cameras, 0.125, tf32, tile)

    return call


def group_norm(shape: tuple[int, ...], dtype: str, channels_last: bool, n_groups: int = 32):
    def call(_: int) -> None:
        import torch
        from mvdream_fast.kernels import group_norm_silu as kernels

        memory_format = torch.channels_last if channels_last else torch.contiguous_format
        x = _empty(*shape, dtype=dtype).to(memory_format=memory_format)
        weight, emb = _empty(shape[1], dtype="float32"), _empty(*shape[:2], dtype=dtype)
        y, mean, rstd = kernels.forward(x, weight, weight, n_groups, 1e-5, emb, True)
        kernels.backward(y, x, weight, weight, n_groups, emb, True, mean, rstd)

    return call


def geglu(rows: int, width: int, dtype: str):
    def call(_: int) -> None:
        from mvdream_fast.kernels import geglu as kernels

        x = _empty(rows, 2 * width, dtype=dtype)
        kernels.backward(kernels.forward(x), x)

    return call


def sds(dtype: str, shape: tuple[int, ...] = (8, 4, 32, 32), views: int = 4):
    def call(_: int) -> None:
        from mvdream_fast.kernels import sds_target as kernels

        z, abar = _empty(*shape, dtype=dtype), _empty(1, dtype="float32")
        for mode in ("x0", "sds"):
            for prediction in ("eps", "v"):
                kernels.forward(z, z, z, z, z, abar, 50.0, prediction, 0.5, mode, views)

    return call


def embedding(dtype: str, images: int = 16, width: int = 1280, frequencies: int = 160, outputs: int = 20160):
    def call(_: int) -> None:
        from mvdream_fast.kernels import time_camera_embedding as kernels

        t, camera = _empty(images, dtype="int64"), _empty(images, 16, dtype=dtype)
        hidden = (_empty(width, dtype=dtype), _empty(width, width, dtype=dtype), _empty(width, dtype=dtype))
        time_mlp = (_empty(width, 2 * frequencies, dtype=dtype), *hidden)
        camera_mlp = (_empty(width, 16, dtype=dtype), *hidden)
        weight, bias = _empty(outputs, width, dtype=dtype), _empty(outputs, dtype=dtype)
        out, *saved = kernels.forward(t, camera, None, time_mlp, camera_mlp, weight, bias)
        kernels.backward(out, *saved, t, camera, time_mlp, camera_mlp, weight)

    return call


def workloads() -> Iterator[Workload]:
    """MVDream's shapes at 256^2 with guidance (16 images, 4 views), and every configuration of the launchers."""
    main = (16, 4, 1024, 5, 64)
    yield Workload("attention d64", False, attention(main, camera=False))
    yield Workload("attention d64 camera", True, attention(main, camera=True))
    yield Workload("attention d64 bf16", False, attention(main, dtype="bfloat16", camera=False))
    yield Workload("attention d40 odd strided", False, attention((16, 4, 1000, 5, 40), camera=True, flat=False))
    for width in (16, 80, 160):  # padded to 16, 128, 256
        yield Workload(f"attention d{width}", False, attention((16, 4, 1024, 5, width), camera=True))
    for width in (64, 128, 256):
        shape = (16, 4, 1024, 5, width)
        yield Workload(f"attention d{width} float32", False, attention(shape, dtype="float32", camera=True))
    yield Workload("attention d64 tf32", False, attention(main, dtype="float32", camera=True, tf32=True))
    yield Workload("group_norm 320 nhwc", True, group_norm((16, 320, 32, 32), "float16", True))
    yield Workload("group_norm 1280 nhwc", False, group_norm((16, 1280, 8, 8), "float16", True))
    yield Workload("group_norm 320 nchw", False, group_norm((16, 320, 32, 32), "float16", False))
    yield Workload("geglu", True, geglu(16 * 1024, 1280, "float16"))
    yield Workload("geglu float32", False, geglu(16 * 1024, 1280, "float32"))
    yield Workload("sds", True, sds("float32"))
    yield Workload("embedding", True, embedding("float16"))
    yield Workload("embedding float32", False, embedding("float32"))


def extremes() -> Iterator[Workload]:
    """Sizes of 1, which Triton turns into constants, and tensors of more than 2^31 elements: only to be compiled."""
    for name, one in (("1", True), ("2^31", False)):
        yield Workload(f"geglu {name}", False, geglu(*((1, 1) if one else (1 << 21, 1280)), "float16"))
        shape = (1, 1, 1, 1) if one else (1, 64, 1 << 13, 1 << 13)
        yield Workload(f"group_norm {name}", False, group_norm(shape, "float16", True, 1 if one else 32))
        yield Workload(f"sds {name}", False, sds("float32", shape, 1))
        shape = (1, 1, 1, 1, 1) if one else (4, 4, 1 << 20, 16, 64)
        yield Workload(f"attention {name}", False, attention(shape, camera=True))
    yield Workload("embedding 1", False, embedding("float16", 1, 1, 1, 1))


@contextmanager
def recorded() -> Iterator[list[tuple]]:
    """Launches inside are listed as (kernel, arguments by name, options, grid) and not run."""
    from triton.runtime.jit import JITFunction

    launches, run = [], JITFunction.run

    def record(self, *args, grid, warmup, **kwargs):
        bound = dict(zip(self.arg_names, args)) | {k: v for k, v in kwargs.items() if k in self.arg_names}
        launches.append((self, bound, {k: v for k, v in kwargs.items() if k not in self.arg_names}, grid))

    JITFunction.run = record
    try:
        yield launches
    finally:
        JITFunction.run = run


def source(kernel: Any, bound: dict[str, Any]):
    """The launch as Triton's own specialisation would see it: ones are constants, multiples of 16 are known to be."""
    from triton.compiler import ASTSource

    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        if parameter.is_constexpr:
            signature[parameter.name], constants[(i,)] = "constexpr", bound[parameter.name]
        else:
            signature[parameter.name] = _kind(bound[parameter.name], (i,), constants, attributes)
    return ASTSource(kernel, signature, constants, attributes)


def _kind(value: Any, path: tuple[int, ...], constants: dict, attributes: dict):
    if isinstance(value, tuple):
        return tuple(_kind(x, (*path, i), constants, attributes) for i, x in enumerate(value))
    if isinstance(value, float):
        return "fp32"
    if isinstance(value, int):
        if value == 1:
            constants[path] = 1
            return "constexpr"
        if value % 16 == 0:
            attributes[path] = [["tt.divisibility", 16]]
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    attributes[path] = [["tt.divisibility", 16]]
    names = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32", "int64": "i64"}
    return "*" + names[str(value.dtype).removeprefix("torch.")]


def inspect(cubin: bytes) -> dict[str, Any]:
    """Registers, stack, local-memory instructions and tensor-core instructions of a compiled kernel."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, code = (
            subprocess.run([tools / tool, flag, file.name], capture_output=True, text=True, check=True).stdout
            for tool, flag in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c"))
        )
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    found = sorted(set(re.findall(TENSOR_CORE, code)))
    spills = len(re.findall(r"\bSTL\b", code)) + len(re.findall(r"\bLDL\b", code))
    return {"registers": registers, "stack_bytes": stack, "spill_instructions": spills, "tensor_cores": found}


def flops(kernel: str, x: dict[str, Any]) -> float:
    """Multiplications and additions of one launch (two a multiply-add)."""
    if kernel.startswith("attention_"):
        length = x["views"] * x["tokens"]
        pairs = x["out" if "out" in x else "q"].shape[0] // x["views"] * x["heads"]
        products = {
            "attention_forward": 4 * length,
            "attention_backward_kv": 8 * length,
            "attention_backward_q": 6 * length,
        }
        return pairs * length * x["D"] * products.get(kernel, 2)
    if kernel == "dense":
        return 2 * x["rows"] * x["n_out"] * (x["n_in"] + x["n_in2"] * x["SECOND"])
    if kernel == "dense_backward_weight":
        return 2 * x["rows"] * x["n_out"] * x["n_in"]
    return 20 * max(t.numel() for t in x.values() if hasattr(t, "numel"))  # work on each element, about


def moved(x: dict[str, Any]) -> int:
    """Bytes if every argument is read or written once; a pointer passed twice counts once."""
    tensors = {id(t): t for t in x.values() if hasattr(t, "numel")}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def occupancy(gpu: GPU, registers: int, shared: int, warps: int) -> float:
    """Resident warps of a multiprocessor over the most it can hold."""
    by_registers = gpu.registers // (-(-registers * 32 // 256) * 256 * warps)
    by_shared = gpu.shared // (shared + 1024)
    return min(by_registers, by_shared, gpu.blocks, gpu.warps // warps) * warps / gpu.warps


def compiled(
    archs: tuple[int, ...], only: str, quick: bool, chosen: Callable[[], Iterator[Workload]] = workloads
) -> Iterator[dict[str, Any]]:
    """One row per distinct launch and architecture; a kernel launched in several forms is numbered."""
    import triton
    from triton.backends.compiler import GPUTarget

    for workload in chosen():
        for arch in archs if workload.quick or not quick else ():
            with recorded() as launches:
                workload.call(arch)
            forms: dict[str, list[str]] = {}
            for kernel, bound, options, grid in launches:
                name = kernel.__name__
                if not re.search(only, f"{workload.name}/{name}"):
                    continue
                binary = triton.compile(source(kernel, bound), target=GPUTarget("cuda", arch, 32), options=options)
                known = forms.setdefault(name, [])
                if binary.hash in known:
                    continue
                known.append(binary.hash)
                label = name if len(known) == 1 else f"{name} {len(known)}"
                yield {"workload": workload.name, "kernel": label, "arch": arch} | measures(binary, arch, bound, grid)


def measures(binary: Any, arch: int, bound: dict[str, Any], grid: tuple[int, ...]) -> dict[str, Any]:
    """What the machine code says, and the time that a datasheet's rates predict for it."""
    gpu, code = GPUS[arch], inspect(binary.asm["cubin"])
    shared, warps = binary.metadata.shared, binary.metadata.num_warps
    work, traffic = flops(binary.metadata.name, bound), moved(bound)
    seconds = max(work / (gpu.tensor if code["tensor_cores"] else gpu.scalar), traffic / gpu.bandwidth)
    return code | {
        "local_table": bound.get("KIND") == 2,  # sin and cos of large arguments keep a table in local memory
        "shared_bytes": shared,
        "warps": warps,
        "programs": grid[0],
        "occupancy": round(occupancy(gpu, code["registers"], shared, warps), 3),
        "flops": work,
        "bytes": traffic,
        "predicted_us": round(seconds * 1e6, 2),
        "predicted_bound": "arithmetic" if seconds * gpu.bandwidth > traffic else "memory",
    }


def problems(rows: list[dict[str, Any]], kept: list[dict[str, Any]]) -> list[str]:
    """What must not be: spills in forward kernels, attention off the tensor cores, or growth against the kept rows."""
    found, before = [], {key(r): r for r in kept}
    for r in rows:
        name = f"{r['workload']}/{r['kernel']} sm_{r['arch']}"
        if "backward" not in r["kernel"] and r["spill_instructions"] and not r["local_table"]:
            found.append(f"{name}: {r['spill_instructions']} spill instructions in a forward kernel")
        products = r["kernel"] in ("attention_forward", "attention_backward_kv", "attention_backward_q")
        if products and not r["workload"].endswith("float32") and not r["tensor_cores"]:
            found.append(f"{name}: no tensor-core instruction")
        old = before.get(key(r))
        if old is None:
            found.append(f"{name}: not in {BASELINE.name}; write it with --output")
            continue
        for what in ("registers", "stack_bytes", "shared_bytes"):
            if r[what] > GROWTH * old[what] and r[what] - old[what] >= 8:
                found.append(f"{name}: {what} grew from {old[what]} to {r[what]}")
    return found


def key(r: dict[str, Any]) -> tuple[str, str, int]:
    return r["workload"], r["kernel"], r["arch"]


def load(path: Path = BASELINE) -> dict[str, Any]:
    return json.loads(path.read_text())


def save(path: Path, rows: list[dict[str, Any]]) -> None:
    """One row a line, in the order of the workloads; rows of workloads that are no more are dropped."""
    import triton

    merged = {key(r): r for r in (load(path)["rows"] if path.exists() else [])} | {key(r): r for r in rows}
    order = [w.name for w in workloads()]
    kept = sorted(
        (r for r in merged.values() if r["workload"] in order),
        key=lambda r: (order.index(r["workload"]), r["kernel"], r["arch"]),
    )
    gpus = {arch: gpu.name for arch, gpu in GPUS.items()}
    head = json.dumps({"triton": triton.__version__, "gpus": gpus, "times": "predicted at datasheet rates"})
    text = ",\n".join(json.dumps(r) for r in kept)
    path.write_text(f'{head[:-1]}, "rows": [\n{text}\n]}}\n')


def main(args: Report) -> None:
    from rich.console import Console
    from rich.table import Table

    columns = ("arch", "registers", "spill_instructions", "shared_bytes", "occupancy", "tensor_cores", "flops", "bytes")
    table = Table("workload", "kernel", *columns, "predicted us", title="Compiled ahead of time; times are predicted")
    rows = []
    for r in compiled(args.archs, args.only, args.quick):
        rows.append(r)
        cells = [
            " ".join(r[c]) if c == "tensor_cores" else f"{r[c]:.3g}" if c in columns[-2:] else str(r[c])
            for c in columns
        ]
        table.add_row(r["workload"], r["kernel"], *cells, f"{r['predicted_us']} ({r['predicted_bound']})")
    Console(width=200).print(table)
    if args.output:
        save(args.output, rows)
    if args.check:
        found = problems(rows, load()["rows"])
        print("\n".join(found) or f"{len(rows)} kernels: no spill, no lost tensor core, no growth", file=sys.stderr)
        sys.exit(1 if found else 0)


if __name__ == "__main__":
    from mvdream_fast import cli

    cli.run(main, Report, prog="kernels.report")
