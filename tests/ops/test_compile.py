"""torch.compile(fullgraph=True) with its default backend, Inductor, around every op of the UNet and a small UNet.

Code generation takes a C++ compiler and minutes, so these are slow; the ops' own test files compile graphs without it.
"""

import shutil

import pytest
import torch
import torch.compiler.config
from tolerances import PARITY

from mvdream_fast import ops
from mvdream_fast.models.config import UNetConfig
from mvdream_fast.models.unet import MultiViewUNet

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs g++, and there is none here"),
]


@pytest.fixture(autouse=True)
def _no_graph_of_an_earlier_run():
    """Torch keeps compiled graphs on disk by what is in them, not by what our ops' gradients are today."""
    with torch.compiler.config.patch(force_disable_caches=True):
        yield


def normal(*shape):
    return torch.randn(shape)


def mlp(n_in):
    return normal(16, n_in), normal(16), normal(16, 16) / 4, normal(16)


# Each op between two operations that Inductor fuses with their neighbours: a list of tensors -> one tensor.
def attention(q, k, v, camera_q, camera_v):
    return ops.cross_view_attention(q * 2, k, v, 2, camera_q=camera_q, camera_v=camera_v) + 1


def time_camera_embedding(t, camera, weight, bias, *weights):
    time_mlp, camera_mlp = ops.MLP(*weights[:4]), ops.MLP(*weights[4:])
    return ops.time_camera_embedding(t, camera * 2, time_mlp, camera_mlp, weight, bias) + 1


def group_norm_silu(x, weight, bias, emb):
    return ops.group_norm_silu(x * 2, weight, bias, 3, 1e-5, emb) + 1


def geglu(x):
    return ops.geglu(x * 2) + 1


def sds_target(z, z_t, cond, uncond, noise, abar):
    target, gradient = ops.sds_target(z, z_t * 2, cond, uncond, noise, abar, 7.5)
    return torch.stack([target, gradient]) + 0 * z


CASES = {
    "cross_view_attention": lambda: (attention, [normal(4, 5, 2, 8) for _ in "qkv"] + [normal(4, 2, 8) for _ in "qv"]),
    "time_camera_embedding": lambda: (
        time_camera_embedding,
        [torch.tensor([3, 5, 7]), normal(3, 16), normal(20, 16) / 4, normal(20), *mlp(8), *mlp(16)],
    ),
    "group_norm_silu": lambda: (
        group_norm_silu,
        [normal(2, 6, 3, 5).to(memory_format=torch.channels_last), normal(6), normal(6), normal(2, 6)],
    ),
    "geglu": lambda: (geglu, [normal(4, 6, 16)]),
    "sds_target": lambda: (sds_target, [normal(8, 4, 3, 5) for _ in range(5)] + [torch.tensor(0.5)]),
}


def run(function, tensors, seed=1):
    """The output and every gradient under a random cotangent."""
    inputs = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in tensors]
    out = function(*inputs)
    d_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed))
    leaves = [x for x in inputs if x.requires_grad]
    grads = torch.autograd.grad(out, leaves, d_out, allow_unused=True)  # a distillation target has one, of z alone
    return [out.detach(), *(torch.zeros(()) if g is None else g for g in grads)]


@pytest.mark.parametrize("op", CASES)
def test_an_op_compiles_with_its_neighbours(op):
    torch.manual_seed(0)
    function, tensors = CASES[op]()
    results, expected = run(torch.compile(function, fullgraph=True), tensors), run(function, tensors)
    for x, e in zip(results, expected, strict=True):
        torch.testing.assert_close(
            x, e, atol=PARITY[op] * 10, rtol=PARITY[op] * 10
        )  # the operations around it round too


@pytest.mark.parametrize("gradients", [True, False])
def test_a_unet_compiles(gradients):
    torch.manual_seed(0)
    config = UNetConfig(model_channels=32, channel_mult=(1, 2), num_res_blocks=1, attention_resolutions=(1,),
                        num_head_channels=16, context_dim=24)  # fmt: skip
    unet = MultiViewUNet(config)
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))  # no branch is zero
    latents, camera, context = normal(4, 4, 8, 8), normal(4, 16), normal(2, 5, 24)
    t = torch.tensor([3, 500, 3, 500])

    def call(model):
        x = latents.clone().requires_grad_(gradients)
        with torch.set_grad_enabled(gradients):
            out = model(x, t, context, camera, 2)
        return [out.detach(), *(torch.autograd.grad(out.square().sum(), x) if gradients else ())]

    for x, e in zip(call(torch.compile(unet, fullgraph=True)), call(unet), strict=True):
        torch.testing.assert_close(x, e, atol=1e-4, rtol=1e-4)
