"""`python -m mvdream_fast.generate "a brown bulldog"`: the views of an object as PNG files.

What a sentence, a camera and a sampler are is known to pipeline.py; here are flags, progress lines and files.
"""

import dataclasses
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro import conf

from mvdream_fast._version import __version__
from mvdream_fast.core import cli, run_folder
from mvdream_fast.core.errors import ArgumentError, OutputError
from mvdream_fast.core.progress import Pace
from mvdream_fast.diffusion.schedule import ddim_timesteps
from mvdream_fast.models.tokenizer import check_prompt

if TYPE_CHECKING:
    from mvdream_fast.diffusion.views import Views
    from mvdream_fast.pipeline import MVDreamPipeline

IMAGE_FACTOR = 6  # decoded images, and the copies of them on their way into files
PROGRESS_EVERY_S = 2.0  # seconds between the progress lines of a run without a terminal


@dataclass(frozen=True)
class Flags:
    """Writes views of what a prompt says: view_0.png and so on, all of them in views.png, and config.json."""

    words: Annotated[str | None, conf.Positional, conf.arg(metavar="PROMPT")] = None
    """What to draw, for example "a brown bulldog"."""
    prompt: str | None = None
    """The same as a flag."""
    model: cli.Model | None = None
    """A model folder or a released file; by default "embedded", the small model that ships with the package."""
    n_views: int = 4
    """Views, evenly spaced around the object."""
    steps: int = 50
    """Denoising steps, counted as upstream does (30 makes 31)."""
    guidance_scale: float | None = None
    """How closely to follow the prompt; 1 asks without guidance, at half of the cost. Default: what suits the model,
    3.5 for the small ones, else 7.5."""
    uncond_mode: Literal["3d", "2d"] | None = None
    """How guidance asks without the prompt: 3d with the cameras, as MVDream does; 2d without them, each view by itself,
    so that views are led to their cameras and to each other, too. Default: 2d for the small models, else 3d."""
    elevation_deg: float = 15.0
    """Height of the cameras over the horizon, from -90 to 90."""
    azimuth_start_deg: float = 0.0
    """Where the first camera stands: 0 in front of the object, 90 at its left."""
    azimuth_span_deg: float = 360.0
    """The arc that the cameras are spread over; its end is left out."""
    negative_prompt: str = ""
    """What not to draw."""
    suffix: bool = True
    """Ends the prompt in ", 3d asset", as the captions of the training data did; never for DeepFloyd IF."""
    seed: int | Literal["random"] = 0
    """The same seed gives the same views."""
    output: Annotated[Path | None, conf.arg(aliases=["-o"])] = None
    """The folder of the views itself, new or empty; by default one under --root."""
    root: Path = run_folder.OUTPUTS
    """Where folders named after the prompt, the time and the seed are made; ROOT/latest links to the last one."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the UNet's weights; auto is what the device is fast at."""
    threads: int | None = None
    """CPU threads; by default one a core."""
    graphs: bool = True
    """On a GPU, a step is one CUDA graph instead of hundreds of launches."""
    mode: Literal["3d", "2d"] | None = None
    """2d draws independent images, without cameras: the only way of models such as DeepFloyd IF. Default: 3d."""
    cutouts: bool = False
    """Also writes the views without their background, cutout_0.png and so on, RGBA with straight colours: for models
    whose decoder tells a thing from its background, as the embedded one's does."""
    quiet: bool = False
    """Prints the output folder and warnings only."""


def main(flags: Flags) -> None:
    """Checks the flags, then draws the views and writes their folder."""
    prompt, seed = check_flags(flags), _seed(flags.seed)
    from mvdream_fast.diffusion.views import NO_MATTING
    from mvdream_fast.pipeline import MVDreamPipeline

    n_threads = cli.set_threads(flags.threads)
    pipe = MVDreamPipeline.from_pretrained(flags.model or "embedded", flags.device, flags.dtype, flags.graphs)
    if flags.cutouts and not pipe.tells_things_apart:
        raise ArgumentError(f"--cutouts: {NO_MATTING}")
    check_memory(flags.n_views, pipe)
    suffix = pipe.suffix if flags.suffix else ""
    _first_line(flags, pipe, n_threads, seed, pipe.unseen_words(prompt, flags.negative_prompt, suffix))
    with _progress(flags.quiet) as callback:
        views = pipe(
            prompt,
            flags.n_views,
            flags.elevation_deg,
            flags.azimuth_start_deg,
            flags.azimuth_span_deg,
            n_steps=flags.steps,
            guidance_scale=flags.guidance_scale,
            uncond_mode=flags.uncond_mode,
            negative_prompt=flags.negative_prompt,
            suffix=suffix,
            seed=seed,
            mode=flags.mode,
            callback=callback,
            warn=lambda _: None,
        )
    folder = run_folder.new_folder(flags.output, flags.root, prompt, seed)
    _fill(folder, _files(views, flags.cutouts, _config(flags, pipe, views, suffix)))
    print(folder if flags.quiet else f"wrote {len(views.tensor)} views to {folder}/ (all of them in views.png)")


def check_flags(flags: Flags) -> str:
    """The prompt, once everything that can be wrong without a model has been looked at. Raises UserError."""
    if flags.words is not None and flags.prompt is not None:
        raise ArgumentError("give the prompt once: by itself, or with --prompt")
    prompt = flags.prompt if flags.prompt is not None else flags.words
    if prompt is None:
        raise ArgumentError('a prompt is missing: python -m mvdream_fast.generate "a brown bulldog"')
    check_prompt(prompt)
    check_prompt(flags.negative_prompt, allow_empty=True)
    cli.check_at_least(flags, 1, "steps", "n_views", "threads")
    if flags.model is None:  # another model may have timesteps of its own, which tell once it is open
        ddim_timesteps(flags.steps)
    cli.check_from_to(flags, -90, 90, "elevation_deg")
    for name in ("guidance_scale", "azimuth_start_deg", "azimuth_span_deg"):
        if not abs(getattr(flags, name) or 0.0) < 1e6:
            raise ArgumentError(f"{cli.option(name)} must be a finite number, got {getattr(flags, name)}")
    if flags.seed != "random" and not 0 <= flags.seed < 2**63:
        raise ArgumentError(f"--seed must be random or from 0 to 2**63 - 1, got {flags.seed}")
    run_folder.check_new_folder(flags.output, flags.root)
    return prompt


def check_memory(n_views: int, pipe: "MVDreamPipeline") -> None:
    """Refuses more views than there is memory for: all are in one call of the UNet, with the prompt and without.

    Raises: OutOfMemoryError.
    """
    from mvdream_fast.core import memory
    from mvdream_fast.distill.run_memory import unet_bytes

    image = 4 * pipe.config.vae.image_size**2 * 3
    need = unet_bytes(pipe.config, 2 * n_views) + n_views * IMAGE_FACTOR * image
    memory.check(f"drawing {n_views} views at once", need, str(pipe.device), "take a smaller --n-views")


def _seed(seed: int | Literal["random"]) -> int:
    return int.from_bytes(os.urandom(4), "little") if seed == "random" else seed


def _first_line(flags: Flags, pipe: "MVDreamPipeline", n_threads: int, seed: int, warnings: list[str]) -> None:
    """Which model runs where, and why; and what of the prompt it won't see."""
    why = "no --model was given: the embedded model" if flags.model is None else f"--model {flags.model}"
    threads = f", {n_threads} threads" if pipe.device.type == "cpu" else ""
    if not flags.quiet:
        print("; ".join([f"{why}, {pipe.describe()}{threads}, seed {seed}", *warnings]), flush=True)
    elif warnings:
        print("; ".join(warnings), file=sys.stderr, flush=True)


@contextmanager
def _progress(quiet: bool) -> Iterator[Callable[[int, int, Any], None] | None]:
    """A callback for the sampler: a bar on a terminal that can redraw a line, a plain line now and then elsewhere."""
    if quiet:
        yield None
    elif sys.stdout.isatty() and os.environ.get("TERM", "").lower() not in ("dumb", "unknown"):  # rich draws none there
        from rich.console import Console
        from rich.progress import Progress

        # A console of its own: within rich's global one, a display that another program keeps open would hide the bar.
        with Progress(console=Console(file=sys.stdout), transient=True) as bar:
            task = bar.add_task("sampling")
            bar.refresh()  # a small model is done before the bar's own clock ticks
            yield lambda done, total, _: bar.update(task, completed=done, total=total)
    else:
        pace = Pace(PROGRESS_EVERY_S)

        def tell(done: int, total: int, _: Any) -> None:
            if line := pace(done, total):
                print(line, flush=True)

        yield tell


def _config(flags: Flags, pipe: "MVDreamPipeline", views: "Views", suffix: str) -> dict[str, Any]:
    """Everything that the views depend on."""
    import torch

    asked = dataclasses.asdict(flags)
    scale, uncond_mode = pipe.guidance(flags.guidance_scale, flags.uncond_mode)
    for name in ("words", "output", "root", "quiet", "device", "graphs"):
        del asked[name]
    return {
        "kind": "views",
        **asked,
        "guidance_scale": scale,
        "uncond_mode": uncond_mode,
        "mode": flags.mode or pipe.config.modes[0],
        "prompt": views.prompt,
        "suffix": suffix,
        "model": flags.model or "embedded",
        "model_name": pipe.config.name,
        "seed": views.seed,
        "device": str(pipe.device),
        "dtype": str(pipe.dtype)[6:],
        "threads": torch.get_num_threads(),
        "timesteps": pipe.schedule.timesteps(flags.steps),
        "cameras": None if views.cameras is None else views.cameras.tolist(),
        "versions": {"mvdream_fast": __version__, "torch": torch.__version__},
    }


def _files(views: "Views", cutouts: bool, config: dict[str, Any]) -> dict[str, bytes]:
    from mvdream_fast.core.images import png_bytes

    kinds = {"view": views.images, "cutout": views.cutouts if cutouts else []}
    files = {f"{kind}_{i}.png": png_bytes(image) for kind, images in kinds.items() for i, image in enumerate(images)}
    return {
        **files,
        "views.png": png_bytes(views.sheet()),
        "config.json": (json.dumps(config, indent=2) + "\n").encode(),
    }


def _fill(folder: Path, files: dict[str, bytes]) -> None:
    """Writes all files into an empty folder or none: they are written aside and then renamed.

    Raises: OutputError; the folder is gone then.
    """
    aside = folder / f".tmp-{os.getpid()}"
    try:
        aside.mkdir()
        for name, data in files.items():
            (aside / name).write_bytes(data)
        for name in files:
            (aside / name).replace(folder / name)
        aside.rmdir()
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, OSError):
            raise OutputError(f"cannot write into {folder}: {error.strerror}; nothing was kept") from error
        raise


if __name__ == "__main__":
    cli.run(main, Flags, prog="generate")
