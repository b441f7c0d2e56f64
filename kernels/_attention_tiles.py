"""Which tiles the attention kernels take: one table for the forward kernel, one for both backward kernels.

On an H100 was run what is now "cameras, whole" of 64, without cameras (414 TFLOP/s at 16,384 tokens). All other tiles,
and what looking ahead gains, are predictions from the compiler's registers, shared memory and order of instructions:
`python benchmarks/kernel_report` compiles every one. No forward kernel spills; of the backward ones some do: d_q of
float32 heads above 64 everywhere, the others are in docs/gpu_predicted.md.
"""

from typing import NamedTuple

import triton


class Tile(NamedTuple):
    """BLOCK_M queries, BLOCK_N keys; AHEAD: whether a product is asked for before exponentials that do not need it."""

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int
    AHEAD: bool = False


# One column for cards of 8.0 (and all that is not named), of 9.x, of 10.x, and those with 99 KB of shared memory a
# block (8.6, 8.9, 12.x). Rows: what is loaded, and the padded head width up to which a row holds.
# - "plain": rows start at multiples of 16 bytes, and no camera vector is added. Tensor cores of 9.x read such keys
#   from shared memory as they were copied, so that they work while exponentials do.
# - "cameras, whole": camera vectors, heads that are not padded, and tokens flat as in `token_offsets`. Keys pass
#   through registers, and looking ahead would gain nothing: every product is waited for.
# - "cameras": the same without the rest; masks and addresses take registers.
# - "numbers": each is loaded by an address of its own.
# - "float32": exact products keep rows in registers; where 32 keys leave just over 128, ptxas takes 128 and spills.
SMALL_HEADS, WIDE_HEADS, WIDEST_HEADS = 64, 128, 256
FORWARD = {
    ("plain", SMALL_HEADS): (Tile(128, 32, 4, 3), Tile(128, 64, 8, 3, True), Tile(128, 128, 8, 3), Tile(128, 32, 4, 3)),
    ("cameras, whole", SMALL_HEADS): (
        Tile(128, 32, 4, 3), Tile(128, 64, 4, 3), Tile(128, 128, 8, 3), Tile(128, 32, 4, 3)
    ),
    ("cameras", SMALL_HEADS): (Tile(128, 32, 4, 3), Tile(64, 64, 4, 3), Tile(128, 128, 8, 3), Tile(128, 32, 4, 3)),
    ("numbers", SMALL_HEADS): (Tile(64, 32, 4, 2),) * 4,
    ("float32", SMALL_HEADS): (Tile(64, 32, 8, 1), Tile(64, 32, 8, 1), Tile(64, 16, 8, 1), Tile(64, 32, 8, 1)),
    ("plain", WIDE_HEADS): (Tile(128, 64, 8, 2), Tile(128, 64, 8, 2, True), Tile(128, 64, 8, 2), Tile(128, 64, 8, 2)),
    ("cameras, whole", WIDE_HEADS): (Tile(128, 64, 8, 2),) * 4,
    ("cameras", WIDE_HEADS): (Tile(128, 64, 8, 2),) * 4,
    ("numbers", WIDE_HEADS): (Tile(64, 32, 8, 2),) * 4,
    ("float32", WIDE_HEADS): (Tile(32, 16, 8, 1), *(Tile(32, 32, 8, 1),) * 3),
    ("plain", WIDEST_HEADS): (*(Tile(64, 32, 8, 2),) * 3, Tile(64, 16, 8, 2)),
    ("cameras, whole", WIDEST_HEADS): (*(Tile(64, 32, 8, 2),) * 3, Tile(64, 16, 8, 2)),
    ("cameras", WIDEST_HEADS): (*(Tile(64, 32, 8, 2),) * 3, Tile(64, 16, 8, 2)),
    ("numbers", WIDEST_HEADS): (Tile(32, 16, 8, 1),) * 4,
    ("float32", WIDEST_HEADS): (Tile(32, 16, 8, 1),) * 4,
}  # fmt: skip
# Two accumulators are held, so the tiles are smaller. Exact float32 products ahead would spill.
BACKWARD = {
    ("half", SMALL_HEADS): (Tile(64, 32, 4, 2), Tile(64, 64, 4, 2, True), Tile(64, 64, 4, 2), Tile(64, 32, 4, 2)),
    ("half", WIDE_HEADS): (Tile(64, 64, 8, 2), Tile(64, 64, 8, 2, True), Tile(64, 64, 8, 2), Tile(64, 32, 8, 2)),
    ("half", WIDEST_HEADS): (Tile(32, 32, 8, 1),) * 4,
    ("float32", SMALL_HEADS): (Tile(32, 32, 8, 1),) * 4,
    ("float32", WIDE_HEADS): (Tile(16, 32, 8, 1),) * 4,
    ("float32", WIDEST_HEADS): (Tile(16, 16, 8, 1),) * 4,
}


def block_width(width: int) -> int:
    """The head width padded to what a tensor core takes."""
    return max(16, triton.next_power_of_2(width))


def forward_tile(block_d: int, itemsize: int, capability: int, aligned: bool, whole: bool, cameras: bool) -> Tile:
    """The forward kernel's for a compute capability (86 is 8.6); the last three as FORWARD's rows say."""
    loaded = "cameras, whole" if cameras and whole else "cameras" if cameras else "plain"
    loaded = "float32" if itemsize == 4 else loaded if aligned else "numbers"
    return FORWARD[loaded, max(SMALL_HEADS, block_d)][_column(capability)]


def backward_tile(block_d: int, itemsize: int, capability: int) -> Tile:
    """That of both backward kernels."""
    return BACKWARD["float32" if itemsize == 4 else "half", max(SMALL_HEADS, block_d)][_column(capability)]


def _column(capability: int) -> int:
    if capability in (86, 89) or capability >= 120:
        return 3
    return {9: 1, 10: 2}.get(capability // 10, 0)
