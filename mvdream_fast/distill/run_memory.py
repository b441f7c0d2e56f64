"""How much memory a text-to-3D run takes, estimated before anything is allocated.

The estimate is a few multiplications with measured factors, meant to be within a third above the truth; it refuses
runs that the operating system would only kill. What is done where memory runs out all the same is loop.py's.
"""

from typing import TYPE_CHECKING

from mvdream_fast.core import memory
from mvdream_fast.core.machine import resident_memory
from mvdream_fast.distill.config import SDSConfig
from mvdream_fast.models.config import ModelConfig, UNetConfig

if TYPE_CHECKING:
    import torch

WEIGHTS = "the model's weights"
VOLUME = "the volume and its optimiser"
TETS = "the tetrahedra and their optimiser"
TEXTURE = "the texture and its optimiser"
OF_EACH_PARTICLE = {VOLUME, TETS, TEXTURE}
LEARNER = "the adapters and their step"
REPAINTED = "the repainted views"
UNET_FACTOR = 48  # live activations of a call without graph, in feature maps of the first level
LEARNER_FACTOR = 250  # feature maps of the first level that a call with graph keeps, of Stable Diffusion's UNet
UNET_KERNELS = 460
KERNELS = 1000  # of a guidance as one graph: 459 of the UNet, the VAE's encoder there and back, the loss
VAE_FACTOR = 26  # feature maps of the first level that the encoder's backward pass keeps

Parts = dict[str, int]
FLAGS = {
    WEIGHTS: "--dtype float16 on a GPU, or --model embedded",
    "the UNet": "--n-views 4",
    "the VAE's encoder": "--n-views 4",
    "the renderer's samples": "--render-size 64",
    "the renderer's images": "--render-size 64",
    VOLUME: "--preset mini",
    TETS: "a lower tets_resolution",
    TEXTURE: "a smaller texture_size",
    LEARNER: "--guidance sds",
    REPAINTED: "fewer repaint_groups in --config",
    memory.GRAPHS: "--no-graphs",
}


def estimate(
    model: ModelConfig | None, config: SDSConfig, weights: int = 0, *, gpu_memory: int | None = None,
    encoder_bytes: int = 4, graphs: bool = False,
) -> Parts:  # fmt: skip
    """Bytes by part at the largest stage of a run.

    Args: weights: bytes of the model's parts together. gpu_memory: of the GPU that it runs on, None for a CPU.
        encoder_bytes: of a number in the VAE's encoder, 2 where it works in bfloat16, as only beside a UNet of 16 bits.
        graphs: whether there will be CUDA graphs, one for each size of the rendered views and
        those of VSD and of repainting.
    """
    renderer = config.representation.memory(config.n_rays(), gpu_memory, lit=config.shading)
    for name in OF_EACH_PARTICLE & renderer.keys():
        renderer[name] *= config.guidance.particles
    parts = {memory.PROGRAM: memory.PROGRAM_BYTES, WEIGHTS: weights, **renderer}
    images = _distilled(config) // _prompts(config)
    if model is not None:
        parts["the UNet"] = unet_bytes(model, max(_distilled(config), _sampled(config)))
    if model is not None and images:
        side = model.vae.image_size // model.vae.patch_size
        maps = images * side**2 * (model.vae.block_out_channels or (0,))[0] * VAE_FACTOR
        parts["the VAE's encoder"] = encoder_bytes * maps
        kernels = len({*config.render_size}) * KERNELS
        if config.guidance.kind == "vsd":
            learned = adapter_weights(model.unet, config.guidance.lora_rank)
            if config.mode == "2d" or model.unet.camera_in == "none":
                learned += pose_weights(model.unet)
            parts[LEARNER] = 16 * learned + encoder_bytes * images * _level(model) // 4 * LEARNER_FACTOR
            # one more call in the graphs of the guidance, and one there and back of its own for a number of groups
            kernels += (len({*config.render_size}) + 3 * len({*config.n_groups})) * UNET_KERNELS
        if config.repaint.repaints:  # in float32; the decoder, without a graph, takes less than the encoder's part
            n_views = config.repaint.repaint_groups * config.cameras.n_views
            parts[REPAINTED] = 4 * n_views * 3 * model.vae.image_size**2
            kernels += UNET_KERNELS
        if graphs:
            parts[memory.GRAPHS] = kernels * memory.KERNEL_BYTES
    return parts


def unet_bytes(model: ModelConfig, n_images: int) -> int:
    """What a call without graph takes of so many images, each of them counted once for every prompt."""
    return n_images * _level(model) * UNET_FACTOR


def _level(model: ModelConfig) -> int:
    """Bytes of a feature map of the UNet's first level, of one image in float32."""
    return 4 * model.latent_size**2 * model.unet.model_channels * model.unet.channel_mult[0]


def _prompts(config: SDSConfig) -> int:
    """Of each image, in one batch of distillation."""
    return 4 if config.guidance.perp_neg else 2


def _distilled(config: SDSConfig) -> int:
    """Images that the model is asked about at once in a step, each with all prompts."""
    return max(config.n_groups) * config.cameras.n_views * _prompts(config) if config.method == "sds" else 0


def _sampled(config: SDSConfig) -> int:
    """The same where a stage begins with sampled views, with those between them in one call."""
    return 2 * config.n_fitted * (2 if config.sampled.sampled_between else 1)


def adapter_weights(unet: UNetConfig, rank: int) -> int:
    """Numbers in the adapters around the eight projections of each transformer, two of which read the text."""
    levels = [m * unet.model_channels for i, m in enumerate(unet.channel_mult) if 2**i in unet.attention_resolutions]
    widths = [width for width in levels for _ in range(2 * unet.num_res_blocks + 1)]
    widths.append(unet.channel_mult[-1] * unet.model_channels)
    return rank * sum(14 * width + 2 * unet.context_dim for width in widths)


def pose_weights(unet: UNetConfig) -> int:
    """Numbers in the embedding of a camera that a model in 2D mode has none of."""
    width = unet.time_embed_dim
    return (unet.camera_dim + 1) * width + (width + 1) * width


def memory_of(device: "torch.device") -> int | None:
    """Bytes of memory of a GPU; None for a CPU."""
    return memory.total(str(device)) if device.type == "cuda" else None


def check(parts: Parts, config: SDSConfig, device: str = "cpu") -> None:
    """Raises OutOfMemoryError where the parts do not fit into what is available beside what is already in use."""
    # What has been loaded is in use already, and so is no longer part of what is available.
    on_gpu = device.startswith("cuda")
    loaded = (memory.PROGRAM, WEIGHTS) if on_gpu else (memory.PROGRAM,)
    need = sum(size for name, size in parts.items() if name not in loaded)
    need += 0 if on_gpu else max(parts[memory.PROGRAM] - resident_memory(), 0)
    memory.check("this run", need, device, advice(parts, config))


def advice(parts: Parts, config: SDSConfig) -> str:
    """The two largest parts and what makes the larger one smaller."""
    first = memory.largest(parts)[0]
    flag = FLAGS[first]
    if first in ("the renderer's samples", "the renderer's images"):
        flag = f"--render-size {max(8, max(config.render_size) // 2)}"
    elif first == "the UNet" and config.sampled.beside and _sampled(config) > _distilled(config):
        flag = "fewer sampled_views in --config"
    return memory.advice(parts, f"try {flag}")
