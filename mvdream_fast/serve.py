"""`python -m mvdream_fast.serve`: a page on 127.0.0.1 to type prompts into, and to watch, turn and keep what comes."""

import dataclasses
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from mvdream_fast.core import cli, loopback, run_folder
from mvdream_fast.core.errors import ArgumentError

if TYPE_CHECKING:
    from mvdream_fast.jobs.local import Workers

MIN_TOKEN = 16


@dataclass(frozen=True)
class Flags:
    """Opens a page for a person: four views of a prompt in seconds, the 3D asset of those that are liked, subjects
    learned from photos, the queue, and everything that was made before.

    All lies in the output folder, a queue that `batch` works on, too. Ctrl+C saves what is at work; the same command
    goes on with it.
    """

    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = run_folder.OUTPUTS / "serve"
    """The folder of the queue and of all that is made: new, empty, or one to go on with."""
    model: cli.Model = "embedded"
    """A model folder, a released checkpoint, or "embedded": the small model that ships with the package."""
    port: int = 7008
    """Port of the page; the next free one if it is taken."""
    host: str = loopback.HOST
    """The address to answer at. Any other than this machine's own needs --token; the page is sent unencrypted."""
    token: str | None = None
    """A word of at least 16 characters that browsers must be told first, or "random", which is printed."""
    workers: int | None = None
    """Processes that grow assets; one more draws views. Default: one for each GPU that --device names, one on a CPU."""
    threads: int | None = None
    """CPU threads of each. Default: the cores shared out."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the UNet's weights; auto is what the device is fast at."""
    graphs: bool = True
    """CUDA graphs on a GPU."""
    checkpoint_every: int = 100
    """Steps between checkpoints: what a power cut may cost."""


def main(flags: Flags) -> None:
    """Checks the flags, then answers until it is stopped."""
    token = check_flags(flags)
    try:
        from mvdream_fast.web.app import make_app
        from mvdream_fast.web.server import run
    except ImportError as error:
        raise ArgumentError("serve needs FastAPI and uvicorn: pip install 'mvdream_fast[serve]'") from error
    from mvdream_fast.distill.request import absolute_model
    from mvdream_fast.web.board import Board

    flags = dataclasses.replace(flags, model=absolute_model(flags.model))
    port = loopback.free_port(flags.port, "--port", flags.host)
    staff = hired(flags)
    board = Board(flags.output.absolute(), flags.model)
    print(address(flags, port, token), flush=True)
    run(make_app(board, token), flags.host, port, staff, print)


def check_flags(flags: Flags) -> str | None:
    """The token, once everything that can be wrong without a model has been looked at. Raises ArgumentError."""
    cli.check_at_least(flags, 1, "workers", "threads", "checkpoint_every")
    cli.check_from_to(flags, 1, 65535, "port")
    if flags.token is None and flags.host not in loopback.NAMES:
        raise ArgumentError(
            f"--host {flags.host} lets others in, so it needs --token random, or a word of your own; without one the "
            f"page is for this machine: leave out --host, and from elsewhere use {loopback.tunnel(flags.port)}"
        )
    if flags.token is None or flags.token == "random":
        return flags.token and secrets.token_urlsafe(24)
    if len(flags.token) < MIN_TOKEN or not all("!" <= c <= "~" for c in flags.token):
        raise ArgumentError(f"--token must be random or at least {MIN_TOKEN} letters, digits and signs without spaces")
    return flags.token


def address(flags: Flags, port: int, token: str | None) -> str:
    """Where the page is, and how to reach it."""
    if flags.host in loopback.NAMES:
        own = loopback.HOST if flags.host == "localhost" else flags.host
        where = f"http://{loopback.in_url(own)}:{port} (this machine only; from another one: "
        where += f"{loopback.tunnel(port, own)})"
    else:
        where = f"http://{loopback.in_url(flags.host)}:{port} (unencrypted: for networks that you trust, or behind a "
        where += "proxy with TLS)"
    where = f"page: {where}"
    return f"{where}\ntoken: {token}" if flags.token == "random" else where


def hired(flags: Flags) -> "list[Workers]":
    """The workers of this machine, not started yet. Refuses a model that is not there, or that no worker can hold.

    Raises: ModelError, OutOfMemoryError, ArgumentError.
    """
    import torch

    from mvdream_fast.core import machine
    from mvdream_fast.distill.request import resolve
    from mvdream_fast.jobs.asset import Device
    from mvdream_fast.jobs.local import share_out
    from mvdream_fast.web.staff import Desk, hire

    Device(flags.device, flags.dtype, flags.graphs).refuse_what_does_not_fit(
        [resolve({"prompt": "a chair", "model": flags.model})]
    )
    n_gpus = torch.cuda.device_count() if machine.choose_device(flags.device).type == "cuda" else 0
    slots, threads = share_out(flags.device, n_gpus, flags.workers, flags.threads, most=1)
    desk = Desk(
        str(flags.output.absolute()), device=flags.device, dtype=flags.dtype, graphs=flags.graphs, threads=threads,
        checkpoint_every=flags.checkpoint_every, forever=True, model=flags.model,
    )  # fmt: skip
    return hire(desk, slots, print)


if __name__ == "__main__":
    cli.run(main, Flags, prog="serve")
