"""python steps_on_gpu.py LIBRARY RUNS runs steps of text-to-3D runs on reference.gpu, with LIBRARY as the extension's
CUDA part, and prints what each step waited for, as JSON. RUNS: [preset, settings to replace, steps] of each run."""

import json
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch
from reference.cuda_host import loaded
from reference.gpu import DEVICE, GPU

from mvdream_fast.distill.loop import new_guidance
from mvdream_fast.distill.recipes import resolve_config
from mvdream_fast.distill.state import RunState
from mvdream_fast.pipeline import MVDreamPipeline
from mvdream_fast.scene.nerf.occupancy import OccupancyGrid

# As the presets, but few samples and a grid of few cells: the kernels run on a CPU, one thread after the other.
SMALL = {"samples_per_ray": 12, "volume": "mini"}


def on_gpu(pipeline: MVDreamPipeline) -> MVDreamPipeline:
    encode = pipeline.encode_prompt
    pipeline.encode_prompt = lambda *args, **kwargs: encode(*args, **kwargs).to(DEVICE)
    pipeline.unet.to(DEVICE)
    pipeline.vae.to(DEVICE)
    pipeline.schedule = pipeline.schedule.to(DEVICE)
    return pipeline


def waits_of(gpu: GPU, pipeline: MVDreamPipeline, preset: str, settings: dict, steps: list[int]) -> list[Counter]:
    """What each step waited for, place by place."""
    config = resolve_config(preset, **SMALL, **settings)
    config = replace(config, render_size=tuple(8 for _ in config.render_size))
    state = RunState(config, "a red chair", 0, new_guidance(pipeline, "a red chair", config, 0))
    state.representation.occupancy = OccupancyGrid(resolution=6)
    state.asset.to(DEVICE)
    waits = []
    for step in steps:
        gpu.take()
        state.step(step)
        waits.append(gpu.take())
    return waits


def main(library: str, runs: list[tuple[str, dict, list[int]]]) -> list[list[Counter]]:
    with GPU(loaded(Path(library))) as gpu:
        pipeline = on_gpu(MVDreamPipeline.from_pretrained("embedded", "cpu", "float32"))
        return [waits_of(gpu, pipeline, *run) for run in runs]


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(main(sys.argv[1], json.loads(sys.argv[2]))))
