"""`python benchmarks/kernel_report`: what can be known about the Triton kernels without a GPU.

Every launcher is called on tensors without storage while its launches are recorded; each recorded launch is compiled
ahead of time for each architecture and read back from the machine code. Which launches: workloads.py; their
predicted times: rates.py.
"""

import itertools
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

from kernel_report.rates import GPUS, flops, moved, occupancy, precision, seconds
from kernel_report.workloads import Workload, workloads

BASELINE = Path(__file__).with_name("gpu_static.json")
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
    """Compare with the kept file and exit 1 on spills, lost tensor cores, blocks too large, or growth over 10 %."""
    output: Path | None = None
    """The JSON file to write to, where rows that are not compiled now stay; nothing is written when omitted."""


TENSOR_CORE = r"\b(?:U?TC[HQO]?MMA|UTC[A-Z]*MMA|[HQ]GMMA|[HQ]MMA)\b"
# The newer instructions take tiles of 64 rows; these have fewer, and run on HMMA.
FEWER_ROWS = (
    r"attention d160.*/attention_backward",  # two accumulators of 256 columns leave registers for 32 rows
    r"attention d\d+ tf32/attention_backward",  # as does float32
    r"attention d(128|256) tf32/attention_forward",
    r"attention d150 .*/attention_forward",  # loads number by number: an address each
    r"embedding.*/dense( \d)?$",  # a batch of images is 16 rows
)
# What is counted of the order in which an H100's instructions stand: its products, the waits for them, exponentials.
IN_ORDER = {"HGMMA": "product", "WARPGROUP.DEPBAR": "wait", "MUFU.EX2": "exp2"}
TABLE_BYTES = 28  # sin and cos of large arguments keep a table in local memory, from the first byte of the stack


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


def inspect(cubin: bytes, local_table: bool = False) -> dict[str, Any]:
    """Registers, stack, spill instructions and tensor-core instructions of a compiled kernel."""
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
    order = order_of(code) if "HGMMA" in found else ""
    return {
        "registers": registers,
        "stack_bytes": stack,
        "spill_instructions": spills(code, local_table),
        "tensor_cores": found,
        "instructions": len(re.findall(r"/\*[0-9a-f]{4,}\*/ ", code)),
        "shared_loads": len(re.findall(r"\bLDSM?\b", code)),
        "order": order,
        "exp2_meanwhile": exp2_meanwhile(order),
    }


def order_of(code: str) -> str:
    """Products, waits for them and exponentials as they stand in the code: "product 8, wait, exp2 68"."""
    names = "|".join(map(re.escape, IN_ORDER))
    runs = itertools.groupby(re.findall(rf"\b({names})\b", code), key=IN_ORDER.get)
    return ", ".join(f"{name} {len(list(run))}" if name != "wait" else name for name, run in runs)


def exp2_meanwhile(order: str) -> int:
    """The exponentials that stand between a product and the wait for it: tensor cores work during them."""
    count, busy = 0, False
    for name, _, n in (part.partition(" ") for part in order.split(", ")):
        busy = name == "product" or (busy and name != "wait")
        count += int(n) if busy and name == "exp2" else 0
    return count


def spills(code: str, local_table: bool = False) -> int:
    """Loads and stores of local memory, less those of a table: at its bytes of the stack, or by another register."""
    places = re.findall(r"\b(?:STL|LDL)\b[^\[\n]*\[(R\d+)(?:\+(0x[0-9a-f]+))?", code)
    return sum(not local_table or (at == "R1" and int(by or "0", 16) >= TABLE_BYTES) for at, by in places)


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
    gpu, local_table = GPUS[arch], bound.get("KIND") == 2
    code = inspect(binary.asm["cubin"], local_table)
    shared, warps = binary.metadata.shared, binary.metadata.num_warps
    parts = seconds(gpu, binary.metadata.name, bound, code["tensor_cores"])
    arithmetic = sum(parts.values()) - parts["memory"]
    return code | {
        "local_table": local_table,
        "precision": precision(bound),
        "shared_bytes": shared,
        "warps": warps,
        "programs": grid[0],
        "occupancy": round(occupancy(gpu, code["registers"], shared, warps), 3),
        "flops": flops(binary.metadata.name, bound),
        "bytes": moved(bound),
        "predicted_us": round(max(arithmetic, parts["memory"]) * 1e6, 2),
        "predicted_bound": "arithmetic" if arithmetic > parts["memory"] else "memory",
        "predicted_parts_us": {name: round(t * 1e6, 2) for name, t in parts.items()},
    }


def problems(rows: list[dict[str, Any]], kept: list[dict[str, Any]]) -> list[str]:
    """What must not be: forward kernels that spill, products off the right tensor cores, blocks that cannot start,
    and growth against the kept rows (of a backward kernel's spills too, which are known and kept)."""
    before = {key(r): r for r in kept}
    return [f"{r['workload']}/{r['kernel']} sm_{r['arch']}: {text}" for r in rows for text in _faults(r, before)]


def _faults(r: dict[str, Any], before: dict[tuple[str, str, int], dict[str, Any]]) -> Iterator[str]:
    gpu = GPUS[r["arch"]]
    if "backward" not in r["kernel"] and r["spill_instructions"]:
        yield f"{r['spill_instructions']} spill instructions in a forward kernel"
    if r["shared_bytes"] > gpu.block_shared or not r["occupancy"]:
        yield f"a block of {r['shared_bytes']} bytes of shared memory cannot start, the limit is {gpu.block_shared}"
    if r["precision"] not in (None, "float32"):
        few = any(re.search(pattern, f"{r['workload']}/{r['kernel']}") for pattern in FEWER_ROWS)
        if not r["tensor_cores"]:
            yield "no tensor-core instruction"
        elif gpu.native not in r["tensor_cores"] and not few:
            yield f"fell back from {gpu.native} to {' '.join(r['tensor_cores'])}"
    old = before.get(key(r))
    if old is None:
        yield f"not in {BASELINE.name}; write it with --output"
        return
    if r.get("exp2_meanwhile", 0) < old.get("exp2_meanwhile", 0) / GROWTH:
        yield f"exponentials during products fell from {old['exp2_meanwhile']} to {r['exp2_meanwhile']}"
    counts = ("registers", "stack_bytes", "shared_bytes", "spill_instructions", "instructions", "shared_loads")
    for what in counts:
        if (
            what in old
            and r[what] > GROWTH * old[what]
            and r[what] - old[what] >= (1 if what.startswith("spill") else 8)
        ):
            yield f"{what} grew from {old[what]} to {r[what]}"


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
        (r for r in merged.values() if r["workload"] in order and r["arch"] in GPUS),
        key=lambda r: (order.index(r["workload"]), r["kernel"], r["arch"]),
    )
    gpus = {arch: gpu.name for arch, gpu in GPUS.items()}
    head = json.dumps({"triton": triton.__version__, "gpus": gpus, "times": "predicted from datasheet rates"})
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
