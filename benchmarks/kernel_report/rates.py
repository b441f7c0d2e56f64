"""Arithmetic, bytes and occupancy of a launch, and the time that datasheets predict for it: `seconds` says how."""

from dataclasses import dataclass
from typing import Any


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
