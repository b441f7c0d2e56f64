"""How much memory a text-to-3D run takes, estimated before anything is allocated, and how much there is.

The estimate is a few multiplications with measured factors, meant to be within a third above the truth; it refuses
runs that the operating system would only kill. What is done where memory runs out all the same is loop.py's.
"""

import resource
from pathlib import Path

from mvdream_fast.core.errors import OutOfMemoryError
from mvdream_fast.core.machine import memory_limit, resident_memory
from mvdream_fast.distill.recipes import SDSConfig
from mvdream_fast.models.config import ModelConfig

PROGRAM = 650 << 20  # Python, torch, diffusers and transformers once imported
ADDRESS_SPACE = 1000 << 20  # of the imported libraries
RESERVED = 512 << 20  # address space for stacks and heaps of threads, hardly any of which is ever touched
UNET_FACTOR = 48  # live activations of a call without graph, in feature maps of the first level
VAE_FACTOR = 26  # feature maps of the first level that the encoder's backward pass keeps

Parts = dict[str, int]
FLAGS = {
    "the program": "a machine with more memory",
    "the model's weights": "--dtype float16 on a GPU, or --model embedded",
    "the UNet": "--n-views 4",
    "the VAE's encoder": "--n-views 4",
    "the renderer's samples": "--render-size 64",
    "the volume and its optimiser": "--preset mini",
}


def estimate(model: ModelConfig | None, config: SDSConfig, weights: int = 0) -> Parts:
    """Bytes by part at the largest stage of a run; `weights` is the size of the model's files, in the dtype used."""
    parts = {"the program": PROGRAM, "the model's weights": weights, **config.representation.memory(config.n_rays())}
    if model is not None and config.method == "sds":
        images = max(config.n_groups) * config.cameras.n_views
        level = 4 * images * model.latent_size**2 * model.unet.model_channels * model.unet.channel_mult[0]
        parts["the UNet"] = 2 * level * UNET_FACTOR
        side = model.vae.image_size // model.vae.patch_size
        parts["the VAE's encoder"] = 4 * images * side**2 * model.vae.block_out_channels[0] * VAE_FACTOR
    return parts


def files_bytes(path: Path) -> int:
    """Bytes of a model's weight files: of a file itself, or of all .safetensors files in a folder, or else .bin."""
    if path.is_file():
        return path.stat().st_size
    sizes = (sum(file.stat().st_size for file in path.rglob(pattern)) for pattern in ("*.safetensors", "*.bin"))
    return next((size for size in sizes if size), 0)


def available(device: str = "cpu") -> tuple[int | None, str]:
    """Bytes that this process may still take in addition to what it has, and what sets that limit."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.mem_get_info(device)[0], "free on the GPU"
    limits = [(_free(), "free on this machine"), (_cgroup(), "left of the control group's limit"),
              (_address_space(), "left of the address space's limit, ulimit -v")]  # fmt: skip
    known = [(max(size, 0), name) for size, name in limits if size is not None]
    return min(known, default=(None, ""))


def _free() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))
    except (OSError, ValueError, StopIteration):
        return None


def _cgroup() -> int | None:
    limit = memory_limit()
    return None if limit is None else limit - resident_memory()


def _address_space() -> int | None:
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    if soft == resource.RLIM_INFINITY:
        return None
    try:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    except (OSError, ValueError, IndexError):
        return None
    return soft - used - RESERVED


def check_start() -> None:
    """Before torch is imported: refuses an address space in which its libraries could not even be mapped."""
    left = _address_space()
    if left is not None and left < ADDRESS_SPACE:
        raise OutOfMemoryError(
            f"starting needs about {_gb(ADDRESS_SPACE)} of address space, and {_gb(left)} is left of this process' "
            "limit; raise it with ulimit -v"
        )


def check(parts: Parts, config: SDSConfig, device: str = "cpu") -> None:
    """Raises OutOfMemoryError where the parts do not fit into what is available beside what is already in use."""
    have, limit = available(device)
    # What has been loaded is in use already, and so is no longer part of what is available.
    loaded = ("the program", "the model's weights") if device.startswith("cuda") else ("the program",)
    need = sum(size for name, size in parts.items() if name not in loaded)
    need += max(parts["the program"] - resident_memory(), 0) if not device.startswith("cuda") else 0
    if have is not None and need > have:
        raise OutOfMemoryError(
            f"this run needs about {_gb(need)} more than is in use, and {_gb(have)} is {limit}; {advice(parts, config)}"
        )


def advice(parts: Parts, config: SDSConfig) -> str:
    """The two largest parts and what makes the larger one smaller."""
    ours = [name for name in parts if name != "the program"]
    first, second = sorted(ours, key=lambda name: parts[name], reverse=True)[:2]
    flag = FLAGS[first]
    if first == "the renderer's samples":
        flag = f"--render-size {max(8, max(config.render_size) // 2)}"
    return f"most goes to {first} ({_gb(parts[first])}) and {second} ({_gb(parts[second])}); try {flag}"


def _gb(size: int) -> str:
    return f"{size / 2**30:.2f} GB"
