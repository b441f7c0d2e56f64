"""What the machine is taken for, from files of machines that this one isn't."""

import pytest
import torch

from mvdream_fast.core import machine
from mvdream_fast.core.errors import ArgumentError, OutOfMemoryError


@pytest.fixture
def cgroup(tmp_path):
    """A made-up control group tree: root, the file of the own groups, and a function that sets a limit."""
    own = tmp_path / "own"

    def limit(folder: str, value: str, name: str = "memory.max") -> None:
        path = tmp_path / "root" / folder
        path.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(value)

    return tmp_path / "root", own, limit


def test_the_tightest_limit_above_the_process_counts(cgroup):
    root, own, limit = cgroup
    own.write_text("0::/pod/container\n")
    limit("pod/container", "max\n")
    limit("pod", "1073741824\n")
    limit("other", "1024\n")
    assert machine.memory_limit(root, own) == 1 << 30
    limit(".", "536870912")
    assert machine.memory_limit(root, own) == 1 << 29


def test_the_older_version_of_control_groups(cgroup):
    root, own, limit = cgroup
    own.write_text("5:cpu:/a\n4:memory:/a\n")
    limit("memory/a", "2147483648", "memory.limit_in_bytes")
    limit("memory", "9223372036854771712", "memory.limit_in_bytes")  # its way of saying: none
    assert machine.memory_limit(root, own) == 2 << 30


def test_no_limit(cgroup):
    root, own, limit = cgroup
    assert machine.memory_limit(root, own) is None
    own.write_text("garbage\n0::/a\n")
    limit("a", "max")
    assert machine.memory_limit(root, own) is None


@pytest.mark.parametrize(
    ("own", "files", "cores"),
    [
        ("", {}, 64),
        ("0::/pod/container\n", {"pod/container/cpu.max": "max 100000", "pod/cpu.max": "250000 100000"}, 2),
        ("0::/a\n", {"cpu.max": "50000 100000"}, 1),
        ("0::/a\n", {"other/cpu.max": "100000 100000", "a/cpu.max": "garbage"}, 64),
        ("3:cpu,cpuacct:/a\n", {"cpu/a/cpu.cfs_quota_us": "300000", "cpu/a/cpu.cfs_period_us": "100000"}, 3),
        ("3:cpu,cpuacct:/a\n", {"cpu/a/cpu.cfs_quota_us": "-1", "cpu/a/cpu.cfs_period_us": "100000"}, 64),
    ],
)
def test_cores_are_cut_by_the_tightest_quota_above_the_process(cgroup, monkeypatch, own, files, cores):
    root, own_file, limit = cgroup
    own_file.write_text(own)
    for path, value in files.items():
        folder, _, name = path.rpartition("/")
        limit(folder or ".", value, name)
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    assert machine.available_cores(root, own_file) == cores


def test_cpu_flags(tmp_path):
    cpuinfo = tmp_path / "cpuinfo"
    assert machine.cpu_flags(cpuinfo) == frozenset()
    cpuinfo.write_text("model name\t: Quick 9\nflags\t\t: sse2 avx2 amx_bf16\n\nflags\t\t: sse2\n")
    assert machine.cpu_flags(cpuinfo) == {"sse2", "avx2", "amx_bf16"}
    assert machine.cpu_name(cpuinfo) == "Quick 9"
    cpuinfo.write_text("Features : asimd sve\n")
    assert machine.cpu_flags(cpuinfo) == {"asimd", "sve"}


@pytest.mark.parametrize(
    ("flags", "expected"),
    [({"avx2"}, torch.float32), ({"avx512_bf16"}, torch.bfloat16), ({"amx_bf16", "avx2"}, torch.bfloat16)],
)
def test_auto_dtype_of_processors(monkeypatch, flags, expected):
    monkeypatch.setattr(machine, "cpu_flags", lambda: frozenset(flags))
    assert machine.choose_dtype("auto", torch.device("cpu")) == expected


@pytest.mark.parametrize(
    ("capability", "expected"), [((7, 0), torch.float16), ((8, 0), torch.bfloat16), ((12, 0), torch.bfloat16)]
)
def test_auto_dtype_of_gpus(monkeypatch, capability, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert machine.choose_dtype("auto", torch.device("cuda")) == expected


@pytest.mark.parametrize(
    ("device", "capability", "unet", "expected"),
    [
        ("cuda", (9, 0), torch.bfloat16, torch.bfloat16),
        ("cuda", (8, 0), torch.float16, torch.bfloat16),
        ("cuda", (9, 0), torch.float32, torch.float32),
        ("cuda", (7, 5), torch.float16, torch.float32),  # no bfloat16 there
        ("cpu", None, torch.bfloat16, torch.float32),
    ],
)
def test_dtype_of_encoders(monkeypatch, device, capability, unet, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert machine.encoder_dtype(unet, torch.device(device)) == expected


def test_cudnn_measures_where_shapes_repeat_and_forgets_it_again(monkeypatch):
    cudnn, cuda = torch.backends.cudnn, torch.device("cuda")
    assert not cudnn.benchmark
    with machine.repeated_shapes(cuda):
        assert cudnn.benchmark
        with pytest.raises(OutOfMemoryError), machine.repeated_shapes(cuda):
            raise OutOfMemoryError("a step that did not fit")
        assert cudnn.benchmark
    assert not cudnn.benchmark
    with machine.repeated_shapes(torch.device("cpu")):
        assert not cudnn.benchmark
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    with machine.repeated_shapes(cuda):
        assert not cudnn.benchmark


def test_named_dtypes():
    assert machine.choose_dtype("float16", torch.device("cpu")) == torch.float16
    cpu = torch.device("cpu")
    assert machine.choose_dtype(torch.bfloat16, cpu) == machine.choose_dtype("bf16", cpu) == torch.bfloat16
    assert machine.choose_dtype(None, cpu) == machine.choose_dtype("auto", cpu)
    for wrong in ("int8", torch.float64, 16):
        name = str(wrong)
        with pytest.raises(ArgumentError, match=f"must be auto, float32, bfloat16, float16, got '{name}'"):
            machine.choose_dtype(wrong, cpu)


def test_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert machine.choose_device("auto") == machine.choose_device("cpu") == torch.device("cpu")
    with pytest.raises(ArgumentError, match="--device cuda: torch sees no CUDA device"):
        machine.choose_device("cuda")
    assert machine.choose_device(None) == machine.choose_device(torch.device("cpu")) == torch.device("cpu")
    for elsewhere in ("mps", "xpu", "meta", torch.device("mps"), "vulkan:0"):
        with pytest.raises(
            ArgumentError, match=f"--device {elsewhere}: the kernels are for cpu and cuda; take --device cpu"
        ):
            machine.choose_device(elsewhere)
    for wrong in ("toaster", 1.5, "cuda:-1"):
        with pytest.raises(ArgumentError, match="--device must be auto, cpu, cuda or cuda:N, got"):
            machine.choose_device(wrong)
    with pytest.raises(ArgumentError, match="--device cuda:1: torch sees no CUDA device"):
        machine.choose_device(1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert machine.choose_device("auto") == torch.device("cuda")
    assert machine.choose_device("cuda:1") == machine.choose_device(1) == torch.device("cuda:1")
    with pytest.raises(ArgumentError, match="--device cuda:2: there are 2 CUDA devices, counted from 0"):
        machine.choose_device("cuda:2")


def test_torchs_ways_of_saying_that_memory_is_out():
    sentence = r"out of memory: .*allocate.*; take fewer views$"
    with pytest.raises(OutOfMemoryError, match=sentence), machine.memory_errors("take fewer views"):
        torch.empty(1 << 60, dtype=torch.uint8)
    with pytest.raises(OutOfMemoryError, match="take fewer views"), machine.memory_errors("take fewer views"):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
    with pytest.raises(RuntimeError, match="^something else$"), machine.memory_errors("take fewer views"):
        raise RuntimeError("something else")
