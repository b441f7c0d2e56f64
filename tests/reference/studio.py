"""A text-to-3D loop with a guidance whose wishes are known, for tests of the loop itself: no diffusion model."""

import torch

from mvdream_fast.camera import sample_cameras
from mvdream_fast.distill.config import replaced, settings_of
from mvdream_fast.distill.systems import mini
from mvdream_fast.guidance.base import Stateless, no_timing
from mvdream_fast.scene.asset import Asset
from mvdream_fast.scene.kinds import new_representation
from mvdream_fast.text_to_3d import TextTo3D

TINY = replaced(mini(), steps=12, render_size=(8,), samples_per_ray=24)


class Painter(Stateless):
    """Wants every pixel red, through a loss whose gradient it may spoil at chosen steps."""

    def __init__(self, spoil=(), color=(1.0, 0.0, 0.0)):
        self.spoil, self.color = spoil, torch.tensor(color)[:, None, None]

    def views(self, step, stream):
        return sample_cameras(TINY.cameras, stream)

    def score(self, rgb, views, step, stream, timing=no_timing):
        loss = (rgb - self.color).square().sum() + 0 * stream.normal(1).sum()
        return loss * (float("nan") if step in self.spoil else 1.0), 7


class Studio(TextTo3D):
    """TextTo3D with a Painter in place of a diffusion model."""

    def __init__(self, guidance=None):
        super().__init__(None, guidance=guidance or Painter())


def fresh_asset(config=TINY, prompt="", seed=0):
    """An asset that no step has changed."""
    return Asset(new_representation(config.representation, seed), prompt, seed, settings_of(config))


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
