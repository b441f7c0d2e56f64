"""What sharing a queue costs, of 100 and of 10,000 jobs, half of them done: claims, heartbeats, a look at all. Beside
it a JSON file behind a lock and a table of SQLite (peers_queue.py), which do less. And what it would buy to have
several scenes in one guided UNet call.
"""

import functools
import itertools
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from contest import named, size, sizes, within
from peers_queue import Listed, Table

from mvdream_fast.jobs.job import Event, Job, Progress, State
from mvdream_fast.jobs.queue import Queue
from mvdream_fast.jobs.store import open_store

COUNTS = sizes((100, 10_000), (10, 20))
SETTINGS = {f"setting_{i}": 1.5 * i for i in range(60)}  # as many as a request has
TAKEN = 2  # jobs that a call claims, so that their order is compared, too
PEERS = {"reference": Listed, "SQLite": Table}


def ours(folder: Path, jobs: list[Job], n_done: int) -> Queue:
    """Our queue with these jobs, the first of them claimed and done by somebody."""
    queue = Queue(open_store(folder))
    queue.add(*jobs)
    (folder / "events").mkdir()
    for job in jobs[:n_done]:
        for number, event in ((1, "claim"), (2, "done")):
            (folder / f"events/{job.id}.{number}").write_text(json.dumps(asdict(Event(event))))
    queue.look()
    return queue


@pytest.fixture(scope="module")
def queues(tmp_path_factory) -> dict[int, dict[str, Any]]:
    """By the number of jobs, everybody's queue."""
    found: dict[int, dict[str, Any]] = {}
    for n in COUNTS:
        place = tmp_path_factory.mktemp("queues")
        jobs = [Job("sds", {"prompt": f"prompt {i}", "sds": SETTINGS}, created=1.0 + i) for i in range(n)]
        kinds = PEERS | {"ours": ours}
        found[n] = {name: make(place / name, jobs, n // 2) for name, make in kinds.items()}
    return found


def by_jobs(queues, calls) -> dict[float, dict[str, Any]]:
    """Contestants of `scale`: calls(queue) of every queue."""
    return {
        n: {name: functools.partial(calls, queue) for name, queue in by_name.items()} for n, by_name in queues.items()
    }


def claiming(queue, look: bool = False):
    def call():
        if look:
            queue.look()
        leases = [queue.claim("a worker") for _ in range(TAKEN)]
        for lease in leases:
            lease.free()
        return [lease.job.request["prompt"] for lease in leases]

    return call


def prompts(claimed: list[str]) -> torch.Tensor:
    return torch.tensor([int(prompt.split()[1]) for prompt in claimed])


def bench_claim(contest, queues):
    """Two jobs claimed and given back. Ours knows what it saw a second ago; `ours looking` asks the files each time."""
    makes = by_jobs(queues, claiming)
    for n, by_name in makes.items():
        by_name["ours looking"] = functools.partial(claiming, queues[int(n)]["ours"], look=True)
    contest.scale("queue, two claims", "call", "jobs", makes, seen=prompts)


def bench_heartbeat(contest, queues):
    """How far a claimed job is, written where others see it; what is compared is what the queue says of it then."""

    def beating(queue):
        lease, steps = queue.claim("a worker"), itertools.count(1)

        class Beats:
            def __call__(self):
                lease.heartbeat(Progress(next(steps)))
                return queue

            close = staticmethod(lease.free)

        return Beats()

    def seen(queue):
        return torch.tensor([status.progress.done for _, status in queue.jobs() if status.state == State.RUNNING])

    largest = named("ours", COUNTS[-1], "jobs")
    goals = [within(10e-3, largest)]  # a hundredth of a run that beats once a second
    contest.scale("queue, a heartbeat", "call", "jobs", by_jobs(queues, beating), seen=seen, goals=goals)


def bench_look(contest, queues):
    """Where all jobs stand, as the pages of a batch show it."""

    def seen(jobs):
        return torch.tensor([sum(status.state == state for _, status in jobs) for state in State])

    contest.scale("queue, a look at all", "call", "jobs", by_jobs(queues, lambda queue: queue.jobs), seen=seen)


@functools.cache
def model(name: str, dtype: str):
    from mvdream_fast.pipeline import MVDreamPipeline

    return MVDreamPipeline.from_pretrained(name, "cpu", dtype)


def guided(name: str, dtype: str, n_scenes: int):
    """The guided call of four views of so many scenes."""
    from mvdream_fast.camera import get_camera
    from mvdream_fast.diffusion.denoiser import Denoiser

    pipeline, n = model(name, dtype), 4 * n_scenes
    config = pipeline.config
    draw = torch.Generator().manual_seed(0)
    latents = torch.randn(n, config.unet.in_channels, config.latent_size, config.latent_size, generator=draw)
    text = pipeline.encode_prompt("a red chair").to(pipeline.dtype).repeat(n_scenes)
    denoiser, camera, t = Denoiser(pipeline.unet, text, 4), get_camera(4).repeat(n_scenes, 1), torch.full((n,), 500)
    return lambda: denoiser(latents, t, camera)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def bench_scenes(contest, tiny_model, dtype):
    """By scenes, of the embedded model; one scene at a time, as the queue's workers have it, is the first row."""
    makes = {
        n: {"ours": functools.partial(guided, size("embedded", tiny_model), dtype, n)} for n in sizes((1, 2, 4), (1, 2))
    }
    contest.scale(f"guided call by scenes, {dtype}", "step", "scenes", makes)
