"""Every recipe with every shape: settings survive the switch, and none gets a loss that its shape has not."""

import pytest
import torch
from reference.random_model import random_model

from mvdream_fast.core.errors import InputFileError
from mvdream_fast.distill import run_memory
from mvdream_fast.distill.config import SDSConfig, replaced, settings_of, typed
from mvdream_fast.distill.recipes import RECIPES, resolve_config, shaded
from mvdream_fast.distill.systems import SDS_PRESETS, mini, repaint
from mvdream_fast.pipeline import MVDreamPipeline
from mvdream_fast.scene.asset import Asset
from mvdream_fast.scene.kinds import new_representation
from mvdream_fast.scene.shapes import SHAPES, changed, class_for
from mvdream_fast.scene.tets.tets import Tets
from mvdream_fast.text_to_3d import TextTo3D


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("preset", SDS_PRESETS)
def test_a_recipe_takes_any_shape(preset, recipe, shape):
    plain, whole = (resolve_config(preset, recipe=recipe, **name) for name in ({}, {"shape": shape}))
    assert whole.later == plain.later  # which are handed theirs
    config = whole.stages[0]
    assert type(config.representation) is SHAPES[shape] is class_for({"shape": shape})
    assert config.representation.volume == plain.representation.volume
    assert config.representation.background == plain.representation.background
    settings = settings_of(config)
    assert replaced(SDSConfig(), **settings) == config
    assert replaced(SDSConfig(), **typed(settings, "f", InputFileError)) == config
    shorter = resolve_config(config, steps=config.steps // 2)
    assert type(shorter.representation) is SHAPES[shape]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_fresh_representation_is_its_seed_alone(shape):
    config = changed(replaced(mini(), shape=shape).representation, background="learned")
    before = torch.get_rng_state()
    first, second, other = (new_representation(config, seed).state() for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)  # torch's own generator is the caller's
    learned = [name for name in first if "background" in name]
    assert learned
    for name, values in first.items():
        assert torch.equal(values, second[name]), name
        assert name not in learned or not torch.equal(values, other[name])


@pytest.mark.parametrize("shape", ["tets", "textured-mesh"])
def test_a_mesh_gets_no_losses_of_densities(shape):
    config = resolve_config("mini", shape=shape)
    lit, redrawn = shaded(config), repaint(config)
    assert (lit.shading, lit.shading_from, lit.representation) == (True, config.steps // 2, config.representation)
    assert (redrawn.repaint.repaint_from, redrawn.representation) == (0.7, config.representation)
    assert settings_of(shaded(mini()))["lambda_orient"][2] == 1000
    assert settings_of(repaint(mini()))["lambda_opaque"][2] == 300


@pytest.mark.parametrize(
    ("shape", "own"), [("volume", []), ("surface", []), ("tets", [run_memory.TETS]), ("textured-mesh", [])]
)
def test_each_particle_has_its_memory(shape, own):
    one, three = (run_memory.estimate(None, resolve_config("mini", shape=shape, particles=n)) for n in (1, 3))
    of_each = [run_memory.VOLUME, *own]
    assert three == {**one, **{name: 3 * one[name] for name in of_each}}


def test_a_run_of_settings_that_name_tetrahedra(tmp_path):
    settings = {"shape": "tets", "tets_resolution": 32, "sphere_radius": 0.4, "steps": 2, "render_size": (16,)}
    config = resolve_config("mini", **settings)
    asset = TextTo3D(MVDreamPipeline(random_model(), "cpu", "float32"))("a red car", config=config)
    assert isinstance(asset.representation, Tets)
    fresh = Tets(asset.representation.config)
    assert not torch.equal(asset.representation.sdf, fresh.sdf)
    assert torch.allclose(asset.representation.sdf, fresh.sdf, atol=0.1)  # two steps of a rate of 0.01 from its sphere
    asset.save(tmp_path / "asset.safetensors")
    loaded = Asset.load(tmp_path / "asset.safetensors")
    assert isinstance(loaded.representation, Tets)
    assert loaded.representation.config == config.representation
    assert torch.equal(loaded.render(size=16).rgb, asset.render(size=16).rgb)
