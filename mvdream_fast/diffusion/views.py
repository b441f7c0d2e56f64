"""Views of one object, as a pipeline returns them."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mvdream_fast.camera import turned
from mvdream_fast.core import reads
from mvdream_fast.core.arguments import whole
from mvdream_fast.core.errors import ArgumentError
from mvdream_fast.core.images import to_image

if TYPE_CHECKING:
    import PIL.Image
NO_MATTING = (
    "the model must have a decoder that tells a thing from its background (vae.decoder_matting), as the embedded one "
    "has; remove the backgrounds with another program"
)


@dataclass(frozen=True)
class Views:
    """Views of one object, on the CPU."""

    tensor: Tensor  # [V, 3, Hp, Wp] float32 in [0, 1]
    cameras: Tensor | None  # [V, 16], what the UNet was told (unit distance); None in 2D mode
    prompt: str  # without the suffix
    seed: int | None  # None when a generator was given
    cutout: Tensor | None = None  # [V, 4, Hp, Wp] in [0, 1]: straight colours and alpha, of models that tell both apart

    @property
    def images(self) -> list["PIL.Image.Image"]:
        """The views as PIL images."""
        return [to_image(view) for view in self.tensor]

    @property
    def cutouts(self) -> list["PIL.Image.Image"]:
        """The views without their backgrounds, as RGBA images.

        Raises: ArgumentError for views of a model that can't tell.
        """
        if self.cutout is None:
            raise ArgumentError(f"cutouts: {NO_MATTING}")
        return [to_image(view) for view in self.cutout]

    def sheet(self, n_columns: int = 4) -> "PIL.Image.Image":
        """All views in one image, row by row; empty places are white."""
        from PIL import Image

        n_views, _, height, width = self.tensor.shape
        n_columns = min(whole("sheet", "n_columns", n_columns, "4 is the default"), n_views)
        sheet = Image.new("RGB", (n_columns * width, -(-n_views // n_columns) * height), "white")
        for i, image in enumerate(self.images):
            sheet.paste(image, (i % n_columns * width, i // n_columns * height))
        return sheet


NEAR_DEG = 0.1  # by which steps may differ that count as equal: cameras are float32, and may have been rounded


def half_way(cameras: Tensor) -> Tensor:
    """Cameras [V, 16] turned around the upright axis by half the step from each to the next: half-way between them.

    Where they don't go all round, the last one stands half a step beyond theirs. One camera's opposite is its own.

    Returns: [V, 16].
    Raises: ArgumentError for steps of several sizes, or none.
    """
    n_views = len(cameras)
    right = cameras.detach().cpu().double().reshape(-1, 4, 4)[:, :2, 0]  # which is level, and told at the poles, too
    azimuths_deg = torch.rad2deg(torch.atan2(right[:, 1], right[:, 0]))
    # Of two opposite ones either way round is right: rounding must not choose.
    steps: list[float] = reads.read(180 - (180 - azimuths_deg.diff() + NEAR_DEG).remainder(360) + NEAR_DEG) or [360.0]
    low, high = min(steps), max(steps)
    if high - low > NEAR_DEG or abs(low) <= NEAR_DEG:
        raise ArgumentError(
            f"between: views must have equal steps of azimuth between their cameras, got steps of {low:.1f} to "
            f"{high:.1f} degrees; sample them without camera, or evenly around"
        )
    step = sum(steps) / len(steps)
    whole_turn = abs(abs(step) * n_views - 360) <= NEAR_DEG * n_views
    return turned(cameras, (180.0 if step > 0 else -180.0) / n_views if whole_turn else step / 2)
