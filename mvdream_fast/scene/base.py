"""The protocol of what a text-to-3D run optimises, and what it renders. Kinds of it live in folders beside this file.

A new representation is a class with these methods and a frozen configuration; scene/kinds.py is where it is named.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor

from mvdream_fast.scene.shading import ALBEDO, Shading

if TYPE_CHECKING:
    from mvdream_fast.camera import Rays
    from mvdream_fast.core.rng import Stream
    from mvdream_fast.scene.mesh.mesh import Mesh


Statistic = float | Callable[[], float]


@dataclass(frozen=True)
class Rendered:
    """A rendered batch of rays: rgb [R, 3], opacity [R], depth [R], each with a graph in training.

    What else a representation's regularizers need is in fields of a subclass.
    """

    rgb: Tensor
    opacity: Tensor
    depth: Tensor


class Lighting(NamedTuple):
    """What a training render shows besides the scene's own colours: light, and a background that is drawn at random.

    shading, lights: one point light for each ray: how it shades, and where it stands, [R, 3].
    plain: [R] bool, rays that are compared with images as they are: neither lit nor before a random background. None:
        none are.
    behind: what a random background is drawn from; None: the render's own stream.
    """

    shading: Shading = ALBEDO
    lights: Tensor | None = None
    plain: Tensor | None = None
    behind: "Stream | None" = None


class RepresentationConfig(Protocol):
    """The frozen values that a representation is made from; no torch is needed to hold or read them."""

    def memory(self, n_rays: int, gpu_memory: int | None = None, lit: bool = False) -> dict[str, int]:
        """Estimated bytes by part of a training step of n_rays, on a GPU of so much memory or (None) on a CPU; lit:
        with normals."""
        ...


class HasMesh(Protocol):
    """What another representation can begin from."""

    def mesh(self, resolution: int = 128) -> "Mesh":
        """Its surface, from a grid of about `resolution` points a side."""
        ...


class Representation(Protocol):
    """What is optimised: its parameters, how they are rendered, and what is left of them at the end.

    Everything random comes from the streams that are handed in, so that a resumed run has the same bytes.
    """

    @property
    def radius(self) -> float:
        """It lies in [-radius, radius]^3."""
        ...

    @property
    def device(self) -> torch.device:
        """Where its tensors are."""
        ...

    def to(self, device: torch.device | str) -> Any:
        """Moves it to another device."""
        ...

    def render(
        self, rays: "Rays", stream: "Stream | None" = None, training: bool = False, lighting: Lighting | None = None
    ) -> Rendered:
        """Rays [R] in front of a background. Training needs a stream; lighting is for training alone, and what shows
        no colours that light could change need not heed it."""
        ...

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Parameters with their learning rates, as torch's optimisers take them; every parameter is in one group."""
        ...

    def regularizers(self, rendered: Rendered, rays: "Rays", step: int) -> Tensor:
        """The weighted sum of the losses that need no guidance, at this step: a scalar with a graph."""
        ...

    def after_step(self, step: int, stream: "Stream") -> None:
        """What changes without a gradient once the parameters have: an occupancy grid, levels that open up."""
        ...

    def statistics(self) -> dict[str, Statistic]:
        """Numbers of the last training step for the log, such as {"occupancy": 0.2, "n_samples": 51200}; one that is
        still on its way from a GPU as a function, which waits for it."""
        ...

    def restart(self, seed: int) -> None:
        """Takes the values that a fresh one of this seed has; the parameters stay the same objects."""
        ...

    def save_memory(self, n_rays: int) -> None:
        """From now on a training step of n_rays takes about half of the memory it could have taken."""
        ...

    @property
    def usual_texture(self) -> int | None:
        """Pixels a side of the texture that a command bakes for its mesh unasked; None where vertices are coloured."""
        ...

    @property
    def usual_faces(self) -> int:
        """At most this many triangles has its mesh unless others are asked for; 0: as many as there are."""
        ...

    def mesh(self, resolution: int = 128, max_faces: int | None = None, texture: int | None = None) -> "Mesh":
        """Its surface; all of its triangles if `max_faces` is None or 0. Raises DivergedError where there is none."""
        ...

    def state(self) -> dict[str, Tensor]:
        """Every tensor that a file has to hold, by name; live, not copies."""
        ...

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Takes over the tensors of `state`. Raises ModelError for those of another configuration."""
        ...
