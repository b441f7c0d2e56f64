"""How the attention kernels read, write and sum rows of tokens: any strides, camera vectors added, nothing outside.

Letters as in cross_view_attention.py, whose kernels call these.
"""

import triton
import triton.language as tl


@triton.jit
def token_offsets(scene, rows, views, tokens, strides, FLAT: tl.constexpr):
    """int64 offsets of the rows (token numbers within a scene) of a [B*V, N, H, D] tensor, head and width apart."""
    first = scene * views
    if FLAT:  # the batch stride is N token strides: the views of a scene follow each other
        return first * strides[0] + rows.to(tl.int64) * strides[1]
    return (first + rows // tokens) * strides[0] + (rows % tokens).to(tl.int64) * strides[1]


@triton.jit
def inside_mask(rows, cols, length, D: tl.constexpr, EVEN: tl.constexpr):
    """Which of [rows, cols] there are; EVEN says that no tile has a row past the end, and only the padding is left."""
    mask = (cols < D)[None, :]
    if not EVEN:
        mask = (rows < length)[:, None] & mask
    return mask


@triton.jit
def load_tile(
    x, camera, scene, head, rows, views, tokens, strides, camera_strides,
    D: tl.constexpr, BLOCK_D: tl.constexpr, FLAT: tl.constexpr, EVEN: tl.constexpr, ALIGN: tl.constexpr,
    CAMERA: tl.constexpr,
):  # fmt: skip
    """[rows, BLOCK_D] of one head, zero outside, with each row's camera vector added and rounded as torch would."""
    cols = tl.arange(0, BLOCK_D)
    starts = token_offsets(scene, rows, views, tokens, strides, FLAT) + head * strides[2]
    if ALIGN > 1:  # Triton knows no stride that does not divide by 16, and would load a head of 40 number by number
        starts = tl.multiple_of(starts, ALIGN)
    pointers = x + starts[:, None] + cols.to(tl.int64)[None, :] * strides[3]
    if EVEN and D == BLOCK_D:
        tile = tl.load(pointers)
    else:
        tile = tl.load(pointers, mask=inside_mask(rows, cols, views * tokens, D, EVEN), other=0.0)
    if CAMERA:
        image = scene * views + rows // tokens
        starts = image * camera_strides[0] + head * camera_strides[1]
        if ALIGN > 1:
            starts = tl.multiple_of(starts, ALIGN)
        vectors = camera + starts[:, None] + cols.to(tl.int64)[None, :] * camera_strides[2]
        if EVEN and D == BLOCK_D:
            vector = tl.load(vectors)
        else:
            vector = tl.load(vectors, mask=inside_mask(rows, cols, views * tokens, D, EVEN), other=0.0)
        tile = (tile.to(tl.float32) + vector.to(tl.float32)).to(tile.dtype)
    return tile


@triton.jit
def store_tile(
    x, tile, scene, head, rows, views, tokens, heads,
    D: tl.constexpr, BLOCK_D: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Writes [rows, BLOCK_D] of one head into a contiguous [B*V, N, H, D]."""
    cols = tl.arange(0, BLOCK_D)
    offsets = ((scene * views * tokens + rows) * heads + head) * D
    pointers = x + offsets[:, None] + cols[None, :]
    if EVEN and D == BLOCK_D:
        tl.store(pointers, tile.to(x.dtype.element_ty))
    else:
        tl.store(pointers, tile.to(x.dtype.element_ty), mask=inside_mask(rows, cols, views * tokens, D, EVEN))


@triton.jit
def sum_tokens(x, out, tokens, heads, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr):
    """[B*V, N, H, D] contiguous -> [B*V, H, D], one head of one image a program, in the order of the tokens."""
    image, head = (tl.program_id(0) // heads).to(tl.int64), tl.program_id(0) % heads
    cols = tl.arange(0, BLOCK_D)
    acc = tl.zeros([BLOCK_D], tl.float32)
    for start in range(0, tokens, BLOCK_N):
        rows = start + tl.arange(0, BLOCK_N)
        offsets = ((image * tokens + rows) * heads + head)[:, None] * D + cols[None, :]
        inside = (rows < tokens)[:, None] & (cols < D)[None, :]
        acc += tl.sum(tl.load(x + offsets, mask=inside, other=0.0).to(tl.float32), 0)
    tl.store(out + (image * heads + head) * D + cols, acc.to(out.dtype.element_ty), mask=cols < D)
