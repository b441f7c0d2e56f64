"""`python -m mvdream_fast.sds "a green armchair"`: a sentence becomes a 3D asset, by score distillation."""

import dataclasses
import json
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from mvdream_fast import cli
from mvdream_fast.errors import ArgumentError, DivergedError, InputFileError

if TYPE_CHECKING:
    from mvdream_fast.config import SDSConfig
    from mvdream_fast.field.asset import Asset
    from mvdream_fast.pipeline import MVDreamPipeline
    from mvdream_fast.text_to_3d import Record


@dataclass(frozen=True)
class Flags:
    """Turns a sentence into a 3D asset: mesh.glb, turntable.webp and report.html in a folder of its own."""

    text: Annotated[str, tyro.conf.Positional] = ""
    """The prompt, as a bare sentence."""
    prompt: str = ""
    """The prompt."""
    model: str = "embedded"
    """A model folder, a released checkpoint, or "embedded": the small model that ships with the package."""
    preset: Literal["auto", "mini", "paper"] = "auto"
    """mini: the embedded model on a CPU. paper: MVDream's recipe. auto: mini for the embedded model, else paper."""
    method: Literal["sds", "reconstruct"] = "sds"
    """reconstruct: fit the volume to sampled views instead of distilling."""
    steps: int | None = None
    """Number of steps; schedules stretch with it. Default: the preset's."""
    seed: str = "0"
    """A number, or "random" (the drawn seed is printed)."""
    output: Annotated[str, tyro.conf.arg(aliases=["-o"])] = "outputs"
    """Folder in which the run's folder is made."""
    resume: str = ""
    """Go on with a run: its folder, or "latest". Other settings then come from the run."""
    guidance_scale: float | None = None
    n_views: int | None = None
    """Views a group; for --method reconstruct, the number of views that are sampled."""
    render_size: int | None = None
    """Pixels a side, at every stage."""
    negative_prompt: str | None = None
    rescale: float | None = None
    """Share of the guided prediction whose deviation is rescaled to the unguided one's."""
    lr: float | None = None
    """Learning rate of the hash grid."""
    elevation_range_deg: tuple[float, float] | None = None
    fovy_range_deg: tuple[float, float] | None = None
    shading: bool = False
    """The recipe's shading variant: point light and orientation loss."""
    preview_every: int | None = None
    """Steps between preview pictures. Default: one at 2 % of the steps, then every 10 %."""
    checkpoint_every: int = 100
    faces: int | None = None
    """At most this many triangles in the mesh."""
    mesh_resolution: int = 128
    device: str = "auto"
    dtype: str = "auto"
    threads: int | None = None
    quiet: bool = False
    """No progress lines."""


def main(flags: Flags) -> None:
    from mvdream_fast import run

    say = (lambda *_: None) if flags.quiet else (lambda line: print(line, flush=True))
    if flags.resume:
        folder = run.resolve_resume(flags.resume, flags.output)
        prompt, seed, model, config = read_run(folder)
    else:
        prompt, seed, model, config, why = plan(flags)
        say(f"preset {config.preset}: {why}; {config.steps} steps; seed {seed}")
        folder = run.make_run_folder(flags.output, prompt, seed)
        write_run(folder, prompt, seed, model, config)
    cli.set_threads(flags.threads)
    start = time.perf_counter()
    pipeline = load_pipeline(model, flags, say)
    if not (folder / "views.png").exists():
        sample_views(pipeline, prompt, seed, folder, config)
        say(f"first views after {time.perf_counter() - start:.1f} s: {folder / 'views.png'}")
    code = optimise(pipeline, prompt, seed, config, folder, flags, say)
    if code:
        print(f"sds: stopped; go on with --resume {folder}", file=sys.stderr)
        sys.exit(code)
    say(f"done in {time.perf_counter() - start:.0f} s: {folder}")


def plan(flags: Flags) -> tuple[str, int, str, "SDSConfig", str]:
    """Prompt, seed, model, configuration and the reason for the preset, from the flags. Raises ArgumentError."""
    import secrets

    from mvdream_fast.config import resolve_config, shaded
    from mvdream_fast.models.tokenizer import check_prompt

    if flags.text and flags.prompt:
        raise ArgumentError(f"give the prompt once: got {flags.text!r} and --prompt {flags.prompt!r}")
    prompt = flags.prompt or flags.text
    check_prompt(prompt)
    if flags.seed != "random" and not flags.seed.isdigit():
        raise ArgumentError(f'--seed must be a number from 0 up or "random", got {flags.seed!r}')
    seed = secrets.randbelow(2**31) if flags.seed == "random" else int(flags.seed)
    preset, why = flags.preset, "as asked"
    if preset == "auto":
        embedded = flags.model == "embedded"
        preset = "mini" if embedded else "paper"
        why = "no --model given: the embedded model" if embedded else f"the model is {flags.model}"
    names = (
        "steps",
        "guidance_scale",
        "n_views",
        "negative_prompt",
        "rescale",
        "elevation_range_deg",
        "fovy_range_deg",
    )
    overrides = {name: getattr(flags, name) for name in names if getattr(flags, name) is not None}
    config = resolve_config(preset, method=flags.method, **overrides)
    if flags.lr is not None:
        config = dataclasses.replace(config, lr_encoding=flags.lr)
    if flags.render_size is not None:
        config = dataclasses.replace(config, render_size=(flags.render_size,) * len(config.render_size))
    config = shaded(config) if flags.shading else config
    check_config(config)
    return prompt, seed, flags.model, config, why


def check_config(config: "SDSConfig") -> None:
    """Raises ArgumentError for numbers that no run can use."""
    rules = (
        (config.steps >= 1, "--steps must be at least 1", config.steps),
        (config.n_views >= 1, "--n-views must be at least 1", config.n_views),
        (8 <= min(config.render_size) <= max(config.render_size) <= 1024, "--render-size must be 8 to 1024",
         config.render_size),
        (abs(config.guidance_scale) < 1e6, "--guidance-scale must be below a million", config.guidance_scale),
        (0 <= config.rescale <= 1, "--rescale must be within 0 and 1", config.rescale),
        (0 < config.lr_encoding < 10, "--lr must be within 0 and 10", config.lr_encoding),
        (0 < config.fovy_range_deg[0] <= config.fovy_range_deg[1] < 180,
         "--fovy-range-deg must be two angles, low and high, within 0 and 180", config.fovy_range_deg),
        (-90 <= config.elevation_range_deg[0] <= config.elevation_range_deg[1] <= 90,
         "--elevation-range-deg must be two angles, low and high, within -90 and 90", config.elevation_range_deg),
    )  # fmt: skip
    for holds, sentence, value in rules:
        if not holds:
            raise ArgumentError(f"{sentence}, got {value}")


def write_run(folder: Path, prompt: str, seed: int, model: str, config: "SDSConfig") -> None:
    """config.json (what --resume reads), cmd.txt and env.json."""
    from mvdream_fast import __version__, machine
    from mvdream_fast.files import atomic_write

    about = {"processor": machine.cpu_name(), "cores": cli.available_cores(), "memory": machine.total_memory()}
    record = {"kind": "sds", "prompt": prompt, "seed": seed, "model": model, "sds": dataclasses.asdict(config)}
    record |= {"version": __version__, "machine": about}
    atomic_write(folder / "config.json", json.dumps(record, indent=2) + "\n")
    atomic_write(folder / "cmd.txt", shlex.join(["python", "-m", "mvdream_fast.sds", *sys.argv[1:]]) + "\n")
    atomic_write(
        folder / "env.json", json.dumps(about | {"python": sys.version, "version": __version__}, indent=2) + "\n"
    )


def read_run(folder: Path) -> tuple[str, int, str, "SDSConfig"]:
    """Prompt, seed, model and configuration of a run folder. Raises InputFileError."""
    from mvdream_fast.config import SDSConfig, from_dict

    path = folder / "config.json"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["kind"] != "sds":
            raise ValueError(f"it describes a {data['kind']}")
        return str(data["prompt"]), int(data["seed"]), str(data["model"]), from_dict(SDSConfig, data["sds"], str(path))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputFileError(f"{path} is not the configuration of an sds run: {error}") from error


def load_pipeline(model: str, flags: Flags, say) -> "MVDreamPipeline":
    from mvdream_fast.pipeline import MVDreamPipeline

    pipeline = MVDreamPipeline.from_pretrained(model, flags.device, flags.dtype)
    say(f"model {model}: {pipeline.describe()}")
    return pipeline


def sample_views(pipeline: "MVDreamPipeline", prompt: str, seed: int, folder: Path, config: "SDSConfig") -> None:
    """views.png: four views as the model draws them, so that a bad prompt is seen before the long part."""
    import io

    from mvdream_fast.files import atomic_write

    warn = lambda sentence: print(f"sds: {sentence}", file=sys.stderr)  # noqa: E731
    views = pipeline(prompt, seed=seed, n_steps=25, negative_prompt=config.negative_prompt, warn=warn)
    out = io.BytesIO()
    views.sheet().save(out, "PNG")
    atomic_write(folder / "views.png", out.getvalue())


def optimise(pipeline, prompt: str, seed: int, config: "SDSConfig", folder: Path, flags: Flags, say) -> int:
    """Runs the loop and leaves everything in `folder`. Returns 0, or 130 / 143 when a signal stopped it."""
    from mvdream_fast import run
    from mvdream_fast.report import write_report
    from mvdream_fast.text_to_3d import TextTo3D

    (folder / "preview").mkdir(exist_ok=True)
    watcher = Watcher(folder, config, flags.preview_every, say)
    about = json.loads((folder / "config.json").read_text())
    notes: list[str] = []
    with run.Interrupt() as interrupt:
        try:
            asset = TextTo3D(pipeline)(
                prompt, seed=seed, config=config, callback=watcher, checkpoints=folder / "ckpt",
                checkpoint_every=flags.checkpoint_every, interrupt=interrupt,
            )  # fmt: skip
        except DivergedError as error:
            write_report(folder, about, watcher.log.read(), [f"The run did not finish: {error}."])
            raise
        if interrupt.requested is not None:
            write_report(folder, about, watcher.log.read(), ["The run was stopped before its end."])
            return interrupt.exit_code
        say("writing the mesh, the turntable and the report")
        asset.save(folder / "asset.safetensors")
        asset.turntable(folder / "turntable.webp", size=128)
        try:
            mesh = asset.save_glb(folder / "mesh.glb", flags.mesh_resolution, flags.faces)
            notes.append(f"{len(mesh.vertices)} vertices, {len(mesh.faces)} triangles")
        except DivergedError as error:
            notes.append(f"There is no mesh: {error}.")
            write_report(folder, about, watcher.log.read(), notes)
            raise
        write_report(folder, about, watcher.log.read(), notes, mesh)
    return 0


class Watcher:
    """The callback of a run: log.jsonl, previews, and a progress line a second (a plain line every ten, in a pipe)."""

    def __init__(self, folder: Path, config: "SDSConfig", preview_every: int | None, say):
        from mvdream_fast import run

        self.folder, self.config, self.say = folder, config, say
        self.log = run.JsonlLog(folder / "log.jsonl")
        self.preview_every = preview_every
        self.begin = self.last = time.perf_counter()
        self.n_done = 0

    def __call__(self, record: "Record", asset: "Asset") -> None:
        if self.n_done == 0:
            self.log.truncate_after(record.step - 1)
        self.n_done += 1
        self.log.write(dataclasses.asdict(record))
        if self.is_preview(record.step + 1):
            save_preview(asset, self.folder / "preview" / f"{record.step + 1:06d}.png")
        now = time.perf_counter()
        if now - self.last > (1 if sys.stdout.isatty() else 10):
            self.last = now
            self.progress(record, now)

    def is_preview(self, done: int) -> bool:
        if self.preview_every:
            return done % self.preview_every == 0
        steps = self.config.steps
        return done == max(1, steps // 50) or done % max(1, steps // 10) == 0

    def progress(self, record: "Record", now: float) -> None:
        from mvdream_fast.machine import resident_memory

        pace = (now - self.begin) / self.n_done
        left = pace * (self.config.steps - record.step - 1)
        self.say(
            f"step {record.step + 1}/{self.config.steps}  {pace:.2f} s/it  {left / 60:.1f} min left  "
            f"loss {record.loss:.4g}  occupancy {100 * record.occupancy:.0f} %  "
            f"memory {resident_memory() / 2**30:.1f} GB"
        )


def save_preview(asset: "Asset", path: Path, size: int = 64) -> None:
    """Four views of the growing asset: colour, opacity and depth, one row each."""
    import io

    import torch
    from PIL import Image

    from mvdream_fast.files import atomic_write

    views = asset.render(size=size)
    depth = views.depth / views.depth.amax().clamp(min=1e-6)
    rows = [views.rgb, views.opacity[:, None].expand(-1, 3, -1, -1), depth[:, None].expand(-1, 3, -1, -1)]
    sheet = torch.cat([torch.cat([*row], dim=2) for row in rows], dim=1)
    out = io.BytesIO()
    pixels = (sheet.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    Image.fromarray(pixels).save(out, "PNG")
    atomic_write(path, out.getvalue())


if __name__ == "__main__":
    cli.run(main, Flags, prog="sds")
