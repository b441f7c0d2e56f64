"""What files say of a run: `--config`, a run's config.json, and lines of `--prompts-file`, each value of its type. What
becomes of it is request.py's.
"""

import dataclasses
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mvdream_fast.core.errors import ArgumentError, InputFileError
from mvdream_fast.core.files import parse_json, read_text
from mvdream_fast.core.schema import Checked, checked, is_object
from mvdream_fast.distill.config import SETTINGS, ExportConfig, RecipeName, typed

MAX_FILE = 8 << 20


@dataclass(frozen=True)
class SettingsFile(Checked):
    """What `--config` reads: any of its keys; a run's config.json also says how it was made."""

    kind: Literal["sds"] = "sds"
    prompt: str = ""
    seed: int | str = 0
    model: str = ""
    refine_model: str = ""
    recipe: RecipeName = "mvdream"
    preset: Literal["auto", "paper", "mini", "fast"] = "auto"
    sds: dict[str, Any] | list[dict[str, Any]] = field(default_factory=dict)
    export: ExportConfig = field(default_factory=ExportConfig)
    version: Any = None
    machine: Any = None
    resumed: Any = None


@dataclass(frozen=True)
class Line(Checked):
    """What a line of `--prompts-file` may set; the bounds are SDSConfig's."""

    prompt: str
    seed: int | str = 0
    negative_prompt: str = ""
    steps: int = 1
    guidance_scale: float = 0.0


def read_settings(path: Path) -> dict[str, Any]:
    """A settings file: TOML, or JSON such as a run's config.json. Tables `sds` and `export` hold fields of SDSConfig
    and ExportConfig, any number of them; beside them stand prompt, seed, model and preset. Several tables `sds` are
    one for each stage.

    Raises:
        InputFileError: a file that cannot be read, is no TOML or JSON, or has a key or a value that cannot be.
    """
    return checked_settings(read_object(path), str(path))


def checked_settings(data: dict[str, Any], source: str) -> dict[str, Any]:
    """The settings that a file's object holds, each of its type. Raises InputFileError, which begins with `source`."""
    export = data.get("export")
    if is_object(export) and export.get("faces", 0) is None:  # as older runs wrote that there is no limit
        data = data | {"export": export | {"faces": 0}}
    file = _given(checked(SettingsFile, data, source, InputFileError), data)
    if isinstance(file.get("sds"), list):
        file["sds"] = [_typed(table, source, f"sds[{i}].") for i, table in enumerate(file["sds"])]
    elif "sds" in file:
        file["sds"] = _typed(file["sds"], source, "sds.")
    return file


def _typed(table: dict[str, Any], source: str, prefix: str) -> dict[str, Any]:
    return typed(table, source, InputFileError, {name: prefix + name for name in SETTINGS})


def _given(whole: Any, data: dict[str, Any]) -> dict[str, Any]:
    """The fields of a checked dataclass that `data` sets."""
    values = {name: getattr(whole, name) for name in data}
    return {name: _given(v, data[name]) if dataclasses.is_dataclass(v) else v for name, v in values.items()}


def read_object(path: Path) -> dict[str, Any]:
    """What a TOML or JSON file holds. Raises InputFileError."""
    text = read_text(path, limit=MAX_FILE)
    if path.suffix.lower() == ".toml":
        try:
            data = tomllib.loads(text)
        except (ValueError, RecursionError) as error:
            raise InputFileError(f"{path} is not TOML: {error}") from error
    else:
        data = parse_json(text, str(path))
    if not isinstance(data, dict):
        raise InputFileError(f"{path} must hold an object, got a {type(data).__name__}")
    return data


def tables(file: dict[str, Any]) -> list[dict[str, Any]]:
    """The tables `sds` of a file: one, or one for each stage."""
    found = file.get("sds", {})
    return (found or [{}]) if isinstance(found, list) else [found]


def read_line(text: str) -> dict[str, Any]:
    """What a line of a file of prompts sets, by name. Raises ArgumentError."""
    data = parse_json(text, "it", ArgumentError)
    data = {"prompt": data} if isinstance(data, str) else data
    if not isinstance(data, dict) or "prompt" not in data:
        raise ArgumentError(f"it must be a string or an object with a prompt, got {text.strip():.300}")
    return _given(checked(Line, data, "", ArgumentError), data)
