"""`python benchmarks/kernel_report`: compiles every Triton kernel for GPUs that are not there; see report.py."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).parents[1])  # benchmarks/, so that this folder is found as a package

from kernel_report.report import Report, main  # noqa: E402 (the path comes first)
from mvdream_fast.core import cli  # noqa: E402

if __name__ == "__main__":
    cli.run(main, Report, prog="kernel_report", command="python benchmarks/kernel_report")
