"""A fixed mesh whose colours are optimised: it stays as it is, and its texture comes out as it was learned."""

import dataclasses
import math

import numpy as np
import pytest
import torch
import trimesh

from mvdream_fast.camera import evaluation_cameras, generate_rays
from mvdream_fast.core.errors import DivergedError, ModelError
from mvdream_fast.core.rng import Stream
from mvdream_fast.scene.asset import Asset
from mvdream_fast.scene.kinds import new_representation
from mvdream_fast.scene.mesh.mesh import Mesh
from mvdream_fast.scene.tets.config import TetsConfig, TexturedMeshConfig
from mvdream_fast.scene.tets.tets import Tets
from mvdream_fast.scene.tets.textured import TexturedMesh

FIELD = TexturedMeshConfig(volume="mini", background="grey")
SHEET = dataclasses.replace(FIELD, mesh_colors="texture", texture_size=64)
RAYS = generate_rays(evaluation_cameras(2), 32, 32)


def box(color=(1.0, 0.5, 0.0)):
    body = trimesh.creation.box([0.8, 1.0, 0.6])
    vertices = np.asarray(body.vertices, np.float32)
    return Mesh(vertices, np.asarray(body.faces, np.int32), np.tile(np.float32(color), (len(vertices), 1)))


def restored(mesh):
    fresh = TexturedMesh(mesh.config)
    fresh.restore({name: value.clone() for name, value in mesh.state().items()})
    return fresh


@pytest.mark.parametrize("config", [FIELD, SHEET])
def test_the_mesh_stays_and_its_colours_learn(config):
    mesh = TexturedMesh(config, box())
    before = {name: value.clone() for name, value in mesh.state().items()}
    groups = mesh.parameter_groups()
    optimizer = torch.optim.Adam([{**group, "lr": 0.3 if config is SHEET else 0.05} for group in groups])
    goal, losses = torch.tensor([0.1, 0.2, 0.9]), []
    for step in range(30):
        rendered = mesh.render(RAYS, Stream(0, step, "render"), True)
        seen = rendered.opacity.detach() == 1
        loss = (rendered.rgb[seen] - goal).square().mean() + mesh.regularizers(rendered, RAYS, step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]
    after = mesh.state()
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert changed == (
        {"logits"} if config is SHEET else {"volume.table", "volume.feature_weights.0", "volume.feature_weights.1"}
    )
    exported = mesh.mesh()
    np.testing.assert_array_equal(np.unique(exported.vertices, axis=0), np.unique(box().vertices, axis=0))


def test_a_texture_starts_with_the_mesh_s_colours():
    mesh = TexturedMesh(SHEET, box())
    rendered = mesh.render(RAYS)
    colors = rendered.rgb[rendered.opacity == 1]
    assert (colors - torch.tensor([1 - 1 / 64, 0.5, 1 / 64])).abs().mean() < 0.02


def test_seams_are_no_outlines():
    """The unwrapped box has its vertices several times; drawn are the eight."""
    mesh = TexturedMesh(SHEET, box())
    assert len(mesh.vertices) == 8 < len(mesh.uvs)
    assert not (mesh.topology < 0).any()
    assert mesh.statistics() == {"n_faces": 12, "n_vertices": 8}


def test_the_texture_is_exported_as_it_is_shown(tmp_path):
    mesh = TexturedMesh(SHEET, box())
    with torch.no_grad():
        mesh.logits.copy_(torch.randn(mesh.logits.shape, generator=torch.Generator().manual_seed(0)))
    exported = mesh.mesh(texture=512)
    assert exported.texture.shape == (64, 64, 3)
    again = TexturedMesh(SHEET, exported)
    difference = (again.render(RAYS).rgb - mesh.render(RAYS).rgb).abs()
    assert difference.mean() < 0.01  # bytes, and gaps that repeat their neighbours
    assert exported.faces.shape == (12, 3)
    assert exported.normals.shape == exported.vertices.shape
    corner = torch.from_numpy(exported.colors[0])
    at = (exported.uvs[0] * 64).astype(int).clip(0, 63)
    shown = torch.from_numpy(
        exported.texture[::-1].copy()[max(at[1] - 1, 0) : at[1] + 2, max(at[0] - 1, 0) : at[0] + 2]
    )
    assert (shown.float() / 255 - corner).abs().amin((0, 1)).max() < 0.5
    Asset(mesh).save_glb(tmp_path / "box.glb", texture=64)
    assert trimesh.load(tmp_path / "box.glb", force="mesh").visual.material.baseColorTexture.size == (64, 64)


def test_a_simplified_mesh_has_colours_at_its_vertices():
    source = Tets(TetsConfig(volume="mini", background="grey", tets_resolution=32))
    for config in (FIELD, SHEET):
        mesh = TexturedMesh.from_representation(config, source, resolution=32)
        small = mesh.mesh(max_faces=300)
        assert len(small.faces) <= 300
        assert small.texture is None
        assert small.colors.shape == small.vertices.shape
        assert len(mesh.mesh().faces) == len(source.mesh().faces)


def test_a_simplified_mesh_is_baked_from_its_texture_not_from_its_vertices():
    """Stripes that are finer than the triangles of a box: they are in the new sheet, too."""
    mesh = TexturedMesh(SHEET, box())
    with torch.no_grad():
        mesh.logits.copy_(torch.where(torch.arange(64) % 8 < 4, 9.0, -9.0)[None, :, None, None].expand(1, 64, 64, 3))
    small = mesh.mesh(max_faces=11, texture=128)
    assert len(small.faces) <= 11
    assert small.texture.shape == (128, 128, 3)
    stripes = (small.texture > 127).mean()
    assert 0.3 < stripes < 0.7
    assert ((small.texture < 9) | (small.texture > 246)).mean() > 0.99  # no blends of two stripes


def test_colours_are_taken_over():
    source = Tets(TetsConfig(volume="mini", background="grey", tets_resolution=32), Stream(9, 0, "volume"))
    expected = source.render(RAYS)
    by_field, by_texture = (
        TexturedMesh.from_representation(c, source, resolution=32).render(RAYS) for c in (FIELD, SHEET)
    )
    # Its triangles have another order, in which the blends along outlines round.
    torch.testing.assert_close(by_field.rgb, expected.rgb, atol=1e-5, rtol=0)
    assert (by_texture.rgb - expected.rgb).abs().max() < 0.01


@pytest.mark.parametrize("config", [FIELD, SHEET])
def test_state_goes_into_a_fresh_one_to_the_byte(config):
    mesh = TexturedMesh(config, box(), Stream(3, 0, "volume"))
    assert torch.equal(restored(mesh).render(RAYS).rgb, mesh.render(RAYS).rgb)
    again = restored(mesh).state()
    assert all(torch.equal(value, again[name]) for name, value in mesh.state().items())


def test_an_asset_of_it_is_saved_and_loaded(tmp_path):
    mesh = TexturedMesh(SHEET, box())
    settings = {"shape": "textured-mesh", "volume": "mini", "background": "grey", "mesh_colors": "texture"}
    Asset(mesh, "a box", 0, settings | {"texture_size": 64}).save(tmp_path / "asset.safetensors")
    loaded = Asset.load(tmp_path / "asset.safetensors")
    assert torch.equal(loaded.render(size=16).rgb, Asset(mesh).render(size=16).rgb)


def test_a_restart_keeps_the_mesh():
    mesh = TexturedMesh(SHEET, box())
    vertices = mesh.vertices.clone()
    mesh.restart(4)
    assert torch.equal(mesh.vertices, vertices)
    assert torch.equal(mesh.volume.table, new_representation(SHEET, 4).volume.table)
    rendered = mesh.render(RAYS)
    torch.testing.assert_close(rendered.rgb, torch.full_like(rendered.rgb, 0.5))


def test_without_a_mesh_there_is_the_background():
    empty = new_representation(SHEET)
    assert (empty.render(RAYS).rgb == 0.5).all()
    with pytest.raises(DivergedError, match="no mesh to export"):
        empty.mesh()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"faces": np.zeros((0, 3), np.int32)}, "must have triangles"),
        ({"faces": np.array([[0, 1, 8]], np.int32)}, "of its 8 vertices"),
        ({"vertices": np.full((8, 3), math.nan, np.float32)}, "finite vertices"),
    ],
)
def test_what_is_no_mesh_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        TexturedMesh(FIELD, dataclasses.replace(box(), **change))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("faces", torch.full((12, 3), 8, dtype=torch.int32), "vertices that it has not"),
        ("uv_faces", torch.full((11, 3), 0, dtype=torch.int32), "vertices that it has not"),
        ("vertices", torch.full((8, 3), math.nan), "not finite in vertices"),
        ("logits", torch.zeros(1, 32, 32, 3), "another configuration: logits"),
    ],
)
def test_a_state_that_is_none_is_refused(name, value, message):
    mesh = TexturedMesh(SHEET, box())
    with pytest.raises(ModelError, match=message):
        TexturedMesh(SHEET).restore(dict(mesh.state()) | {name: value})
    with pytest.raises(ModelError, match="another configuration|damaged"):
        TexturedMesh(SHEET).restore({k: v for k, v in mesh.state().items() if k != name})
