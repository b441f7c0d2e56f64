"""Both renderers and the render command: what is seen from where, edges, glass, resuming, and what goes wrong."""

import json
import re
import resource
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import trimesh

from mvdream_fast import render
from mvdream_fast.camera import orbit_cameras
from mvdream_fast.core.errors import ArgumentError, InputFileError, OutputError
from mvdream_fast.data.shards import list_shards, read_shard
from mvdream_fast.rendering import dataset
from mvdream_fast.rendering.catalogue import read_folder
from mvdream_fast.rendering.mesh import Mesh, Part, Texture
from mvdream_fast.rendering.mesh_file import load_mesh
from mvdream_fast.rendering.orbits import PRESETS, look_at_origin, orbit
from mvdream_fast.rendering.software import NumpyRenderer
from mvdream_fast.rendering.survey import survey

SIDES = {  # glTF axes: +Z front, +X the object's left, +Y up
    (0, 0, 1): (255, 0, 0), (1, 0, 0): (0, 255, 0), (0, 0, -1): (0, 0, 255), (-1, 0, 0): (255, 255, 0),
    (0, 1, 0): (255, 255, 255), (0, -1, 0): (0, 0, 0),
}  # fmt: skip


@pytest.fixture(scope="module", params=["gl", "numpy"])
def renderer(request):
    if request.param == "numpy":
        return NumpyRenderer()
    return gl_or_skip()


def gl_or_skip():
    try:
        return dataset.make_renderer("gl")
    except ArgumentError as error:
        pytest.skip(f"no OpenGL here: {error}")


def colored_cube() -> trimesh.Scene:
    """A cube with a colour for each side, as six geometries."""
    scene = trimesh.Scene()
    cube = trimesh.creation.box()
    for side, color in SIDES.items():
        faces = cube.faces[np.abs(cube.face_normals - side).max(1) < 1e-6]
        material = trimesh.visual.material.SimpleMaterial(diffuse=[*color, 255])
        visual = trimesh.visual.TextureVisuals(uv=np.zeros((8, 2)), material=material)
        scene.add_geometry(trimesh.Trimesh(cube.vertices, faces, visual=visual, process=False))
    return scene


@pytest.fixture(scope="module")
def cube(tmp_path_factory) -> Mesh:
    path = tmp_path_factory.mktemp("cube") / "cube.glb"
    colored_cube().export(path)
    return load_mesh(path).normalised()


def cameras(*azimuths, elevation=0.0, fov=40.0):
    distance = 1.03 / np.sin(np.radians(fov / 2))
    c2w = np.stack([look_at_origin(a, elevation, distance) for a in azimuths])
    return c2w, np.full(len(azimuths), np.radians(fov), np.float32)


@pytest.mark.parametrize(("azimuth", "side"), [(0, (0, 0, 1)), (90, (1, 0, 0)), (180, (0, 0, -1)), (270, (-1, 0, 0))])
def test_azimuths_see_the_right_sides(renderer, cube, azimuth, side):
    view = renderer.render(cube, *cameras(azimuth), 32, lit=False)[0]
    np.testing.assert_array_equal(view[16, 16], (*SIDES[side], 255))


def test_up_is_up(renderer, cube):
    view = renderer.render(cube, *cameras(0, elevation=30), 64, lit=False)[0]
    rows = np.flatnonzero(view[:, 32, 3] == 255)
    np.testing.assert_array_equal(view[rows[2], 32, :3], SIDES[0, 1, 0])
    np.testing.assert_array_equal(view[rows[-3], 32, :3], SIDES[0, 0, 1])


def test_a_quarter_to_the_left_shows_front_and_left(renderer, cube):
    """Azimuth 45 stands at -Y +X: the front (red) is on the picture's left, the object's left side (green) right."""
    view = renderer.render(cube, *cameras(45), 64, lit=False)[0]
    np.testing.assert_array_equal(view[32, 22, :3], SIDES[0, 0, 1])
    np.testing.assert_array_equal(view[32, 42, :3], SIDES[1, 0, 0])


def test_edges_are_clean(renderer):
    """Supersampled alpha in between, the colour of the object right up to the edge, nothing outside."""
    ball = load_mesh(trimesh.creation.icosphere(subdivisions=3).export(file_type="ply"), "ply").normalised()
    ball = ball.recolored([0], (0.2, 0.6, 0.4), flat=True)
    view = renderer.render(ball, *cameras(0), 64, lit=False)[0]
    alpha = view[..., 3]
    assert alpha[0].max() == alpha[-1].max() == alpha[:, 0].max() == alpha[:, -1].max() == 0
    edge = (alpha > 0) & (alpha < 255)
    assert 60 < edge.sum() < 260
    np.testing.assert_allclose(
        view[alpha > 0][:, :3].astype(int), np.broadcast_to((51, 153, 102), (np.sum(alpha > 0), 3)), atol=2
    )
    # a disc of radius 1 / 1.03 of the half picture, a little less for the tessellation
    assert alpha.sum() / 255 == pytest.approx(np.pi * (32 / 1.03) ** 2, rel=0.03)


def test_white_comes_out_white(renderer):
    ball = load_mesh(trimesh.creation.icosphere(subdivisions=3).export(file_type="ply"), "ply").normalised()
    view = renderer.render(ball.recolored([0], (0.96, 0.96, 0.95), flat=True), *cameras(0, elevation=15), 64)[0]
    solid = view[view[..., 3] == 255][:, :3]
    assert np.median(solid) > 215
    assert np.percentile(solid, 5) > 115


def square(y, opacity, color) -> Part:
    corners = np.array([(-1, y, -1), (1, y, -1), (1, y, 1), (-1, y, 1)], np.float32)
    normals = np.tile(np.array([(0, -1, 0)], np.float32), (4, 1))
    colors = np.tile(np.array([(*color, opacity)], np.float32), (4, 1))
    return Part(corners, normals, colors, np.array([(0, 1, 2), (0, 2, 3)], np.int32), blend=opacity < 1)


def test_glass_lets_the_rest_through(renderer):
    red, green, blue = np.eye(3)
    alone = renderer.render(Mesh((square(-0.2, 0.25, red),)), *cameras(0, fov=30), 16, lit=False)[0, 8, 8]
    np.testing.assert_allclose(alone, (255, 0, 0, 64), atol=1)
    # far to near whatever their order in the file, and nothing behind a solid part
    mesh = Mesh((square(-0.4, 0.25, red), square(0.0, 1.0, blue), square(-0.2, 0.5, green), square(0.4, 0.5, green)))
    both = renderer.render(mesh, *cameras(0, fov=30), 16, lit=False)[0, 8, 8]
    np.testing.assert_allclose(both, (64, 96, 96, 255), atol=2)


def test_holes_of_a_texture_are_holes(renderer):
    part = square(0.0, 1.0, (1, 1, 1))
    texture = np.full((2, 2, 4), 255, np.uint8)
    texture[:, 1, 3] = 0
    uv = np.array([(0, 0), (1, 0), (1, 1), (0, 1)], np.float32)
    mesh = Mesh((replace(part, texture=Texture(texture, uv), cutoff=0.5),))
    alpha = renderer.render(mesh, *cameras(0, fov=30), 32, lit=False)[0, ..., 3]
    assert alpha[16, 10] == 255
    assert alpha[16, 20] == 0


def test_both_sides_of_a_sheet_are_lit(renderer):
    sheet = Mesh((square(0.0, 1.0, (1, 1, 1)),))
    front, back = renderer.render(sheet, *cameras(0, 180, fov=30), 16)[:, 8, 8, 0]
    assert front > 200
    assert back > 200


def test_the_two_renderers_agree(cube, tmp_path):
    gl = gl_or_skip()
    rng = np.random.default_rng(0)
    texture = np.kron(rng.integers(0, 256, (4, 4, 4), dtype=np.uint8), np.ones((32, 32, 1), np.uint8))
    texture[..., 3] = 255
    torus = trimesh.creation.torus(0.7, 0.25)
    torus.export(tmp_path / "torus.obj")
    smooth = load_mesh(tmp_path / "torus.obj").normalised()
    p = smooth.parts[0]
    textured = Mesh((replace(p, texture=Texture(texture, p.positions[:, :2])),))
    glass = replace(p, colors=p.colors * np.float32([1, 1, 1, 0.4]), blend=True)
    glassy = Mesh((glass, square(0.0, 1.0, (0.1, 0.5, 0.9))))
    for mesh in (cube, smooth, textured, glassy.normalised()):
        pictures = [r.render(mesh, *cameras(20, 200, elevation=20), 64).astype(int) for r in (gl, NumpyRenderer())]
        a, b = (x[..., :3] * (x[..., 3:] / 255) for x in pictures)
        assert np.abs(a - b).mean() < 0.6
        assert np.abs(pictures[0][..., 3] - pictures[1][..., 3]).mean() < 0.3
        assert a.mean() > 10


def test_many_views_and_sizes_are_independent(cube):
    """A view is the same alone, in an atlas and after another size."""
    gl = gl_or_skip()
    c2w, fovy = cameras(*range(0, 360, 10), elevation=20)
    together = gl.render(cube, c2w, fovy, 64)
    gl.render(cube, c2w[:1], fovy[:1], 256, samples=2)
    np.testing.assert_array_equal(gl.render(cube, c2w[30:31], fovy[30:31], 64)[0], together[30])


def test_orbit_cameras_are_camera_pys():
    ours = orbit(PRESETS["embedded"], np.array([0.25, 0.5, 0.5, 0.2]))
    theirs = orbit_cameras(16, ours.elevation_deg, ours.azimuth_deg[0], 360.0, ours.distance, np.degrees(ours.fovy[0]))
    np.testing.assert_allclose(ours.c2w, theirs.c2w.numpy(), atol=1e-5)
    np.testing.assert_allclose(ours.fovy, theirs.fovy.numpy(), atol=1e-6)
    assert torch.is_tensor(theirs.fovy)


@pytest.mark.parametrize("u", [0.0, 0.5, 0.999])
def test_embedded_orbits(u):
    made = orbit(PRESETS["embedded"], np.full(4, u))
    np.testing.assert_allclose(np.diff(made.azimuth_deg), 22.5)
    assert 0 <= made.azimuth_deg[0] < 22.5
    assert 0 <= made.elevation_deg <= 30
    assert 30 <= np.degrees(made.fovy[0]) <= 50.001
    factor = made.distance * np.sin(made.fovy[0] / 2)
    assert 1.0 - 1e-6 <= factor <= 1.05
    np.testing.assert_allclose(np.linalg.norm(made.c2w[:, :3, 3], axis=1), made.distance, rtol=1e-5)


@pytest.mark.parametrize("u", [0.0, 0.5, 0.999])
def test_paper_orbits(u):
    """32 azimuths from 0; distance = 0.5 x NDC focal length x U[0.9, 1.1]; the object in [-0.5, 0.5]."""
    preset = PRESETS["paper"]
    made = orbit(preset, np.full(4, u))
    np.testing.assert_allclose(made.azimuth_deg, 11.25 * np.arange(32))
    assert 15 <= np.degrees(made.fovy[0]) <= 60.001
    focal = 1 / np.tan(made.fovy[0] / 2)
    assert made.distance == pytest.approx(0.5 * focal * (0.9 + 0.2 * u), rel=1e-5)
    assert preset.fit == "box"


def test_a_survey_sees_colors_parts_and_size(renderer, cube):
    look = survey(cube, renderer)
    assert set(look.colors) >= {"red", "green", "blue", "yellow", "white"}
    assert len(look.part_shares) == 6
    assert sum(look.part_shares) == pytest.approx(1, abs=0.01)
    by_name = dict(zip(look.part_colors, look.part_shares))
    assert by_name["red"] == pytest.approx(by_name["blue"], abs=0.02)
    assert 0.15 < look.coverage < 0.5
    assert len(look.thumbnail) == 4 * 16 * 16 * 3


@pytest.fixture
def meshes(tmp_path):
    folder = tmp_path / "meshes"
    folder.mkdir()
    colored_cube().export(folder / "cube.glb")
    trimesh.creation.icosphere(subdivisions=2).export(folder / "red_ball.stl")
    trimesh.creation.cone(1, 2).export(folder / "cone.ply")
    trimesh.creation.torus(1, 0.4).export(folder / "ring.obj")
    (folder / "broken.glb").write_bytes(b"glTF\x02\x00\x00\x00junk")
    (folder / "captions.csv").write_text('cone.ply,"a \x1b[1mparty\x00 hat"\n../../../etc/passwd,nope\n')
    return folder


@pytest.fixture
def one_mesh(tmp_path):
    folder = tmp_path / "one"
    folder.mkdir()
    colored_cube().export(folder / "cube.glb")
    return folder


def flags(source, out, **more) -> render.Flags:
    return render.Flags(**{"source": str(source), "out": out, "workers": 1, "orbits": 1, "recolours": 1} | more)


def test_the_command_end_to_end(meshes, tmp_path, capsys):
    out = tmp_path / "shards"
    render.main(flags(meshes, out, held_out=0.25))
    text = capsys.readouterr().out
    assert "skipped broken-glb: broken.glb: the file is cut short" in text
    assert "4 assets in 2 shards" in text
    assert "1 unreadable, 0 too thin, 0 near-duplicates" in text
    train = [s for p in list_shards(out) for s in read_shard(p)]
    held = [s for p in list_shards(out, "held_out") for s in read_shard(p)]
    assert {s.meta["id"] for s in train} & {s.meta["id"] for s in held} == set()
    everything = {s.meta["key"]: s for s in train + held}
    assert everything["cone-ply-o0"].meta["caption"] == "a [1mparty hat"
    assert "cone-ply-o1" not in everything
    assert everything["red-ball-stl-o1"].meta["caption"].endswith(" red ball")
    first = everything["cube-glb-o0"]
    assert first.views.shape == (16, 64, 64, 4)
    assert first.c2w.shape == (16, 4, 4)
    assert (out / "sheet.png").stat().st_size > 1000
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["kept"], list(summary["unreadable"])) == (4, ["broken-glb"])


def test_a_second_run_draws_only_what_is_missing(meshes, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(dataset, "SHARD_ASSETS", 1)
    out = tmp_path / "shards"
    render.main(flags(meshes, out, sheet=False))
    whole = {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in out.glob("*.tar")}
    assert len(whole) == 4
    (out / "train-00002.tar").unlink()
    (out / "surveys.json").unlink()
    (out / "train-00002.tar.tmp-999999999").write_bytes(b"left behind")
    capsys.readouterr()
    render.main(flags(meshes, out, sheet=False))
    assert re.search(r" (16|32) new views", capsys.readouterr().out)
    for path in out.glob("*.tar"):
        content, time = whole[path.name]
        assert path.read_bytes() == content
        assert (path.stat().st_mtime_ns == time) == (path.name != "train-00002.tar")
    assert not list(out.glob("*.tmp-*"))


def test_a_folder_of_another_data_set_is_left_alone(one_mesh, tmp_path):
    out = tmp_path / "shards"
    render.main(flags(one_mesh, out, sheet=False))
    with pytest.raises(OutputError, match="was begun with another seed; name another folder with -o"):
        render.main(flags(one_mesh, out, sheet=False, seed=1))
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "train-00000.tar").write_bytes(b"mine")
    with pytest.raises(OutputError, match="holds shards of something else"):
        render.main(flags(one_mesh, foreign, sheet=False))


def test_paper_preset_at_another_size(one_mesh, tmp_path):
    out = tmp_path / "shards"
    render.main(flags(one_mesh, out, preset="paper", size=96, orbits=1, recolours=None))
    (sample,) = (s for p in list_shards(out) for s in read_shard(p))
    assert sample.views.shape == (32, 96, 96, 4)
    assert sample.meta["azimuth_deg"][:2] == [0.0, 11.25]


def test_a_disk_that_fills_ends_with_7_and_keeps_what_is_whole(one_mesh, tmp_path):
    """A file-size limit stands in for the full disk: settings and surveys fit, a shard does not."""
    out = tmp_path / "shards"
    limit = 17_000
    done = subprocess.run(
        [sys.executable, "-m", "mvdream_fast.render", str(one_mesh), "-o", str(out), "--workers", "1", "--orbits", "1",
         "--renderer", "numpy"],
        capture_output=True, text=True, timeout=100, check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )  # fmt: skip
    assert done.returncode == 7, done.stderr
    assert "cannot write" in done.stderr
    assert "File too large" in done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(p.name for p in out.iterdir()) == [".lock", "render.json", "surveys.json"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_every_process(one_mesh, tmp_path, number):
    out = tmp_path / "shards"
    command = [sys.executable, "-m", "mvdream_fast.render", str(one_mesh), "-o", str(out), "--workers", "1"]
    process = subprocess.Popen(
        [*command, "--orbits", "200"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    while "1 of 1" not in process.stderr.readline():
        assert process.poll() is None
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)  # comes back only when no child holds the pipe any more
    assert process.returncode == 128 + number
    assert "render: stopped; the same command goes on" in errors
    assert not list(out.glob("*.tar"))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"size": 32}, "--size must be from 64 to 512, got 32"),
        ({"size": 1024}, "--size must be from 64 to 512"),
        ({"workers": 0}, "--workers must be at least 1"),
        ({"limit": 0}, "--limit must be at least 1"),
        ({"orbits": 0, "recolours": 0}, "nothing would be drawn"),
        ({"held_out": 1.0}, "--held-out must be in"),
    ],
)
def test_bad_flags(tmp_path, more, message):
    with pytest.raises(ArgumentError, match=message):
        render.main(flags(tmp_path, tmp_path / "out", **more))


def test_nothing_but_bad_meshes_is_an_error(tmp_path, capsys):
    (tmp_path / "scene.fbx").write_bytes(b"Kaydara")
    with pytest.raises(InputFileError, match="none of the 1 assets of .* can be rendered"):
        render.main(flags(tmp_path, tmp_path / "out", renderer="numpy"))
    assert "skipped scene-fbx: scene.fbx: the format must be one of glb" in capsys.readouterr().out


def test_limit_spreads_over_the_source(meshes, tmp_path):
    entries, _ = render._entries(flags(meshes, tmp_path, limit=2))
    everything = read_folder(meshes)
    assert entries == [everything[0], everything[2]]
