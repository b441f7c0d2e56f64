"""Training steps of our trainers, with our UNet and with diffusers' modules of the same numbers in its place."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mvdream_fast.camera import get_camera
from mvdream_fast.core.rng import Stream
from mvdream_fast.data.batches import Batch
from mvdream_fast.models.tokenizer import build_subset_vocabulary
from mvdream_fast.training.initial_model import new_model
from mvdream_fast.training.unet import Parts, Trainer, TrainOptions
from mvdream_fast.tuning.dreambooth import DreamBoothOptions, DreamBoothTrainer
from mvdream_fast.tuning.photos import PhotoSource

N_VIEWS = 4
COLORS = ("red", "blue", "green", "white")


class FromDiffusers(nn.Module):
    """diffusers' UNet with our numbers, behind the signature of ours."""

    def __init__(self, ours: Any, latent_size: int, layout: torch.memory_format):
        super().__init__()
        from reference.diffusers_unet import RegroupProcessor, diffusers_unet, load_ldm

        self.unet, self.camera = diffusers_unet(ours.config, latent_size), copy.deepcopy(ours.camera_embed)
        load_ldm(self.unet, ours.state_dict(), ours.config)
        self.processor, self.layout = RegroupProcessor(N_VIEWS), layout
        self.unet.set_attn_processor(self.processor)
        self.to(memory_format=layout)

    def forward(self, latents: Tensor, t: Tensor, context: Tensor, camera: Tensor | None, n_views: int) -> Tensor:
        from reference.diffusers_unet import add_camera

        self.processor.n_views = n_views
        add_camera(self.unet, None if camera is None else self.camera(camera))
        wide = context.repeat_interleave(n_views, 0)
        return self.unet(latents.contiguous(memory_format=self.layout), t, wide, return_dict=False)[0]


class Same:
    """A source whose batches are all this one."""

    def __init__(self, batch: Batch):
        self._batch = batch

    def batch(self, *_: Any) -> Batch:
        return self._batch


def parts_of(size: str, layout: torch.memory_format | None) -> Parts:
    """`mini`, or `tiny`: every weight drawn (a fresh model's last layers are zero). A layout is for diffusers' UNet."""
    if size == "tiny":
        from reference.random_model import random_model

        model = random_model()
    else:
        vocabulary = build_subset_vocabulary([f"a photo of a {color} armchair with cushions" for color in COLORS])
        model = new_model("mini", vocabulary, seed=0)
        torch.manual_seed(0)
        with torch.no_grad():
            for parameter in (p for p in model.unet.parameters() if not p.any()):
                parameter.normal_(std=0.02)
    unet = model.unet if layout is None else FromDiffusers(model.unet, model.config.latent_size, layout)
    return Parts(model.config, unet, model.text, model.vae, model.tokenizer)


def stepping(trainer: Trainer) -> Callable[[], Tensor]:
    """A call that is the next update; its loss, which is compared for the first."""
    return lambda: torch.tensor(trainer.train_step()["loss"])


def training(size: str, layout: torch.memory_format | None, n_scenes: int) -> Callable[[], Tensor]:
    """Scenes of four views, 3D attention and cameras: text tower, loss, backward, clipping, AdamW, average."""
    parts = parts_of(size, layout)
    captions = [f"a {COLORS[i % 4]} {'car' if size == 'tiny' else 'armchair with cushions'}" for i in range(n_scenes)]
    shape = (parts.config.unet.in_channels, parts.config.latent_size, parts.config.latent_size)
    latents = Stream(0, 0, "latents").normal(n_scenes * N_VIEWS, *shape)
    batch = Batch(latents, get_camera(N_VIEWS).repeat(n_scenes, 1), captions, N_VIEWS, encoded=True)
    options = TrainOptions(n_views=N_VIEWS, batch_size=n_scenes, multi_view_share=1.0, caption_dropout=0.0)
    return stepping(Trainer(parts, Same(batch), options))


def dreambooth(size: str, layout: torch.memory_format | None, n_photos: int) -> Callable[[], Tensor]:
    """Photos in 2D mode, and the pull back to the weights that the tuning started from."""
    parts = parts_of(size, layout)
    shape = (parts.config.unet.in_channels, parts.config.latent_size, parts.config.latent_size)
    latents = Stream(0, 0, "photos").normal(n_photos, *shape)
    source = PhotoSource(latents, "a red car" if size == "tiny" else "a photo of a red armchair", encoded=True)
    return stepping(DreamBoothTrainer(parts, source, DreamBoothOptions(batch_size=n_photos)))
