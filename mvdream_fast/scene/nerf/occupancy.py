"""The occupancy grid of a volume: which cells of the box are worth sampling, learned while the density changes."""

from collections.abc import Callable

import torch
from torch import nn

from mvdream_fast.core import reads
from mvdream_fast.core.rng import Stream
from mvdream_fast.ops.march_rays import unpack_bits
from mvdream_fast.ops.update_occupancy import run_update


def default_step_size(radius: float, n_samples_per_ray: int = 512) -> float:
    """The marching step: the box's diagonal, with 1.732 for the root of 3, in n_samples_per_ray parts."""
    return 1.732 * 2 * radius / n_samples_per_ray


class OccupancyGrid(nn.Module):
    """Moving maximum of density times step in resolution^3 cells of [-radius, radius]^3, and its bits.

    Every cell counts as occupied until the first update. Buffers: `ema` [G^3] float32 and `bits` [ceil(G^3 / 8)] uint8,
    x slowest; both go into the checkpoint. `fraction` and `mean` are read once for each state of them.
    """

    ema: torch.Tensor
    bits: torch.Tensor

    def __init__(
        self,
        resolution: int = 32,
        radius: float = 1.0,
        step_size: float | None = None,
        update_every: int = 16,
        warmup_steps: int = 256,
        decay: float = 0.95,
        threshold: float = 0.01,
    ):
        super().__init__()
        self.resolution, self.radius = resolution, radius
        self.step_size = default_step_size(radius) if step_size is None else step_size
        self.update_every, self.warmup_steps = update_every, warmup_steps
        self.decay, self.threshold = decay, threshold
        n_cells = resolution**3
        self.register_buffer("ema", torch.zeros(n_cells))
        self.register_buffer("bits", torch.full(((n_cells + 7) // 8,), 255, dtype=torch.uint8))
        self._sent: tuple[tuple, reads.Later] | None = None

    @property
    def aabb(self) -> tuple[float, ...]:
        """The box, as two opposite corners: six numbers in scene units."""
        return (-self.radius,) * 3 + (self.radius,) * 3

    @property
    def occupied(self) -> torch.Tensor:
        """[G^3] bool, x slowest."""
        return unpack_bits(self.bits, self.ema.shape[0])

    @property
    def fraction(self) -> float:
        """Share of occupied cells, in [0, 1]."""
        return self.fraction_later()()

    @property
    def mean(self) -> float:
        """Mean of the moving maximum over the cells that are not marked unseen (0 if all are)."""
        return self.mean_later()()

    def fraction_later(self) -> Callable[[], float]:
        """A function that waits for `fraction` as it is now, whatever becomes of the grid."""
        later = self._later()
        return lambda: later.get()[0]

    def mean_later(self) -> Callable[[], float]:
        """The same of `mean`."""
        later = self._later()
        return lambda: later.get()[1]

    def _later(self) -> reads.Later:
        """`fraction` and `mean`: on their way since the last update, or asked for now if the grid was changed since."""
        sent = self._sent
        if sent is None or sent[0] != self._state():
            sent = self._send()
        return sent[1]

    def _send(self) -> tuple[tuple, reads.Later]:
        seen = self.ema >= 0
        mean = torch.where(seen, self.ema, 0).double().sum() / seen.sum().clamp(min=1)
        sent = self._state(), reads.Later(torch.stack([self.occupied.float().mean().double(), mean]))
        self._sent = sent
        return sent

    def _state(self) -> tuple:
        """What differs once a buffer has been written to, by whomever."""
        return tuple((id(x), object() if x.is_inference() else x._version) for x in (self.ema, self.bits))

    def fill(self) -> None:
        """Count every cell as occupied again, as at the start; the way out of a grid that emptied itself."""
        self.ema.zero_()
        self.bits.fill_(255)

    @torch.no_grad()
    def update(self, step: int, sigma_fn: Callable[[torch.Tensor], torch.Tensor], stream: Stream) -> bool:
        """Probe the density at one random point of each chosen cell; does nothing between multiples of update_every.

        All cells before step `warmup_steps`, and in a grid's first update whenever that is; afterwards a quarter of
        them drawn uniformly, and occupied ones up to another quarter. sigma_fn: positions [P, 3] in scene units ->
        [P]. Returns: whether the grid was updated.
        """
        if step % self.update_every:
            return False
        probes_all = step < self.warmup_steps or self._is_unprobed
        cells = None if probes_all else self._draw_cells(stream)
        sigmas = sigma_fn(self._points(cells, stream)).float()
        self._store(*run_update(self.ema, sigmas * self.step_size, cells, self.decay, self.threshold))
        return True

    @property
    def _is_unprobed(self) -> bool:
        """Whether it is as at the start: an update that found nothing anywhere would have left no cell occupied."""
        return self.fraction == 1 and self.mean == 0

    def _store(self, ema: torch.Tensor, bits: torch.Tensor) -> None:
        self.ema.copy_(ema)
        self.bits.copy_(bits)
        self._send()

    def _draw_cells(self, stream: Stream) -> torch.Tensor:
        device, quarter = self.ema.device, self.ema.shape[0] // 4
        drawn = stream.integers(0, self.ema.shape[0], quarter, device=device)
        if reads.reads_wait(device):
            return torch.cat([drawn, draw_occupied(self.occupied, stream.uniform(quarter, device=device))])
        occupied = torch.nonzero(self.occupied)[:, 0]
        if occupied.shape[0] > quarter:
            occupied = occupied[stream.integers(0, occupied.shape[0], quarter, device=device)]
        return torch.cat([drawn, occupied])

    def _points(self, cells: torch.Tensor | None, stream: Stream) -> torch.Tensor:
        device, g = self.ema.device, self.resolution
        cells = torch.arange(g**3, device=device) if cells is None else cells
        corner = torch.stack([cells // (g * g), cells // g % g, cells % g], dim=-1)
        unit = (corner + stream.uniform(cells.shape[0], 3, device=device)) / g
        return (2 * unit - 1) * self.radius


def draw_occupied(occupied: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """A cell for each of `uniform` [n] in [0, 1), without reading how many there are: [n] int64.

    Of more than n occupied cells (occupied [G^3] bool) n drawn with repetition; of fewer each, again and again; of none
    any.
    """
    up_to = occupied.cumsum(0)
    n_occupied, n = up_to[-1], uniform.shape[0]
    drawn = (uniform.double() * n_occupied).long()
    in_turn = torch.arange(n, device=occupied.device) % n_occupied.clamp(min=1)
    ranks = torch.where(n_occupied > n, drawn, in_turn)
    return torch.searchsorted(up_to, ranks + 1).clamp(max=occupied.shape[0] - 1)
