"""What a person at the page and a batch wait for, from commands as they are typed, on an idle machine:

    python benchmarks/throughput.py page -o WORK     # seconds from a prompt to its four views on the page of `serve`
    python benchmarks/throughput.py batch -o WORK    # `batch` beside as many `sds` commands, as many at once as workers

Too long for `make bench`, and each is of one run: say how idle the machine was beside the figures.
"""

import argparse
import contextlib
import json
import os
import resource
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

PROMPTS = ("a red car", "a green chair", "a white house", "a brown table")
ASKS_S = 0.8  # between two questions of the page while something is at work
START_S = 120


def command(module: str, *words: str) -> list[str]:
    return [sys.executable, "-m", f"mvdream_fast.{module}", *words]


def page(work: Path) -> None:
    """Every prompt by itself, asked as a browser asks, once the process that draws has loaded its model."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def ask(path: str, data: dict[str, str] | None = None) -> Any:
        body = None if data is None else json.dumps(data).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", body, headers)
        return json.loads(urllib.request.urlopen(request, timeout=20).read())

    def done(thing: str) -> bool:
        return any(found["id"] == thing and found["state"] == "done" for found in ask("/api/state")["shelf"])

    server = subprocess.Popen(command("serve", "-o", str(work / "serve"), "--port", str(port)))
    try:
        end = time.monotonic() + START_S
        while time.monotonic() < end:
            with contextlib.suppress(urllib.error.URLError):
                ask("/api/state")
                break
            time.sleep(0.5)
        time.sleep(20)
        for prompt in PROMPTS:
            start = time.monotonic()
            thing = ask("/api/views", {"prompt": prompt})["id"]
            while not done(thing):
                time.sleep(ASKS_S)
            urllib.request.urlopen(f"http://127.0.0.1:{port}/files/{thing}/views.png").read()
            print(f"{prompt}: {time.monotonic() - start:.1f} s", flush=True)
    finally:
        server.terminate()
        server.wait()


def batch(work: Path, preset: str) -> None:
    """The same prompts, both ways; the memory is that of the largest process."""
    lines = work / "prompts.jsonl"
    lines.write_text("".join(json.dumps(prompt) + "\n" for prompt in PROMPTS))
    together = seconds(lambda: run(command("batch", str(lines), "-o", str(work / "batch"), "--preset", preset)))
    of_batch = largest_mb()

    def alone(prompt: str) -> None:
        run(command("sds", prompt, "-o", str(work / prompt.replace(" ", "-")), "--preset", preset))

    def apart() -> None:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(alone, PROMPTS))

    each = seconds(apart)
    print(f"batch {together:.0f} s, sds commands {each:.0f} s: {each / together:.2f}x")
    print(f"largest process: {of_batch:.0f} MB of the batch, {largest_mb():.0f} MB of all")


def run(words: list[str]) -> None:
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL)


def seconds(work: Any) -> float:
    start = time.monotonic()
    work()
    return time.monotonic() - start


def largest_mb() -> float:
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["page", "batch"])
    parser.add_argument("-o", "--output", type=Path, required=True, help="a new folder")
    parser.add_argument("--preset", default="fast", help="of the batch")
    flags = parser.parse_args()
    flags.output.mkdir(parents=True)
    page(flags.output) if flags.what == "page" else batch(flags.output, flags.preset)


if __name__ == "__main__":
    main()
