"""`python -m mvdream_fast.evaluate MODEL [RUN ...]`: figures for models and for finished text-to-3D runs.

What is measured is evaluation/measures.py's, how it is gathered evaluation/judging.py's; here are flags and the table.
"""

import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro import conf

from mvdream_fast.core import cli
from mvdream_fast.core.errors import ArgumentError, InputFileError, OutputError, UserError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from mvdream_fast.evaluation.judging import Judge, SamplingOptions

QUICK = {"steps": 10, "seeds": 1, "n_captions": 12, "n_prompts": 8}

MODEL_ROWS = (
    ("top1", "text retrieval, top-1 (share)", ".3f"),
    ("top5", "text retrieval, top-5 (share)", ".3f"),
    ("similarity", "similarity to the text (cosine)", ".3f"),
    ("azimuth_error_deg", "azimuth error, median (deg)", ".1f"),
    ("azimuth_within_45", "azimuth within 45 deg (share)", ".3f"),
    ("frechet", "Frechet distance to real renders", ".4f"),
    ("hull_support", "silhouettes that a hull explains (share)", ".3f"),
    ("colour_spread", "colour differences between views", ".3f"),
    ("colours_kept", "the prompt's colours are seen (share)", ".3f"),
    ("diversity", "diversity over seeds (1 - cosine)", ".3f"),
    ("gradient", "sharpness (mean gradient)", ".4f"),
    ("named", "ImageNet classifier: names it, top-5 (share)", ".2f"),
    ("classifier_frechet", "ImageNet classifier: Frechet distance to real renders", ".0f"),
    ("classifier_kernel", "ImageNet classifier: kernel distance to real renders", ".2f"),
)
RUN_ROWS = (
    ("top1", "top-1", ".2f"),
    ("similarity", "similarity", ".3f"),
    ("janus", "Janus", ".2f"),
    ("shows_front", "front seen", ".2f"),
    ("azimuth_error_deg", "azimuth error", ".0f"),
    ("turn_overlap", "silhouettes", ".3f"),
    ("turn_colour_spread", "colours", ".3f"),
)
# The second table of runs: what owes nothing to our evaluator.
OTHER_ROWS = (
    ("fog", "fog", ".2f"),
    ("gradient", "gradient", ".4f"),
    ("sharpness", "over its views'", ".2f"),
    ("colours_kept", "colours kept", ".2f"),
    ("named", "named", ".2f"),
    ("agreement", "like its views", ".2f"),
    ("mesh_overlap", "mesh: silhouettes", ".3f"),
    ("mesh_psnr", "mesh: PSNR", ".1f"),
)


@dataclass(frozen=True)
class Flags:
    """Measures models (four views of fixed prompts) and finished runs (a turntable, fog, mesh), beside real renders.

    The judge is a small image-text model trained on the training renders alone: in-domain figures, no CLIP scores.
    With the extra `evaluate`, an ImageNet classifier that never saw them is asked, too. A target that cannot be
    measured stops no other: its reason is printed, and the exit code is that of the first.
    """

    targets: Annotated[tuple[cli.Place, ...], conf.Positional, conf.arg(metavar="MODEL|RUN")] = ()
    """Model folders or names, and run folders; by default "embedded", the small model that ships with the package."""
    json: Path | None = None
    """A new file for all figures."""
    data: Path | None = None
    """Shards whose held-out renders are the yardstick, instead of the figures that ship with the evaluator."""
    quick: bool = False
    """A rough look at a model: 10 steps, one seed, 12 captions and 8 prompts."""
    steps: int | None = None
    """Denoising steps of a model's views (default 25)."""
    seeds: int | None = None
    """Samples of each held-out caption (default 2; diversity needs two)."""
    guidance_scale: float | None = None
    """Of a model's views; by default what suits the model."""
    uncond_mode: Literal["3d", "2d"] | None = None
    """How guidance asks without the prompt, as for `generate`; by default what suits the model."""
    prompts: Path | None = None
    """Another list of prompts, one a line, with "= a sofa" behind what the evaluator knows by another name."""
    evaluator: Path | None = None
    """Another evaluator: the output of train --stage evaluator."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    dtype: str = "auto"
    threads: int | None = None
    """CPU threads; by default one a core."""
    quiet: bool = False
    """Prints the figures only."""


def main(flags: Flags) -> None:
    """Checks the flags, then measures and prints a table."""
    check_flags(flags)
    kinds = {target: kind_of(target) for target in flags.targets or ("embedded",)}
    say = (lambda _: None) if flags.quiet else (lambda line: print(line, file=sys.stderr, flush=True))
    if not flags.targets:
        say("no target was given: the embedded model")
    from mvdream_fast.evaluation.judging import load_judge

    cli.set_threads(flags.threads)
    judge = load_judge(say, flags.evaluator, flags.prompts, flags.data)
    report, code = measured(kinds, flags, judge, say)
    if report["models"] or report["runs"]:
        _print(report, judge)
        if flags.json:
            from mvdream_fast.core.files import atomic_write

            atomic_write(flags.json, json.dumps(report, indent=2) + "\n")
    if code:
        sys.exit(code)


def measured(kinds: dict[str, str], flags: Flags, judge: "Judge", say) -> tuple[dict[str, Any], int]:
    """The figures of all targets, given with their kinds, and the exit code: that of the first that has none.

    What it cost to measure the others is not lost: a target without figures is told on stderr, and is in `failed`.
    """
    from mvdream_fast.evaluation.judging import evaluate_run, summary
    from mvdream_fast.evaluation.runs import compared

    report: dict[str, Any] = {"kind": "evaluation", "evaluator": judge.evaluator.about, "models": {}, "runs": []}
    report["failed"], seen, code = {}, [], 0
    for target, kind in kinds.items():
        try:
            if kind == "model":
                report["models"][target] = _evaluate_model(target, flags, judge, say)
            else:
                figures, features = evaluate_run(Path(target).expanduser(), judge)
                report["runs"].append(figures)
                seen.append(features)
        except UserError as error:
            print(f"evaluate: {target}: {error}", file=sys.stderr)
            report["failed"][target], code = str(error), code or error.exit_code
    if report["runs"]:
        report["runs_mean"] = summary(report["runs"])
        report["runs_distances"] = {} if judge.reference.seen is None else compared(seen, judge.reference.seen)
    return report, code


def check_flags(flags: Flags) -> None:
    """Refuses what no evaluation can use, before torch is imported. Raises UserError."""
    cli.check_at_least(flags, 1, "steps", "seeds", "threads")
    if not abs(flags.guidance_scale or 0.0) < 1e6:
        raise ArgumentError(f"--guidance-scale must be a finite number, got {flags.guidance_scale}")
    repeated = sorted({target for target in flags.targets if flags.targets.count(target) > 1})
    if repeated:
        raise ArgumentError(f"each target must be given once, got {repeated[0]} twice")
    if flags.json and flags.json.exists():
        raise OutputError(f"{flags.json} exists already; name another file with --json")
    if flags.json and not flags.json.absolute().parent.is_dir():
        raise OutputError(f"{flags.json} cannot be written: {flags.json.absolute().parent} is not a folder")


def kind_of(target: str) -> str:
    """ "model" or "sds", by the folder's config.json. What has none is left to the model loader.

    Raises: InputFileError for folders of other kinds; ModelError where config.json cannot be read.
    """
    from mvdream_fast.checkpoints.folder import read_json
    from mvdream_fast.checkpoints.places import EMBEDDED

    folder = Path(target).expanduser()
    if target in EMBEDDED or not folder.is_dir():
        return "model"
    kind = read_json(folder / "config.json").get("kind", "model")
    if kind in ("dreambooth", "training"):
        return "model"  # which the run left
    if kind not in ("model", "sds"):
        raise InputFileError(f"{target} is of kind {kind!r}, which has no evaluation; name a model or an sds run")
    return kind


def sampling(flags: Flags) -> "SamplingOptions":
    """How models are asked: --quick first, then what is given by itself."""
    from mvdream_fast.evaluation.judging import SamplingOptions

    given = {name: getattr(flags, name) for name in ("steps", "seeds") if getattr(flags, name) is not None}
    usual = SamplingOptions(guidance_scale=flags.guidance_scale, uncond_mode=flags.uncond_mode)
    return dataclasses.replace(usual, **((QUICK if flags.quick else {}) | given))


def _evaluate_model(target: str, flags: Flags, judge: "Judge", say) -> dict[str, Any]:
    from mvdream_fast.evaluation.judging import evaluate_model
    from mvdream_fast.pipeline import MVDreamPipeline

    pipeline = MVDreamPipeline.from_pretrained(target, flags.device, flags.dtype)
    say(f"{target}: {pipeline.describe()}")
    scale, uncond_mode = pipeline.guidance(flags.guidance_scale, flags.uncond_mode)
    options = dataclasses.replace(sampling(flags), guidance_scale=scale, uncond_mode=uncond_mode)
    return evaluate_model(pipeline, judge, options, say)


def _print(report: dict[str, Any], judge: "Judge") -> None:
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 120)
    real = judge.reference.scores
    for target, result in report["models"].items():
        asked = result["options"]
        heads = (
            f"{_sampled(asked['n_captions'], len(judge.reference.captions))} held-out captions",
            f"{_sampled(asked['n_prompts'], len(judge.prompts))} fixed prompts",
            "real renders",
        )
        columns = (result["held_out"], result["prompts"], _at_size(real, [result["held_out"]["size"]]))
        rows = [(label, [_number(x.get(key), form) for x in columns]) for key, label, form in MODEL_ROWS]
        console.print(_table(f"{target}: four views", ("measure", *heads), rows))
        console.print(f"{target}: {_ratio(result, real)}; took {result['seconds']:.0f} s")
    if report["runs"]:
        _print_runs(console, report, real)


def _print_runs(console: "Console", report: dict[str, Any], real: dict[str, float]) -> None:
    runs, mean = report["runs"], report["runs_mean"]
    prompts = [(run["prompt"], run) for run in runs]
    views = {"gradient": mean.get("views_gradient"), "named": mean.get("views_named")}
    same_size = _at_size(real, [run["size"] for run in runs])
    judged = [*prompts, ("mean", mean), ("real renders", real)]
    others = [*prompts, ("mean", mean), ("sampled views", views), ("real renders", same_size)]
    for title, columns, rows in (
        ("finished runs: a turntable of 16 views", RUN_ROWS, judged),
        ("finished runs: figures that owe nothing to the evaluator", OTHER_ROWS, others),
    ):
        lines = [(name, [_number(row.get(key), form) for key, _, form in columns]) for name, row in rows]
        console.print(_table(title, ("prompt", *(label for _, label, _ in columns)), lines))
    console.print(f"median fog {mean['fog_median']:.2f} (real renders {_number(real.get('fog_median'), '.2f')})")
    for name, found in report["runs_distances"].items():
        console.print(
            f"{name}: Frechet distance {found['classifier_frechet']:.0f}, kernel distance "
            f"{found['classifier_kernel']:.2f} to real renders in the ImageNet classifier's features"
        )


def _table(title: str, heads: tuple[str, ...], rows: list[tuple[str, list[str]]]) -> "Table":
    """A name and numbers in each row."""
    from rich import box
    from rich.table import Table

    table = Table(title=title, box=box.SIMPLE, title_justify="left")
    for i, head in enumerate(heads):
        table.add_column(head, justify="right" if i else "left")
    for name, numbers in rows:
        table.add_row(name, *numbers)
    return table


def _at_size(real: dict[str, float], sizes: list[int]) -> dict[str, float | None]:
    """What real renders score, their gradient at the size of other images; none where those differ in size."""
    size = sizes[0] if len(set(sizes)) == 1 else None
    return real | {"gradient": real.get(f"gradient_{size}")}


def _sampled(most: int | None, n: int) -> str:
    """How many of n were sampled, which are told apart from all n."""
    return f"{n}" if most is None or most >= n else f"{most} of {n}"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _ratio(result: dict[str, Any], real: dict[str, float]) -> str:
    """The headline: how much of the real renders' retrieval the model reaches, and what the distances compare with."""
    share = result["held_out"]["top1"] / real["top1"] if real["top1"] else 0.0
    return (
        f"{100 * share:.0f} % of the real renders' top-1; other real objects are at a Frechet distance of "
        f"{real['frechet_other_objects']:.4f}"
    )


if __name__ == "__main__":
    cli.run(main, Flags, prog="evaluate")
