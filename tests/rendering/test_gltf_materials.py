"""glTF's materials, textures, samplers and vertex colours: pixels of both renderers against colours worked by hand."""

import numpy as np
import pytest
from gltf_builder import LINEAR, SQUARE_UV, Builder, encoded, picture, quarters
from PIL import Image

from mvdream_fast.rendering.mesh import MeshError
from mvdream_fast.rendering.mesh_file import load_mesh

RED, GREEN, BLUE, WHITE = (255, 0, 0, 255), (0, 255, 0, 255), (0, 0, 255, 255), (255, 255, 255, 255)
FOUR = np.array([[RED, GREEN], [BLUE, WHITE]], np.uint8)
NEAREST = {"magFilter": 9728}
REPEAT, CLAMP, MIRROR = 10497, 33071, 33648


def shown(renderer, material: dict, builder: Builder | None = None, **attributes) -> tuple[int, ...]:
    """The middle of the square's upper left quarter in that material."""
    builder = builder or Builder()
    square = builder.square(**attributes) | {"material": builder.add("materials", material)}
    return quarters(renderer, builder.show(square).load())[0]


def flat(*rgba) -> np.ndarray:
    return np.full((2, 2, len(rgba)), rgba, np.uint8)


def test_no_material_is_white(renderer):
    builder = Builder()
    assert quarters(renderer, builder.show(builder.square()).load()) == [WHITE] * 4


def test_the_base_color_factor_is_linear(renderer):
    factor = [LINEAR[128], LINEAR[64], LINEAR[192], 1]
    assert shown(renderer, {"pbrMetallicRoughness": {"baseColorFactor": factor}}) == (128, 64, 192, 255)
    # 0.214 in linear light is mid grey: sRGB 0.5
    assert shown(renderer, {"pbrMetallicRoughness": {"baseColorFactor": [0.214] * 3 + [1]}}) == (127, 127, 127, 255)


def test_a_texture_is_srgb_and_comes_back_as_it_is(renderer):
    builder = Builder()
    material = {"pbrMetallicRoughness": {"baseColorTexture": builder.texture(flat(10, 128, 250))}}
    assert shown(renderer, material, builder) == (10, 128, 250, 255)


@pytest.mark.parametrize(
    ("color", "dtype", "more"),
    [
        ([0.5] * 3, "f4", {}),
        ([0.5] * 4, "f4", {}),
        ([127.5] * 3 + [0], "f4", {"scale": 255}),
        ([128, 128, 128, 255], "u1", {"normalized": True}),
        ([128, 128, 128, 255], "u1", {}),  # a colour of bytes can mean nothing else
        ([32768] * 3 + [65535], "u2", {"normalized": True}),
    ],
)
def test_vertex_colors_are_linear_whatever_their_type(renderer, color, dtype, more):
    """0.5 of linear light is 188: also with a material, whose alphaMode OPAQUE ignores alpha."""
    builder = Builder()
    color = np.array(color) / more.get("scale", 1)
    flags = {k: v for k, v in more.items() if k == "normalized"}
    given = builder.accessor([color] * 4, dtype, **flags)
    assert shown(renderer, {}, builder, COLOR_0=given) == (188, 188, 188, 255)


def test_factor_color_and_texture_are_multiplied_in_linear_light(renderer):
    """0.5 x 0.5 x 0.21586 = 0.053965, which is 65.7 of 255; without the texture 0.25, which is 137."""
    builder = Builder()
    rough = {"baseColorFactor": [0.5, 0.5, 0.5, 1]}
    assert shown(renderer, {"pbrMetallicRoughness": rough}, builder, COLOR_0=[[0.5] * 3] * 4) == (137, 137, 137, 255)
    builder = Builder()
    rough["baseColorTexture"] = builder.texture(flat(128, 128, 128))
    assert shown(renderer, {"pbrMetallicRoughness": rough}, builder, COLOR_0=[[0.5] * 3] * 4) == (66, 66, 66, 255)


def test_vertex_colors_are_interpolated_in_linear_light(renderer):
    """Black on the left, white on the right: the middle is half the light, 188."""
    builder = Builder()
    square = builder.square(COLOR_0=[[x] * 3 for x in (0, 1, 1, 0)])
    view = picture(renderer, builder.show(square).load(), samples=2)
    assert abs(int(view[16, 15, 0]) + int(view[16, 16, 0]) - 2 * 188) <= 2


def textured(info: dict | None = None, sampler: dict | None = None, pixels=FOUR, **attributes):
    """A loaded square with a texture of four colours."""
    builder = Builder()
    base = builder.texture(pixels, NEAREST if sampler is None else sampler) | (info or {})
    square = builder.square(**attributes) | {"material": builder.material({"baseColorTexture": base})}
    return builder.show(square).load()


def test_the_first_row_of_an_image_is_the_top(renderer):
    assert quarters(renderer, textured()) == [RED, GREEN, BLUE, WHITE]


@pytest.mark.parametrize(("dtype", "scale"), [("u1", 255), ("u2", 65535)])
def test_normalised_texture_coordinates(renderer, dtype, scale):
    builder = Builder()
    uv = builder.accessor(np.array(SQUARE_UV) * scale, dtype, normalized=True)
    base = builder.texture(FOUR, NEAREST)
    square = builder.square(TEXCOORD_0=uv) | {"material": builder.material({"baseColorTexture": base})}
    assert quarters(renderer, builder.show(square).load()) == [RED, GREEN, BLUE, WHITE]


def test_whole_texture_coordinates_of_quantised_meshes(renderer):
    """KHR_mesh_quantization: bytes that are not normalised, made small again by the texture's transform."""
    builder = Builder(extensionsRequired=["KHR_mesh_quantization", "KHR_texture_transform"])
    uv = builder.accessor(np.array(SQUARE_UV) * 100, "u1")
    base = builder.texture(FOUR, NEAREST) | {"extensions": {"KHR_texture_transform": {"scale": [0.01, 0.01]}}}
    square = builder.square(TEXCOORD_0=uv) | {"material": builder.material({"baseColorTexture": base})}
    assert quarters(renderer, builder.show(square).load()) == [RED, GREEN, BLUE, WHITE]


def test_the_set_of_coordinates_that_a_texture_asks_for(renderer):
    other = [(1, 1), (0, 1), (0, 0), (1, 0)]  # mirrored from left to right
    assert quarters(renderer, textured({"texCoord": 1}, TEXCOORD_1=other)) == [GREEN, RED, WHITE, BLUE]
    transform = {"extensions": {"KHR_texture_transform": {"texCoord": 1}}}
    assert quarters(renderer, textured(transform, TEXCOORD_1=other)) == [GREEN, RED, WHITE, BLUE]
    mesh = textured({"texCoord": 3})
    assert mesh.notes == ("a texture asks for TEXCOORD_3, which the mesh lacks, and is not drawn",)
    assert quarters(renderer, mesh) == [WHITE] * 4


@pytest.mark.parametrize(
    ("wrap", "expected"),
    [
        (None, [RED, GREEN, RED, GREEN]),
        (REPEAT, [RED, GREEN, RED, GREEN]),
        (CLAMP, [RED, RED, RED, GREEN]),
        (MIRROR, [GREEN, RED, RED, GREEN]),
    ],
)
def test_wrap_modes(renderer, wrap, expected):
    """u from -1 to 1 over an image of two columns shows four; and the same along v."""
    sampler = NEAREST | ({} if wrap is None else {"wrapS": wrap, "wrapT": wrap})
    columns = textured(sampler=sampler, pixels=FOUR[:1], TEXCOORD_0=[(-1, 1), (1, 1), (1, 0), (-1, 0)])
    assert [tuple(picture(renderer, columns)[16, x].tolist()) for x in (8, 13, 18, 23)] == expected
    rows = textured(sampler=sampler, pixels=FOUR[:1].transpose(1, 0, 2), TEXCOORD_0=[(0, 1), (1, 1), (1, -1), (0, -1)])
    assert [tuple(picture(renderer, rows)[y, 16].tolist()) for y in (8, 13, 18, 23)] == expected


def test_a_texture_without_a_sampler_is_smooth_and_repeats(renderer):
    """Between black and white texels there is half their light, 188."""
    builder = Builder()
    base = builder.texture(np.array([[0, 255]], np.uint8))
    square = builder.square() | {"material": builder.material({"baseColorTexture": base})}
    view = picture(renderer, builder.show(square).load(), samples=2)
    assert abs(int(view[16, 15, 0]) + int(view[16, 16, 0]) - 2 * 188) <= 4
    assert 240 <= view[16, 21, 0] <= 255
    assert "sampler" not in builder.tree["textures"][0]


@pytest.mark.parametrize(
    ("transform", "expected"),
    [
        ({"offset": [0.5, 0]}, [GREEN, RED, WHITE, BLUE]),
        ({"scale": [0.5, 0.5]}, [RED] * 4),
        ({"offset": [0, 1], "scale": [1, -1]}, [BLUE, WHITE, RED, GREEN]),
        # The specification's own example: the lower left quarter of the image, turned clockwise.
        ({"offset": [0, 1], "rotation": np.pi / 2, "scale": [0.5, 0.5]}, [BLUE] * 4),
        ({"offset": [0, 1], "rotation": np.pi / 2}, [BLUE, RED, WHITE, GREEN]),
    ],
)
def test_texture_transforms(renderer, transform, expected):
    assert quarters(renderer, textured({"extensions": {"KHR_texture_transform": transform}})) == expected


@pytest.mark.parametrize(
    ("mode", "alpha"),
    [
        ({}, 255),  # OPAQUE: 0.5 x 0.4 is ignored
        ({"alphaMode": "MASK"}, 0),
        ({"alphaMode": "MASK", "alphaCutoff": 0.19}, 255),
        ({"alphaMode": "MASK", "alphaCutoff": 0.21}, 0),
        ({"alphaMode": "BLEND"}, 51),
    ],
)
def test_alpha_modes(renderer, mode, alpha):
    """Factor 0.5, texture 102 / 255 = 0.4, vertex colour 1: alpha is 0.2, 51 of 255."""
    builder = Builder()
    rough = {"baseColorFactor": [1, 0, 0, 0.5], "baseColorTexture": builder.texture(flat(255, 255, 255, 102))}
    square = builder.square(COLOR_0=[[1.0] * 4] * 4) | {"material": builder.material(rough, **mode)}
    color = quarters(renderer, builder.show(square).load())[0]
    assert color == ((255, 0, 0, alpha) if alpha else (0, 0, 0, 0))


def test_blended_leaves_hide_what_is_behind_them(renderer):
    """Texels of full alpha in a BLEND material are solid, whatever the order of the faces; clear ones are holes."""
    builder = Builder()
    leaf = np.array([[RED, (0, 0, 0, 0)]], np.uint8)
    front = builder.square() | {
        "material": builder.material({"baseColorTexture": builder.texture(leaf, NEAREST)}, alphaMode="BLEND")
    }
    behind = builder.square(POSITION=[(x, y, -0.001) for x, y in ((-1, -1), (1, -1), (1, 1), (-1, 1))]) | {
        "material": builder.material({"baseColorFactor": [0, 0, 1, 0.999]}, alphaMode="BLEND")
    }
    assert quarters(renderer, builder.show(front, behind).load())[:2] == [RED, BLUE]


def test_single_sided_faces_are_not_seen_from_behind(renderer):
    builder = Builder()
    material = builder.material(doubleSided=False)
    mesh = builder.show(builder.square() | {"material": material}).load()
    assert quarters(renderer, mesh)[0] == WHITE
    assert picture(renderer, mesh, azimuth=180)[..., 3].max() == 0
    builder.tree["materials"][0]["doubleSided"] = True
    assert picture(renderer, builder.load(), azimuth=180)[16, 16].tolist() == list(WHITE)


def test_a_mirrored_node_is_seen_from_the_same_side(renderer):
    """A negative scale turns triangles over, and glTF turns them back."""
    builder = Builder()
    mesh = builder.show(builder.square(), scale=[-1, 1, 1]).load()
    assert quarters(renderer, mesh)[0] == WHITE
    assert picture(renderer, mesh, azimuth=180)[..., 3].max() == 0


def test_emission_is_added_in_linear_light(renderer):
    black = {"baseColorFactor": [0, 0, 0, 1]}
    glow = {"pbrMetallicRoughness": black, "emissiveFactor": [LINEAR[64], LINEAR[128], 0]}
    assert shown(renderer, glow) == (64, 128, 0, 255)
    strong = {"KHR_materials_emissive_strength": {"emissiveStrength": 0.5 / LINEAR[64]}}
    assert shown(renderer, glow | {"extensions": strong})[0] == 188
    builder = Builder()
    texture = builder.texture(flat(128, 255, 0))
    half = {"pbrMetallicRoughness": black, "emissiveFactor": [1, 0.5, 1], "emissiveTexture": texture}
    assert shown(renderer, half, builder) == (128, 188, 0, 255)
    grey = {"pbrMetallicRoughness": {"baseColorFactor": [0.25, 0.25, 0.25, 1]}, "emissiveFactor": [0.25, 0, 0]}
    assert shown(renderer, grey) == (188, 137, 137, 255)


def test_unlit_materials_are_not_shaded(renderer):
    builder = Builder()
    material = {"pbrMetallicRoughness": {"baseColorFactor": [LINEAR[128], LINEAR[64], LINEAR[192], 1]}}
    unlit = material | {"emissiveFactor": [1, 1, 1], "extensions": {"KHR_materials_unlit": {}}}
    square = builder.square() | {"material": builder.add("materials", unlit)}
    assert quarters(renderer, builder.show(square).load(), lit=True) == [(128, 64, 192, 255)] * 4
    # The same with light, seen from the front: ambient 0.385, headlight 0.44 x 0.99, key 0.275 x 0.6183; together 0.99.
    builder.tree["materials"][0] = material
    lit = quarters(renderer, builder.load(), lit=True)[0]
    np.testing.assert_allclose(lit, (127, 63, 190, 255), atol=1)


def test_the_diffuse_color_of_specular_glossiness(renderer):
    builder = Builder()
    gloss = {"diffuseFactor": [0.5, 1, 0, 1], "diffuseTexture": builder.texture(flat(255, 128, 255))}
    extensions = {"KHR_materials_pbrSpecularGlossiness": gloss}
    assert shown(renderer, {"extensions": extensions}, builder) == (188, 128, 0, 255)


def test_of_variants_the_default_material_is_shown(renderer):
    builder = Builder(extensionsRequired=["KHR_materials_variants"])
    red, blue = (builder.material({"baseColorFactor": c}) for c in ([1, 0, 0, 1], [0, 0, 1, 1]))
    mapping = {"KHR_materials_variants": {"mappings": [{"material": blue, "variants": [0]}]}}
    square = builder.square() | {"material": red, "extensions": mapping}
    assert quarters(renderer, builder.show(square).load())[0] == RED


GREY16 = Image.fromarray(np.full((2, 2), 128 * 257, np.uint16))
PALETTE = Image.fromarray(flat(200, 100, 50)).convert("P", palette=Image.Palette.ADAPTIVE)


@pytest.mark.parametrize(
    ("pixels", "kind", "expected"),
    [
        (flat(200, 100, 50), "PNG", (200, 100, 50)),
        (np.full((2, 2), 90, np.uint8), "PNG", (90, 90, 90)),
        (GREY16, "PNG", (128, 128, 128)),
        (PALETTE, "PNG", (200, 100, 50)),
        (np.full((8, 8, 3), 120, np.uint8), "JPEG", (120, 120, 120)),
    ],
)
def test_images(renderer, pixels, kind, expected):
    builder = Builder()
    texture = {"source": builder.add("images", builder.image(pixels, kind))}
    info = {"index": builder.add("textures", texture)}
    assert shown(renderer, {"pbrMetallicRoughness": {"baseColorTexture": info}}, builder) == (*expected, 255)


@pytest.mark.parametrize(("kind", "name"), [("WEBP", "EXT_texture_webp"), ("AVIF", "EXT_texture_avif")])
def test_images_of_extensions_come_before_their_fallback(renderer, kind, name):
    builder = Builder(extensionsRequired=[name])
    options = {"lossless": True} if kind == "WEBP" else {"quality": 100, "subsampling": "4:4:4"}
    better = builder.add("images", builder.image(np.full((16, 16, 3), 120, np.uint8), kind, **options))
    worse = builder.add("images", builder.image(flat(0, 0, 0)))
    info = {"index": builder.add("textures", {"source": worse, "extensions": {name: {"source": better}}})}
    assert shown(renderer, {"pbrMetallicRoughness": {"baseColorTexture": info}}, builder) == (120, 120, 120, 255)


def test_a_large_texture_is_shrunk_in_linear_light():
    """A chessboard of black and white texels has half the light, 188: the mean of its bytes would be 128."""
    board = np.indices((1024, 1024)).sum(0) % 2 * 255
    part = textured(pixels=board).parts[0]
    assert part.texture.pixels.shape == (512, 512, 4)
    assert set(part.texture.pixels[..., :3].reshape(-1)) == {188}


def test_images_that_cannot_be_read(tmp_path):
    builder = Builder()
    base = {"index": builder.add("textures", {"source": builder.add("images", {"uri": "picture.png"})})}
    builder.show(builder.square() | {"material": builder.material({"baseColorTexture": base})})
    path = tmp_path / "a.gltf"
    path.write_bytes(builder.json(builder.data_uri()))
    with pytest.raises(MeshError, match=r"a.gltf: needs 'picture.png', which is not beside it"):
        load_mesh(path)
    (tmp_path / "picture.png").write_bytes(b"\xabKTX 20\xbb\r\n\x1a\n")
    with pytest.raises(MeshError, match=r"a.gltf: a texture is damaged, or not PNG, JPEG, WEBP, AVIF"):
        load_mesh(path)
    (tmp_path / "picture.png").write_bytes(encoded(FOUR))
    assert load_mesh(path).parts[0].texture.pixels[0, 1].tolist() == list(GREEN)
