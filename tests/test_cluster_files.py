"""The files in examples/cluster: shells read them, commands and flags in them exist, schedulers know the rest.

Which of them were run, and how, is in docs/scale.md.
"""

import dataclasses
import importlib
import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import tyro
import yaml
from torch.distributed.run import get_args_parser

from mvdream_fast.core import cli

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "examples" / "cluster").iterdir())
BATCH = [path for path in FILES if path.suffix == ".sbatch"]
SKY = [path for path in FILES if path.name.startswith("sky-")]
# What stands for variables of the shell: arguments of the scripts, and what schedulers set.
VALUES = {
    "1": "in", "2": "out", "3": "500", "@:4": "", "RESUME": "--resume", "PYTHON:-python": "python",
    "TORCHRUN:-torchrun": "torchrun", "GPUS:-8": "8", "HEAD": "head", "BUCKET": "s3://bucket/run", "MODEL": "model",
    "SLURM_ARRAY_TASK_ID": "7", "SLURM_CPUS_PER_TASK": "128", "SLURM_NNODES": "8", "SLURM_JOB_ID": "1",
    "SKYPILOT_NUM_NODES": "8", "SKYPILOT_NUM_GPUS_PER_NODE": "8", "SKYPILOT_NODE_RANK": "3",
}  # fmt: skip
SBATCH = {
    "job-name", "nodes", "ntasks", "ntasks-per-node", "gpus-per-node", "cpus-per-task", "time", "requeue", "signal",
    "output",
}  # fmt: skip
SKY_FIELDS = {"name", "workdir", "num_nodes", "resources", "envs", "file_mounts", "setup", "run"}
SKY_RESOURCES = {"accelerators", "use_spot", "disk_size", "network_tier"}


def commands(text: str) -> list[list[str]]:
    """The words of every line that runs a module of the package, variables replaced; comments' examples, too."""
    text = re.sub(r"^# ", "", text, flags=re.MULTILINE)  # an example in a comment is a command as well
    text = re.sub(r"\\\n\s*", " ", text)
    lines = [line for line in text.splitlines() if re.search(r"\s-m mvdream_fast\.\w+ ", line)]
    whole = [re.sub(r"\$(?:\{([^}]+)\}|(\w+))", lambda match: VALUES[match[1] or match[2]], line) for line in lines]
    return [[word for word in shlex.split(line, comments=True) if word] for line in whole]


def flags_of(words: list[str]):
    """What a verb's own parser makes of its flags."""
    at = words.index("-m")
    verb = importlib.import_module(words[at + 1])
    return verb, tyro.cli(verb.Flags, args=words[at + 2 :], registry=cli._TYPES)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_its_commands_and_flags_exist(path):
    found = commands(path.read_text(encoding="utf-8"))
    assert found, "it runs nothing of this package"
    for words in found:
        verb, flags = flags_of(words)
        if verb.__name__ == "mvdream_fast.batch":
            verb.check_flags(dataclasses.replace(flags, ray=None))  # which asks whether Ray is installed
            assert flags.checkpoint_every == 2000
        if verb.__name__ == "mvdream_fast.render":
            assert flags.shard == "7/500"
        if verb.__name__ == "mvdream_fast.train":
            assert (flags.shard, flags.shard_group, flags.resume) == ("fsdp2", 8, True)


def test_a_flag_that_does_not_exist_is_seen(capsys):
    (words,) = commands("exec python -m mvdream_fast.render $1 -o $2 \\\n  --sizes 256 # no\n")
    assert words == ["exec", "python", "-m", "mvdream_fast.render", "in", "-o", "out", "--sizes", "256"]
    with pytest.raises(SystemExit):
        flags_of(words)
    assert "--sizes" in capsys.readouterr().err


@pytest.mark.parametrize("path", [*BATCH, *SKY], ids=lambda path: path.name)
def test_a_shell_reads_it(path):
    text = path.read_text(encoding="utf-8")
    scripts = [text] if path in BATCH else [yaml.safe_load(text)[part] for part in ("setup", "run")]
    for script in scripts:
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)


@pytest.mark.parametrize("path", BATCH, ids=lambda path: path.name)
def test_slurm_knows_its_options(path):
    lines = re.findall(r"^#SBATCH (.*)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    names = {re.match(r"--([\w-]+)", line)[1] for line in lines}
    assert names <= SBATCH
    assert {"requeue", "signal"} <= names  # a stopped job saves, and goes on elsewhere


@pytest.mark.parametrize("name", ["train.sbatch", "sky-train.yaml"])
def test_torchrun_knows_its_flags(name):
    (words,) = commands((ROOT / "examples/cluster" / name).read_text(encoding="utf-8"))
    options = get_args_parser().parse_args(words[words.index("torchrun") + 1 :])
    assert options.module
    assert options.training_script == "mvdream_fast.train"
    assert (options.nnodes, options.nproc_per_node) == ("8", "8")
    assert options.training_script_args[-1] == "--resume"


@pytest.mark.parametrize("path", SKY, ids=lambda path: path.name)
def test_skypilot_knows_its_fields(path):
    task = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert set(task) <= SKY_FIELDS
    assert set(task["resources"]) <= SKY_RESOURCES
    for name in re.findall(r"\$\{?([A-Z]+)\b", task["run"] + json.dumps(task.get("file_mounts", {}))):
        assert name in task["envs"] or name.startswith("SKYPILOT") or f"{name}=" in task["run"]


def test_ray_knows_its_file():
    ray = pytest.importorskip("ray", reason="the schema of a cluster file comes with Ray")
    import jsonschema

    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text(encoding="utf-8"))
    cluster = yaml.safe_load((ROOT / "examples/cluster/ray.yaml").read_text(encoding="utf-8"))
    jsonschema.validate(cluster, schema)
    assert any("--head" in command for command in cluster["head_start_ray_commands"])
