"""Batches that are disturbed until they are done, on Ray and on a disk that fills up: every asset is made exactly once,
with the bytes of a run that nothing disturbed. Long: `make test-all` runs them."""

import importlib.util
import json
import os
import subprocess
import time
import uuid
from pathlib import Path

import pytest
from reference.batches import Head, Killer, in_background, jobs_of, prompts, ray_head, rows, small_disk
from reference.counting_jobs import whole
from reference.quick_jobs import QUICK_RUN, digests, undisturbed

pytestmark = [pytest.mark.slow, pytest.mark.timeout(7200)]
HAS_RAY = importlib.util.find_spec("ray") is not None
LIMIT_S = 5400


@pytest.fixture
def asked(tmp_path, tiny_model):
    """asked(n, place, more flags): the arguments of a batch of n prompts."""

    def arguments(n: int, place: Path, *more: str) -> list[str]:
        file = tmp_path / "prompts.jsonl"
        file.write_text("".join(json.dumps(line) + "\n" for line in prompts(n)))
        sizes = ["--steps", "24", "--checkpoint-every", "4"]
        return [str(file), "-o", str(place), "--model", tiny_model, *QUICK_RUN, *sizes, *more]

    return arguments


def check(place: Path, n: int) -> str:
    """Every asset once. Returns the figures."""
    found = rows(place)
    assert [state for state, _ in found.values()] == ["done"] * n
    events = [json.loads(path.read_text())["event"] for path in (place / "events").iterdir()]
    assert events.count("done") == n
    assert sorted(path.name for path in (place / "assets").iterdir()) == sorted(job.name for job in jobs_of(place))
    assert list((place / "work").iterdir()) == []
    return f"{n} assets in {sum(attempt for _, attempt in found.values())} attempts"


def check_bytes(place: Path, work: str, alone: Path) -> None:
    """Every asset as if nothing had happened."""
    if work == "quick_jobs":
        assert digests(place) == undisturbed(alone, jobs_of(place))
    else:
        made = {job.id: (place / "assets" / job.name / "asset").read_text() for job in jobs_of(place)}
        assert made == {job_id: whole(job_id) for job_id in made}


@pytest.mark.skipif(not HAS_RAY, reason="needs Ray, of the extra cluster")
@pytest.mark.parametrize("restarts", [0, 3])
@pytest.mark.parametrize("work", ["counting_jobs", "quick_jobs"])
def test_on_ray_workers_are_killed_and_the_head_is_restarted(asked, tmp_path, work, restarts, capsys):
    """With work that costs nothing, and with text-to-3D runs."""
    place, begin = tmp_path / "out", time.monotonic()
    temporary = Path("/tmp") / f"ray-{uuid.uuid4().hex[:8]}"  # of sockets, whose names must be short
    with ray_head(temporary, 4) as head:
        command = in_background(*asked(40, place, "--ray", head.address, "--workers", "4"), module=work)
        try:
            with Killer(place, (2.0, 6.0)) as killer:
                for number in range(1, restarts + 1):
                    wait_for(place, 8 * number, command)
                    restart(head)
                assert command.wait(LIMIT_S) == 0
        finally:
            command.kill()
    seconds = time.monotonic() - begin
    assert killer.n >= 8
    told = check(place, 40)
    check_bytes(place, work, tmp_path / "alone")
    with capsys.disabled():
        print(f"\n{work}: {told}, {killer.n} kills, {restarts} restarts of the head, {seconds:.0f} s")


def restart(head: Head) -> None:
    head.kill()
    time.sleep(5)
    head.start()


def wait_for(place: Path, n: int, command: subprocess.Popen) -> None:
    """Until so many assets are there."""
    end = time.monotonic() + LIMIT_S
    while time.monotonic() < end and command.poll() is None and len(list(place.glob("assets/*"))) < n:
        time.sleep(0.5)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to mount a small disk")
@pytest.mark.parametrize(("work", "megabytes"), [("counting_jobs", 64), ("quick_jobs", 768)])
def test_the_disk_is_full_for_a_while(asked, tmp_path, work, megabytes, capsys):
    """Another program takes all space, four times, for some seconds."""
    with small_disk(tmp_path / "disk", megabytes << 20) as disk:
        place, full = disk / "out", 0
        command = in_background(*asked(12, place, "--workers", "2"), module=work)
        try:
            for n in (1, 3, 6, 9):
                wait_for(place, n, command)
                full += fill(disk / "filler")
                time.sleep(8)
                (disk / "filler").unlink()
            assert command.wait(LIMIT_S) == 0
            said = command.stdout.read()
        finally:
            command.kill()
        told = check(place, 12)
        check_bytes(place, work, tmp_path / "alone")
    assert full == 4
    assert "the disk is full; waiting for space" in said
    with capsys.disabled():
        print(f"\n{work}: {told}, the disk full {full} times, {said.count('the disk is full')} waits")


def fill(path: Path) -> bool:
    """Takes all space that is left."""
    try:
        with open(path, "wb", buffering=0) as file:
            while True:
                file.write(bytes(1 << 16))
    except OSError as error:
        return "No space left" in str(error)
