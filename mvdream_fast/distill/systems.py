"""The systems of text to 3D: functions that return one frozen value, by size; no torch here. The table of them is
recipes.py's.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

from mvdream_fast.camera_sampling import CameraSampling
from mvdream_fast.core.ramp import WeightRamp, is_ever_on
from mvdream_fast.distill.config import SDSConfig, joined, replaced, restepped, settings_of, shared_out
from mvdream_fast.guidance.config import GuidanceConfig
from mvdream_fast.models.config import MINI, SD21
from mvdream_fast.scene.nerf.config import NerfConfig
from mvdream_fast.scene.shapes import changed, names_of
from mvdream_fast.scene.surface.config import SurfaceConfig
from mvdream_fast.scene.tets.config import TetsConfig, TexturedMeshConfig


def paper() -> SDSConfig:
    """MVDream's recipe for the released models."""
    return SDSConfig()


def mini() -> SDSConfig:
    """The embedded model on a CPU."""
    return SDSConfig(
        preset="mini",
        steps=600,
        cameras=CameraSampling.mini(),
        n_groups=(1,),
        render_size=(64,),
        milestones=(),
        guidance=GuidanceConfig(
            guidance_scale=7.5, min_step=(0.0, 0.98, 0.02, 480.0), max_step=(0.0, 0.98, 0.50, 480.0)
        ),
        negative_prompt="",
        representation=NerfConfig(volume="mini", background="grey", samples_per_ray=128, normals="finite_difference"),
    )


def fast() -> SDSConfig:
    """Half of mini's steps, the first half of them at half the size."""
    return replaced(
        mini(),
        preset="fast",
        steps=300,
        render_size=(32, 64),
        n_groups=(1, 1),
        milestones=(150,),
        samples_per_ray=96,
        min_step=(0.0, 0.98, 0.02, 240.0),
        max_step=(0.0, 0.98, 0.50, 240.0),
    )


SDS_PRESETS = {"paper": paper(), "mini": mini(), "fast": fast()}


def constant(weight: float) -> WeightRamp:
    """A weight, or a share, that stays the same."""
    return (0.0, weight, weight, 0.0)


def repaint(config: SDSConfig, share: float = 0.3, opaque: float = 300.0) -> SDSConfig:
    """The recipe with the last `share` of its last stage's steps fitted to views that the model has redrawn, and with a
    loss of that weight on opacities between 0 and 1, whole half-way to the end, where it has none of its own."""
    *before, stage = config.stages
    first, last = (1 - share) * stage.steps, stage.steps
    own = settings_of(stage).get("lambda_opaque")  # None: a mesh is opaque
    losses = {} if own is None or is_ever_on(own) else {"lambda_opaque": (first, 0.0, opaque, (first + last) / 2)}
    return joined([*before, replaced(stage, repaint_from=1 - share, **losses)])


def mvdream(size: str = "paper") -> SDSConfig:
    """Score distillation from four views at once, of a model that knows their cameras."""
    return SDS_PRESETS[size]


def mvdream_sharp(size: str = "paper") -> SDSConfig:
    """mvdream, whose end is fitted to redrawn views; at the small sizes as long as it asks about as many as mvdream."""
    config = replaced(repaint(mvdream(size)), recipe="mvdream-sharp")
    return restepped(config, SHARP_STEPS.get(size, config.steps))


def mvdream_mesh(size: str = "paper") -> SDSConfig:
    """mvdream's volume, whose mesh is refined by the same model as Magic3D refines its own: little noise, all rates
    alike, a loss on its normals."""
    volume = replaced(mvdream(size), recipe="mvdream-mesh")
    scale = 1.0 if size == "paper" else LATENTS_SHARE
    refined = dataclasses.replace(
        volume,
        steps=volume.steps // 2,
        n_groups=volume.n_groups[-1:],
        render_size=(512,) if size == "paper" else (SMALL_REFINED[size],),
        milestones=(),
        guidance=dataclasses.replace(volume.guidance, min_step=constant(0.02), max_step=constant(0.50)),
        representation=changed(
            volume.representation, shape="tets", tets_resolution=128 if size == "paper" else SMALL_TETS,
            lambda_normal_consistency=constant(1e4 * scale), lr_mlp=0.01, lr_background=0.01,
        ),
        weight_decay=0.0,  # Adam
    )  # fmt: skip
    whole = joined([volume, refined])
    return whole if size == "paper" else joined(_shared(whole, mvdream(size).steps))


def mvdream_solid(size: str = "paper") -> SDSConfig:
    """mvdream_mesh's second stage alone: four views are sampled, the run begins as the solid that their silhouettes
    leave of space, and their colours and silhouettes are fitted beside distillation from the first step to the last.

    Rates are low: what the views show is right from the start, and distillation has only to mend what they don't. The
    weights are those found for the embedded model; at `paper` they grow as guidance does with the numbers in a latent,
    and shrink as the views' pixels grow. Nothing of that was tried.
    """
    mesh, small = mvdream_mesh(size).stages[1], size in SOLID_STEPS
    numbers = 1.0 if small else 1 / LATENTS_SHARE
    pixels = 1.0 if small else numbers * (MINI.vae.image_size / mesh.render_size[-1]) ** 2
    usual, steps = MINI if small else SD21, SOLID_STEPS.get(size, mesh.steps)
    # First what a hull has of spikes and steps goes, then corners come back, and in many steps spikes would, too.
    smooth = (0.0, 1e5, 1e4 if size == "fast" else 5e4, SMOOTHING_SHARE * steps)
    return replaced(
        restepped(mesh, steps),
        recipe="mvdream-solid", sampled_views=4, sampled_steps=25 if small else 50, sampled_hull=True,
        sampled_between=small,
        sampled_scale=usual.guidance.scale, sampled_uncond=usual.guidance.uncond_mode,
        lambda_sampled=constant(20 * pixels), lambda_silhouette=constant(20 * pixels),
        lambda_normal_consistency=smooth,
        lr_encoding=0.002, lr_mlp=0.002, lr_geometry=0.005, lr_decay=0.1,
        **({"volume": "coarse", "render_size": (SMALL_REFINED["mini"],)} if small else {}),
    )  # fmt: skip


def few_shot(size: str) -> SDSConfig:
    """mvdream_solid without distillation: the solid that sampled views leave of space, fitted to them."""
    like = mvdream_solid(size)
    n_views = like.sampled.sampled_views
    return replaced(like, recipe="mvdream", method="reconstruct", sampled_views=0, n_views=n_views)


SMOOTHING_SHARE = 0.6  # of mvdream-solid's steps
SOLID_STEPS = {"mini": 300, "fast": 100}
SHARP_STEPS = {"mini": 706, "fast": 343}


def dreamfusion_if(size: str = "paper") -> SDSConfig:
    """Score distillation from single views in a space of pixels, as threestudio's dreamfusion-if."""
    paper = SDSConfig(
        recipe="dreamfusion-if",
        mode="2d",
        steps=10_000,
        cameras=CameraSampling(
            n_views=1, elevation_range_deg=(-10.0, 90.0), fovy_range_deg=(40.0, 70.0), distance_range=(1.5, 2.0),
            relative_distance="none", perturb=(0.1, 0.2, 0.02),
        ),
        n_groups=(1,),
        render_size=(64,),
        milestones=(),
        guidance=GuidanceConfig(
            loss="sds", guidance_scale=20.0, guided_from="cond", rescale=0.0, min_step=constant(0.02),
            max_step=constant(0.98), timesteps="each", weighting="sds", view_words=True,
        ),
        negative_prompt="",
        representation=NerfConfig(
            radius=2.0, background_aug_prob=0.0, lambda_orient=(0.0, 10.0, 1000.0, 5000.0),
            lambda_sparsity=constant(1.0), lr_encoding=0.01, lr_mlp=0.01, lr_background=0.001,
        ),
        shading=True,
        shading_from=2001,
        soft_shading=False,
        weight_decay=0.0,  # Adam
    )  # fmt: skip
    return paper if size == "paper" else _embedded(paper, size, 1.0)


def textmesh_if(size: str = "paper") -> SDSConfig:
    """dreamfusion_if of a surface in place of a volume, as threestudio's textmesh-if: its first stage, NeuS's form."""
    surface = SurfaceConfig(radius=2.0, background_aug_prob=0.0)
    paper = dataclasses.replace(dreamfusion_if(), recipe="textmesh-if", representation=surface)
    return paper if size == "paper" else _embedded(paper, size, 1.0)


def magic3d_if_sd(size: str = "paper") -> SDSConfig:
    """A coarse volume from a model of pixels, and its mesh refined by a model of latents, as threestudio's
    magic3d-coarse-if and magic3d-refine-sd."""
    like = dreamfusion_if()
    uniform = dataclasses.replace(like.guidance, weighting="uniform")
    coarse = dataclasses.replace(like, recipe="magic3d-if-sd", guidance=uniform, soft_shading=True)
    refined = dataclasses.replace(
        coarse,
        steps=5000,
        cameras=dataclasses.replace(
            coarse.cameras, elevation_range_deg=(-10.0, 45.0), fovy_range_deg=(30.0, 45.0)
        ),
        render_size=(512,),
        guidance=dataclasses.replace(
            coarse.guidance, guidance_scale=100.0, weighting="sds", max_step=constant(0.50)
        ),
        representation=TetsConfig(radius=2.0, background_aug_prob=0.0),
        shading_from=0,
    )  # fmt: skip
    paper = joined([coarse, refined])
    return paper if size == "paper" else _embedded(paper, size, 1.0, LATENTS_SHARE)


def prolificdreamer(size: str = "paper") -> SDSConfig:
    """Variational score distillation of a volume, score distillation of the normals of its mesh, and variational again
    of that mesh's colours, from single views of a latent model: threestudio's prolificdreamer, -geometry, -texture."""
    volume = SDSConfig(
        recipe="prolificdreamer",
        mode="2d",
        steps=25_000,
        cameras=CameraSampling(
            n_views=1, elevation_range_deg=(-10.0, 45.0), fovy_range_deg=(40.0, 70.0), distance_range=(1.0, 1.5),
            relative_distance="none",
        ),
        n_groups=(1, 1),
        render_size=(64, 512),
        milestones=(5000,),
        guidance=GuidanceConfig(
            kind="vsd", loss="sds", guidance_scale=7.5, rescale=0.0, min_step=constant(0.02),
            max_step=(5000.0, 0.98, 0.50, 5001.0), timesteps="each", weighting="sds", view_words=True,
            view_words_deg=30.0, lora_lr=1e-4,
        ),
        negative_prompt="",
        representation=NerfConfig(lambda_sparsity=constant(10.0), lambda_opaque=(10_000.0, 0.0, 1000.0, 10_001.0)),
    )  # fmt: skip
    on_mesh = dataclasses.replace(volume, n_groups=(1,), render_size=(512,), milestones=())
    plain = dataclasses.replace(
        volume.guidance, kind="sds", guidance_scale=100.0, guided_from="cond", view_words_deg=45.0
    )  # fmt: skip
    rate = 0.005
    normals = TetsConfig(
        shows="normals", lambda_laplacian=constant(1e4), lr_geometry=rate, lr_encoding=rate, lr_mlp=rate,
        lr_background=rate,
    )  # fmt: skip
    geometry = dataclasses.replace(
        on_mesh, steps=15_000, guidance=plain, representation=normals, weight_decay=0.0
    )  # Adam
    texture = dataclasses.replace(on_mesh, steps=30_000, representation=TexturedMeshConfig(background_aug_prob=0.0))
    paper = joined([volume, geometry, texture])
    if size == "paper":
        return paper
    # Of few steps most are the volume's: what has no shape by then gets none.
    shares = joined(map(restepped, paper.stages, (40_000, 10_000, 10_000)))
    return _embedded(shares, size, *[LATENTS_SHARE] * 3)


# Numbers in the embedded model's latents over those in Stable Diffusion's at 512 pixels: guidance sums over them.
# Detail does not count: all of its variance together is that of two other channels.
LATENTS_SHARE = (MINI.vae.latent_channels - MINI.vae.detail_channels) * MINI.latent_size**2 / (4 * 64**2)
# Weights that keep a mesh smooth are the paper's at every size: with a tenth of them, at a scale of 100, it has spikes.
SMOOTH = ("lambda_normal_consistency", "lambda_laplacian")
SMALL_DEVIATION = 0.46  # v, which is 0.01 of a scene unit: a third of a pixel
SMALL_TETS = 64  # planes of points a side
SMALL_REFINED = {"mini": 128, "fast": 64}  # pixels a side of a mesh's renders


def _shared(config: SDSConfig, steps: int) -> Iterator[SDSConfig]:
    """The stages of a run, of so many steps in all."""
    return map(restepped, config.stages, shared_out(steps, config))


def _embedded(paper: SDSConfig, size: str, *weights: float) -> SDSConfig:
    """A recipe of single views for embedded models: guidance, rates, losses and shading are the paper's, their
    schedules stretched; steps, cameras, images and volume are mvdream's of this size, its V views V scenes of one.

    weights: of each stage's losses beside guidance, for a model whose images have fewer numbers than the paper's.
    """
    steps = SDS_PRESETS[size].steps
    stages = zip(_shared(paper, steps), weights, strict=True)
    first, *later = (_embedded_stage(stage, size, weight) for stage, weight in stages)
    on_mesh = {"n_groups": first.n_groups[-1:], "render_size": (SMALL_REFINED[size],), "milestones": ()}
    return joined([first, *(replaced(stage, **on_mesh) for stage in later)])


def _embedded_stage(stage: SDSConfig, size: str, weight: float) -> SDSConfig:
    like, shape = restepped(SDS_PRESETS[size], stage.steps), stage.representation
    of_model = names_of(type(shape)) & {
        "volume", "normals", "radius", "background", "background_aug_prob", "samples_per_ray",
    }  # fmt: skip
    changes: dict[str, Any] = {name: getattr(like.representation, name) for name in of_model}
    for name, ramp in dataclasses.asdict(shape).items():
        if name.startswith("lambda_") and name not in SMOOTH:
            changes[name] = (ramp[0], ramp[1] * weight, ramp[2] * weight, ramp[3])
    if isinstance(shape, TetsConfig):
        changes["tets_resolution"] = SMALL_TETS
    if isinstance(shape, SurfaceConfig):  # in so few steps the deviation stays where it was, and all stays fog
        changes["deviation_least"] = (0.0, shape.deviation, SMALL_DEVIATION, 0.8 * stage.steps)
    return dataclasses.replace(
        stage,
        preset=like.preset,
        cameras=dataclasses.replace(like.cameras, n_views=1),
        n_groups=tuple(n * like.cameras.n_views for n in like.n_groups),
        render_size=like.render_size,
        milestones=like.milestones,
        representation=changed(shape, **changes),
    )
