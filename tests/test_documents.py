"""Documents hold together: links lead somewhere inside the repository, files that a text names exist, and the trees of
README and CONTRIBUTING name every folder."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
PROSE = sorted({*DOCUMENTS, ROOT / "NOTICE", ROOT / "Makefile"} - {ROOT / "CHANGELOG.md"})  # which is of its day
TESTS = sorted((ROOT / "tests").rglob("*.py"))
SOURCE_FOLDERS = ("mvdream_fast", "kernels", "csrc", "benchmarks", "examples", "docs", "tests", ".ci")
SOURCES = [
    path
    for folder in ("mvdream_fast", "kernels", "csrc", "benchmarks", "examples")
    for path in sorted((ROOT / folder).rglob("*"))
    if path.suffix in {".py", ".sh", ".cpp", ".cu", ".h", ".cuh"}
]
FILE = re.compile(r"(?<![\w*./<-])(?:\w[\w.-]*/)*\w[\w-]*\.(?:py|md|sh|cpp|cu|cuh)\b")
ELSEWHERE = {"DOCS/ablations.md", "table.md", "OUT/compare.md", "compare.md"}  # what examples and commands write


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


def links(text: str) -> list[str]:
    """Targets of links and images, but for those of the web."""
    found = re.findall(r"\]\(([^)\s]+)\)", without_code(text)) + re.findall(r'src="([^"]+)"', text)
    return [target for target in found if "://" not in target]


def anchors(text: str) -> set[str]:
    """What a page's headings are called in links, by GitHub's rule."""
    headings = re.findall(r"^#+ (.+)$", without_code(text), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken(page: Path, text: str) -> Iterator[str]:
    """The links of a page that lead nowhere, or out of the repository."""
    for target in links(text):
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        missing = not path.is_relative_to(ROOT) or not path.exists()
        if missing or (anchor and anchor not in anchors(path.read_text(encoding="utf-8"))):
            yield target


def repository_files() -> set[str]:
    """Every path of a file, and every end of it that begins at a folder or at the name."""
    paths = [p.relative_to(ROOT).parts for p in ROOT.glob("*.*")]
    for folder in SOURCE_FOLDERS:
        paths += [p.relative_to(ROOT).parts for p in (ROOT / folder).rglob("*") if p.suffix]
    return {"/".join(parts[i:]) for parts in paths for i in range(len(parts))}


FILES = repository_files()


def strangers(text: str) -> set[str]:
    """Names of source files and pages in a text that the repository does not have."""
    return set(FILE.findall(text)) - FILES - ELSEWHERE


@pytest.mark.parametrize("path", TESTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_that_the_head_of_a_test_names_exist(path):
    assert not strangers(ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "")


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    assert not list(broken(page, page.read_text(encoding="utf-8")))


@pytest.mark.parametrize("path", [*PROSE, *SOURCES], ids=lambda path: str(path.relative_to(ROOT)))
def test_files_that_a_text_names_exist(path):
    assert not strangers(path.read_text(encoding="utf-8"))


def test_a_stale_name_and_a_broken_link_are_seen():
    assert strangers("see optimization.py and `models/checkpoint.py`, not ops/geglu.py, cpu/geglu.cpp or *.py") == {
        "optimization.py",
        "models/checkpoint.py",
    }
    page = ROOT / "docs/gpu.md"
    text = "# A heading: two\n[x](cameras.md) [y](gone.md) [z](#no) ![i](../../shared/GPU.md) [w](https://a.b)"
    assert list(broken(page, text + ' <img src="none.png">')) == ["gone.md", "#no", "../../shared/GPU.md", "none.png"]
    assert anchors("# A heading: two\n```\n# no heading\n```\n") == {"a-heading-two"}


def packages() -> set[str]:
    return {path.parent.name for path in (ROOT / "mvdream_fast").glob("*/__init__.py")} - {"kernels"}


def test_contributing_draws_every_folder():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    tree = text.split("## Where things live")[1].split("```")[1].split("\nmvdream_fast/\n")[1]
    assert set(re.findall(r"^  (\w+)/ ", tree, flags=re.MULTILINE)) == packages()


def test_the_readme_names_every_folder_and_is_short():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^mvdream_fast/(\w+)/", readme, flags=re.MULTILINE)) == packages()
    assert len(readme.splitlines()) <= 130


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda page: page.name)
def test_prose_is_under_120_characters_wide(page):
    if page.name == "CHANGELOG.md":
        return
    lines = without_code(page.read_text(encoding="utf-8")).splitlines()
    assert not [line for line in lines if len(line) >= 120 and not line.startswith(("|", "    ", "!["))]
