"""What the ops share at their edges: how many threads a native call takes, and the sentences of refusals."""

from types import SimpleNamespace

import pytest
import torch

import mvdream_fast
from mvdream_fast.ops import _edges


@pytest.fixture
def torch_of_64_cores(monkeypatch):
    """A container of few cores on a machine of 64, which is what torch counts; returns what sets torch's number."""
    chosen = [64]
    monkeypatch.setattr(torch, "get_num_threads", lambda: chosen[0])
    monkeypatch.setattr(_edges, "available_cores", lambda: 2)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    caches = (_edges._torchs_own, _edges._allowed)
    for cached in caches:
        cached.cache_clear()
    yield lambda n: chosen.__setitem__(0, n)
    for cached in caches:
        cached.cache_clear()


def test_a_control_groups_cores_bound_the_threads_that_nobody_chose(torch_of_64_cores):
    assert _edges.thread_count() == 2
    torch_of_64_cores(8)  # torch.set_num_threads(8): somebody chose
    assert _edges.thread_count() == 8


def test_a_number_from_the_environment_was_chosen(torch_of_64_cores, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "64")
    assert _edges.thread_count() == 64


def test_a_queue_names_the_device_of_its_tensors(monkeypatch):
    made = []
    cuda = SimpleNamespace(Queue=lambda *arguments: made.append(arguments))
    monkeypatch.setattr(mvdream_fast, "_C", SimpleNamespace(cuda=cuda), raising=False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=7 + device.index))
    _edges.queue_of(SimpleNamespace(is_cuda=True, device=torch.device("cuda", 3)))
    assert made == [(10, False, torch.backends.cuda.matmul.allow_tf32, 3)]


def test_results_that_malloc_maps_anew_ask_for_large_pages(monkeypatch):
    asked = []
    native = SimpleNamespace(advise_huge_pages=lambda *arguments: asked.append(arguments))
    monkeypatch.setattr(mvdream_fast, "_C", native, raising=False)
    like = torch.zeros(1)
    small, large = _edges.new_result(like, 2, 3, dtype=torch.int32), _edges.new_result(like, 1 << 21, 5)
    assert (small.dtype, small.shape, large.dtype, large.shape) == (torch.int32, (2, 3), torch.float32, (1 << 21, 5))
    assert asked == [(large.data_ptr(), 40 << 20)]


def test_refusals_say_what_to_do():
    x = torch.zeros(3, 2)
    _edges.check_shaped("op", "x", x, (None, 2))
    _edges.check_same_device("op", x=x, y=None, z=x)
    with pytest.raises(TypeError, match=r"^op: x must be a tensor, got list; pass a tensor$"):
        _edges.check_shaped("op", "x", [1.0], (1,))
    with pytest.raises(ValueError, match=r"^op: x must be of shape \[any, 3\], got \[3, 2\]; reshape it$"):
        _edges.check_shaped("op", "x", x, (None, 3))
    with pytest.raises(TypeError, match=r"^op: x must be float32 or float64, got torch.float16; convert it first$"):
        _edges.check_shaped("op", "x", x.half(), (3, 2))
    with pytest.raises(RuntimeError, match=r"^op: y must be on the device of x, got meta and cpu; move one$"):
        _edges.check_same_device("op", x=x, y=x.to("meta"))
