"""What the representations that are meshes share: colours at the surface, a background, rendering and state."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mvdream_fast.core.rng import Stream
from mvdream_fast.scene.background import new_background, seen_behind
from mvdream_fast.scene.base import HasMesh, Lighting, Rendered
from mvdream_fast.scene.mesh.mesh import Mesh
from mvdream_fast.scene.nerf.volume import Volume
from mvdream_fast.scene.raster import Body, MeshRendered, Seen, compose, see
from mvdream_fast.scene.saved import check_state
from mvdream_fast.scene.tets.config import MeshColors

if TYPE_CHECKING:
    from mvdream_fast.camera import Rays

FIT_STEPS, FIT_POINTS, FIT_RATE = 200, 8192, 0.01


def fit_colors(volume: Volume, mesh: Mesh, seed: int = 0) -> None:
    """Teaches a field the colours at a mesh's vertices, by steps of Adam on some of them; what it knew is the start."""
    learned = [volume.table, *volume.feature_weights]
    optimizer = torch.optim.Adam(learned, lr=FIT_RATE, eps=1e-15)
    vertices, colors = (torch.from_numpy(x).to(volume.table) for x in (mesh.vertices, mesh.colors))
    for step in range(FIT_STEPS):
        drawn = Stream(seed, step, "colours").integers(0, len(vertices), min(len(vertices), FIT_POINTS))
        loss = (volume(vertices[drawn])[1] - colors[drawn]).square().mean()
        gradients = torch.autograd.grad(loss, learned)
        for parameter, gradient in zip(learned, gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)


class ColoredMesh(nn.Module):
    """The half of a Representation (scene/base.py) that asks its class for a `body` and for what of it is optimised.

    Its colours are the volume's, whose density is not asked: so they can be taken over from a volume as they are.
    """

    usual_faces: int = MeshColors.usual_faces
    usual_texture: int | None = 1024

    def __init__(self, config: MeshColors, stream: Stream):
        super().__init__()
        self.volume = Volume(config.volume_config(), stream)
        self.volume.density_weights.requires_grad_(False)
        self.background = new_background(config.background, config.background_aug_prob, stream)

    def body(self) -> Body:
        """The mesh that is drawn, with a graph to what of it is optimised."""
        raise NotImplementedError

    @property
    def reach(self) -> float:
        """How far from the origin the mesh may go."""
        return 3**0.5 * self.radius

    @property
    def radius(self) -> float:
        """It lies in [-radius, radius]^3."""
        return self.volume.config.radius

    @property
    def device(self) -> torch.device:
        """Where its tensors are."""
        return self.volume.table.device

    def render(
        self, rays: "Rays", stream: Stream | None = None, training: bool = False, lighting: Lighting | None = None
    ) -> MeshRendered:
        """Rays [R] of whole images, which `generate_rays` makes, in front of the background.

        Evaluation shows plain colours, and makes no graph. Raises ValueError for other rays.
        """
        with torch.set_grad_enabled(training and torch.is_grad_enabled()):
            seen = see(self.body(), rays, self.reach)
            if not training:
                return compose(seen, self.seen_colors(seen), rays, self.background(rays.rays_d))
            lighting = lighting or Lighting()
            background = seen_behind(self.background, rays.rays_d, stream, lighting)
            return compose(seen, self.seen_colors(seen), rays, background, lighting)

    def seen_colors(self, seen: Seen) -> Tensor:
        """Colours [K, 3] of the pixels that show the mesh."""
        return self.volume(seen.positions)[1]

    def colors(self, positions: Tensor) -> Tensor:
        """The field's colours at positions [P, 3] in scene units, [P, 3] in [0, 1]."""
        return self.volume(positions.to(self.device))[1]

    def take_colors(self, source: HasMesh, mesh: Mesh | None = None, seed: int = 0) -> None:
        """Takes over the background of another representation, where it is of one kind, and its colours: as they are
        where they are those of a field like this one, else fitted to those of its mesh, where there is one."""
        volume, background, logits = (getattr(source, name, None) for name in ("volume", "background", "logits"))
        if isinstance(background, type(self.background)):
            self.background.load_state_dict(background.state_dict())
        if isinstance(volume, Volume) and volume.config == self.volume.config and logits is None:  # else a texture's
            own, found = self.volume.state_dict(), volume.state_dict()
            self.volume.load_state_dict({name: found[name] for name in own})
        elif mesh is not None:
            fit_colors(self.volume, mesh, seed)

    def color_groups(self, lr_encoding: float, lr_mlp: float, lr_background: float) -> list[dict[str, Any]]:
        """The parameters of the colours with their learning rates; what has no parameters is left out."""
        groups = [
            {"params": [self.volume.table], "lr": lr_encoding},
            {"params": [*self.volume.feature_weights], "lr": lr_mlp},
            {"params": [*self.background.parameters()], "lr": lr_background},
        ]
        return [group for group in groups if group["params"]]

    def regularizers(self, rendered: Rendered, rays: "Rays", step: int) -> Tensor:
        """None: 0."""
        return rendered.opacity.sum() * 0

    def after_step(self, step: int, stream: Stream) -> None:
        """Nothing changes without a gradient."""

    def save_memory(self, n_rays: int) -> None:
        """A mesh has no samples to save: a step takes what its images take."""

    def state(self) -> dict[str, Tensor]:
        """Parameters by name; live, not copies."""
        return self.state_dict()

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Raises ModelError when names or shapes differ or a number is not finite."""
        check_state("mesh", self.state(), tensors)
        self.load_state_dict(tensors)
