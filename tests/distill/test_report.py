"""The report is one page that needs nothing else, and survives missing parts."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from mvdream_fast.distill.report import thin, time_split, write_report
from mvdream_fast.scene.mesh.mesh import Mesh

RECORDS = [
    {"step": i, "loss": 10.0 / (i + 1), "opacity": 0.2, "occupancy": 0.5, "seconds": {"guidance": 0.3, "renderer": 0.1}}
    for i in range(20)
]
CONFIG = {"prompt": 'a <b>red</b> "chair" & lamp', "seed": 3, "model": "mini", "sds": {"steps": 20, "loss": "x0"}}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "preview").mkdir()
    for step in range(10, 100, 10):
        Image.new("RGB", (8, 8), (step, 0, 0)).save(tmp_path / "preview" / f"{step:06d}.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "views.png")
    return tmp_path


@pytest.fixture(scope="module")
def mesh():
    """A red tetrahedron."""
    vertices = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]], dtype=np.float32)
    faces = np.array([[0, 2, 1], [0, 1, 3], [1, 2, 3], [0, 3, 2]], dtype=np.int32)
    return Mesh(vertices, faces, np.array([[1, 0, 0]] * 4, dtype=np.float32))


def test_page_holds_everything_and_fetches_nothing(folder, mesh):
    page = write_report(folder, CONFIG, RECORDS, ["4 vertices"], mesh).read_text()
    assert "a &lt;b&gt;red&lt;/b&gt; &quot;chair&quot; &amp; lamp" in page
    assert "<b>red" not in page
    assert page.count("data:image/png") == 7  # the sampled views and six of nine previews
    assert "data:image/svg+xml" in page
    assert 'sandbox="allow-scripts"' in page
    assert "4 vertices" in page
    assert page.count("<iframe") == 1
    outside = re.sub(r'srcdoc="[^"]*"', "", page)
    assert not re.findall(r'(?:src|href)="(?!data:)', outside)


def test_missing_parts_are_left_out(tmp_path):
    page = write_report(tmp_path, CONFIG, [], ["The run was stopped."]).read_text()
    assert "The run was stopped." in page
    assert "The asset" not in page
    assert "Curves" not in page


def test_time_split_adds_up():
    assert time_split(RECORDS) == {"guidance": "75.0 %", "renderer": "25.0 %", "a step, on average": "0.400 s"}
    assert time_split([]) == {}


def test_thin_keeps_the_ends():
    assert thin([1, 2], 6) == [1, 2]
    assert thin(list(range(101)), 6) == [0, 20, 40, 60, 80, 100]


def test_settings_are_listed(folder):
    page = write_report(folder, CONFIG, RECORDS).read_text()
    assert f"<td>loss</td><td>{json.dumps('x0').replace(chr(34), '&quot;')}</td>" in page
