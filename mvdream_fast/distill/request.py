"""What a text-to-3D command is asked for: a preset, a file of settings over it, flags over both, one line of a file of
prompts over all. No torch here: a wrong setting is refused before anything is loaded.
"""

import dataclasses
import json
import math
import secrets
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from mvdream_fast.checkpoints.folder import read_json
from mvdream_fast.core.errors import ArgumentError, InputFileError, ModelError
from mvdream_fast.distill.recipes import (
    SDS_PRESETS,
    SETTINGS,
    ExportConfig,
    SDSConfig,
    preset_for,
    replaced,
    resolve_config,
    settings_of,
    shaded,
    typed,
)
from mvdream_fast.models.config import from_dict
from mvdream_fast.models.tokenizer import check_prompt

TOP_KEYS = {"kind", "prompt", "seed", "model", "preset", "sds", "export", "version", "machine"}
LINE_KEYS = {"prompt", "seed", "negative_prompt", "steps", "guidance_scale"}
MAX_FILE = 8 << 20


@dataclass(frozen=True)
class Request:
    """One run. `why` is the reason for its preset, for the first line of output."""

    prompt: str
    seed: int
    model: str
    config: SDSConfig
    export: ExportConfig = field(default_factory=ExportConfig)
    why: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The resolved form: what a run leaves as config.json, and what `--config` and `--resume` read."""
        rest = {"sds": settings_of(self.config), "export": dataclasses.asdict(self.export)}
        return {"kind": "sds", "prompt": self.prompt, "seed": self.seed, "model": self.model, **rest}


def resolve(flags: dict[str, Any], file: dict[str, Any] | None = None) -> Request:
    """A run from the flags that were given (by name, others absent) and a file's content from `read_settings`.

    Raises:
        ArgumentError: a prompt, a number or a combination that no run can use.
    """
    file = file or {}
    prompt = flags.get("prompt", file.get("prompt", ""))
    check_prompt(prompt)
    model = flags.get("model", file.get("model"))
    preset, why = _preset(flags.get("preset", "auto"), file, model)
    config = resolve_config(preset, **file.get("sds", {}))
    config = _with_flags(config, flags)
    check_config(config)
    export = dataclasses.replace(ExportConfig(), **file.get("export", {}))
    names = {f.name for f in dataclasses.fields(ExportConfig)}
    export = dataclasses.replace(export, **{name: value for name, value in flags.items() if name in names})
    check_export(export)
    return Request(prompt, _seed(flags.get("seed", file.get("seed", 0))), model or "embedded", config, export, why)


def _preset(asked: str, file: dict[str, Any], model: str | None) -> tuple[str, str]:
    """The preset's name and the reason for it."""
    of_file = file.get("sds", {}).get("preset", file.get("preset", "auto"))
    if "auto" not in (asked, of_file) and asked != of_file:
        raise ArgumentError(f"--preset {asked} contradicts the file of --config, which is for {of_file}; name one")
    for preset, why in ((asked, "as asked"), (of_file, "as in the file of --config")):
        if preset != "auto":
            return preset, why
    if model is None:
        return "mini", "no --model given, so the small model that ships with the package draws"
    if model in ("embedded", "mini"):
        return "mini", "the model is the embedded one"
    size = read_json(Path(model) / "config.json").get("vae", {}).get("image_size") if Path(model).is_dir() else None
    if isinstance(size, int):
        return preset_for(size), f"the model {model} draws {size} pixels a side"
    return "paper", f"the model is {model}"


def _with_flags(config: SDSConfig, flags: dict[str, Any]) -> SDSConfig:
    names = set(SETTINGS) - {"preset", "shading", "render_size"}
    config = resolve_config(config, **{name: value for name, value in flags.items() if name in names})
    if "lr" in flags:
        config = replaced(config, lr_encoding=flags["lr"])
    if "render_size" in flags:
        config = replaced(config, render_size=(flags["render_size"],) * len(config.render_size))
    return shaded(config) if flags.get("shading") else config


def _seed(seed: str | int) -> int:
    if seed == "random":
        return secrets.randbelow(2**31)
    if not str(seed).isascii() or not str(seed).isdigit() or int(seed) >= 2**63:
        raise ArgumentError(f'--seed must be a number from 0 to 2**63 - 1 or "random", got {seed!r}')
    return int(seed)


def check_config(config: SDSConfig) -> None:
    """Raises ArgumentError for numbers that no run can use."""
    n_stages, s = len(config.milestones) + 1, SimpleNamespace(**settings_of(config))
    sizes, weights = config.render_size, [ramp for name, ramp in vars(s).items() if name.startswith("lambda_")]
    rules = (
        (config.mode == "3d" or config.method == "sds",
         "--mode must be 3d with --method reconstruct, whose views are sampled together", config.mode),
        (1 <= config.steps <= 10**7, "--steps must be at least 1", config.steps),
        (1 <= s.n_views <= 256, "--n-views must be at least 1, and at most 256", s.n_views),
        (sizes and 8 <= min(sizes) <= max(sizes) <= 1024, "--render-size must be 8 to 1024", sizes),
        (len(sizes) == len(config.n_groups) == n_stages,
         "render_size and n_groups must have one entry more than milestones", (sizes, config.n_groups)),
        (list(config.milestones) == sorted(config.milestones), "milestones must grow", config.milestones),
        (all(1 <= n <= 64 for n in config.n_groups), "n_groups must be 1 to 64", config.n_groups),
        (1 <= s.samples_per_ray <= 4096, "samples_per_ray must be 1 to 4096", s.samples_per_ray),
        (1 <= config.updates_per_guidance <= 1000, "updates_per_guidance must be 1 to 1000",
         config.updates_per_guidance),
        (1 <= s.max_samples <= 1 << 31, "max_samples must be 1 to 2**31", s.max_samples),
        (abs(s.guidance_scale) < 1e6, "--guidance-scale must be below a million", s.guidance_scale),
        (0 <= s.rescale <= 1, "--rescale must be within 0 and 1", s.rescale),
        (0 < s.lr_encoding < 10, "--lr must be within 0 and 10", s.lr_encoding),
        (0 <= min(s.lr_mlp, s.lr_background) <= max(s.lr_mlp, s.lr_background) < 10,
         "lr_mlp and lr_background must be within 0 and 10", (s.lr_mlp, s.lr_background)),
        (0 <= config.weight_decay < 1, "weight_decay must be within 0 and 1", config.weight_decay),
        (0 < config.adam_eps < 1, "adam_eps must be within 0 and 1", config.adam_eps),
        (all(0 <= beta < 1 for beta in config.betas), "betas must be within 0 and 1", config.betas),
        (0 <= s.background_aug_prob <= 1, "background_aug_prob must be within 0 and 1",
         s.background_aug_prob),
        (all(min(w[1:3]) >= 0 and max(w[1:3]) <= 1e6 for w in weights), "loss weights must be 0 to a million", weights),
        (all(min(ramp[1:3]) >= 0 and max(ramp[1:3]) <= 1 for ramp in (s.min_step, s.max_step)),
         "min_step and max_step must be fractions of the timesteps", (s.min_step, s.max_step)),
        (0 < s.distance_range[0] <= s.distance_range[1] < 1000,
         "distance_range must be two positive numbers, low and high", s.distance_range),
        (0 < s.fovy_range_deg[0] <= s.fovy_range_deg[1] < 180,
         "--fovy-range-deg must be two angles, low and high, within 0 and 180", s.fovy_range_deg),
        (-90 <= s.elevation_range_deg[0] <= s.elevation_range_deg[1] <= 90,
         "--elevation-range-deg must be two angles, low and high, within -90 and 90", s.elevation_range_deg),
        (all(map(math.isfinite, _numbers(config))), "every setting must be a finite number", "one that is not"),
    )  # fmt: skip
    _refuse(rules)
    check_prompt(config.negative_prompt, allow_empty=True)
    check_prompt(config.suffix, allow_empty=True)


def check_export(export: ExportConfig) -> None:
    """Raises ArgumentError for a mesh that cannot be made."""
    rules = (
        (8 <= export.mesh_resolution <= 512, "--mesh-resolution must be 8 to 512", export.mesh_resolution),
        (export.faces is None or export.faces >= 4, "--faces must be at least 4", export.faces),
        (export.texture is None or 16 <= export.texture <= 8192, "--texture must be 16 to 8192 pixels",
         export.texture),
    )  # fmt: skip
    _refuse(rules)


def _refuse(rules: tuple) -> None:
    for holds, sentence, value in rules:
        if not holds:
            raise ArgumentError(f"{sentence}, got {value}")


def _numbers(config: SDSConfig) -> Iterator[float]:
    for value in settings_of(config).values():
        yield from (v for v in (value if isinstance(value, tuple) else (value,)) if isinstance(v, (int, float)))


def read_settings(path: Path) -> dict[str, Any]:
    """A settings file: TOML, or JSON such as a run's config.json. Tables `sds` and `export` hold fields of SDSConfig
    and ExportConfig, any number of them; beside them stand prompt, seed, model and preset.

    Raises:
        InputFileError: a file that cannot be read, is no TOML or JSON, or has an unknown or mistyped key.
    """
    data = _parse(path, _read(path))
    unknown = sorted(set(data) - TOP_KEYS)
    if unknown or data.get("kind", "sds") != "sds":
        wrong = f"unknown key(s) {', '.join(unknown)}" if unknown else f"it describes a {data['kind']!r}"
        raise InputFileError(
            f"{path} is not a configuration of an sds run: {wrong}; known: {', '.join(sorted(TOP_KEYS))}"
        )
    for key, kind in (("prompt", str), ("model", str), ("preset", str), ("seed", (int, str))):
        if key in data and (not isinstance(data[key], kind) or isinstance(data[key], bool)):
            raise InputFileError(f"{path}: {key} must be {getattr(kind, '__name__', 'a number')}, got {data[key]!r}")
    if data.get("preset", "auto") not in ("auto", *SDS_PRESETS):
        raise InputFileError(f"{path}: preset must be one of auto, {', '.join(SDS_PRESETS)}, got {data['preset']!r}")
    try:
        data["sds"] = typed(_table(data, "sds", path), f"{path}: sds")
        export = _table(data, "export", path)
        whole = from_dict(ExportConfig, export, f"{path}: export")
    except ModelError as error:
        raise InputFileError(str(error)) from error
    data["export"] = {name: getattr(whole, name) for name in export}
    return data


def _table(data: dict[str, Any], key: str, path: Path) -> dict[str, Any]:
    table = data.get(key, {})
    if not isinstance(table, dict):
        raise InputFileError(f"{path}: {key} must be an object, got {type(table).__name__}")
    return table


def _read(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_FILE:
            raise InputFileError(f"{path} has more than {MAX_FILE >> 20} MB; it is no file of settings or prompts")
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        if isinstance(error, InputFileError):
            raise
        raise InputFileError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error


def _parse(path: Path, text: str) -> dict[str, Any]:
    try:
        data = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputFileError(f"{path} is not {'TOML' if path.suffix == '.toml' else 'JSON'}: {error}") from error
    if not isinstance(data, dict):
        raise InputFileError(f"{path} must hold an object, got a {type(data).__name__}")
    return data


def read_run(folder: Path) -> Request:
    """The request of a run folder, from its config.json. Raises InputFileError."""
    path = folder / "config.json"
    file = read_settings(path)
    missing = [key for key in ("kind", "prompt", "seed", "model", "sds") if key not in file]
    if missing or set(file["sds"]) != set(SETTINGS):
        raise InputFileError(f"{path} is not the configuration of an sds run: {', '.join(missing) or 'sds'} incomplete")
    export = ExportConfig(**file["export"])
    return Request(file["prompt"], _seed(file["seed"]), file["model"], replaced(SDSConfig(), **file["sds"]), export)


def read_prompts(path: Path, flags: dict[str, Any], file: dict[str, Any] | None) -> list[Request]:
    """The runs of a JSONL file: a line is a string, or an object with a prompt and any of LINE_KEYS. Empty lines are
    skipped.

    Raises:
        InputFileError: a file that cannot be read or holds no prompt.
        ArgumentError: a line that cannot be used, by its number; no run has been made then.
    """
    requests = []
    for number, line in enumerate(_read(path).splitlines(), 1):
        if line.strip():
            try:
                requests.append(resolve({**flags, **_line(line)}, file))
            except ArgumentError as error:
                raise ArgumentError(f"{path}, line {number}: {error}; nothing was run") from error
    if not requests:
        raise InputFileError(f'{path} holds no prompt; a line is {{"prompt": "a red chair", "seed": 1}}')
    return requests


def _line(text: str) -> dict[str, Any]:
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ArgumentError(f"not JSON: {error}") from error
    data = {"prompt": data} if isinstance(data, str) else data
    if not isinstance(data, dict) or set(data) - LINE_KEYS or not isinstance(data.get("prompt"), str):
        raise ArgumentError(f"it must be a string or an object with prompt and any of {', '.join(sorted(LINE_KEYS))}")
    seed = data.get("seed", 0)
    if isinstance(seed, bool) or not isinstance(seed, (int, str)):
        raise ArgumentError(f"seed must be a number, got {seed!r}")
    known = {name: value for name, value in data.items() if name not in ("prompt", "seed")}
    try:
        typed(known, "a setting")
    except ModelError as error:
        raise ArgumentError(str(error)) from error
    return data
