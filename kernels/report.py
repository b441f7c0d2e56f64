"""`python -m mvdream_fast.kernels.report`: what can be known about the Triton kernels without a GPU.

Every launcher is called on tensors without storage while its launches are recorded; each recorded launch is compiled
ahead of time for each architecture and read back from the machine code. Times are predicted from datasheets: `seconds`
says how.
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
    """Compare with the kept file and exit 1 on spills, lost tensor cores, blocks too large, or growth over 10 %."""
    output: Path | None = None
    """The JSON file to write to, where rows that are not compiled now stay; nothing is written when omitted."""


@dataclass(frozen=True)
class GPU:
    """A datasheet: dense rates in FLOP/s, bytes/s, and the limits of one multiprocessor that bound occupancy."""

    name: str
    tensor: float  # float16 products, float32 sums; those of tf32 run at half of it on each of these
    scalar: float  # float32
    exp2: float  # a second: 16 a clock and multiprocessor
    bandwidth: float
    warps: int
    blocks: int
    shared: int
    native: str = "HMMA"  # the tensor-core instruction that reaches `tensor`
    older: float = 1.0  # the part of it that HMMA reaches: 0.6 was measured on an H100, the rate is assumed of a B200
    registers: int = 65536

    @property
    def block_shared(self) -> int:
        """The most shared memory of one block: the driver keeps 1 KB of each."""
        return self.shared - 1024


# 120 stands for 86 and 89 too, which get its tiles: they have the same tensor-core instruction and shared memory.
GPUS = {
    80: GPU("A100 SXM 80 GB", 312e12, 19.5e12, 16 * 108 * 1.41e9, 2.039e12, 64, 32, 164 * 1024),
    90: GPU("H100 SXM", 989e12, 67e12, 16 * 132 * 1.83e9, 3.35e12, 64, 32, 228 * 1024, "HGMMA", 0.6),
    100: GPU("B200", 2250e12, 75e12, 16 * 148 * 1.85e9, 8.0e12, 64, 32, 228 * 1024, "UTCHMMA", 0.6 * 989 / 2250),
    120: GPU("RTX 5090", 209.5e12, 104.8e12, 16 * 170 * 2.41e9, 1.792e12, 48, 24, 100 * 1024),
}
TENSOR_CORE = r"\b(?:U?TC[HQO]?MMA|UTC[A-Z]*MMA|[HQ]GMMA|[HQ]MMA)\b"
# The newer instructions take tiles of 64 rows; these have fewer, and run on HMMA.
FEWER_ROWS = (
    r"attention d160.*/attention_backward",  # two accumulators of 256 columns leave registers for 32 rows
    r"attention d\d+ tf32/attention_backward",  # as does float32
    r"attention d(128|256) tf32/attention_forward",
    r"attention d150 .*/attention_forward",  # loads number by number: an address each
    r"embedding.*/dense( \d)?$",  # a batch of images is 16 rows
)
TABLE_BYTES = 28  # sin and cos of large arguments keep a table in local memory, from the first byte of the stack


@dataclass(frozen=True)
class Workload:
    """A call of launchers on tensors of the device "meta", for one compute capability."""

    name: str
    quick: bool
    call: Callable[[int], None]


def _empty(*shape: int, dtype: str = "float16"):
    import torch

    return torch.empty(shape, dtype=getattr(torch, dtype), device="meta")


def attention(
    shape: tuple[int, ...], *, dtype: str = "float16", camera: bool, tf32: bool = False, flat: bool = True,
    backward: bool = True,
):  # fmt: skip
    """Forward and backward on slices of a packed projection; the tiles are those of the compute capability."""

    def call(capability: int) -> None:
        from mvdream_fast.kernels import cross_view_attention as kernels

        images, views, tokens, heads, width = shape
        packed = _empty(images if flat else 2 * images, tokens, 3, heads, width, dtype=dtype)
        q, k, v = (packed if flat else packed[::2]).unbind(2)
        cameras = [_empty(images, heads, width, dtype=dtype) if camera else None] * 3
        block_d, itemsize = kernels.block_width(width), q.element_size()
        d_out = _empty(images, tokens, heads, width, dtype=dtype)
        layout = kernels._align(q, k, v, *cameras) > 1, kernels._flat(views, q, k, v) and width == block_d
        tile = kernels.forward_tile(block_d, itemsize, capability, *layout)
        out, lse = kernels.forward(q, k, v, views, *cameras, 0.125, tf32, tile)
        tile = kernels.backward_tile(block_d, itemsize, capability)
        if backward:
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
    """MVDream's shapes at 256^2 with guidance (16 images, 4 views), and every configuration of the launchers.

    Heads of 64 are those of Stable Diffusion 2.1, heads of 40, 80 and 160 those of 1.5, padded to 64, 128 and 256.
    """
    main = (16, 4, 1024, 5, 64)
    yield Workload("attention d64", False, attention(main, camera=False))
    yield Workload("attention d64 bf16", False, attention(main, dtype="bfloat16", camera=False, backward=False))
    for width in (64, 40, 80, 160):
        for odd, flat in ((False, True), (True, True), (False, False), (True, False)):
            name = f"attention d{width} camera" + " odd" * odd + " strided" * (not flat)
            shape = (16, 4, 1001 if odd else 1024, 5, width)
            backward = (odd, flat) == (False, True) or (odd, flat, width) == (True, False, 40)
            call = attention(shape, camera=True, flat=flat, backward=backward)
            yield Workload(name, name == "attention d64 camera", call)
    yield Workload("attention d40 one view", False, attention((2, 1, 4096, 8, 40), camera=False, backward=False))
    for width in (36, 100, 150):  # rows that do not start at 16 bytes, padded to 64, 128, 256
        call = attention((16, 4, 1001, 5, width), camera=True, flat=False, backward=False)
        yield Workload(f"attention d{width} camera odd strided", False, call)
    yield Workload("attention d16", False, attention((16, 4, 1024, 5, 16), camera=True))
    for width in (64, 128, 256):
        shape = (16, 4, 1024, 5, width)
        yield Workload(f"attention d{width} float32", False, attention(shape, dtype="float32", camera=True))
        call = attention(shape, dtype="float32", camera=True, tf32=True, backward=width == 64)
        yield Workload(f"attention d{width} tf32", False, call)
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
        yield Workload(f"group_norm {name}", False, group_norm(shape, "float16", True, 1))
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
    return {
        "registers": registers,
        "stack_bytes": stack,
        "spill_instructions": spills(code, local_table),
        "tensor_cores": found,
    }


def spills(code: str, local_table: bool = False) -> int:
    """Loads and stores of local memory, less those of a table: at its bytes of the stack, or by another register."""
    places = re.findall(r"\b(?:STL|LDL)\b[^\[\n]*\[(R\d+)(?:\+(0x[0-9a-f]+))?", code)
    return sum(not local_table or (at == "R1" and int(by or "0", 16) >= TABLE_BYTES) for at, by in places)


def precision(x: dict[str, Any]) -> str | None:
    """In what a launch multiplies matrices, None where it does not; float32 is without tensor cores."""
    if "PRECISION" not in x:
        return None
    dtype = str(x["weight" if "weight" in x else "d_y" if "d_y" in x else "q"].dtype).removeprefix("torch.")
    return "tf32" if dtype == "float32" and x["PRECISION"] == "tf32" else dtype


def flops(kernel: str, x: dict[str, Any]) -> float:
    """Multiplications and additions of one launch (two a multiply-add)."""
    if kernel.startswith("attention_"):
        length = x["views"] * x["tokens"]
        products = {"attention_forward": 4, "attention_backward_kv": 8, "attention_backward_q": 6}
        return scores(x) * x["D"] * products.get(kernel, 2 / length)
    if kernel == "dense":
        return 2 * x["rows"] * x["n_out"] * (x["n_in"] + x["n_in2"] * x["SECOND"])
    if kernel == "dense_backward_weight":
        return 2 * x["rows"] * x["n_out"] * x["n_in"]
    return 20 * max(t.numel() for t in x.values() if hasattr(t, "numel"))  # work on each element, about


def scores(x: dict[str, Any]) -> int:
    """Pairs of a query and a key, over heads and scenes."""
    tensor = x["out" if "out" in x else "q"]
    return tensor.shape[0] // x["views"] * x["heads"] * (x["views"] * x["tokens"]) ** 2


def between_products(kernel: str, x: dict[str, Any]) -> tuple[float, float]:
    """exp2 and float32 instructions of an attention kernel outside its products.

    Forward: maximum, scaling, sum and rounding of each score, and the accumulator's rescaling once a block of keys.
    Backward: scaling, log-sum, difference, product and two roundings. A camera vector takes three instructions (two
    conversions, an addition) for each number of each tile loaded.
    """
    n = scores(x)
    if kernel == "attention_backward_kv":
        per_score = 6 + 3 * x["CAMERA_Q"] * x["BLOCK_D"] / x["BLOCK_N"]
    else:
        per_score = 3 * (x["CAMERA_K"] + x["CAMERA_V"]) * x["BLOCK_D"] / x["BLOCK_M"]
        per_score += 6 if kernel == "attention_backward_q" else 4 + x["BLOCK_D"] / x["BLOCK_N"]
        per_score += not x["EVEN"]  # keys past the end
    return n, n * per_score


def seconds(gpu: GPU, kernel: str, x: dict[str, Any], tensor_cores: list[str]) -> dict[str, float]:
    """What each part of a launch takes at the datasheet's rates, were it alone.

    Products run on padded heads. A block of an attention kernel waits for its scores before their exponentials, and
    for those before the next product; what other blocks hide of that is not counted on, so the parts are added.
    """
    kind, work = precision(x), flops(kernel, x)
    parts = {"products": 0.0, "exp2": 0.0, "float32": 0.0, "memory": moved(x) / gpu.bandwidth}
    if kind is None:
        return parts | {"float32": work / gpu.scalar}
    rate = {"float32": gpu.scalar, "tf32": gpu.tensor / 2}.get(kind, gpu.tensor)
    if kind != "float32" and gpu.native not in tensor_cores:
        rate *= gpu.older
    if not kernel.startswith("attention_"):
        return parts | {"products": work / rate}
    exponentials, others = between_products(kernel, x)
    parts |= {"exp2": exponentials / gpu.exp2, "float32": others / (gpu.scalar / 2)}
    return parts | {"products": work * x["BLOCK_D"] / x["D"] / rate}


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
    for what in ("registers", "stack_bytes", "shared_bytes", "spill_instructions"):
        if r[what] > GROWTH * old[what] and r[what] - old[what] >= (1 if what.startswith("spill") else 8):
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


if __name__ == "__main__":
    from mvdream_fast import cli

    cli.run(main, Report, prog="kernels.report")
