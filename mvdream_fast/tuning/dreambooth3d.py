"""DreamBooth3D's way from photos to a volume, in stages that each leave a folder and are not repeated on resume.

    1-partial   the first steps of the tuning, before the model is tied to the photos' viewpoints
    2-volume    score distillation from it: a rough volume of the right shape
    3-full      the tuning to its end: faithful, but it draws what the photos show from everywhere
    4-pseudo    renders of the volume, noised and denoised by the full model: the subject from many sides
    model       the partial model, tuned further on photos and pseudo views (5-final holds its checkpoints)
    6-volume    score distillation from that and reconstruction of the pseudo views, together

Source: Raj et al. 2023, "DreamBooth3D". There the pseudo views are single images; here a multi-view model translates
four at a time, and they are trained on in multi-view mode, with their cameras.
"""

import dataclasses
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mvdream_fast.camera import Cameras, normalize_camera, sample_cameras
from mvdream_fast.checkpoints.open import needed
from mvdream_fast.core import run_folder
from mvdream_fast.core.errors import ModelError
from mvdream_fast.core.images import png_bytes, sheet
from mvdream_fast.core.processes import ALONE, Ranks
from mvdream_fast.core.progress import Pace
from mvdream_fast.core.rng import Stream
from mvdream_fast.data.batches import Batch
from mvdream_fast.diffusion import sampler
from mvdream_fast.distill.config import SDSConfig
from mvdream_fast.distill.loop import Loop, Progress, new_guidance
from mvdream_fast.distill.progress import figures
from mvdream_fast.distill.recipes import resolve_config
from mvdream_fast.distill.state import RunState
from mvdream_fast.distill.systems import constant
from mvdream_fast.guidance.reconstruction import Anchored
from mvdream_fast.pipeline import MVDreamPipeline
from mvdream_fast.scene.asset import Asset
from mvdream_fast.tuning.dreambooth import DreamBoothTrainer
from mvdream_fast.tuning.photos import PhotoSource, draw
from mvdream_fast.tuning.tune import Plan, encoded, latest, load_parts, photo_source, tune

TUNINGS = ("1-partial", "3-full", "5-final")  # the stages that leave checkpoints
FULL_MODEL = "3-full/model"
N_STEPS = 50  # of DDIM, over the whole schedule
PROGRESS_S = 10.0


def run_stages(plan: Plan, photos: np.ndarray, folder: Path, device: torch.device) -> int:
    """Runs every stage that has not left its product yet. Returns the exit code."""
    stages = Stages(plan, photos, folder, device)
    work = (
        ("1-partial/model", stages.partial),
        ("2-volume/asset.safetensors", stages.first_volume),
        (FULL_MODEL, stages.full),
        ("4-pseudo/views.safetensors", stages.pseudo),
        ("model", stages.final),
        ("6-volume/mesh.glb", stages.last_volume),
    )
    for number, (product, stage) in enumerate(work, 1):
        there = (folder / product).exists()
        print(f"stage {number} of {len(work)}, {product}{': there already' if there else ''}", flush=True)
        if there:
            continue
        (folder / product).parent.mkdir(exist_ok=True)
        if code := stage():
            return code
    return 0


@dataclasses.dataclass
class Stages:
    """The stages of one run; each returns an exit code and ends by writing its product whole."""

    plan: Plan
    photos: np.ndarray
    folder: Path
    device: torch.device

    @property
    def prompt(self) -> str:
        """What the photos show, with the instance token."""
        return self.plan.settings["instance_prompt"]

    @property
    def config(self) -> SDSConfig:
        """The recipe of both volumes."""
        steps = self.plan.settings["sds_steps"]
        return resolve_config(self.plan.settings["sds_preset"], **({"steps": steps} if steps else {}))

    def partial(self) -> int:
        """The first steps of the tuning."""
        parts, steps = load_parts(self.plan, self.device), self.plan.settings["partial_steps"]
        source = photo_source(self.plan, self.photos, parts)
        return tune(self.plan, parts, source, self.folder / "1-partial", steps=steps)

    def first_volume(self) -> int:
        """A rough volume, from the partially tuned model."""
        return self._volume(self.folder / "1-partial/model", self.folder / "2-volume")

    def full(self) -> int:
        """The tuning to its end."""

        def go_on(trainer: DreamBoothTrainer) -> None:
            trainer.restore(*latest(self.folder / "1-partial"))

        parts = load_parts(self.plan, self.device)
        source = photo_source(self.plan, self.photos, parts)
        return tune(self.plan, parts, source, self.folder / "3-full", prepare=go_on)

    def pseudo(self) -> int:
        """All groups, or none: it takes a minute, not hours."""
        asset = Asset.load(self.folder / "2-volume/asset.safetensors").to(self.device)
        pipeline = self._pipeline(self.folder / FULL_MODEL)
        s, views = self.plan.settings, []
        for group in range(s["pseudo_groups"]):
            stream = Stream(s["seed"], group, "pseudo views")
            cameras = sample_cameras(self.config.cameras, stream)
            renders = asset.render(cameras, pipeline.config.vae.image_size).rgb
            images = translate(
                pipeline, renders, cameras, self.prompt, s["pseudo_strength"], s["guidance_scale"], stream
            )
            views.append(PseudoViews(images.cpu(), cameras.c2w, cameras.fovy))
        folder = self.folder / "4-pseudo"
        run_folder.atomic_write(folder / "views.png", png_bytes(sheet(torch.stack([view.images for view in views]))))
        PseudoViews(*(torch.stack(rows) for rows in zip(*views))).save(folder / "views.safetensors")
        return 0

    def final(self) -> int:
        """The partial model, tuned further on photos and pseudo views."""

        def begin(trainer: DreamBoothTrainer) -> None:
            _, tensors, meta = latest(self.folder / "1-partial")
            trainer.begin_from(tensors, meta)

        parts, views = load_parts(self.plan, self.device), self._pseudo_views()
        latents = torch.stack([encoded(parts, group * 2 - 1) for group in views.images])
        source = MixedSource(photo_source(self.plan, self.photos, parts), latents, views.c2w)
        options = dataclasses.replace(self.plan.options, multi_view_share=self.plan.settings["pseudo_share"])
        return tune(
            self.plan, parts, source, self.folder / "5-final", options=options, model=self.folder / "model",
            prepare=begin,
        )  # fmt: skip

    def last_volume(self) -> int:
        """The asset: distillation and reconstruction of the pseudo views together."""
        views, weight = self._pseudo_views(), self.plan.settings["lambda_recon"]
        return self._volume(self.folder / "model", self.folder / "6-volume", views, weight)

    def _pseudo_views(self) -> "PseudoViews":
        return PseudoViews.load(self.folder / "4-pseudo/views.safetensors")

    def _pipeline(self, model: Path) -> MVDreamPipeline:
        return MVDreamPipeline.from_pretrained(str(model), str(self.device), graphs=self.plan.graphs)

    def _volume(self, model: Path, folder: Path, views: "PseudoViews | None" = None, weight: float = 0.0) -> int:
        """Score distillation into `folder`: turntable, asset, and, of the last volume, the mesh."""
        pipeline, config, seed = self._pipeline(model), self.config, self.plan.settings["seed"]
        guidance = new_guidance(pipeline, self.prompt, config, seed)
        if views is not None:
            cameras = [views.cameras(group) for group in range(len(views.images))]
            guidance = Anchored(guidance, views.images, cameras, constant(weight))
        state = RunState(config, self.prompt, seed, guidance, pipeline.device, model=pipeline.config)
        pace = Pace(PROGRESS_S)

        def tell(progress: Progress) -> None:
            if line := pace(progress.record.step + 1, config.steps):
                print(f"{line}, {figures(progress.record)}", flush=True)

        with run_folder.Interrupt() as interrupt:
            loop = Loop(tell, folder / "ckpt", interrupt=interrupt)
            asset = loop.run(config, seed, lambda *_: state, self.prompt)
            if interrupt.requested is not None:
                return interrupt.exit_code
        asset.turntable(folder / "turntable.webp", n_frames=60)
        asset.save(folder / "asset.safetensors")
        if views is not None:
            asset.save_glb(folder / "mesh.glb")
        return 0


@dataclasses.dataclass(frozen=True)
class PseudoViews:
    """Groups of views: images [G, V, 3, Hp, Wp] in [0, 1], c2w [G, V, 4, 4], fovy [G, V]; of one, without G."""

    images: Tensor
    c2w: Tensor
    fovy: Tensor

    def __iter__(self):
        return iter((self.images, self.c2w, self.fovy))

    def cameras(self, group: int) -> Cameras:
        """The cameras of one group."""
        return Cameras(self.c2w[group], self.fovy[group])

    def save(self, path: Path) -> None:
        """Writes one safetensors file, whole or not at all."""
        from safetensors.torch import save

        run_folder.atomic_write(path, save({name: t.contiguous() for name, t in vars(self).items()}))

    @staticmethod
    def load(path: Path) -> "PseudoViews":
        """Raises ModelError for anything that `save` did not write."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return PseudoViews(**load_file(path))
        except (OSError, SafetensorError, TypeError) as error:
            raise ModelError(f"cannot read the pseudo views {path}: {error}; delete it to make them again") from error


@torch.no_grad()
def translate(
    pipeline: MVDreamPipeline, images: Tensor, cameras: Cameras, prompt: str, strength: float, guidance_scale: float,
    stream: Stream,
) -> Tensor:  # fmt: skip
    """Image to image: the views noised up to `strength` of the schedule's steps, then denoised as what the prompt says.

    Args: images [V, 3, Hp, Wp] in [0, 1] of one object from `cameras`, of the model's size.
    Returns: [V, 3, Hp, Wp] in [0, 1].
    """
    z = needed(pipeline.vae, "vae").encode(images.to(pipeline.device) * 2 - 1)
    text = pipeline.encode_prompt([prompt], suffix="", warn=lambda _: None)
    denoise = pipeline.denoiser(text, normalize_camera(cameras.c2w), len(cameras), guidance_scale)
    noise = stream.normal(*z.shape, device=z.device)
    settings = (pipeline.schedule, N_STEPS, guidance_scale, strength)
    return pipeline.decode(sampler.translate(denoise, z, noise, *settings)[0])


class MixedSource:
    """Photos in 2D mode; in multi-view mode groups of pseudo views with their cameras.

    Args: views [G, V, C, h, w], latents or images in [-1, 1] as the photos are; c2w [G, V, 4, 4].
    """

    def __init__(self, photos: PhotoSource, views: Tensor, c2w: Tensor):
        self.photos, self.images = photos, views
        self.cameras = torch.stack([normalize_camera(group) for group in c2w])  # [G, V, 16]

    def batch(self, stream: Stream, n_scenes: int, n_views: int, multi_view: bool, ranks: Ranks = ALONE) -> Batch:
        """As many images either way, but at least one group."""
        if not multi_view:
            return self.photos.batch(stream, n_scenes, n_views, False, ranks)
        n_groups, v = self.cameras.shape[:2]
        rows = ranks.part(draw(n_groups, max(1, n_scenes * n_views // v), stream))
        captions = [self.photos.caption] * len(rows)
        images, cameras = self.images[rows].flatten(0, 1), self.cameras[rows].flatten(0, 1)
        return Batch(images, cameras, captions, v, self.photos.encoded)
