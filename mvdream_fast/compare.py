"""`python -m mvdream_fast.compare "a green armchair" -o OUT`: systems of text to 3D, side by side on one page."""

import dataclasses
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from mvdream_fast.core import cli
from mvdream_fast.core.arguments import user_path
from mvdream_fast.core.errors import ArgumentError, InputFileError
from mvdream_fast.distill.config import RecipeName

if TYPE_CHECKING:
    from mvdream_fast.distill.request import Request

Say = Callable[[str], None]


@dataclass(frozen=True)
class Flags:
    """Runs several recipes on the same prompts, each in a process of its own, and shows what they made side by side.

    OUT/compare.html is one page without a network: the assets turn together, with time, memory, scores and settings.
    Beside it lie compare.png, compare.md and compare.json; the runs are in OUT/runs/<prompt>/<recipe>/. The same
    command again makes what is missing: finished runs stay, others go on.
    """

    text: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="PROMPT")] = None
    """The prompt."""
    prompts_file: Path | None = None
    """Several prompts instead, one a line; lines that begin with # are comments."""
    first: int | None = None
    """Only so many of the file's prompts, from its beginning."""
    recipes: tuple[RecipeName, ...] = ("mvdream", "dreamfusion-if", "magic3d-if-sd", "textmesh-if", "prolificdreamer")
    """The systems, in the order of the page; python -m mvdream_fast.sds --list-recipes says what each is."""
    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None
    """The folder of the comparison, new or one to go on with. Needed."""
    seed: int = 0
    """Of every run. Default: the settings file's, else 0."""
    size: Literal["mini", "fast", "paper"] = "mini"
    """The preset of every run: at mini and fast all recipes ask the model about as many views. Default: the settings
    file's, else mini."""
    models: tuple[str, ...] = ()
    """Other models than the package's own, each as RECIPE=MODEL; as RECIPE=MODEL,MODEL where later stages ask
    another."""
    steps: int | None = None
    """Steps of every run; schedules stretch with it. Default: the preset's."""
    config: Path | None = None
    """A settings file of sds (TOML) for every run; flags win over it."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    threads: int | None = None
    """CPU threads; by default one a core."""
    quiet: bool = False
    """Prints the table only."""
    given: cli.Given = frozenset()


@dataclass(frozen=True)
class Job:
    """One run: what is asked for, where, and the flags that begin it."""

    request: "Request"
    folder: Path
    begin: list[str]


def main(flags: Flags) -> None:
    """Checks everything, makes the runs that are missing, then the page. Exits with the first failure's code."""
    from mvdream_fast.distill import child_run

    say: Say = (lambda _: None) if flags.quiet else (lambda line: print(line, flush=True))
    check_flags(flags)
    jobs = plan(flags)
    for job in jobs:
        child_run.check_same(job.folder, job.request)
    run_all(jobs, flags, say)
    cli.set_threads(flags.threads)
    page(jobs, flags, say)
    codes = (result.exit_code for job in jobs if (result := child_run.result_of(job.folder)))
    if code := next(filter(None, codes), 0):
        sys.exit(code)


def check_flags(flags: Flags) -> None:
    """What is wrong with the flags by themselves. Raises ArgumentError."""
    if (flags.text is None) == (flags.prompts_file is None):
        raise ArgumentError("give one prompt, or several with --prompts-file")
    if flags.output is None:
        raise ArgumentError("-o must name the folder of the comparison, new or one to go on with")
    if not flags.recipes or len(set(flags.recipes)) < len(flags.recipes):
        raise ArgumentError(f"--recipes must name at least one recipe, each once, got {' '.join(flags.recipes)}")
    if flags.first is not None and flags.prompts_file is None:
        raise ArgumentError("--first counts the prompts of --prompts-file; leave it out, or name a file")
    cli.check_at_least(flags, 1, "first", "steps", "threads")
    cli.check_at_least(flags, 0, "seed")


def prompts(flags: Flags) -> list[str]:
    """The prompts, as they are asked for. Raises InputFileError where the file holds none, or one twice."""
    from mvdream_fast.core.files import read_lines

    if flags.prompts_file is None:
        return [flags.text or ""]
    lines = [line.strip() for line in read_lines(flags.prompts_file)]
    found = [line for line in lines if line and not line.startswith("#")][: flags.first]
    if not found or len(set(found)) < len(found):
        raise InputFileError(f"{flags.prompts_file} must hold at least one prompt, each once, got {len(found)} lines")
    return found


def models(flags: Flags) -> dict[str, list[str]]:
    """The models that are named, by recipe: one, or two where its later stages have their own. Raises ArgumentError."""
    out = {}
    for word in flags.models:
        recipe, sign, names = word.partition("=")
        found = names.split(",")
        if not sign or recipe not in flags.recipes or not all(found) or len(found) > 2 or recipe in out:
            raise ArgumentError(
                f"--models must be RECIPE=MODEL or RECIPE=MODEL,MODEL, each for one of --recipes, got {word!r}"
            )
        out[recipe] = [str(user_path(model)) if model.startswith("~") else model for model in found]
    return out


def plan(flags: Flags) -> list[Job]:
    """Every run, prompt by prompt, checked as `sds` checks it. Raises ArgumentError, InputFileError."""
    from mvdream_fast.core.run_folder import slugify
    from mvdream_fast.distill import request, settings_file

    file = settings_file.read_settings(flags.config) if flags.config else {}
    every = for_every_run(flags, file)
    named, root, jobs = models(flags), Path(flags.output or ""), []
    for prompt in prompts(flags):
        for recipe in flags.recipes:
            asked = {"recipe": recipe, **every, **dict(zip(("model", "refine_model"), named.get(recipe, [])))}
            begin = [f"{cli.option(name)}={value}" for name, value in {"prompt": prompt, **asked}.items()]
            begin += [f"--config={flags.config}"] if flags.config else []
            wanted = request.resolve({"prompt": prompt, **asked}, file)
            jobs.append(Job(dataclasses.replace(wanted, why=""), root / "runs" / slugify(prompt) / recipe, begin))
    return jobs


def for_every_run(flags: Flags, file: dict[str, Any]) -> dict[str, Any]:
    """The flags of `sds` that all runs have in common: those that were given, and mini where nothing names a preset.

    file: what `read_settings` found. Raises ArgumentError where a flag contradicts it.
    """
    from mvdream_fast.distill.settings_file import tables

    recipe, preset = (tables(file)[0].get(name, file.get(name, "auto")) for name in ("recipe", "preset"))
    others = [name for name in flags.recipes if recipe not in ("auto", name)]
    if others:
        raise ArgumentError(
            f"--recipes must be {recipe} with this file of --config, which is for it, got {' '.join(flags.recipes)}"
        )
    given = {"preset" if name == "size" else name: value for name, value in cli.given(flags).items()}
    if preset not in ("auto", given.get("preset", preset)):
        raise ArgumentError(f"--size {flags.size} contradicts the file of --config, which is for {preset}; name one")
    if "seed" not in given and file.get("seed") == "random":
        raise ArgumentError(
            f"the seed in {flags.config} must be a number, so that the same command goes on with its runs, got random; "
            "give one with --seed"
        )
    asked = {name: given[name] for name in ("preset", "seed", "steps") if name in given}
    return asked if preset != "auto" else {"preset": flags.size} | asked


def run_all(jobs: list[Job], flags: Flags, say: Say) -> None:
    """Makes what is missing, one run after the other. Exits with 130 or 143 when a signal stopped it."""
    from mvdream_fast.core.run_folder import Interrupt
    from mvdream_fast.distill import child_run

    how = [f"--device={flags.device}", *([f"--threads={flags.threads}"] if flags.threads else [])]
    with Interrupt() as interrupt:
        for i, job in enumerate(jobs, 1):
            name = f"{job.request.prompt!r}, {job.request.config.recipe}"
            result = child_run.result_of(job.folder)
            if result is not None and result.exit_code == 0:
                say(f"[{i} of {len(jobs)}] {name}: finished already")
                continue
            say(f"[{i} of {len(jobs)}] {name}: {job.folder}")
            result = child_run.run(job.folder, job.begin, how, flags.quiet, interrupt)
            if interrupt.requested is not None:
                print("compare: stopped; the same command goes on", file=sys.stderr)
                sys.exit(interrupt.exit_code)
            if result.exit_code:
                print(f"compare: {name} failed ({result.exit_code}); the others go on", file=sys.stderr)


def page(jobs: list[Job], flags: Flags, say: Say) -> None:
    """Judges the runs, and writes the page and its companions."""
    from mvdream_fast.evaluation.comparison import judged
    from mvdream_fast.evaluation.comparison_page import write_comparison
    from mvdream_fast.evaluation.judging import load_judge

    say("judging what was made")
    judge = load_judge(say)
    found = [judged(job.request, job.folder, judge) for job in jobs]
    print(write_comparison(Path(flags.output or ""), found), end="")
    say(f"wrote {flags.output}/compare.html, .png, .md and .json")


if __name__ == "__main__":
    cli.run(main, Flags, prog="compare")
