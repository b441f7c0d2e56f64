"""The captures of models/captured.py on CUDA, as far as their calls can be followed without a GPU."""

import contextlib
import gc
from types import SimpleNamespace

import torch

from mvdream_fast.models import captured


class FakeCuda:
    """torch.cuda's part in a capture: notes who is called, in which order and on which stream."""

    def __init__(self, monkeypatch):
        self.log, self.streams, self.handles, self.at = [], 0, 0, ["main"]
        for name in ("Stream", "stream", "current_stream", "graph", "graph_pool_handle", "device", "CUDAGraph"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        monkeypatch.setattr(torch, "clear_autocast_cache", lambda: self.log.append("clear casts"))
        captured._side_stream.cache_clear()

    def Stream(self, device):
        self.streams += 1
        return SimpleNamespace(name="side", wait_stream=lambda other: self.log.append(f"side waits for {other.name}"))

    def current_stream(self, device):
        return SimpleNamespace(name="main", wait_stream=lambda other: self.log.append(f"main waits for {other.name}"))

    @contextlib.contextmanager
    def stream(self, stream):
        self.at.append(stream.name)
        yield
        self.at.pop()

    @contextlib.contextmanager
    def device(self, device):
        self.log.append(f"on {device}")
        yield

    def graph_pool_handle(self):
        self.handles += 1
        return (0, self.handles)

    @contextlib.contextmanager
    def graph(self, graph, pool, stream, capture_error_mode):
        self.log.append(f"capture into {pool} on {stream.name}, {capture_error_mode}")
        self.at.append(stream.name)
        yield
        self.at.pop()

    def CUDAGraph(self):
        return SimpleNamespace(replay=lambda: self.log.append("replay"))


def test_a_capture_on_cuda_warms_up_on_the_stream_that_records(monkeypatch):
    cuda, device = FakeCuda(monkeypatch), torch.device("cuda", 1)
    graph = captured.CudaGraph(device)
    where = []
    graph.warm_up(lambda: where.append(cuda.at[-1]))
    assert cuda.log == ["side waits for main", "main waits for side"]
    cuda.log.clear()
    assert graph.record(lambda: where.append(cuda.at[-1]) or "answer") == "answer"
    # No cast of a weight from before is in the graph, none of the graph's is left for others.
    assert cuda.log == ["clear casts", "on cuda:1", "capture into (0, 1) on side, thread_local", "clear casts"]
    cuda.log.clear()
    graph.replay()
    assert (cuda.log, where) == (["replay"], ["side", "side"])


def test_a_pool_is_shared_by_the_graphs_of_a_device_while_there_is_one(monkeypatch):
    """torch refuses the handle of a pool whose graphs are all gone."""
    cuda = FakeCuda(monkeypatch)
    devices = [torch.device("cuda", i) for i in range(2)]
    first, second = (captured.CudaGraph(devices[0]) for _ in range(2))
    other = captured.CudaGraph(devices[1])
    assert first.pool is second.pool is not other.pool
    del first
    assert captured.CudaGraph(devices[0]).pool is second.pool
    before = second.pool.handle
    del second
    gc.collect()
    assert captured.CudaGraph(devices[0]).pool.handle != before
    assert (cuda.streams, cuda.handles) == (2, 3)
