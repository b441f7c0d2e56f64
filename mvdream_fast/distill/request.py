"""What a text-to-3D command is asked for: a preset, a file of settings over it, flags over both, one line of a file of
prompts over all. No torch here: a wrong setting is refused before anything is loaded.
"""

import dataclasses
import os
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mvdream_fast.checkpoints.places import EMBEDDED, draws_single_images, stored_config
from mvdream_fast.core.errors import ArgumentError, InputFileError, ModelError
from mvdream_fast.core.files import lines, read_text
from mvdream_fast.core.schema import checked, is_object
from mvdream_fast.distill.checks import check_config
from mvdream_fast.distill.config import (
    MVDREAM,
    SETTINGS,
    ExportConfig,
    SDSConfig,
    completed,
    joined,
    replaced,
    settings_of,
    written,
)
from mvdream_fast.distill.recipes import RECIPES, preset_for, resolve_config, sampled_as, shaded, usual_recipe
from mvdream_fast.distill.settings_file import MAX_FILE, checked_settings, read_line, read_object, tables
from mvdream_fast.models.config import SamplingGuidance
from mvdream_fast.models.tokenizer import check_prompt

if TYPE_CHECKING:
    from mvdream_fast.checkpoints.open import Source

MODELS = ("model", "refine_model")  # settings that name one
RENAMED = {"lr": "lr_encoding", "guidance": "kind"}  # flags whose field has another name
VSD_SCALE = 7.5  # ProlificDreamer's, where SDS needs more


@dataclass(frozen=True)
class Request:
    """One run. `why` is the reason for its preset, for the first line of output.

    refine_model: of the stages after the first, "" where the recipe has no other one for them.
    """

    prompt: str
    seed: int
    model: str
    config: SDSConfig
    export: ExportConfig = field(default_factory=ExportConfig)
    why: str = ""
    refine_model: str = ""

    def model_of(self, stage: int) -> str:
        """The model that the stage of this index asks."""
        return self.refine_model if stage and self.refine_model else self.model

    def models(self) -> list[str]:
        """The models that its stages ask, each once."""
        return [*dict.fromkeys(self.model_of(stage) for stage in range(len(self.config.stages)))]

    def settings(self) -> dict[str, Any]:
        """Everything that makes the run what it is, by name: of several stages the first one's settings by themselves,
        the others' as `stages`."""
        stages = {"stages": written(self.config)} if self.config.later else {}
        return settings_of(self.config) | stages | {"seed": self.seed} | self._models()

    def to_dict(self) -> dict[str, Any]:
        """The resolved form: what a run leaves as config.json, and what `--config` and `--resume` read."""
        rest = {"sds": written(self.config), "export": dataclasses.asdict(self.export)}
        return {"kind": "sds", "prompt": self.prompt, "seed": self.seed, **self._models(), **rest}

    def _models(self) -> dict[str, str]:
        return {"model": self.model} | ({"refine_model": self.refine_model} if self.refine_model else {})


def resolve(flags: dict[str, Any], file: dict[str, Any] | None = None) -> Request:
    """A run from the flags that were given (by name, others absent) and a file's content from `read_settings`.

    Raises:
        ArgumentError: a prompt, a number or a combination that no run can use.
    """
    file = file or {}
    prompt = flags.get("prompt", file.get("prompt", ""))
    check_prompt(prompt)
    model, refine = (_asked_model(flags.get(name, file.get(name))) for name in MODELS)
    preset, why = _preset(flags.get("preset", "auto"), file, model)
    recipe = _recipe(preset, flags, file, model)
    known = RECIPES[recipe]
    if refine is not None and known.refine is None:
        raise ArgumentError(f"--refine-model must be left out with the recipe {recipe}, whose stages ask one model")
    method = {name: flags[name] for name in ("method",) if name in flags}  # which the recipe's own losses depend on
    usual = _as_guided(resolve_config(preset, recipe=recipe, **method), model)
    config = _with_flags(_with_file(usual, file.get("sds", {})), flags)
    modes = "mode" in flags or any("mode" in table for table in tables(file))
    asked = [model, *[refine if known.refine else model] * len(config.later)]
    config = joined(_with_mode(stage, name, modes) for stage, name in zip(config.stages, asked, strict=True))
    check_config(config, flag_names(flags))
    export = ExportConfig(faces=config.stages[-1].representation.usual_faces)
    export = dataclasses.replace(export, **file.get("export", {}))
    names = {f.name for f in dataclasses.fields(ExportConfig)}
    export = dataclasses.replace(export, **{name: value for name, value in flags.items() if name in names})
    check_export(export, flag_names(flags))
    seed = _seed(flags.get("seed", file.get("seed", 0)))
    refines = refine or (known.refine.embedded if known.refine else "")
    return Request(prompt, seed, model or known.prior.embedded, config, export, why, refines)


def _asked_model(model: str | None) -> str | None:
    return None if model is None else absolute_model(model)


def absolute_model(model: str) -> str:
    """A model as commands in other folders name it: what lies at a path by its whole path. A name stays as it is, of a
    model of the package also where a folder is called so, and so does what is not there."""
    if model in EMBEDDED:
        return model
    path = os.path.expanduser(model)
    return str(Path(path).absolute()) if os.path.exists(path) else model


def is_same_model(one: str, other: str) -> bool:
    """Whether two names are those of one model; records of older runs have them as they were typed."""
    if one == other or {one, other} & {"", *EMBEDDED}:
        return one == other
    return Path(one).resolve() == Path(other).resolve()


def open_model(request: Request, stage: int = 0) -> "Source":
    """The model of a run's stage, recognised but not read. One from single views takes Stable Diffusion's own files,
    too.

    Raises: ModelError where there is none, saying what to get, or one of another kind than the recipe needs.
    """
    from mvdream_fast.checkpoints.open import open_source

    name, mode, model = request.config.recipe, request.config.stages[stage].mode, request.model_of(stage)
    prior = RECIPES[name].prior_of(stage)
    try:
        source = open_source(model, add_cameras=mode == "2d")
    except ModelError as error:
        if name == MVDREAM:
            raise
        raise ModelError(f"the recipe {name} needs {prior.needs}: {prior.get} ({error})") from error
    prior.check(name, mode, model, source.config)
    return source


def _as_guided(config: SDSConfig, model: str | None) -> SDSConfig:
    """The recipe's views sampled as the model's own config.json says, where it does."""
    stored = stored_config(model).get("guidance") if model else None
    if not is_object(stored):
        return config
    return sampled_as(config, checked(SamplingGuidance, stored, str(model), ModelError))


def _with_file(config: SDSConfig, found: dict[str, Any] | list[dict[str, Any]]) -> SDSConfig:
    """A recipe with a file's settings: those of one table for the whole run, of several for each stage its own."""
    if isinstance(found, dict):
        return resolve_config(config, **found)
    if len(found) != len(config.stages):
        raise ArgumentError(
            f"sds must be one table, or {len(config.stages)}, one for each stage of {config.recipe}, got {len(found)}"
        )
    return joined(resolve_config(stage, **table) for stage, table in zip(config.stages, found, strict=True))


def _recipe(preset: str, flags: dict[str, Any], file: dict[str, Any], model: str | None) -> str:
    """The recipe's name: the flag's, the file's, or the usual one; settings of a file that names none are mvdream's."""
    asked, of_file = flags.get("recipe"), tables(file)[0].get("recipe", file.get("recipe"))
    if None not in (asked, of_file) and asked != of_file:
        raise ArgumentError(f"--recipe {asked} contradicts the file of --config, which is for {of_file}; name one")
    if asked or of_file or file.get("sds"):
        return asked or of_file or MVDREAM
    return usual_recipe(preset, flag_names(flags), model is None or not draws_single_images(model))


def _preset(asked: str, file: dict[str, Any], model: str | None) -> tuple[str, str]:
    """The preset's name and the reason for it."""
    of_file = tables(file)[0].get("preset", file.get("preset", "auto"))
    if "auto" not in (asked, of_file) and asked != of_file:
        raise ArgumentError(f"--preset {asked} contradicts the file of --config, which is for {of_file}; name one")
    for preset, why in ((asked, "as asked"), (of_file, "as in the file of --config")):
        if preset != "auto":
            return preset, why
    if model is None:
        return "mini", "no --model given, so the small model that ships with the package draws"
    if model in EMBEDDED:
        return "mini", "the model is the embedded one"
    size = stored_config(model).get("vae", {}).get("image_size")
    if isinstance(size, int):
        return preset_for(size), f"the model {model} draws {size} pixels a side"
    return "paper", f"the model is {model}"


def _with_flags(config: SDSConfig, flags: dict[str, Any]) -> SDSConfig:
    names = set(SETTINGS) - {"recipe", "preset", "shading", "render_size"}
    config = resolve_config(config, **{name: value for name, value in flags.items() if name in names})
    config = joined(_stage_with_flags(stage, flags) for stage in config.stages)
    return shaded(config) if flags.get("shading") else config


def _stage_with_flags(config: SDSConfig, flags: dict[str, Any]) -> SDSConfig:
    """The flags that are no setting's name."""
    if flags.get("guidance", config.guidance.kind) != config.guidance.kind:
        config = replaced(config, kind=flags["guidance"])
        if config.guidance.kind == "vsd" and "guidance_scale" not in flags:
            config = replaced(config, guidance_scale=VSD_SCALE)
    if "lr" in flags:
        config = replaced(config, lr_encoding=flags["lr"])
    if "render_size" in flags:
        config = replaced(config, render_size=(flags["render_size"],) * len(config.render_size))
    return config


def _with_mode(config: SDSConfig, model: str | None, asked: bool) -> SDSConfig:
    """In the mode 2d where the model knows no other. Raises ArgumentError where 3d is asked of one."""
    if model is None or not draws_single_images(model):
        return config
    if asked and config.mode == "3d":
        raise ArgumentError(f"--mode must be 2d with {model}, which draws single images, without cameras, got 3d")
    return replaced(config, mode="2d")


def flag_names(flags: Iterable[str]) -> dict[str, str]:
    """What a user who gave these flags wrote for a setting: {"render_size": "--render-size"}."""
    return {RENAMED.get(flag, flag): f"--{flag.replace('_', '-')}" for flag in flags}


def _seed(seed: str | int) -> int:
    if seed == "random":
        return secrets.randbelow(2**31)
    digits = str(seed).lstrip("0") or str(seed)[:1]
    # The length first: Python makes no number of some thousand digits.
    if not str(seed).isascii() or not str(seed).isdigit() or len(digits) > 19 or int(digits) >= 2**63:
        raise ArgumentError(f'--seed must be a number from 0 to 2**63 - 1 or "random", got {seed!r:.60}')
    return int(digits)


def check_export(export: ExportConfig, names: Mapping[str, str] | None = None) -> None:
    """Raises ArgumentError for a mesh that cannot be made; names as in `check_config`."""
    checked(ExportConfig, dataclasses.asdict(export), "", ArgumentError, names)


def read_run(folder: Path) -> Request:
    """The request of a run folder, from its config.json. Raises InputFileError."""
    path = folder / "config.json"
    return run_of(read_object(path), str(path))


def run_of(data: dict[str, Any], source: str) -> Request:
    """The request that was resolved to this: what `Request.to_dict` gave, or a run's config.json.

    Raises: InputFileError, which begins with `source`.
    """
    file = checked_settings(data, source)
    if "sds" in file:
        file["sds"] = completed(file["sds"])
    missing = [key for key in ("kind", "prompt", "seed", "model", "sds") if key not in file]
    stages = [replaced(SDSConfig(), **table) for table in tables(file)]
    whole = all(set(table) == set(settings_of(stage)) for table, stage in zip(tables(file), stages, strict=True))
    if missing or not whole or not stages:
        raise InputFileError(
            f"{source} is not the configuration of an sds run: {', '.join(missing) or 'sds'} incomplete"
        )
    export, refine = ExportConfig(**file.get("export", {})), file.get("refine_model", "")
    return Request(file["prompt"], _seed(file["seed"]), file["model"], joined(stages), export, refine_model=refine)


def differences(run: Request, flags: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Which flags (by name) ask for something else than a run is: name -> (what is asked for, what the run has)."""
    out, settings = {}, run.settings() | {"refine_model": run.refine_model, "steps": run.config.ends[-1]}
    for name, value in flags.items():
        has = settings[RENAMED.get(name, name)]
        if name == "seed":
            same = str(value) == str(has)
        elif name in MODELS:
            same = is_same_model(value, has)
        elif name in ("recipe", "preset", "shading"):
            same = value in ("auto", has)
        elif name == "view_words":  # which may have been left to the mode
            has = run.config.guidance.tells_sides(run.config.mode)
            same = value == has
        else:
            same = _with_flags(run.config, {name: value}) == run.config
        if not same:
            out[name] = value, has
    return out


def read_prompts(path: Path, flags: dict[str, Any], file: dict[str, Any] | None) -> list[Request]:
    """The runs of a JSONL file: a line is a string, or an object with a prompt and any of Line's keys. Empty lines are
    skipped.

    Raises:
        InputFileError: a file that cannot be read or holds no prompt.
        ArgumentError: a line that cannot be used, by its number; no run has been made then.
    """
    requests = []
    for number, line in enumerate(lines(read_text(path, limit=MAX_FILE)), 1):
        if line.strip():
            try:
                requests.append(resolve({**flags, **read_line(line)}, file))
            except ArgumentError as error:
                raise ArgumentError(f"{path}, line {number}: {error}; nothing was run") from error
    if not requests:
        raise InputFileError(f'{path} holds no prompt; a line is {{"prompt": "a red chair", "seed": 1}}')
    return requests
