"""What a recipe is: a name's entry in the table of recipes.py, and which models it takes; no torch here."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from mvdream_fast.core.errors import ModelError
from mvdream_fast.models.config import ModelConfig

Config = TypeVar("Config")


@dataclass(frozen=True)
class Prior:
    """The kind of model that stages ask.

    embedded: the model of the package that they take where none is named. pixels: whether it must be one of pixels;
    None where either kind will do. get: where a full model is to be had.
    """

    needs: str
    embedded: str
    pixels: bool | None
    get: str

    def check(self, recipe: str, mode: str, name: str, model: ModelConfig) -> None:
        """Raises ModelError for a model `name` of another kind than a stage of `recipe` in `mode` needs."""
        is_pixels = model.vae.kind == "pixels"
        single = "3d" not in model.modes
        if self.pixels not in (None, is_pixels) or (single and mode == "3d"):
            kind = f"{'single images' if single else 'several views'}, as {'pixels' if is_pixels else 'latents'}"
            raise ModelError(
                f"the recipe {recipe} needs {self.needs}, but the model {name} is one of {kind}; leave out the "
                f"model for the package's own, {self.embedded}, or {self.get}"
            )


@dataclass(frozen=True)
class Recipe(Generic[Config]):
    """A text-to-3D system: where it is from, what it does, and the model that it needs.

    refine: the model of its stages after the first, where that is another one.
    """

    at: Callable[[str], Config]  # by size: "paper", "mini", "fast"
    paper: str
    stages: str
    prior: Prior
    refine: Prior | None = None

    def prior_of(self, stage: int) -> Prior:
        """The kind of model that the stage of this index asks."""
        return self.refine if self.refine is not None and stage else self.prior
