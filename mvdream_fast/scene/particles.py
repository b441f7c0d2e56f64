"""Several representations of one prompt that a run optimises in turn: particles, whose spread is the answer's.

They are rendered, saved and restored as one; what is shown and exported is the first.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mvdream_fast.scene.base import Lighting, Rendered, Representation, Statistic

if TYPE_CHECKING:
    from mvdream_fast.camera import Rays
    from mvdream_fast.core.rng import Stream
    from mvdream_fast.scene.mesh.mesh import Mesh

SEEDS_APART = 1 << 32  # between those of two particles: a run that starts again takes the next seed


def seed_of(seed: int, particle: int) -> int:
    """The seed of a particle of a run with this seed; the first one has the run's own."""
    return seed + SEEDS_APART * particle


class Particles:
    """A Representation (scene/base.py) of n: each training step is that of one of them, drawn at random.

    Source: Wang et al. 2023, "ProlificDreamer", algorithm 1.
    """

    def __init__(self, particles: Sequence[Representation]):
        self.particles, self._drawn = [*particles], particles[0]

    @property
    def first(self) -> Representation:
        """The one that is shown."""
        return self.particles[0]

    @property
    def radius(self) -> float:
        """All lie in [-radius, radius]^3."""
        return self.first.radius

    @property
    def usual_texture(self) -> int | None:
        """That of the first one's shape."""
        return self.first.usual_texture

    @property
    def usual_faces(self) -> int:
        """That of the first one's shape."""
        return self.first.usual_faces

    @property
    def device(self) -> torch.device:
        """Where their tensors are."""
        return self.first.device

    def to(self, device: torch.device | str) -> "Particles":
        """Moves all of them."""
        for particle in self.particles:
            particle.to(device)
        return self

    def render(
        self, rays: "Rays", stream: "Stream | None" = None, training: bool = False, lighting: Lighting | None = None
    ) -> Rendered:
        """One drawn from the stream in training, the first otherwise."""
        if not training or stream is None:
            return self.first.render(rays, stream, training, lighting)
        self._drawn = self.particles[int(stream.integers(0, len(self.particles)))]
        return self._drawn.render(rays, stream, training, lighting)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Those of all. A step leaves gradients in one of them, and an optimiser passes over the others."""
        return [group for particle in self.particles for group in particle.parameter_groups()]

    def regularizers(self, rendered: Rendered, rays: "Rays", step: int) -> Tensor:
        """The drawn one's."""
        return self._drawn.regularizers(rendered, rays, step)

    def after_step(self, step: int, stream: "Stream") -> None:
        """All of them's: what is due at certain steps would pass one by that is not drawn there."""
        for particle in self.particles:
            particle.after_step(step, stream)

    def statistics(self) -> dict[str, Statistic]:
        """The drawn one's."""
        return self._drawn.statistics()

    def restart(self, seed: int) -> None:
        """Each takes the values of its own seed."""
        for i, particle in enumerate(self.particles):
            particle.restart(seed_of(seed, i))

    def save_memory(self, n_rays: int) -> None:
        """All of them."""
        for particle in self.particles:
            particle.save_memory(n_rays)

    def mesh(self, resolution: int = 128, max_faces: int | None = None, texture: int | None = None) -> "Mesh":
        """The first one's."""
        return self.first.mesh(resolution, max_faces, texture)

    def state(self) -> dict[str, Tensor]:
        """Every tensor of every one, its number before the name."""
        return {f"{i}.{name}": x for i, one in enumerate(self.particles) for name, x in one.state().items()}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Takes over the tensors of `state`. Raises ModelError for those of another configuration."""
        for i, particle in enumerate(self.particles):
            start = f"{i}."
            particle.restore({k.removeprefix(start): x for k, x in tensors.items() if k.startswith(start)})
