"""The modules that own `params`: an encoding, a network, and a network behind an encoding."""

import gc
import math
from collections.abc import Mapping
from typing import Any, SupportsIndex

import torch
from torch import Tensor, nn

from mvdream_fast.core.rng import Stream
from mvdream_fast.ops._edges import FLOATS, check_same_device, check_shaped, is_recorded, require
from mvdream_fast.tcnn_compat import fused
from mvdream_fast.tcnn_compat.composite import new_encoder
from mvdream_fast.tcnn_compat.config import Options
from mvdream_fast.tcnn_compat.encoder import Encoder, next_multiple
from mvdream_fast.tcnn_compat.network import ALIGNMENT, MLP
from mvdream_fast.tcnn_compat.waves import Identity

LOSS_SCALES = {torch.float16: 128.0, torch.float32: 1.0}


class Module(nn.Module):
    """What the three have in common: one flat `params` in float32, the network's first, then the encoding's.

    `loss_scale` and `jit_fusion` are there for code that reads or sets them; here they change nothing.
    """

    params: nn.Parameter

    def __init__(self, encoder: Encoder, network: MLP | None, seed: int, dtype: torch.dtype | None):
        op, dtype = type(self).__name__, torch.float16 if dtype is None else dtype
        require(dtype in LOSS_SCALES, op, "dtype", "torch.float16, torch.float32 or None", dtype, "choose one of them")
        super().__init__()
        self.n_input_dims, self.seed, self.dtype = encoder.n_dims, seed, dtype
        self.n_output_dims = network.n_out if network else encoder.width
        self.loss_scale, self.jit_fusion = LOSS_SCALES[dtype], False
        self._encoder, self._network = encoder, network
        self._fused_grid = fused.grid_of(encoder, network) if network else None
        stream = Stream(seed, 0, "tcnn_compat")
        initial = torch.cat([part.initial(stream) for part in (network, encoder) if part])
        self.params = nn.Parameter(initial.to("cuda" if torch.cuda.is_available() else "cpu"))

    def forward(self, x: Tensor) -> Tensor:
        """x [P, n_input_dims] of any floating dtype -> [P, n_output_dims] of `dtype`, outside of autocast's reach.

        Raises ValueError for another shape of x or params, RuntimeError where they are on two devices.
        """
        op, n_params = type(self).__name__, sum(part.n_params for part in (self._network, self._encoder) if part)
        check_shaped(op, "x", x, (None, self.n_input_dims), FLOATS)
        check_shaped(op, "params", self.params, (n_params,), FLOATS)
        check_same_device(op, params=self.params, x=x)
        with torch.autocast(x.device.type, enabled=False):
            return self._evaluate(x.float(), self.params.float()).to(self.dtype)

    def _evaluate(self, x: Tensor, params: Tensor) -> Tensor:
        encoder, network = self._encoder, self._network
        if network is None:
            return encoder.encode(x, params, encoder.width)
        weights, features = params.split([network.n_params, encoder.n_params])
        if self._fused_grid and not is_recorded(x, params):
            return fused.evaluate(x, self._fused_grid, network, weights, features)
        return network(encoder.encode(x, features, network.n_in), weights)

    def extra_repr(self) -> str:
        """What print shows."""
        sizes = f"n_input_dims={self.n_input_dims}, n_output_dims={self.n_output_dims}"
        return f"{sizes}, seed={self.seed}, dtype={self.dtype}, hyperparams={self.hyperparams}"

    @property
    def hyperparams(self) -> dict[str, Mapping[str, Any]]:
        """The configurations that the module was made of."""
        return {name: vars(self)[name] for name in ("encoding_config", "network_config") if name in vars(self)}


class Encoding(Module):
    """An input encoding.

    Args:
        n_input_dims: columns of the input.
        encoding_config: tiny-cuda-nn's JSON object: "otype" is Grid, HashGrid, DenseGrid, TiledGrid, Frequency,
            TriangleWave, OneBlob, SphericalHarmonics, Identity or Composite; options and defaults are tiny-cuda-nn's.
        seed: of the initial parameters.
        dtype: of the output, torch.float16 (None) or torch.float32.

    Raises: ValueError that names the key, for options that there cannot be.
    """

    def __init__(
        self,
        n_input_dims: int,
        encoding_config: Mapping[str, Any],
        seed: int = 1337,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(_encoder("Encoding", n_input_dims, encoding_config), None, seed, dtype)
        self.encoding_config = encoding_config


class NetworkWithInputEncoding(Module):
    """An input encoding and a network behind it; arguments as those of `Encoding` and `Network`."""

    def __init__(
        self,
        n_input_dims: int,
        n_output_dims: int,
        encoding_config: Mapping[str, Any],
        network_config: Mapping[str, Any],
        seed: int = 1337,
        dtype: torch.dtype | None = None,
    ):
        op = "NetworkWithInputEncoding"
        encoder = _encoder(op, n_input_dims, encoding_config)
        super().__init__(encoder, _network(op, encoder, n_output_dims, network_config), seed, dtype)
        self.encoding_config, self.network_config = encoding_config, network_config


class Network(Module):
    """A network without biases.

    Args:
        n_input_dims, n_output_dims: columns of input and output.
        network_config: tiny-cuda-nn's JSON object: "otype" is FullyFusedMLP (16, 32, 64 or 128 neurons) or CutlassMLP,
            "activation" and "output_activation" are None, ReLU, LeakyReLU, Exponential, Sine, Sigmoid, Squareplus,
            Softplus, Tanh or SiLU.
        seed, dtype: as those of `Encoding`.

    Raises: ValueError that names the key, for options that there cannot be.
    """

    def __init__(
        self,
        n_input_dims: int,
        n_output_dims: int,
        network_config: Mapping[str, Any],
        seed: int = 1337,
        dtype: torch.dtype | None = None,
    ):
        encoder = Identity(_count("Network", "n_input_dims", n_input_dims))
        super().__init__(encoder, _network("Network", encoder, n_output_dims, network_config), seed, dtype)
        self.network_config = network_config


def free_temporary_memory() -> None:
    """Collects what Python no longer reaches; the modules hold no memory between calls."""
    gc.collect()


def supports_jit_fusion() -> bool:
    """Whether `jit_fusion` can be switched on: no, here is nothing to compile."""
    return False


def _encoder(op: str, n_dims: SupportsIndex, config: Mapping[str, Any]) -> Encoder:
    return new_encoder(Options(op, "encoding_config", config), _count(op, "n_input_dims", n_dims))


def _network(op: str, encoder: Encoder, n_out: SupportsIndex, config: Mapping[str, Any]) -> MLP:
    n_in = next_multiple(encoder.width, math.lcm(ALIGNMENT, encoder.alignment))
    return MLP.read(Options(op, "network_config", config), n_in, _count(op, "n_output_dims", n_out))


def _count(op: str, name: str, n: SupportsIndex) -> int:
    count = int(n) if isinstance(n, SupportsIndex) and not isinstance(n, bool) else 0
    require(count >= 1, op, name, "a whole number of at least 1", n, "say how many columns there are")
    return count
