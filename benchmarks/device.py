"""Everything that only a GPU can tell, in one run of at most eight minutes: `python benchmarks/device.py -o RESULTS`.

Each part (device_parts.py) runs in a process of its own with a time limit, so that one that fails, hangs or loses the
device costs its own figures only; nothing that it has started goes on beside the next. What it finds is written at
once, a line of RESULTS/device.jsonl each. The parts come in the order of their value. `--cpu` rehearses every line at
toy sizes; `--parts` runs some, to do it in two halves.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
TOTAL_S = 480
RESERVE_S = 5  # of the total, so that the last part's results are written
KILL_S = 2  # at most, until what a part has started is gone
PARTS = {  # name: seconds that it may take
    "versions": 20,
    "parity": 150,
    "graphs": 60,
    "guided_step": 90,
    "launches": 30,
    "sds_step": 90,
    "attention": 60,
    "field": 60,
    "training": 30,
    "nerfacc": 40,
    "counters": 60,
}


def main() -> int:
    """Runs the parts that are asked for; 1 where one of them failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder of device.jsonl and the parts' logs")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="default: all")
    parser.add_argument("--cpu", action="store_true", help="rehearse on a CPU, at toy sizes")
    parser.add_argument("--seconds", type=float, default=TOTAL_S, help="for all parts together")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)  # one part, in this process
    flags = parser.parse_args()
    flags.output.mkdir(parents=True, exist_ok=True)
    if flags.here:
        return run_here(flags.parts[0], flags.output)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that a part ends with this process
    end, failed = time.monotonic() + flags.seconds - RESERVE_S, []
    for name in flags.parts:
        left = end - time.monotonic()
        seconds = min(PARTS[name] * (4 if flags.cpu else 1), left)  # a busy CPU is no GPU
        problem = run_part(name, flags, seconds) if left > 1 else "no time was left"
        if problem:
            failed.append(name)
            write(flags.output, name, "failed", {"error": problem})
    print(f"{len(flags.parts) - len(failed)} parts done" + (f"; failed: {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


def run_part(name: str, flags: argparse.Namespace, seconds: float) -> str:
    """One part in a process group of its own, which ends with it. Returns what went wrong, in a line, or nothing."""
    line = [
        sys.executable,
        str(Path(__file__).absolute()),
        "--here",
        "--parts",
        name,
        "-o",
        str(flags.output.absolute()),
    ]
    environment = os.environ | ({"MVDREAM_FAST_BENCH_CPU": "1"} if flags.cpu else {})
    log = flags.output / f"{name}.log"
    print(f"{name}: at most {seconds:.0f} s, its output in {log}", flush=True)
    with open(log, "wb") as file:
        process = subprocess.Popen(line, stdout=file, stderr=file, env=environment, cwd=ROOT, start_new_session=True)
        try:
            code = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            return f"its {seconds:.0f} s were over"
        finally:
            end_group(process)
    if code:
        last = log.read_text(errors="replace").strip().splitlines()[-1:] or ["nothing was said"]
        return f"exit code {code}: {last[0][:200]}"
    return ""


def end_group(leader: subprocess.Popen) -> None:
    """Kills a process and what is left of its group (the tests that a part runs keep the GPU), and waits for them."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader.pid, signal.SIGKILL)
    leader.wait()
    end = time.monotonic() + KILL_S
    with contextlib.suppress(ProcessLookupError):  # raised once the group is empty
        while time.monotonic() < end:
            os.killpg(leader.pid, signal.SIGKILL)
            time.sleep(0.02)


def run_here(name: str, output: Path) -> int:
    """Measures one part in this process and writes each figure as it comes."""
    for place in ("", "tests", "tests/ops", "benchmarks"):
        sys.path.insert(0, str(ROOT / place))
    import device_parts

    for what, figures in getattr(device_parts, name)():
        write(output, name, what, figures)
    return 0


def write(output: Path, part: str, what: str, figures: dict[str, Any]) -> None:
    """A line of the results, on the disk before the next thing is tried."""
    text = json.dumps({"part": part, "what": what, **figures}, default=str)
    with open(output / "device.jsonl", "a") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
