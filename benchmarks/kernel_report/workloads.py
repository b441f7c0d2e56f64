"""Which launches the report compiles: MVDream's shapes, every configuration of the launchers, and extreme sizes.

What is made of them is report.py's.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

DEVICE = "meta"  # of all tensors: none has storage


@dataclass(frozen=True)
class Workload:
    """A call of launchers, for one compute capability."""

    name: str
    quick: bool
    call: Callable[[int], None]


def _empty(*shape: int, dtype: str = "float16", channels_last: bool = False):
    import torch

    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=getattr(torch, dtype), device=DEVICE, memory_format=memory_format)


def attention(
    shape: tuple[int, ...], *, dtype: str = "float16", camera: bool, tf32: bool = False, flat: bool = True,
    backward: bool = True,
):  # fmt: skip
    """On slices of a packed projection: forward and backward, or the forward of inference, which keeps nothing.

    The tiles are those of the compute capability.
    """

    def call(capability: int) -> None:
        from mvdream_fast.kernels import cross_view_attention as kernels

        images, views, tokens, heads, width = shape
        packed = _empty(images if flat else 2 * images, tokens, 3, heads, width, dtype=dtype)
        q, k, v = (packed if flat else packed[::2]).unbind(2)
        cameras = [_empty(images, heads, width, dtype=dtype) if camera else None] * 3
        block_d, itemsize = kernels.block_width(width), q.element_size()
        strides, whole = (q.stride(), k.stride(), v.stride()), flat and width == block_d
        aligned = kernels._align(itemsize, *strides, *kernels._camera_strides(*cameras)) > 1
        tile = kernels.forward_tile(block_d, itemsize, capability, aligned, whole, camera)
        out, lse = kernels.forward(q, k, v, views, *cameras, 0.125, tf32, tile, backward)
        if backward:
            d_out = _empty(images, tokens, heads, width, dtype=dtype)
            tile = kernels.backward_tile(block_d, itemsize, capability)
            kernels.backward(d_out, q, k, v, out, lse, views, *cameras, 0.125, tf32, tile)

    return call


def group_norm(shape: tuple[int, ...], dtype: str, channels_last: bool, n_groups: int = 32):
    def call(_: int) -> None:
        from mvdream_fast.kernels import group_norm_silu as kernels

        x = _empty(*shape, dtype=dtype, channels_last=channels_last)
        weight, emb = _empty(shape[1], dtype="float32"), _empty(*shape[:2], dtype=dtype)
        y, mean, rstd = kernels.forward(x, weight, weight, n_groups, 1e-5, emb, True)
        kernels.backward(y, x, weight, weight, n_groups, emb, True, mean, rstd)
        kernels.forward(x, weight, weight, n_groups, 1e-5, emb, True, False)

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
    for odd, flat in ((True, True), (False, False), (True, False)):
        shape = (16, 4, 1001 if odd else 1024, 5, 64)
        name = "attention d64" + " odd" * odd + " strided" * (not flat)
        yield Workload(name, False, attention(shape, camera=False, flat=flat, backward=False))
    yield Workload("attention d128", False, attention((16, 4, 1024, 5, 128), camera=False, backward=False))
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
