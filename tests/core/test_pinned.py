"""Numbers go to a GPU through page-locked memory that torch lends, and drawn numbers stay what they are."""

import hashlib

import pytest
import torch

from mvdream_fast.core import pinned
from mvdream_fast.core.pinned import copies_wait, to_device
from mvdream_fast.core.rng import Stream

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def copies(monkeypatch):
    """What is copied, and how, as if this CPU's copies waited for a GPU; page-locked memory is ordinary here."""
    locked, sent, plain = [], [], torch.Tensor.to

    def pin_memory(x):
        locked.append(x.clone())
        return locked[-1]

    def to(x, *arguments, **options):
        sent.append((x, options))
        return plain(x, *arguments, **options).clone()

    monkeypatch.setattr(pinned, "copies_wait", lambda source, target: True)
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda x: any(x is y for y in locked))
    monkeypatch.setattr(torch.Tensor, "to", to)
    return locked, sent


def test_which_copies_wait():
    assert copies_wait(CPU, GPU)
    assert not copies_wait(CPU, CPU)
    assert not copies_wait(GPU, GPU)
    assert not copies_wait(GPU, CPU)  # its number is read: core/reads.py


def test_a_copy_goes_through_a_buffer_of_its_own_and_does_not_wait(copies):
    locked, sent = copies
    x = torch.arange(3.0)
    there = to_device(x, "cpu")
    x.fill_(7)  # the caller's again
    assert there.tolist() == [0, 1, 2]
    ((source, options),) = sent
    assert source is locked[0]
    assert options == {"non_blocking": True}
    to_device(locked[0], "cpu")  # is page-locked already
    assert len(locked) == 1


def test_two_copies_share_no_buffer(copies):
    """The first may be on its way still: torch's allocator knows when it has arrived, a buffer of ours would not."""
    locked, _ = copies
    to_device(torch.zeros(3), "cpu")
    to_device(torch.ones(3), "cpu")
    assert locked[0].data_ptr() != locked[1].data_ptr()
    assert locked[0].tolist() == [0, 0, 0]


def drawn() -> str:
    stream, digest = Stream(3, 4, "draws"), hashlib.blake2b(digest_size=8)
    for x in (stream.normal(5, 3, device="cpu"), stream.uniform(7, low=-1, high=2, device="cpu"),
              stream.integers(0, 1000, 9, device="cpu"), stream.permutation(6), stream.normal(2)):  # fmt: skip
        digest.update(x.numpy().tobytes())
    return digest.hexdigest()


def test_the_drawn_numbers_are_those_from_before_there_were_buffers():
    assert drawn() == "fefad1186bff69c1"


def test_the_way_to_a_gpu_changes_no_drawn_number(copies):
    assert drawn() == "fefad1186bff69c1"
    locked, sent = copies
    assert len(locked) == len(sent) == 4
