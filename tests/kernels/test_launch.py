"""Our own launches against Triton's, record by record, and what a call of an op does besides: without a GPU.

A stub stands for CUDA's driver (tests/cuda_stub), which reads from each cubin what parameters its kernel takes, as the
driver does, and writes down what a launch hands it. It works in a process of its own: this one interprets kernels.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from mvdream_fast.kernels import _launch

pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.skipif(shutil.which("cc") is None, reason="the stub driver takes a C compiler, and there is none here"),
]
ATTENTION = (
    "attention_forward",
    "attention_delta",
    "attention_backward_kv",
    "attention_backward_q",
    *["sum_tokens"] * 3,
)


def run(folder, pattern):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(Path(__file__).with_name("launch_records.py")), str(folder), pattern]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def facts(tmp_path_factory):
    return run(tmp_path_factory.mktemp("stub"), "small.*")


def kernels(records):
    return tuple(record.split()[0] for record in records)


def part(record, name, length=1):
    """The words of a record after `name`."""
    words = record.split()
    return words[words.index(name) + 1 :][:length]


def check_equal(found):
    assert found["triton"]
    assert found["ours"] == found["triton"]
    assert found["asked"] == []  # Triton had no part in the last call


def test_every_kernel_is_launched_as_triton_launches_it(facts):
    for found in facts["report"].values():
        check_equal(found)
    launched = {name: kernels(found["ours"]) for name, found in facts["report"].items()}
    assert launched["small attention"] == ATTENTION
    assert launched["small attention of one"] == ATTENTION[:4]
    assert launched["small group_norm"] == (
        "group_norm_silu_forward", "group_norm_silu_backward", "sum_images", "group_norm_silu_forward",
    )  # fmt: skip
    assert launched["small geglu"] == launched["small geglu of one"] == ("geglu_forward", "geglu_backward")
    assert launched["small sds"] == ("sds_target_x0", "sds_target_x0", "sds_target_noise", "sds_target_noise")
    assert set(launched["small embedding"]) == {"dense", "dense_backward_weight"}


def test_a_record_by_hand(facts):
    # 5 rows of 24 pairs: tiles of 32 columns and 1024 / 32 rows, so one program; then strides, rows and width.
    record = facts["report"]["small geglu"]["ours"][0]
    assert part(record, "grid", 3) == ["1", "1", "1"]
    assert part(record, "block", 3) == ["128", "1", "1"]  # four warps
    assert part(record, "stream") == ["0x7"]
    numbers = [int.from_bytes(bytes.fromhex(word), "little") for word in part(record, "parameters", 99)]
    assert [len(word) // 2 for word in part(record, "parameters", 99)] == [8, 8, 4, 4, 4, 8, 8]  # a stride of 1 is none
    assert numbers[2:] == [48, 5, 24, 0, 0]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_configuration_of_the_report(tmp_path):
    report = run(tmp_path, "(?!small).*")["report"]
    assert {"attention d64", "attention d40 one view", "embedding float32"} <= report.keys()
    for found in report.values():
        check_equal(found)


def test_another_alignment_takes_another_binary(facts):
    others = facts["others"]
    for name in ("aligned", "shifted", "aligned again"):
        check_equal(others[name])
    binaries = [others[name]["ours"][0].split()[1] for name in ("aligned", "shifted", "aligned again")]
    assert binaries[0] == binaries[2] != binaries[1]


def test_a_hook_makes_launches_tritons(facts):
    hooked = facts["others"]["hooked"]
    assert hooked["asked"] == ["geglu_forward"]
    assert hooked["ours"] == hooked["triton"]
    assert hooked["told"] == 3


@pytest.mark.parametrize(("name", "device"), [("from another device", 1), ("from a new thread", -1)])
def test_a_launch_goes_to_the_device_of_its_tensors(facts, name, device):
    found = facts["others"][name]
    assert [part(record, "device") for record in found["ours"]] == [["0"]]
    assert found["device"] == device  # as it was before


METADATA = {
    "target": SimpleNamespace(backend="cuda", warp_size=32),
    "num_ctas": 1,
    "shared": 65536,
    "global_scratch_size": 0,
    "profile_scratch_size": 0,
    "launch_cooperative_grid": False,
    "launch_pdl": False,
}


@pytest.mark.parametrize(
    ("change", "plain"),
    [
        ({}, True),
        ({"cluster_dims": (1, 1, 1)}, True),  # Triton 3.5 and 3.6 have them
        ({"cluster_dims": (2, 1, 1)}, False),
        ({"num_ctas": 2}, False),
        ({"global_scratch_size": 128}, False),
        ({"profile_scratch_size": 128}, False),
        ({"launch_cooperative_grid": True}, False),
        ({"launch_pdl": True}, False),
        ({"instrumentation_mode": "gsan"}, False),
        ({"shared": 229 * 1024}, False),
        ({"target": SimpleNamespace(backend="hip", warp_size=64)}, False),
    ],
)
def test_what_is_launched_so(change, plain):
    assert _launch._is_plain(SimpleNamespace(**METADATA | change)) is plain


def test_parameters_that_the_driver_does_not_confirm_leave_a_launch_to_triton(facts):
    assert facts["others"]["kept"] == {"as compiled": True, "one more": False, "one less": False, "a wider one": False}


def test_an_error_names_the_kernel(facts):
    expected = "geglu_forward: the launch of the kernel failed with CUDA error 700: an error of the stub"
    assert facts["others"]["an error"]["text"] == expected


@pytest.mark.parametrize(
    ("op", "launched"),
    [
        ("cross_view_attention", ("attention_forward",)),
        ("group_norm_silu", ("group_norm_silu_forward",)),
        ("geglu", ("geglu_forward",)),
        ("time_camera_embedding", ("dense",) * 4),
        ("sds_target", ("sds_target_x0",)),
    ],
)
def test_a_good_call_does_nothing_else(facts, op, launched):
    found = facts["ops"][op]
    assert kernels(found["ours"]) == launched
    assert found["sentences"] == []
    assert found["idle"] == []  # no module imported, no capability asked


@pytest.mark.parametrize(
    ("op", "output", "kept"), [("cross_view_attention", 6, (7, 8)), ("group_norm_silu", 4, (5, 6))]
)
def test_inference_keeps_nothing_for_a_backward(facts, op, output, kept):
    addresses = part(facts["ops"][op]["ours"][0], "parameters", 9)
    assert [addresses[i] for i in kept] == [addresses[output]] * 2


def test_which_attention_is_torchs(facts):
    launched = {
        name: kernels(facts["ops"][name]["ours"]) for name in ("torch's", "cameras", "strided", "deterministic")
    }
    ours = ("attention_forward",)
    assert launched == {"torch's": (), "cameras": ours, "strided": ours, "deterministic": ours}
