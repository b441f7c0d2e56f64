"""What a training step will need, told before anything is allocated: the model is run on the meta device, where tensors
have shapes and no memory. Nothing is trained here.
"""

import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mvdream_fast.checkpoints.manifest import build
from mvdream_fast.core import memory
from mvdream_fast.core.errors import OutputError
from mvdream_fast.models.blocks import MultiViewTransformer, ResBlock
from mvdream_fast.models.config import ModelConfig, TextConfig
from mvdream_fast.models.lora import add_adapters

FLOAT = 4  # bytes of a float32
TEXT_ACTIVATIONS = 34  # numbers that a transformer layer keeps for each token and channel, about
KERNELS = 2500  # of a step's forward and backward in a graph, about, at full size
PROBE = 1024  # side of the matrix product that tells a machine's speed


@dataclass(frozen=True)
class Estimate:
    """Of one step: floating-point operations, and bytes by what they are for. `trained` counts trained weights."""

    flops: float
    memory: dict[str, int]
    trained: int

    @property
    def total(self) -> int:
        """Bytes of all parts."""
        return sum(self.memory.values())


def estimate_step(
    config: ModelConfig,
    batch: int,
    resolution: int,
    *,
    n_views: int = 1,
    accumulate: int = 1,
    half: bool = False,
    checkpointing: bool = False,
    lora_rank: int = 0,
    train_text: bool = False,
    preserve: bool = True,
    graphs: bool = False,
) -> Estimate:
    """A training step of `batch` encoded images with AdamW, weights in float32; activations in bfloat16 where `half`.

    `n_views`: how many images are one scene's; 1 is the 2D mode. `graphs`: as a CUDA graph.

    Raises: ModelError for a configuration that cannot be built.
    """
    with torch.device("meta"):
        unet, vae = build("unet", config), build("vae", config)
    if lora_rank:
        with torch.device("meta"):
            add_adapters(unet, lora_rank)
    n_weights, text = sum(p.numel() for p in unet.parameters()), text_weights(config.text)
    trained = sum(p.numel() for p in unet.parameters() if p.requires_grad) + train_text * text
    latents = (batch, config.unet.in_channels, *(resolution // config.vae.downsampling,) * 2)
    unet = unet.to(torch.bfloat16 if half else torch.float32)
    flops, activations = _run(unet, latents, config, checkpointing, n_views)
    tokens = batch // n_views * config.text.context_length
    if train_text:
        activations += tokens * config.text.width * config.text.n_layers * TEXT_ACTIVATIONS * FLOAT
    flops += (6 if train_text else 2) * text * tokens
    frozen = text + sum(p.numel() for p in vae.parameters())
    copies = 1 if preserve and not lora_rank else 0
    parts = {
        memory.PROGRAM: memory.PROGRAM_BYTES,
        "UNet weights": FLOAT * n_weights,
        "text tower and autoencoder": FLOAT * frozen,
        "gradients": FLOAT * trained,
        "Adam's moments": 2 * FLOAT * trained,
        "weights to stay close to": FLOAT * copies * n_weights,
        "activations": activations,
    }
    if half:
        parts["weights in half precision"] = 2 * n_weights  # autocast keeps its casts for the length of a step
    if graphs:
        parts[memory.GRAPHS] = KERNELS * memory.KERNEL_BYTES
    return Estimate(accumulate * flops, parts, trained)


def text_weights(text: TextConfig) -> int:
    """Weights of a text tower: embeddings, layers, final norm."""
    layer = 4 * text.width**2 + 2 * text.width * text.mlp_width + text.mlp_width + 9 * text.width
    return (text.vocabulary_size + text.context_length + 2) * text.width + (text.n_layers - text.skip_last) * layer


def _run(
    unet: nn.Module, latents: tuple[int, ...], config: ModelConfig, checkpointing: bool, n_views: int
) -> tuple[float, int]:
    """Operations of forward and backward, and bytes of what autograd keeps in between."""
    dtype = next(unet.get_submodule("out.2").parameters()).dtype
    kept = _Kept(unet)
    with torch.device("meta"):
        x = torch.empty(latents, dtype=dtype)
        context = torch.empty(latents[0] // n_views, config.text.context_length, config.unet.context_dim, dtype=dtype)
        t = torch.zeros(latents[0], dtype=torch.int64)
        camera = torch.empty(latents[0], config.unet.camera_dim, dtype=dtype) if n_views > 1 else None
        counter = FlopCounterMode(display=False, custom_mapping=_attention_flops())
        with counter, torch.autograd.graph.saved_tensors_hooks(kept.note, lambda tensor: tensor):
            loss = unet(x, t, context, camera, n_views).sum()
            again = counter.get_total_flops() if checkpointing else 0
            loss.backward()
    return float(counter.get_total_flops() + again), kept.total(checkpointing)


class _Kept:
    """Counts the tensors that autograd saves, those inside of the blocks that checkpointing recomputes apart."""

    def __init__(self, unet: nn.Module):
        self.seen = {p.untyped_storage()._cdata for p in unet.parameters()}
        self.alive: list[Tensor] = []  # so that no storage takes the address of one that is gone
        self.outside, self.inside, self.inputs = 0, [], 0
        self.in_block = False
        for block in (m for m in unet.modules() if isinstance(m, (ResBlock, MultiViewTransformer))):
            block.register_forward_pre_hook(self._enter)
            block.register_forward_hook(self._leave)

    def note(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.seen:
            self.seen.add(storage._cdata)
            self.alive.append(tensor)
            if self.in_block:
                self.inside[-1] += storage.nbytes()
            else:
                self.outside += storage.nbytes()
        return tensor

    def _enter(self, _: nn.Module, inputs: tuple) -> None:
        self.in_block = True
        self.inside.append(0)
        self.inputs += inputs[0].nbytes

    def _leave(self, *_: object) -> None:
        self.in_block = False

    def total(self, checkpointing: bool) -> int:
        """With checkpointing, the blocks' inputs stay and one block at a time is alive in full."""
        inside = self.inputs + max(self.inside) if checkpointing else sum(self.inside)
        return self.outside + inside


def _attention_flops() -> dict:
    """Operations of the op that torch's counter does not know: two GEMMs forward, five backward."""

    def forward(q: tuple, k: tuple, v: tuple, views: int, *_: object, **__: object) -> int:
        images, tokens, heads, width = q
        return 4 * images * heads * tokens * views * tokens * width

    def backward(d_out: list, kept: list, wanted: list, q: tuple, k: tuple, v: tuple, views: int, *_: object, **__):
        return forward(q, k, v, views) * 5 // 2

    ops = torch.ops.mvdream_fast
    return {ops.cross_view_attention: forward, ops.cross_view_attention_backward: backward}


def measured_rate(device: torch.device, half: bool = False) -> float:
    """Floating-point operations a second of a large matrix product on this device, the best of a few."""
    x = torch.ones(PROBE, PROBE, device=device, dtype=torch.bfloat16 if half else torch.float32)
    best = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        (x @ x)[0, 0].item()
        best = min(best, time.perf_counter() - start)
    return 2 * PROBE**3 / best


def check_memory(estimate: Estimate, device: str, advice: str) -> None:
    """Raises OutOfMemoryError where a step will not fit: needed, what there is, the two largest parts, what to do."""
    need = estimate.total - memory.PROGRAM_BYTES  # that much is taken already
    memory.check("a step", need, device, memory.advice(estimate.memory, advice))


def check_disk(folder: Path, n_bytes: int, what: str) -> None:
    """Raises OutputError where the file system of `folder` (which may not exist yet) has no room for n_bytes."""
    place = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(place).free
    if free < n_bytes:
        raise OutputError(
            f"{what} will take about {n_bytes / 2**30:.2f} GB of disk and {place} has {free / 2**30:.2f} GB free; "
            "make room, or name another folder with -o"
        )
