"""The others of a contest: torch compiled, torch's attention kernels, and what needs a GPU or a package.

Each is a function that raises Unavailable, with the reason, where this machine cannot run it.
"""

import importlib.util
import shutil
from collections.abc import Callable
from typing import Any

import contest
import torch
import torch.nn.functional as F
from contestants import Unavailable
from torch.nn.attention import SDPBackend, sdpa_kernel

CUDA = torch.cuda.is_available()
DEVICE, HALF = ("cuda", torch.float16) if CUDA else ("cpu", torch.float32)


def need_gpu(name: str) -> None:
    if not CUDA:
        raise Unavailable(f"{name} runs on a CUDA GPU only, and there is none here")


def need(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise Unavailable(f"{package} is not installed")


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile for exactly these shapes. The smoke run leaves it out: compiling takes longer than all else."""
    kept: list[Callable[..., Any]] = []

    def call(*arguments: Any) -> Any:
        if not kept:
            if contest.smoke:
                raise Unavailable("compiling takes too long for the smoke run")
            if not CUDA and not shutil.which("g++"):
                raise Unavailable("torch.compile needs a C++ compiler for a CPU, and there is no g++")
            torch._dynamo.reset()  # or a function that met eight shapes before would run as eager torch
            kept.append(torch.compile(function, dynamic=False))
        return kept[0](*arguments)

    return call


def sdpa(backend: SDPBackend | None = None) -> Callable[..., torch.Tensor]:
    """torch's attention of regrouped tensors [B, H, V*N, D]: the backend that torch takes by itself, or this one."""
    if backend is None:
        return F.scaled_dot_product_attention

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if not CUDA and backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
            need_gpu(f"torch's {backend.name.lower()}")
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v)

    return call


def xformers(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """xformers' attention of the same tensors."""
    need_gpu("xformers")
    from xformers.ops import memory_efficient_attention

    return memory_efficient_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
