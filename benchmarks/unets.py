"""One guided step of a multi-view UNet, by whoever has one: diffusers, OpenVINO, ONNX Runtime and ours, same weights.

Four views and two prompts are eight images. Everything here may run in a contestant's own process: nothing but what
that contestant needs is imported there, and a size is told by its name.
"""

import dataclasses
import functools
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from contestants import Unavailable
from peers import CUDA, DEVICE, HALF, compiled, need, need_gpu
from torch import Tensor, nn

from mvdream_fast.camera import get_camera
from mvdream_fast.models.config import MINI, NAMED, UNetConfig
from mvdream_fast.ops import MLP, camera_embedding

N_VIEWS, GUIDANCE = 4, 7.5
Step = Callable[[Tensor, Tensor], Tensor]  # latents [V, C, h, w], t -> [2V, C, h, w], without the prompt first


@dataclasses.dataclass(frozen=True)
class Size:
    unet: UNetConfig
    side: int  # of the latents
    n_tokens: int
    schedule: Any


def size_of(name: str) -> Size:
    """`tiny`, `mini` (the embedded model), `sd21` or `width-N`: Stable Diffusion 2.1's UNet, N channels wide."""
    if name == "tiny":
        from reference.random_model import TINY

        return Size(TINY.unet, 8, TINY.text.context_length, TINY.schedule)
    if name in ("mini", "sd21"):
        whole = MINI if name == "mini" else NAMED["sd21-4view"]
        return Size(whole.unet, whole.latent_size, whole.text.context_length, whole.schedule)
    width = int(name.split("-")[1])
    unet = dataclasses.replace(UNetConfig(), model_channels=width, num_head_channels=32 if width % 64 else 64)
    return Size(unet, 32, 77, dataclasses.replace(MINI.schedule, prediction="eps"))


def inputs(size: Size) -> tuple[Tensor, Tensor]:
    """Latents of four views, and the text of both prompts."""
    draw = torch.Generator().manual_seed(0)
    latents = torch.randn(N_VIEWS, size.unet.in_channels, size.side, size.side, generator=draw)
    text = torch.randn(2, size.n_tokens, size.unet.context_dim, generator=draw)
    return latents.to(DEVICE, HALF), text.to(DEVICE, HALF)


def ours(name: str) -> Step:
    from mvdream_fast.diffusion.denoiser import Denoiser, TextCond
    from mvdream_fast.models.unet import MultiViewUNet

    size = size_of(name)
    with torch.device("meta"):
        unet = MultiViewUNet(size.unet)
    fill(unet, {key: key for key, _ in unet.named_parameters()}, shapes_of(size.unet))
    _, text = inputs(size)
    denoiser = Denoiser(unet.to(HALF), TextCond(text[1:], text[:1]), N_VIEWS)
    return lambda latents, t: denoiser(latents, t, get_camera(N_VIEWS).to(DEVICE))


class Theirs(nn.Module):
    """diffusers' UNet under a regrouping processor, told the cameras, as one function of latents and step."""

    def __init__(self, size: Size, layout: torch.memory_format):
        super().__init__()
        from reference.diffusers_unet import RegroupProcessor, add_camera, diffusers_unet, to_diffusers

        shapes = shapes_of(size.unet)
        with torch.device("meta"):
            self.unet = diffusers_unet(size.unet, size.side)
        fill(self.unet, to_diffusers(shapes, size.unet), shapes)
        self.unet.set_attn_processor(RegroupProcessor(N_VIEWS))
        mlp = MLP(*(numbers(key, shape) for key, shape in shapes.items() if key.startswith("camera_embed.")))
        add_camera(self.unet, camera_embedding(get_camera(N_VIEWS).repeat(2, 1), mlp).to(DEVICE, HALF))
        self.unet.to(dtype=HALF, memory_format=layout)
        self.layout, self.text = layout, inputs(size)[1].repeat_interleave(N_VIEWS, 0)

    @torch.no_grad()
    def forward(self, latents: Tensor, t: Tensor) -> Tensor:
        latents = latents.repeat(2, 1, 1, 1).contiguous(memory_format=self.layout)
        return self.unet(latents, t, self.text, return_dict=False)[0]


def diffusers(name: str, layout: torch.memory_format = torch.contiguous_format) -> Step:
    return Theirs(size_of(name), layout)


def diffusers_compiled(name: str) -> Step:
    return compiled(diffusers(name, torch.channels_last))


def diffusers_graphed(name: str) -> Step:
    """As one CUDA graph: what is left when launching costs nothing."""
    need_gpu("a CUDA graph")
    step, (latents, _) = diffusers(name, torch.channels_last), inputs(size_of(name))
    t = torch.zeros((), device=DEVICE)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            step(latents, t)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step(latents, t)

    def call(new: Tensor, now: Tensor) -> Tensor:
        latents.copy_(new)
        t.copy_(now)
        graph.replay()
        return out

    return call


@functools.cache
def onnx_file(name: str) -> Path:
    """diffusers' UNet as an ONNX file, made once for OpenVINO and ONNX Runtime."""
    if CUDA:
        raise Unavailable("OpenVINO and ONNX Runtime are what one takes on a CPU")
    need("onnx")
    folder = tempfile.TemporaryDirectory(prefix="onnx")  # removed with the process
    _kept.append(folder)
    file, model, (latents, _) = Path(folder.name) / "unet.onnx", diffusers(name), inputs(size_of(name))
    names = {"input_names": ["latents", "t"], "output_names": ["noise_pred"]}
    torch.onnx.export(model, (latents, torch.tensor(500)), str(file), dynamo=False, **names)
    return file


_kept: list[tempfile.TemporaryDirectory] = []


def onnxruntime(file: Path) -> Step:
    need("onnxruntime")
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
    session = ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    return lambda latents, t: torch.from_numpy(session.run(None, {"latents": latents.numpy(), "t": t.numpy()})[0])


def openvino(file: Path) -> Step:
    need("openvino")
    import openvino as ov

    settings = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    request = ov.compile_model(str(file), "CPU", settings).create_infer_request()

    def call(latents: Tensor, t: Tensor) -> Tensor:
        request.infer({"latents": latents.numpy(), "t": t.numpy()}, share_inputs=True)
        return torch.from_numpy(request.get_output_tensor().data)

    return call


def one_step(build: Callable[..., Step], *arguments: Any, size: str) -> Callable[[], Tensor]:
    """A call of one guided step."""
    step, (latents, _), t = build(*arguments), inputs(size_of(size)), torch.tensor(500, device=DEVICE)
    return lambda: step(latents, t)


def sampling(build: Callable[..., Step], *arguments: Any, name: str, n_steps: int) -> Callable[[], Tensor]:
    """A call that samples latents [V, C, h, w] by guided DDIM."""
    from mvdream_fast.diffusion.sampler import ddim_sample
    from mvdream_fast.diffusion.schedule import NoiseSchedule

    size = size_of(name)
    step, (noise, _) = build(name, *arguments), inputs(size)
    schedule = NoiseSchedule.from_config(size.schedule, DEVICE)

    def model(latents: Tensor, t: Tensor) -> Tensor:  # the sampler gives [uncond; cond], whose latents are the same
        return step(latents[:N_VIEWS], t)

    return lambda: ddim_sample(model, noise, schedule, n_steps, GUIDANCE)


def flop(name: str) -> float:
    """Arithmetic of a guided step of diffusers' UNet, as torch counts it, without running it."""
    from torch.utils.flop_counter import FlopCounterMode

    size = size_of(name)
    from reference.diffusers_unet import RegroupProcessor, diffusers_unet

    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        unet, n = diffusers_unet(size.unet, size.side), 2 * N_VIEWS
        unet.set_attn_processor(RegroupProcessor(N_VIEWS))
        latents = torch.empty(n, size.unet.in_channels, size.side, size.side)
        unet(latents, torch.empty(n), torch.empty(n, size.n_tokens, size.unet.context_dim))
    return counter.get_total_flops()


@functools.cache
def shapes_of(config: UNetConfig) -> dict[str, torch.Size]:
    """Of every parameter of ours, by its name."""
    from mvdream_fast.models.unet import MultiViewUNet

    with torch.device("meta"):
        return {key: p.shape for key, p in MultiViewUNet(config).named_parameters()}


def fill(model: nn.Module, names: dict[str, str], shapes: dict[str, torch.Size]) -> None:
    """Gives a model on the meta device memory and numbers, one tensor at a time: no second model weighs on the peak.

    names: ours -> the model's own name of each parameter.
    """
    model.to_empty(device=DEVICE).requires_grad_(False)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for key, name in names.items():
            parameters.pop(name).copy_(numbers(key, shapes[key]))
    if parameters:
        raise RuntimeError(f"no numbers for {', '.join(parameters)}")


def numbers(name: str, shape: torch.Size) -> Tensor:
    """A parameter's values, from its LDM name alone: a trained model's sizes, nowhere zero as a fresh one is."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    values = torch.randn(shape, generator=generator)
    scale = values[0].numel() ** -0.5 if len(shape) > 1 else 0.1
    return values.mul_(scale).add_(float(len(shape) == 1 and name.endswith("weight")))
