"""Imports go downwards only, by the floors of FLOORS (CONTRIBUTING.md draws them).

Every import of every file is read from its source, those inside functions included. One that is under TYPE_CHECKING
doesn't happen, so it may name something higher up, but not the other half of the package.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "mvdream_fast"

# Highest first. Files of one room may import each other; rooms on one floor may not.
FLOORS = [
    {"loops": ["dreambooth3d", "dreambooth_runs", "estimate", "evaluation", "evaluation_reference", "evaluation_runs",
               "memory", "optimization", "report", "settings", "teachers", "text_to_3d", "training",
               "training_averaged", "training_dreambooth", "training_evaluator", "training_loop", "training_runs",
               "training_vae", "viewer", "watch"],
     "surfaces": ["diffusers", "nerfacc_compat", "tcnn_compat"]},
    {"pipeline": ["pipeline"]},
    {"guidance": ["guidance"], "sampler": ["sampler"], "data": ["data"], "run": ["run"]},
    {"models": ["models"], "field": ["field"]},
    {"ops": ["ops"]},
    {"kernels": ["kernels"], "native": ["_C"]},
    {"leaves": ["_version", "camera", "cli", "config", "distributed", "errors", "files", "learning_rate", "machine",
                "rng", "schedule", "weights"]},
]  # fmt: skip
ROOM_OF = {name: room for floor in FLOORS for room, names in floor.items() for name in names}
FLOOR_OF = {room: level for level, floor in enumerate(reversed(FLOORS)) for room in floor}
VERBS_FLOOR = len(FLOORS)


def python_files() -> list[Path]:
    return sorted([*(ROOT / PACKAGE).rglob("*.py"), *(ROOT / "kernels").rglob("*.py")])


def top_name(path: Path) -> str:
    """The folder or module directly under the package that a file belongs to; `kernels` lies beside it."""
    relative = path.relative_to(ROOT)
    return relative.parts[0] if relative.parts[0] == "kernels" else Path(relative.parts[1]).stem


def room(path: Path) -> str:
    """A room of FLOORS, or "verb" for what `python -m` runs."""
    name = top_name(path)
    if name in ROOM_OF:
        return ROOM_OF[name]
    assert is_verb(path), f"{path.relative_to(ROOT)} has no room: give it one in FLOORS and in CONTRIBUTING.md"
    return "verb"


def is_verb(path: Path) -> bool:
    return path.parent.name == PACKAGE and any(
        isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"
        for node in ast.parse(path.read_text(encoding="utf-8")).body
    )


def nodes(tree: ast.AST, types: bool) -> Iterator[ast.AST]:
    """All nodes of a tree; without `types`, not those under `if TYPE_CHECKING`."""
    for node in ast.iter_child_nodes(tree):
        if types or not (isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")):
            yield node
            yield from nodes(node, types)


def imported(source: str, package: list[str], types: bool = True) -> Iterator[str]:
    """Names directly under mvdream_fast that a source imports; `package` is the dotted package the file lies in."""
    for node in nodes(ast.parse(source), types):
        modules = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            modules = [f"{stem}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module") and node.args:
            modules = [node.args[0].value] if isinstance(node.args[0], ast.Constant) else []
        for module in modules:
            parts = module.split(".")
            if parts[0] == PACKAGE and len(parts) > 1:
                yield parts[1]


def imports(path: Path, types: bool = True) -> set[str]:
    package = list(path.relative_to(ROOT).with_suffix("").parts[:-1])
    if package[0] == "kernels":
        package.insert(0, PACKAGE)
    # `from mvdream_fast import __version__` and the like name attributes of the package, not modules
    names = imported(path.read_text(encoding="utf-8"), package, types)
    return {name for name in names if not name.startswith("__")}


FILES = [path for path in python_files() if path != ROOT / PACKAGE / "__init__.py"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_downwards(path):
    own = room(path)
    own_floor = FLOOR_OF.get(own, VERBS_FLOOR)
    for name in imports(path, types=False):
        other = ROOM_OF.get(name, "verb")
        if other == own and own != "verb":
            continue
        assert FLOOR_OF.get(other, VERBS_FLOOR) < own_floor, f"{own} must not import {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_two_halves_do_not_know_each_other(path):
    forbidden = {
        "field": {"schedule", "sampler", "guidance", "models", "pipeline"},
        "models": {"field", "camera"},
        "guidance": {"field"},
    }
    assert not imports(path) & forbidden.get(room(path), set())


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_only_ops_call_kernels_and_native_code(path):
    """doctor asks the extension how it was built; nothing else looks past ops."""
    if room(path) not in ("ops", "kernels") and top_name(path) != "doctor":
        assert not imports(path) & {"kernels", "_C"}


def test_every_kind_of_import_is_seen():
    source = (
        "import mvdream_fast.models.unet as u\n"
        "def f():\n    from mvdream_fast import field\n    from . import guidance\n"
        "    from ..ops import geglu\n    import_module('mvdream_fast._C')\n"
        "if TYPE_CHECKING:\n    from mvdream_fast.pipeline import Views\n"
        "import torch\nfrom os import path\n"
    )
    seen = sorted(imported(source, [PACKAGE, "field"]))
    assert seen == ["_C", "field", "field", "models", "ops", "pipeline"]
    seen.remove("pipeline")
    assert sorted(imported(source, [PACKAGE, "field"], types=False)) == seen
    assert list(imported("from . import guidance", [PACKAGE])) == ["guidance"]


def test_there_are_verbs_and_their_rooms_are_found():
    verbs = {top_name(path) for path in FILES if room(path) == "verb"}
    assert {"generate", "doctor"} <= verbs
    assert {room(path) for path in FILES} >= {"verb", "pipeline", "sampler", "models", "field", "ops", "leaves"}


def test_no_import_cycle_between_leaves():
    graph = {
        top_name(path): {name for name in imports(path) if ROOM_OF.get(name) == "leaves"}
        for path in FILES
        if room(path) == "leaves"
    }
    done: set[str] = set()
    while ready := {name for name, needs in graph.items() if name not in done and needs - {name} <= done}:
        done |= ready
    assert done == set(graph), f"these leaves import each other in a circle: {sorted(set(graph) - done)}"
