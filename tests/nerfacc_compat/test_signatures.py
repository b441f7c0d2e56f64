"""Every public name and parameter of nerfacc 0.5.3 and of its main branch, and nerfacc itself where it runs.

nerfacc 0.5.3 runs only its dense helpers without a GPU; the test against them is skipped where it isn't installed.
"""

import importlib
import inspect
import operator

import pytest
import torch
from reference.nerfacc_data import close, draw, rays_around
from reference.nerfacc_signatures import ADDED_SINCE, SIGNATURES

from mvdream_fast import nerfacc_compat as nerfacc

MODULES = {"cameras", "estimators", "grid", "losses", "pdf", "volrend"}
# What nerfacc keeps in a module, and is a name of the package here as well.
HANDED_UP = {
    "accumulate_along_rays_",
    "distortion",
    "opencv_lens_undistortion",
    "opencv_lens_undistortion_fisheye",
}


def test_submodules_have_nerfaccs_paths():
    from mvdream_fast.nerfacc_compat import data_specs, grid, losses, pack, pdf, scan, volrend
    from mvdream_fast.nerfacc_compat.estimators.base import AbstractEstimator
    from mvdream_fast.nerfacc_compat.estimators.occ_grid import OccGridEstimator

    assert OccGridEstimator is nerfacc.OccGridEstimator
    assert pack.pack_info is nerfacc.pack_info
    named = {data_specs: "RaySamples", grid: "traverse_grids", losses: "distortion", pdf: "importance_sampling"}
    named |= {scan: "exclusive_sum", volrend: "rendering"}
    assert all(getattr(module, name) is getattr(nerfacc, name) for module, name in named.items())
    assert isinstance(OccGridEstimator([0, 0, 0, 1, 1, 1], resolution=4), AbstractEstimator)
    assert AbstractEstimator().device == torch.device("cpu")
    for call in (AbstractEstimator().sampling, AbstractEstimator().update_every_n_steps):
        with pytest.raises(NotImplementedError, match=f"{call.__name__}: AbstractEstimator must define it"):
            call()


def parameters(function):
    """`x, n=3` of a function's or class' signature."""
    named = inspect.signature(function).parameters.values()
    return ", ".join(p.name if p.default is p.empty else f"{p.name}={p.default}" for p in named)


def test_names_parameters_and_defaults_are_nerfaccs():
    for name, wanted in SIGNATURES.items():
        assert parameters(operator.attrgetter(name)(nerfacc)) == wanted, name


def test_all_names_nerfaccs_functions_and_no_other():
    public = {name.partition(".")[0] for name in SIGNATURES} - MODULES
    assert set(nerfacc.__all__) == public | HANDED_UP | {"__version__"}
    for name in SIGNATURES:
        if name.rpartition(".")[2] in HANDED_UP:
            assert operator.attrgetter(name)(nerfacc) is getattr(nerfacc, name.rpartition(".")[2])


@pytest.fixture
def theirs():
    module = pytest.importorskip("nerfacc", reason="nerfacc 0.5.3 is not installed")
    for name in ("cameras", "estimators.prop_net"):
        importlib.import_module(f"nerfacc.{name}")
    return module


def test_the_signatures_are_those_of_nerfacc_itself(theirs):
    assert set(theirs.__all__) <= set(nerfacc.__all__)
    for name, wanted in SIGNATURES.items():
        added = ADDED_SINCE.get(name, "")
        original = operator.attrgetter(name)(theirs) if added is not None else None
        if isinstance(original, torch.jit.ScriptFunction):  # which has no signature
            assert len([*original.graph.inputs()]) == len(wanted.split(", "))
        elif original is not None:
            assert parameters(original) + added == wanted, name


def test_its_plain_torch_functions_agree(theirs):
    x, box = draw(500, 3, seed=5) * 12 - 6, torch.tensor([-1.0, -2, -1, 1, 2, 1], dtype=torch.float64)
    grids = draw(3, 4, 5, 6, seed=6)
    for name, arguments in {
        "grid._query": (x, grids, box),
        "grid._enlarge_aabb": (box, 3.0),
        "cameras._opencv_lens_distortion": (x[:, :2] / 9, draw(8) * 0.01),
        "cameras._opencv_lens_distortion_fisheye": (x[:, :2] / 9, draw(4) * 0.01),
        "cameras._opencv_lens_undistortion": (x[:, :2] / 9, draw(8) * 0.01),
        "pdf._sample_from_weighted": (draw(5, 9).sort(-1).values, draw(5, 8, seed=1), 20, False, 0.1, 0.9),
        "estimators.prop_net._transform_stot": ("lindisp", draw(5), 0.5, 4.0),
        "estimators.prop_net._lossfun_outer": (
            *(draw(5, 21).sort(-1).values, draw(5, 20, seed=1), draw(5, 8, seed=2).sort(-1).values, draw(5, 7, seed=3)),
        ),
    }.items():
        ours, original = (operator.attrgetter(name)(m)(*arguments) for m in (nerfacc, theirs))
        for a, b in zip(*(x if isinstance(x, tuple) else (x,) for x in (ours, original)), strict=True):
            close(a, b, rtol=1e-9, atol=1e-9)
    ours, original = (m.estimators.prop_net.get_proposal_requires_grad_fn(4.0, 50) for m in (nerfacc, theirs))
    assert [ours(step) for step in range(200)] == [original(step) for step in range(200)]


def test_its_dense_functions_agree(theirs):
    from nerfacc.grid import _ray_aabb_intersect

    t_starts = draw(5, 8).sort(-1).values
    t_ends, sigmas, rgbs = t_starts + 0.1, draw(5, 8, seed=1) * 9, draw(5, 8, 3, seed=2)
    background = draw(3, seed=3)
    for a, b in zip(
        *(m.rendering(t_starts, t_ends, rgb_sigma_fn=lambda *_: (rgbs, sigmas), render_bkgd=background)[:3]
          for m in (nerfacc, theirs)),
        strict=True,
    ):  # fmt: skip
        close(a, b, rtol=1e-12, atol=1e-12)
    alphas = draw(5, 8, seed=4)
    for name in ("render_weight_from_alpha", "render_transmittance_from_alpha", "render_visibility_from_alpha"):
        ours, original = (getattr(m, name)(alphas) for m in (nerfacc, theirs))
        for a, b in zip(*(x if isinstance(x, tuple) else (x,) for x in (ours, original)), strict=True):
            close(a, b, rtol=1e-12, atol=1e-12)
    for a, b in zip(*(m.render_weight_from_density(t_starts, t_ends, sigmas) for m in (nerfacc, theirs)), strict=True):
        close(a, b, rtol=1e-12, atol=1e-12)
    rays = torch.tensor([0] * 3 + [2] * 5)
    packed = [m.accumulate_along_rays(sigmas[0], rgbs[0], rays, 4) for m in (nerfacc, theirs)]
    close(*packed, rtol=1e-12, atol=1e-12)
    for name in ("inclusive_sum", "exclusive_sum", "inclusive_prod", "exclusive_prod"):
        close(getattr(nerfacc, name)(sigmas), getattr(theirs, name)(sigmas), rtol=1e-12, atol=1e-12)
    rays_o, rays_d = rays_around(300, 1.5)
    boxes = torch.tensor([[-1.0, -1, -1, 1, 1, 1], [0.2, 0, -2, 0.7, 3, 1]])
    for a, b in zip(
        nerfacc.ray_aabb_intersect(rays_o, rays_d, boxes, 0.1, 2.0, 7.0),
        _ray_aabb_intersect(rays_o, rays_d, boxes, 0.1, 2.0, 7.0),
        strict=True,
    ):
        close(a, b, rtol=1e-5, atol=1e-5)
