"""Four views from the embedded model while the same is going on beside it: what two commands on one machine cost.

Each contestant is one process or two, as commands are, with OpenMP's own spinning (the reference) and with that of
`mvdream_fast.core.cli.share_cores` (ours); a call has all of them sample at once and waits for the last.
"""

import functools
import os
import subprocess
import sys

import pytest
from contest import faster, size, sizes

from mvdream_fast.core.cli import SPIN_COUNT

SPINNING = {"reference": {}, "ours": {"GOMP_SPINCOUNT": SPIN_COUNT}}
PROGRAM = """
import sys
from mvdream_fast import MVDreamPipeline
pipeline = MVDreamPipeline.from_pretrained(sys.argv[1])
for line in sys.stdin:
    pipeline("a red car", n_steps=int(sys.argv[2]), seed=0)
    print("done", flush=True)
"""


class Programs:
    """So many processes that sample whenever this is called."""

    def __init__(self, environment: dict[str, str], n_programs: int, model: str, n_steps: int):
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("GOMP", "OMP"))}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        line = [sys.executable, "-c", PROGRAM, model, str(n_steps)]
        self.running = [subprocess.Popen(line, env=inherited | environment, **pipes) for _ in range(n_programs)]

    def __call__(self) -> int:
        for program in self.running:
            program.stdin.write("go\n")
            program.stdin.flush()
        return sum(program.stdout.readline() == "done\n" for program in self.running)

    def close(self) -> None:
        for program in self.running:
            program.communicate()  # the end of its input is its end


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("n_programs", sizes([1, 2], [2]))
def bench_beside_others(contest, n_programs, tiny_model):
    n_steps = size(20, 2)
    makes = {
        name: functools.partial(Programs, environment, n_programs, size("embedded", tiny_model), n_steps)
        for name, environment in SPINNING.items()
    }
    contest.run(
        f"{n_programs} at once",
        "run",
        makes,
        work={"steps": n_steps, "programs": n_programs},
        goals=[faster(0.95 if n_programs == 1 else 1, "reference")],
        budget_s=20,
    )
