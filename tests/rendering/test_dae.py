"""COLLADA: axes, node trees, polygons, effects, opacity and textures, against colours and corners worked by hand."""

import numpy as np
import pytest
from gltf_builder import corners, encoded, picture, quarters

from mvdream_fast.core.color import to_srgb
from mvdream_fast.rendering.mesh import Mesh, MeshError
from mvdream_fast.rendering.mesh_file import load_mesh

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)
FOUR = np.array([[RED, GREEN], [BLUE, WHITE]], np.uint8).repeat(32, 0).repeat(32, 1)


def source(name: str, values, parameters: str) -> str:
    flat = np.asarray(values, float).reshape(-1)
    names = "".join(f'<param name="{p}" type="float"/>' for p in parameters)
    return (
        f'<source id="{name}"><float_array id="{name}-a" count="{flat.size}">{" ".join(map(str, flat))}</float_array>'
        f'<technique_common><accessor source="#{name}-a" count="{len(values)}" stride="{len(parameters)}">{names}'
        f"</accessor></technique_common></source>"
    )


SOURCES = (
    source("p", [(-1, -1, 0), (1, -1, 0), (1, 1, 0), (-1, 1, 0)], "XYZ")
    + source("uv", [(0, 0), (1, 0), (1, 1), (0, 1)], "ST")
    + source("uv2", [(1, 0), (0, 0), (0, 1), (1, 1)], "ST")
    + source("c", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0.5, 0.5, 0.5)], "RGB")
    + '<vertices id="v"><input semantic="POSITION" source="#p"/></vertices>'
)
INPUTS = (
    '<input semantic="VERTEX" source="#v" offset="0"/><input semantic="TEXCOORD" source="#uv" offset="0" set="0"/>'
    '<input semantic="TEXCOORD" source="#uv2" offset="0" set="1"/>'
)
POLYLIST = f'<polylist count="1" material="m">{INPUTS}<vcount>4</vcount><p>0 1 2 3</p></polylist>'
TRIANGLES = f'<triangles count="2" material="m">{INPUTS}<p>0 1 2 0 2 3</p></triangles>'
POLYGONS = f'<polygons count="1" material="m">{INPUTS}<p>0 1 2 3</p></polygons>'
SAMPLER = (
    '<newparam sid="surf"><surface type="2D"><init_from>img</init_from></surface></newparam>'
    '<newparam sid="samp"><sampler2D><source>surf</source>{more}</sampler2D></newparam>'
)


def dae(effect: str = "", primitives: str = POLYLIST, axis: str = "Y_UP", node: str = "", shader: str = "lambert",
        sampler: str = "", bind: str = "") -> bytes:  # fmt: skip
    """A square; `effect` is the inside of its shader, `node` comes before the instance."""
    return f"""<?xml version="1.0" encoding="utf-8"?>
<COLLADA xmlns="http://www.collada.org/2005/11/COLLADASchema" version="1.4.1">
<asset><created>2020-01-01T00:00:00</created><modified>2020-01-01T00:00:00</modified><unit name="inch" meter="0.0254"/>
<up_axis>{axis}</up_axis></asset>
<library_images><image id="img" name="img"><init_from>four.png</init_from></image></library_images>
<library_effects><effect id="e"><profile_COMMON>{SAMPLER.format(more=sampler)}<technique sid="common"><{shader}>{effect}
</{shader}></technique></profile_COMMON></effect></library_effects>
<library_materials><material id="mat" name="paint"><instance_effect url="#e"/></material></library_materials>
<library_geometries><geometry id="g"><mesh>{SOURCES}{primitives}</mesh></geometry></library_geometries>
<library_visual_scenes><visual_scene id="s"><node id="n">{node}<instance_geometry url="#g"><bind_material>
<technique_common><instance_material symbol="m" target="#mat">{bind}</instance_material></technique_common>
</bind_material></instance_geometry></node></visual_scene></library_visual_scenes>
<scene><instance_visual_scene url="#s"/></scene></COLLADA>""".encode()


def load(content: bytes) -> Mesh:
    return load_mesh(content, "dae", {"four.png": encoded(FOUR)})


def color(text: str) -> str:
    return f"<diffuse><color>{text}</color></diffuse>"


def share(number: float) -> str:
    return f"<transparency><float>{number}</float></transparency>"


TEXTURE = '<diffuse><texture texture="samp" texcoord="UV"/></diffuse>'


def test_diffuse_colors_are_srgb():
    part = load(dae(color("0.2 0.4 0.6 1"))).parts[0]
    np.testing.assert_allclose(to_srgb(part.colors[:, :3]), [(0.2, 0.4, 0.6)] * 4, atol=1e-6)
    assert (part.material, part.blend) == ("paint", False)


@pytest.mark.parametrize("primitives", [POLYLIST, TRIANGLES, POLYGONS])
def test_primitives(primitives):
    found = corners(load(dae(color("1 1 1 1"), primitives)))
    area = np.cross(found[:, 1] - found[:, 0], found[:, 2] - found[:, 0])[:, 2] / 2
    np.testing.assert_allclose(area, [2, 2])


@pytest.mark.parametrize(("axis", "point"), [("Y_UP", (-1, -1, 0)), ("Z_UP", (-1, 0, 1)), ("X_UP", (1, -1, 0))])
def test_up_axes(axis, point):
    """(-1, -1, 0) of the file as right, up and backwards."""
    np.testing.assert_allclose(corners(load(dae(color("1 1 1 1"), axis=axis)))[0, 0], point, atol=1e-6)


def test_node_trees():
    node = "<translate>10 0 0</translate><rotate>0 1 0 90</rotate><scale>1 3 1</scale>"
    found = corners(load(dae(color("1 1 1 1"), node=node))).reshape(-1, 3)
    np.testing.assert_allclose([found.min(0), found.max(0)], [(10, -3, -1), (10, 3, 1)], atol=1e-5)
    matrix = "<matrix>0 -1 0 5  2 0 0 6  0 0 1 7  0 0 0 1</matrix>"  # row-major, unlike glTF's
    found = corners(load(dae(color("1 1 1 1"), node=matrix))).reshape(-1, 3)
    np.testing.assert_allclose([found.min(0), found.max(0)], [(4, 4, 7), (6, 8, 7)], atol=1e-5)


@pytest.mark.parametrize(
    ("effect", "opacity"),
    [
        ("", 1),
        (share(0.25), 0.25),
        ("<transparent><color>1 1 1 0.5</color></transparent>", 0.5),
        ('<transparent opaque="A_ONE"><color>0 0 0 1</color></transparent>' + share(0.4), 0.4),
        ('<transparent opaque="RGB_ZERO"><color>0 0 0 1</color></transparent>', 1),
        ('<transparent opaque="RGB_ZERO"><color>1 1 1 1</color></transparent>' + share(0.25), 0.75),
        ('<transparent opaque="A_ZERO"><color>0 0 0 0.75</color></transparent>', 0.25),
        ('<transparent opaque="RGB_ONE"><color>0 1 0 1</color></transparent>', 0.71516),
    ],
)
def test_four_ways_to_say_how_clear(renderer, effect, opacity):
    mesh = load(dae(color("1 0 0 1") + effect))
    assert mesh.parts[0].opacity == pytest.approx(opacity, abs=1e-5)
    assert quarters(renderer, mesh)[0] == (255, 0, 0, round(opacity * 255 + 1e-3))


def test_a_texture_and_its_set(renderer):
    assert quarters(renderer, load(dae(TEXTURE))) == [(*c, 255) for c in (RED, GREEN, BLUE, WHITE)]
    bind = '<bind_vertex_input semantic="UV" input_semantic="TEXCOORD" input_set="1"/>'
    assert quarters(renderer, load(dae(TEXTURE, bind=bind))) == [(*c, 255) for c in (GREEN, RED, WHITE, BLUE)]


@pytest.mark.parametrize(
    ("named", "there"),
    [
        ("my%20four.png", "my four.png"),
        ("my%20four.png", "my%20four.png"),
        ("./tex/f%C3%BCr%231.png", "tex/für#1.png"),
        ("file:///C:/models/my%20four.png", "my four.png"),
        ("my four.png", "my four.png"),
        ("100%.png", "100%.png"),
    ],
)
def test_names_of_images_are_uris(named, there):
    mesh = load_mesh(dae(TEXTURE).replace(b">four.png<", f">{named}<".encode()), "dae", {there: encoded(FOUR)})
    assert mesh.parts[0].texture is not None
    assert mesh.notes == ()


@pytest.mark.parametrize(
    ("wrap", "expected"),
    [("", [RED, GREEN]), ("WRAP", [RED, GREEN]), ("MIRROR", [GREEN, RED]), ("CLAMP", [GREEN, GREEN])],
)
def test_wrap_modes(renderer, wrap, expected):
    sampler = f"<wrap_s>{wrap}</wrap_s><wrap_t>{wrap}</wrap_t>" if wrap else ""
    content = dae(TEXTURE, sampler=sampler).replace(b"0.0 0.0 1.0 0.0 1.0 1.0 0.0 1.0", b"1 0 2 0 2 1 1 1")
    assert quarters(renderer, load(content))[:2] == [(*c, 255) for c in expected]


def test_opacity_of_a_texture(renderer):
    """RGB_ZERO: what is light in the image is clear. Red lets 1 - 0.2127 be seen, white nothing."""
    clear = '<transparent opaque="RGB_ZERO"><texture texture="samp" texcoord="UV"/></transparent>'
    found = quarters(renderer, load(dae(color("1 1 0 1") + clear)))
    assert found[3] == (0, 0, 0, 0)
    assert found[0] == (255, 255, 0, 201)


def test_emission_and_constant_shaders(renderer):
    glow = "<emission><color>0.2 0.4 0 1</color></emission>"
    assert quarters(renderer, load(dae(glow + color("0 0 0 1"))))[0] == (51, 102, 0, 255)
    assert quarters(renderer, load(dae(glow, shader="constant")), lit=True)[0] == (51, 102, 0, 255)


def test_vertex_colors_are_srgb(renderer):
    inputs = INPUTS + '<input semantic="COLOR" source="#c" offset="0"/>'
    mesh = load(dae(color("1 1 1 1"), f'<triangles count="2" material="m">{inputs}<p>0 1 2 0 2 3</p></triangles>'))
    part = mesh.parts[0]
    order = np.lexsort([part.positions[:, 0], part.positions[:, 2]])
    expected = [(1, 0, 0), (0, 1, 0), (0.5, 0.5, 0.5), (0, 0, 1)]
    np.testing.assert_allclose(to_srgb(part.colors[order, :3]), expected, atol=1e-6)
    assert picture(renderer, mesh)[16, 16, 3] == 255


def test_what_is_missing_is_said():
    lines = f'<lines count="1" material="m">{INPUTS}<p>0 1</p></lines>'
    mesh = load_mesh(dae(TEXTURE, POLYLIST + lines), "dae", {})
    assert set(mesh.notes) == {
        "points and lines have no surface and are not drawn", "the texture four.png is not there and is not drawn"
    }  # fmt: skip
    np.testing.assert_allclose(to_srgb(mesh.parts[0].colors[0, :3]), 0.8, atol=1e-6)


def test_skins_and_morphs_are_shown_unmoved():
    """A bind shape of half the size; and a morph, whose targets are left out."""
    names = (
        '<source id="j"><Name_array id="ja" count="1">b</Name_array><technique_common><accessor source="#ja" count="1">'
    )
    names += '<param name="JOINT" type="Name"/></accessor></technique_common></source>'
    eye = source("b", [np.eye(4).reshape(-1)], ["TRANSFORM"]).replace('type="float"/>', 'type="float4x4"/>', 1)
    eye = eye.replace('stride="1"', 'stride="16"')
    skin = f"""<library_controllers><controller id="k"><skin source="#g">
<bind_shape_matrix>0.5 0 0 0 0 0.5 0 0 0 0 1 0 0 0 0 1</bind_shape_matrix>{names}{eye}{source("w", [(1,)], ["WEIGHT"])}
<joints><input semantic="JOINT" source="#j"/><input semantic="INV_BIND_MATRIX" source="#b"/></joints>
<vertex_weights count="4"><input semantic="JOINT" source="#j" offset="0"/>
<input semantic="WEIGHT" source="#w" offset="1"/><vcount>1 1 1 1</vcount><v>0 0 0 0 0 0 0 0</v></vertex_weights>
</skin></controller></library_controllers><library_visual_scenes>"""
    goals = names.replace("Name_array", "IDREF_array").replace(">b<", ">g<").replace("JOINT", "MORPH_TARGET")
    goals = goals.replace('"Name"', '"IDREF"')
    targets = f"""<library_controllers><controller id="k"><morph source="#g" method="NORMALIZED">{goals}
{source("w", [(1,)], ["MORPH_WEIGHT"])}<targets><input semantic="MORPH_TARGET" source="#j"/>
<input semantic="MORPH_WEIGHT" source="#w"/></targets></morph></controller></library_controllers>
<library_visual_scenes>"""
    for library, half, note in (
        (skin, 0.5, "a skin is shown in its bind shape"),
        (targets, 1, "a morphed geometry is shown as it is without its targets"),
    ):
        text = dae(color("1 1 1 1")).decode().replace("<library_visual_scenes>", library)
        text = text.replace('instance_geometry url="#g"', 'instance_controller url="#k"')
        mesh = load(text.replace("</instance_geometry>", "</instance_controller>").encode())
        found = corners(mesh).reshape(-1, 3)
        np.testing.assert_allclose([found.min(0), found.max(0)], [(-half, -half, 0), (half, half, 0)], atol=1e-6)
        assert mesh.notes == (note,)


@pytest.mark.parametrize("content", [b"", b"<a/>", dae().replace(b"0 1 2 3</p>", b"0 1 2 9</p>"), dae()[:900]])
def test_damaged_files(content):
    with pytest.raises(MeshError, match="dae mesh"):
        load(content)
