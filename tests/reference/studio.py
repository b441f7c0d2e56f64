"""A text-to-3D loop with a teacher whose wishes are known, for tests of the loop itself: no diffusion model."""

import dataclasses

import torch

from mvdream_fast.camera import sample_cameras
from mvdream_fast.distill.recipes import SDS_PRESETS
from mvdream_fast.guidance.sds import no_lap
from mvdream_fast.text_to_3d import TextTo3D

TINY = dataclasses.replace(SDS_PRESETS["mini"], steps=12, render_size=(8,), samples_per_ray=24)


class Painter:
    """Wants every pixel red, through a loss whose gradient it may spoil at chosen steps."""

    def __init__(self, spoil=(), colour=(1.0, 0.0, 0.0)):
        self.spoil, self.colour = spoil, torch.tensor(colour)[:, None, None]

    def cameras(self, step, stream):
        return sample_cameras(TINY, stream)

    def score(self, rgb, cameras, step, stream, lap=no_lap):
        loss = (rgb - self.colour).square().sum() + 0 * stream.normal(1).sum()
        return loss * (float("nan") if step in self.spoil else 1.0), 7


class Studio(TextTo3D):
    """TextTo3D with a Painter in place of a diffusion model."""

    def __init__(self, teacher=None):
        self._teacher = teacher or Painter()

    keep, device = True, torch.device("cpu")
    pipeline = None

    def teacher(self, prompt, config, seed):
        return self._teacher


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
