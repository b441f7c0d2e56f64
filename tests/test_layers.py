"""Imports go downwards only, by the floors of FLOORS (CONTRIBUTING.md names them), and no two files import each other.

Every import of every file is read from its source, those inside functions included. One that is under TYPE_CHECKING
doesn't happen, so it may name something higher up, but not the other half of the package. Every folder has a floor, and
no file is left out.
"""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "mvdream_fast"
VERBS = [
    "sds", "generate", "train", "dreambooth", "render", "evaluate", "convert", "compare", "benchmark", "batch", "serve",
    "doctor",
]  # fmt: skip

# Highest first. What stands on one floor may not import its neighbours there; the files of one folder may import each
# other, but not in a circle.
FLOORS = [
    VERBS,
    ["web"],
    ["jobs"],
    ["text_to_3d", "diffusers", "nerfacc_compat", "tcnn_compat"],
    ["tuning"],
    ["training"],
    ["evaluation"],
    ["pipeline"],
    ["distill"],
    ["guidance"],
    ["rendering"],
    ["diffusion", "data"],
    ["checkpoints"],
    ["models", "scene"],
    ["ops"],
    ["kernels"],
    ["_C"],
    ["camera"],
    ["camera_sampling", "benchmarking"],
    ["core", "weights"],
    ["_version"],
]
FLOOR_OF = {name: level for level, floor in enumerate(reversed(FLOORS)) for name in floor}


def python_files() -> list[Path]:
    found = [*(ROOT / PACKAGE).rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]
    return sorted(path for path in found if (ROOT / PACKAGE / "kernels") not in path.parents)


def top_name(path: Path) -> str:
    """The folder or module directly under the package that a file belongs to; `kernels` lies beside it."""
    relative = path.relative_to(ROOT)
    return relative.parts[0] if relative.parts[0] == "kernels" else Path(relative.parts[1]).stem


def dotted(path: Path) -> str:
    """The name that a file is imported by."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = (PACKAGE, *parts) if parts[0] == "kernels" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def nodes(tree: ast.AST, types: bool) -> Iterator[ast.AST]:
    """All nodes of a tree; without `types`, not those under `if TYPE_CHECKING`."""
    for node in ast.iter_child_nodes(tree):
        if types or not (isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")):
            yield node
            yield from nodes(node, types)


def imported(source: str, package: list[str], types: bool = True) -> Iterator[str]:
    """Dotted names under mvdream_fast that a source imports; `package` is the dotted package the file lies in."""
    for node in nodes(ast.parse(source), types):
        modules = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            modules = [f"{stem}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call) and _name_of(node.func) == "import_module" and node.args:
            modules = [node.args[0].value] if isinstance(node.args[0], ast.Constant) else []
        yield from (module for module in modules if module.startswith(f"{PACKAGE}."))


def _name_of(called: ast.expr) -> str:
    """The last word of what is called: f of f() and of module.f()."""
    return called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")


def imports(path: Path, types: bool = True) -> set[str]:
    """Names directly under mvdream_fast that a file imports."""
    # `from mvdream_fast import __version__` and the like name attributes of the package, not modules
    return {name.split(".")[1] for name in _imported_by(path, types)} - {"__version__"}


@cache
def _imported_by(path: Path, types: bool) -> set[str]:
    name = dotted(path)
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    return set(imported(path.read_text(encoding="utf-8"), package.split("."), types))


FILES = [path for path in python_files() if path != ROOT / PACKAGE / "__init__.py"]
ids = lambda path: str(path.relative_to(ROOT))  # noqa: E731


def upward(name: str, others: set[str]) -> set[str]:
    """Those of `others` that something named `name` must not import."""
    return {other for other in others if other != name and FLOOR_OF[other] >= FLOOR_OF[name]}


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_imports_go_downwards(path):
    assert top_name(path) in FLOOR_OF, f"{ids(path)} has no floor: give it one in FLOORS and in CONTRIBUTING.md"
    wrong = upward(top_name(path), imports(path, types=False))
    assert not wrong, f"{ids(path)} must not import {', '.join(sorted(wrong))}, which is not below it"


def test_a_broken_floor_is_seen():
    assert upward("scene", {"core", "ops", "camera"}) == set()
    assert upward("scene", {"models", "guidance", "scene", "core"}) == {"models", "guidance"}
    assert upward("core", {"camera"}) == {"camera"}
    assert upward("sds", {"generate"}) == {"generate"}


def test_every_floor_is_somewhere_and_named_in_contributing():
    existing = {top_name(path) for path in FILES} | {"_C"}
    assert existing == set(FLOOR_OF)
    line = re.search(r"^`verbs -> .*?`$", (ROOT / "CONTRIBUTING.md").read_text(), re.M | re.S).group()
    named = [set(re.findall(r"\w+", floor)) for floor in line.split("->")]
    assert named == [{"verbs"}, *({*floor} for floor in FLOORS[1:-1])]  # the version is no floor to speak of


def test_a_verb_is_what_python_runs():
    mains = {
        path.stem
        for path in (ROOT / PACKAGE).glob("*.py")
        if re.search(r"^if __name__ == .__main__.:", path.read_text(), re.M)
    }
    assert mains == set(VERBS)


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_the_two_halves_do_not_know_each_other(path):
    forbidden = {
        "scene": {"models", "checkpoints", "diffusion", "guidance", "pipeline", "distill"},
        "models": {"scene", "camera"},
        "guidance": {"scene"},
        "diffusion": {"scene"},
    }
    assert not imports(path) & forbidden.get(top_name(path), set())


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_only_ops_call_kernels_and_native_code(path):
    """doctor asks the extension how it was built, kernels launch by it; nothing else looks past ops."""
    if top_name(path) not in ("ops", "kernels", "doctor"):
        assert not imports(path) & {"kernels", "_C"}


def test_no_two_files_import_each_other():
    """Neither directly nor around a corner."""
    names = {dotted(path): path for path in FILES}
    graph = {}
    for name, path in names.items():
        modules = _imported_by(path, types=True)
        graph[name] = {m if m in names else m.rpartition(".")[0] for m in modules} & names.keys() - {name}
    assert circle(graph) == set()


def circle(graph: dict[str, set[str]]) -> set[str]:
    """What is left when everything that imports nothing of what is left has been taken away, again and again."""
    left = dict(graph)
    while ready := [name for name, needs in left.items() if not needs & left.keys()]:
        for name in ready:
            del left[name]
    return set(left)


def test_a_circle_is_seen():
    assert circle({"a": {"b"}, "b": {"c"}, "c": set()}) == set()
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == {"a", "b", "c"}


def test_every_kind_of_import_is_seen():
    source = (
        "import mvdream_fast.models.unet as u\n"
        "def f():\n    from mvdream_fast import scene\n    from . import guidance\n"
        "    from ..ops import geglu\n    import_module('mvdream_fast._C')\n"
        "if TYPE_CHECKING:\n    from mvdream_fast.pipeline import Views\n"
        "import torch\nfrom os import path\n"
    )
    everything = ["_C", "models.unet", "ops.geglu", "pipeline.Views", "scene", "scene.guidance"]
    everything = [f"{PACKAGE}.{name}" for name in everything]
    assert sorted(imported(source, [PACKAGE, "scene"])) == everything
    everything.remove(f"{PACKAGE}.pipeline.Views")
    assert sorted(imported(source, [PACKAGE, "scene"], types=False)) == everything
    assert list(imported("from . import guidance", [PACKAGE])) == [f"{PACKAGE}.guidance"]
