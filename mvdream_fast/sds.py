"""`python -m mvdream_fast.sds "a green armchair"`: a sentence becomes a 3D asset, by score distillation."""

import dataclasses
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from mvdream_fast.core import cli, run_folder
from mvdream_fast.core.errors import ArgumentError, UserError
from mvdream_fast.distill.config import RecipeName

if TYPE_CHECKING:
    from mvdream_fast.core.run_folder import Interrupt
    from mvdream_fast.distill.request import Request
    from mvdream_fast.distill.sampled import Sampler
    from mvdream_fast.distill.viewer import Viewer
    from mvdream_fast.jobs.asset import Device
    from mvdream_fast.pipeline import MVDreamPipeline

Say = Callable[[str], None]


@dataclass(frozen=True)
class Flags:
    """Turns a sentence into a 3D asset: mesh.glb, turntable.webp and report.html in a folder of its own.

    By default the folder is ROOT/<prompt>/<time>-s<seed>/, and ROOT/latest links to it.
    """

    text: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="PROMPT")] = None
    """The prompt, as a bare sentence."""
    prompt: str | None = None
    """The prompt, as a flag."""
    prompts_file: Path | None = None
    """One run for each line of a JSONL file, such as {"prompt": "a red chair", "seed": 1}; all are checked first."""
    config: Path | None = None
    """A TOML file of settings, or the config.json of an earlier run; flags win over it."""
    model: cli.Model | None = None
    """A model folder, a released checkpoint, or the name of a small model of the package: "embedded", "pixels".
    Default: the recipe's."""
    refine_model: cli.Model | None = None
    """The model of the stages after the first, for a recipe that asks another one there (magic3d-if-sd)."""
    recipe: RecipeName | None = None
    """The system. Default: mvdream-solid for small models, mvdream for others and where --method, --mode, --guidance,
    --shading or --n-views ask for another kind of run. --list-recipes says what each is."""
    list_recipes: bool = False
    """Prints the recipes: paper, stages, models, time on this machine. Makes nothing."""
    preset: Literal["auto", "mini", "fast", "paper"] = "auto"
    """mini: the embedded model on a CPU. fast: half its steps, the first half of them at half the size.
    paper: the recipe for full models. auto: mini for the embedded models and others that draw 64 pixels, else paper."""
    method: Literal["sds", "reconstruct"] | None = None
    """sds: distillation alone, as MVDream has it. reconstruct: fit a volume to views that are sampled once instead."""
    mode: Literal["3d", "2d"] | None = None
    """2d: the model sees each view by itself, without its camera; view words in the prompt instead (DreamFusion's
    way). For comparison."""
    view_words: bool = False
    """Tells each view in words from where it is seen; in the 2d mode it does so anyway."""
    perp_neg: bool = False
    """Leads each view of the 2d mode away from the words of its other sides (Perp-Neg)."""
    guidance: Literal["sds", "vsd"] | None = None
    """vsd: what the model says is held against a copy of it that learns the renders (ProlificDreamer's way), at a
    guidance scale of 7.5."""
    lora_rank: int | None = None
    """Of that copy's low-rank adapters. Default: 4."""
    lora_lr: float | None = None
    """Their learning rate. Default: 1e-4."""
    particles: int | None = None
    """Assets that --guidance vsd optimises in turn, for variety; the first one is kept. Default: 1."""
    steps: int | None = None
    """Number of steps, shared by the stages in proportion; schedules stretch with it. Default: the preset's."""
    seed: str | None = None
    """A number, 0 if left out, or "random" (the drawn seed is printed)."""
    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None
    """The folder of the run itself, new or empty; by default one under --root."""
    root: Path = run_folder.OUTPUTS
    """Where run folders named after the prompt, the time and the seed are made; ROOT/latest links to the last one."""
    resume: cli.Run | None = None
    """Go on with a run: its folder, or "latest" for that of -o, else the last one under ROOT. What the run is stays as
    it was begun; flags for its mesh, device, threads, view and checkpoints count."""
    guidance_scale: float | None = None
    """How closely to follow the prompt."""
    guided_from: Literal["uncond", "cond"] | None = None
    """What the scale s is added to: eps_u + s (eps_c - eps_u), or eps_c + s (eps_c - eps_u), which is stronger by 1."""
    loss: Literal["x0", "sds"] | None = None
    """x0: towards the model's clean image (MVDream's). sds: along its noise, weighted (DreamFusion's)."""
    weighting: Literal["sds", "uniform", "fantasia3d"] | None = None
    """Weight of the loss sds at a noise level: sigma^2, 1, or alpha sigma^2."""
    timesteps: Literal["shared", "each"] | None = None
    """One noise level for all images of a step, or one for each group of views (in the 2d mode for each image)."""
    n_views: Annotated[int | None, tyro.conf.arg(aliases=["--views"])] = None
    """Views a step; for --method reconstruct, the number of views that are sampled."""
    render_size: int | None = None
    """Pixels a side, at every stage."""
    negative_prompt: str | None = None
    """What not to make."""
    rescale: float | None = None
    """Share of the guided prediction whose deviation is rescaled to the unguided one's."""
    lr: float | None = None
    """Learning rate of the hash grid."""
    elevation_range_deg: tuple[float, float] | None = None
    """Heights of the cameras over the horizon."""
    fovy_range_deg: tuple[float, float] | None = None
    """Their fields of view."""
    shading: bool = False
    """The recipe's shading variant: point light and orientation loss."""
    preview_every: int | None = None
    """Steps between preview images. Default: one at 2 % of the steps, then every 10 %."""
    checkpoint_every: int = 100
    """Steps between checkpoints."""
    viewer: bool = False
    """Opens a live page on 127.0.0.1 where the asset can be turned while it grows; closes with the run."""
    viewer_port: int = 7007
    """Port of that page; the next free one if it is taken."""
    faces: int | None = None
    """At most this many triangles in the mesh; 0: as many as the surface has (default: 30000, and 0 where the mesh
    itself was optimised)."""
    mesh_resolution: int | None = None
    """Points a side of the grid that the surface is taken from. Default: 128."""
    texture: int | None = None
    """The colours of mesh.glb are a texture of this many pixels a side; 0 colours its vertices (default: 1024 where the
    mesh itself was optimised, else 0)."""
    formats: tuple[Literal["glb", "obj", "ply"], ...] | None = None
    """Files of the mesh; mesh.glb is always made."""
    up: Literal["y", "z"] | None = None
    """Upward axis of .obj and .ply (default y); .glb is always y-up."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the UNet's weights; auto is what the device is fast at."""
    graphs: bool = True
    """On a GPU, what the model says of a step is one CUDA graph instead of a thousand launches."""
    threads: int | None = None
    """CPU threads; by default one a core."""
    quiet: bool = False
    """Prints the run's folder and warnings only."""
    given: cli.Given = frozenset()


# Flags that say how and where a run is made, not what.
HOW = ("text", "config", "prompts_file", "output", "root", "resume", "preview_every", "checkpoint_every", "viewer",
       "viewer_port", "device", "dtype", "graphs", "threads", "quiet", "list_recipes")  # fmt: skip


def main(flags: Flags) -> None:
    """Checks the flags, then makes every asset that is asked for. Exits with 130 or 143 when a signal stopped it."""
    if flags.list_recipes:
        list_recipes(flags.root)
        return
    from mvdream_fast.core import memory

    say: Say = (lambda _: None) if flags.quiet else (lambda line: print(line, flush=True))
    check_flags(flags)
    if flags.resume:
        folder = run_folder.resolve_resume(flags.resume, flags.root, flags.output)
        request = resumed(flags, folder)
        with run_folder.locked(folder):
            memory.check_start()
            go_on(request, folder, flags, say)
        return
    requests = plan(flags)
    memory.check_start()
    cli.set_threads(flags.threads)
    start = time.perf_counter()
    place(flags).refuse_what_does_not_fit(requests)
    folder = new_folder(flags, requests[0])
    pipeline = place(flags).load(requests[0])
    if len(requests) > 1:
        make_all(pipeline, requests, folder, flags, say)
    else:
        with run_folder.locked(folder):
            make(pipeline, requests[0], folder, flags, say, start)


def list_recipes(root: Path) -> None:
    """The table of recipes, with the times of the runs under `root`."""
    from mvdream_fast.distill.recipe_table import print_recipes

    print_recipes(root)


def go_on(request: "Request", folder: Path, flags: Flags, say: Say) -> None:
    """The rest of a run."""
    cli.set_threads(flags.threads)
    start = time.perf_counter()
    place(flags).refuse_what_does_not_fit([request])
    place(flags).write_record(request, folder)
    make(place(flags).load(request), request, folder, flags, say, start)


def check_flags(flags: Flags) -> None:
    """What is wrong with the flags by themselves. Raises ArgumentError."""
    given = [name for name in ("text", "prompt", "prompts_file") if getattr(flags, name) is not None]
    if len(given) > 1:
        raise ArgumentError("give the prompt once: by itself, with --prompt, or with --prompts-file")
    if flags.resume and (given or flags.config):
        raise ArgumentError("--resume takes prompt and settings from the run; leave out the prompt and --config")
    if flags.prompts_file and flags.output:
        raise ArgumentError("-o names the folder of one run; --root is where those of --prompts-file are made")
    cli.check_at_least(flags, 1, "checkpoint_every", "preview_every", "threads")
    cli.check_from_to(flags, 1, 65535, "viewer_port")


def asked(flags: Flags) -> dict[str, Any]:
    """The flags that were given of those that say what a run is."""
    found = {name: value for name, value in cli.given(flags).items() if name not in HOW}
    return found | ({} if flags.text is None else {"prompt": flags.text})


def plan(flags: Flags) -> list["Request"]:
    """The runs that are asked for, every one checked. Raises ArgumentError, InputFileError."""
    from mvdream_fast.distill import request, settings_file

    given = asked(flags)
    file = settings_file.read_settings(flags.config) if flags.config else None
    if flags.prompts_file is not None:
        return request.read_prompts(flags.prompts_file, given, file)
    return [request.resolve(given, file)]


def resumed(flags: Flags, folder: Path) -> "Request":
    """The request of a run folder, with the mesh that the flags ask for; they may not ask for another run.

    Raises: ArgumentError, InputFileError.
    """
    from mvdream_fast.distill import request

    run, given = request.read_run(folder), asked(flags)
    export = {f.name: given.pop(f.name) for f in dataclasses.fields(run.export) if f.name in given}
    replaced = dataclasses.replace(run.export, **export)
    request.check_export(replaced, request.flag_names(export))
    cli.check_resumed(request.differences(run, given))
    return dataclasses.replace(run, export=replaced, why="as the run was started")


def new_folder(flags: Flags, request: "Request") -> Path:
    """A run folder with its record, which --resume reads."""
    folder = run_folder.new_folder(flags.output, flags.root, request.prompt, request.seed)
    place(flags).write_record(request, folder)
    return folder


def place(flags: Flags) -> "Device":
    """Where the model is, by the flags."""
    from mvdream_fast.jobs.asset import Device

    return Device(flags.device, flags.dtype, flags.graphs)


def make(pipeline: "MVDreamPipeline", request: "Request", folder: Path, flags: Flags, say: Say, start: float) -> None:
    """One run, in its folder. Exits with 130 or 143 when a signal stopped it."""
    from mvdream_fast.distill.sampled import Sampler
    from mvdream_fast.jobs.asset import sample_views

    say(first_line(pipeline, request))
    sampler = Sampler(pipeline)
    if flags.quiet:
        print(folder, flush=True)
    with run_folder.Interrupt() as interrupt:
        if not (folder / "views.png").exists():
            sample_views(sampler, request, folder)
            say(f"first views after {time.perf_counter() - start:.1f} s: {folder / 'views.png'}")
        code = optimise(sampler, request, folder, flags, say, interrupt)
    if code:
        print(f"sds: stopped; go on with --resume {folder}", file=sys.stderr)
        sys.exit(code)
    say(f"done in {time.perf_counter() - start:.0f} s: {folder}")


def make_all(pipeline: "MVDreamPipeline", requests: list["Request"], folder: Path, flags: Flags, say: Say) -> None:
    """One run after the other; one that fails doesn't stop the rest, and the first failure's code is the command's."""
    lines, code = [], 0
    for i, request in enumerate(requests):
        folder, start = folder if i == 0 else new_folder(flags, request), time.perf_counter()
        try:
            with run_folder.locked(folder):
                make(pipeline, request, folder, flags, say, start)
            state = "done"
        except UserError as error:
            print(f"sds: {request.prompt!r}: {error}", file=sys.stderr)
            state, code = f"failed ({type(error).__name__}, {error.exit_code})", code or error.exit_code
        lines.append(
            f"{state:24} {time.perf_counter() - start:6.0f} s  {request.prompt!r}, seed {request.seed}: {folder}"
        )
    say("\n".join([f"{len(requests)} runs:", *lines]))
    if code:
        sys.exit(code)


def first_line(pipeline: "MVDreamPipeline", request: "Request") -> str:
    """Which recipe and which model, why, and what of the prompt the model won't see."""
    from mvdream_fast.distill.loop import prompt_endings

    config = request.config
    method = "" if config.method == "sds" else f", {config.method}"
    endings = prompt_endings(config)
    unseen = pipeline.unseen_words([request.prompt] * len(endings), config.negative_prompt, endings)
    steps = " + ".join(str(stage.steps) for stage in config.stages)
    recipe = "" if config.recipe == "mvdream" else f"recipe {config.recipe}, "
    parts = [f"{recipe}preset {config.preset}{method}: {request.why}", f"{steps} steps", f"seed {request.seed}"]
    refines = [f"model of its refinement {request.refine_model}"] if request.refine_model else []
    return "; ".join([*parts, f"model {pipeline.describe()}", *refines, *unseen])


def optimise(
    sampler: "Sampler", request: "Request", folder: Path, flags: Flags, say: Say, interrupt: "Interrupt"
) -> int:
    """Runs the loop and leaves everything in `folder`. Returns 0, or 130 / 143 when a signal stopped it."""
    from mvdream_fast.jobs import asset

    viewer, keep = open_viewer(flags, request, say), flags.prompts_file is not None
    refine = partial(place(flags).load, request, 1)
    try:
        way = asset.Way(keep, refine, say, flags.preview_every, flags.checkpoint_every, viewer)
        return 0 if asset.optimise(sampler, request, folder, way, interrupt) else interrupt.exit_code
    finally:
        if viewer is not None:
            viewer.close()


def open_viewer(flags: Flags, request: "Request", say: Say) -> "Viewer | None":
    """The live page of a run, where `--viewer` asks for it."""
    if not flags.viewer:
        return None
    from mvdream_fast.distill.viewer import Viewer

    viewer = Viewer(flags.viewer_port, request.prompt)
    print(viewer.describe(), flush=True)
    return viewer


if __name__ == "__main__":
    cli.run(main, Flags, prog="sds")
