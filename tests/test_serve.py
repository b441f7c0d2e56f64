"""The command behind the page: what its flags refuse; a server with its workers from start to end, killed between."""

import contextlib
import errno
import json
import os
import signal
import socket
import subprocess
import sys
import types
from pathlib import Path

import httpx2
import psutil
import pytest
import torch
from reference.batches import environment
from reference.painter import png, strip
from reference.until import until

from mvdream_fast import serve
from mvdream_fast.core import cli, loopback
from mvdream_fast.core.errors import ArgumentError, UserError
from mvdream_fast.serve import Flags, address, check_flags

START_S = 240.0


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ({"host": "0.0.0.0"}, "--host 0.0.0.0 lets others in, so it needs --token random"),
        ({"host": "192.0.2.7"}, "--host 192.0.2.7 lets others in"),
        ({"host": "::"}, "--host :: lets others in"),
        ({"host": "0.0.0.0", "token": "secret"}, "--token must be random or at least 16 letters"),
        ({"token": "sixteen letters or more"}, "without spaces"),
        ({"token": "sixteen-letters-é-or-more"}, "without spaces"),
        ({"token": ""}, "--token must be random"),
        ({"port": 0}, "--port must be from 1 to 65535"),
        ({"workers": 0}, "--workers must be at least 1"),
        ({"threads": 0}, "--threads must be at least 1"),
    ],
)
def test_flags_that_are_refused(flags, sentence):
    with pytest.raises(ArgumentError) as error:
        check_flags(Flags(**flags))
    assert sentence in str(error.value)


def test_a_model_is_named_by_its_whole_path(tmp_path, monkeypatch):
    """What is made of it goes on from another folder, too."""
    from mvdream_fast.web import board, server

    seen = []
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m").mkdir()
    monkeypatch.setattr(serve, "hired", lambda flags: seen.append(flags.model))
    monkeypatch.setattr(board, "Board", lambda folder, model: seen.append(model))
    monkeypatch.setattr(server, "run", lambda *_: None)
    for model in ("m", "embedded"):
        serve.main(Flags(output=tmp_path / "out", model=model))
    assert seen == [str(tmp_path / "m")] * 2 + ["embedded"] * 2


def test_tokens():
    assert check_flags(Flags()) is None
    assert check_flags(Flags(host="localhost")) is None
    assert check_flags(Flags(host="0.0.0.0", token="sixteen-letters-or-more")) == "sixteen-letters-or-more"
    drawn = {check_flags(Flags(token="random")) for _ in range(3)}
    assert len(drawn) == 3
    assert all(len(word) == 32 for word in drawn)


def test_the_address_says_who_can_open_it():
    own = address(Flags(), 7009, None)
    assert "http://127.0.0.1:7009 (this machine only" in own
    assert loopback.tunnel(7009) in own
    others = address(Flags(host="0.0.0.0", token="random"), 7008, "word")
    assert "unencrypted" in others
    assert others.endswith("\ntoken: word")
    assert "word" not in address(Flags(host="0.0.0.0", token="a-word-of-their-own"), 7008, "a-word-of-their-own")


def test_ipv6_is_served_too():
    assert check_flags(Flags(host="::1")) is None
    own = address(Flags(host="::1"), 7009, None)
    assert "http://[::1]:7009 (this machine only" in own
    assert "ssh -L 7009:[::1]:7009 " in own
    assert "http://[::]:7008 (unencrypted" in address(Flags(host="::", token="random"), 7008, "word")


@pytest.mark.skipif(not socket.has_ipv6, reason="no IPv6 here")
@pytest.mark.parametrize("host", ["::1", "::"])
def test_ports_of_ipv6_addresses(host):
    with socket.socket(socket.AF_INET6) as taken:
        try:
            taken.bind(("::1", 0))
        except OSError as error:
            pytest.skip(f"no IPv6 here: {error}")
        taken.listen()
        port = taken.getsockname()[1]
        assert port < loopback.free_port(port, "--port", host) < port + loopback.PORTS_TRIED


@pytest.mark.parametrize(
    ("host", "sentence"),
    [
        ("192.0.2.7", "--host 192.0.2.7 is no address of this machine"),
        ("2001:db8::7", "--host 2001:db8::7 is no address of this machine"),
        ("no name", "--host no name is no name or address that can be found"),
        ("a" * 70 + ".example", "is no name or address that can be found"),
    ],
)
def test_hosts_that_are_not_this_machine_are_one_sentence(host, sentence, monkeypatch):
    looked_up, look_up = [], socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **more: looked_up.append(args) or look_up(*args, **more))
    with pytest.raises(ArgumentError) as error:
        loopback.free_port(7008, "--port", host)
    assert sentence in str(error.value)
    assert "leave it out" in str(error.value)
    assert len(looked_up) == 1


@pytest.mark.parametrize("number", [errno.EADDRINUSE, errno.EACCES])
def test_only_ports_that_are_taken_are_passed_over(number, monkeypatch):
    tried = []

    class Probe(socket.socket):
        def bind(self, at):
            tried.append(at)
            if at[1] < 7010:
                raise OSError(number, "taken")

    monkeypatch.setattr(socket, "socket", Probe)
    assert loopback.free_port(7008, "--port") == 7010
    assert tried == [("127.0.0.1", port) for port in (7008, 7009, 7010)]


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["--model", "nowhere"], 3, "nowhere"),
        (["--host", "0.0.0.0"], 2, "needs --token random"),
        (["-o", "full"], 7, "holds something else than jobs"),
        (["--device", "tpu"], 2, "--device must be auto, cpu, cuda"),
    ],
)
def test_wrong_use_is_one_sentence_and_a_code(arguments, code, sentence, capsys, in_tmp):
    Path("full").mkdir()
    Path("full/letter.txt").write_text("mine")
    with pytest.raises(SystemExit) as ended:
        cli.run(serve.main, Flags, prog="serve", argv=arguments)
    printed = capsys.readouterr()
    assert (ended.value.code, printed.out) == (code, "")
    assert sentence in printed.err
    assert printed.err.count("\n") == 1


@pytest.mark.parametrize(
    ("device", "workers", "growers"),
    [
        ("cuda:1", None, ["cuda:1"]),
        ("cuda:1", 2, ["cuda:1", "cuda:1"]),
        ("auto", None, ["cuda:0", "cuda:1", "cuda:2"]),
        ("cpu", None, ["cpu"]),
    ],
)
def test_growers_have_the_gpus_that_the_flag_names(monkeypatch, tmp_path, device, workers, growers):
    """On a machine of three, one each unless more are asked for; one on a CPU."""
    from mvdream_fast.core import machine
    from mvdream_fast.jobs.asset import Device
    from mvdream_fast.web import staff

    asked = []
    chosen = torch.device("cpu" if device == "cpu" else "cuda:1")
    monkeypatch.setattr(machine, "choose_device", lambda _: chosen)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(Device, "refuse_what_does_not_fit", lambda *_: 0)
    monkeypatch.setattr(staff, "hire", lambda desk, slots, say: asked.extend(slot.device for slot in slots))
    serve.hired(Flags(output=tmp_path, device=device, workers=workers))
    assert asked == growers


class Staff:
    """Workers that die as often as they are started."""

    def __init__(self, error=None):
        self.error, self.told = error, []

    def start(self):
        self.told.append("start")

    def tend(self):
        self.told.append("tend")
        if self.error:
            raise self.error

    def stop(self, grace):
        self.told.append("stop")


def test_workers_that_cannot_live_end_the_server(monkeypatch):
    from mvdream_fast.web import server

    monkeypatch.setattr(server, "TEND_S", 0.05)
    well, ill = Staff(), Staff(UserError("the worker died 5 times"))
    with pytest.raises(UserError, match="died 5 times"):
        server.run(None, "127.0.0.1", loopback.free_port(7108, "--port"), [well, ill], lambda _: None)
    assert well.told == ["start", "tend", "stop"]
    assert ill.told == ["start", "tend", "stop"]


def test_workers_that_leave_with_the_server_are_not_started_again(monkeypatch):
    """Ctrl+C reaches them by the terminal; the server may still be answering."""
    from mvdream_fast.web import server

    monkeypatch.setattr(server, "TEND_S", 0.01)
    staff = Staff()
    tender = server._Tender([staff], types.SimpleNamespace(should_exit=True))
    tender.start()
    tender.join(10)
    assert (tender.is_alive(), staff.told) == (False, [])


@contextlib.contextmanager
def started(model: str, port: int, module: str = "mvdream_fast.serve"):
    """The command, as a person starts it, once it answers."""
    command = [sys.executable, "-m", module, "-o", "out", "--model", model, "--port", str(port), "--threads", "1"]
    with subprocess.Popen(command, start_new_session=True, env=environment()) as process:
        try:
            until(lambda: ask("GET", port, "api/state"), START_S)
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def ask(method: str, port: int, path: str, timeout: float = 30, **asked):
    with contextlib.suppress(httpx2.TransportError):
        return httpx2.request(method, f"http://127.0.0.1:{port}/{path}", timeout=timeout, **asked)


@pytest.mark.timeout(900)  # two starts of three processes that import torch
def test_views_of_a_prompt_and_a_server_that_is_killed(tiny_model, in_tmp):
    """The real thing: workers of their own draw; a killed server takes them along, and the next one shows the same."""
    port = loopback.free_port(7208, "--port")
    with started(tiny_model, port) as process:
        job_id = ask("POST", port, "api/views", json={"prompt": "a red chair"}).json()["id"]
        look = lambda: ask("GET", port, "api/state", params={"id": job_id}).json()["chosen"]  # noqa: E731
        until(lambda: look()["state"] == "done", START_S)
        drawn = ask("GET", port, look()["views"]).content
        workers = psutil.Process(process.pid).children(recursive=True)
        assert len(workers) >= 2  # one that draws and one that grows
        process.kill()
        process.wait()
        psutil.wait_procs(workers, timeout=120)
        assert [worker for worker in workers if worker.is_running() and worker.status() != "zombie"] == []
    with started(tiny_model, port) as process:
        assert ask("GET", port, look()["views"]).content == drawn
        process.send_signal(signal.SIGINT)
        assert process.wait(120) == 130


@pytest.mark.slow
@pytest.mark.timeout(1800)  # a process that tunes, beside the three of the server, all of which import torch
def test_photos_are_learned_and_the_subject_drawn_and_grown(tiny_model, in_tmp):
    """By the page's addresses alone, from three photos to a mesh: two steps of tuning, in the process that
    `dreambooth` is, then views and an asset of the model that it left, which are not those of the model before."""
    port = loopback.free_port(7308, "--port")
    with started(tiny_model, port, "reference.quick_serve"):

        def post(path: str, **body) -> str:
            answer = ask("POST", port, path, timeout=30, **body)
            assert answer.status_code == 200, answer.text
            return answer.json()["id"]

        def made(job_id: str) -> dict:
            look = lambda: ask("GET", port, "api/state", params={"id": job_id}).json()["chosen"]  # noqa: E731
            found = until(lambda: (thing := look())["state"] not in ("queued", "running") and thing, 600)
            assert found["state"] == "done", found["error"]
            return found

        photos = [post("api/photos", content=png(strip(1, filled))) for filled in (0.5, 0.7, 0.9)]
        subject = post("api/subjects", json={"noun": "chair", "photos": photos})
        assert made(subject)["kind"] == "subject"
        (folder,) = Path("out/assets").iterdir()
        about = json.loads((folder / "config.json").read_text())["settings"]
        taught = Path(about["instance_data_dir"])
        assert taught.parent == Path("out/uploads/sets").absolute()
        assert sorted(path.name for path in taught.iterdir()) == ["00.png", "01.png", "02.png"]
        asked = {"prompt": "a photo of a sks chair", "seed": 1}
        views, before = post("api/views", json=asked | {"subject": subject}), post("api/views", json=asked)
        drawn = [ask("GET", port, made(job_id)["views"]).content for job_id in (views, before)]
        assert drawn[0] != drawn[1], "the subject was learned"
        asset = made(post(f"api/jobs/{views}/grow", json={"pace": "fast"}))
        assert ask("GET", port, asset["mesh"]).content[:4] == b"glTF"
        assert asset["subject"] == subject
        (grown,) = [path.parent for path in Path("out/assets").glob("*/mesh.glb")]
        assert json.loads((grown / "config.json").read_text())["model"] == str(folder.absolute() / "model")
