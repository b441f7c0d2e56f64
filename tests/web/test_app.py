"""The page's addresses over a real queue: what a person may ask, what is refused and how, and what is found again."""

import errno
import io
import json
import re
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import Image
from reference.painter import Painter, png, strip
from starlette.testclient import TestClient

from mvdream_fast.core.errors import ArgumentError, OutputError
from mvdream_fast.core.schema import checked
from mvdream_fast.distill.request import run_of
from mvdream_fast.jobs.job import Job
from mvdream_fast.tuning.photos import list_photos
from mvdream_fast.web import board as boards
from mvdream_fast.web.app import make_app
from mvdream_fast.web.board import Board
from mvdream_fast.web.uploads import SIZE, Uploads


@pytest.fixture
def painter(tmp_path):
    return Painter(tmp_path / "out")


@pytest.fixture
def client(painter):
    return started(painter)


def started(painter) -> TestClient:
    """A server on the painter's folder, which looks anew for every question."""
    return TestClient(make_app(Board(painter.root)), base_url="http://127.0.0.1:7008")


@pytest.fixture(autouse=True)
def always_fresh(monkeypatch):
    monkeypatch.setattr(boards, "FRESH_S", -1.0)


def post(client, path, status=200, **asked):
    answer = client.post(path, json=asked)
    assert answer.status_code == status, answer.text
    return answer.json()["id" if status == 200 else "error"]


def chosen(client, job_id):
    return client.get("/api/state", params={"id": job_id}).json()["chosen"]


def colors(client, url):
    answer = client.get("/" + url)
    assert answer.status_code == 200
    return np.asarray(Image.open(io.BytesIO(answer.content)).convert("RGB"))


def test_from_a_prompt_to_a_mesh(client, painter):
    views = post(client, "/api/views", prompt=" a red chair ", seed=3)
    assert chosen(client, views) | {"when": 0} == chosen(client, views) | {
        "when": 0, "title": "a red chair", "kind": "views", "state": "queued", "seed": 3, "can": ["cancel"],
        "views": None, "files": [], "about": ["seed 3", "the built-in model"],
    }  # fmt: skip
    assert painter.take().request == {
        "prompt": "a red chair", "seed": 3, "model": "embedded", "negative_prompt": "", "n_steps": 25
    }  # fmt: skip
    painter.views()
    assert (colors(client, chosen(client, views)["views"]) == np.asarray(strip())).all()
    painter.finish()
    assert chosen(client, views)["can"] == ["grow", "another"]

    asset = post(client, f"/api/jobs/{views}/grow", pace="fast")
    request = painter.take().request
    assert (request["prompt"], request["seed"]) == ("a red chair", 3)
    assert (request["sds"]["recipe"], request["sds"]["preset"]) == ("mvdream-solid", "fast")
    painter.grow(10, 40)
    growing = chosen(client, asset)
    assert (growing["done"], growing["total"], growing["state"]) == (10, 40, "running")
    assert growing["left_s"] >= 0
    assert [preview["step"] for preview in growing["previews"]] == [10]
    assert (colors(client, growing["previews"][0]["url"]) == np.asarray(strip(3, 0.25))).all()
    assert growing["views"].startswith(f"files/{views}/views.png")  # those that were drawn before

    painter.finish()
    made = chosen(client, asset)
    mesh = client.get("/" + made["mesh"])
    assert mesh.content[:4] == b"glTF"
    assert mesh.headers["content-disposition"] == 'attachment; filename="a-red-chair-mesh.glb"'
    labels = {file["label"]: file["bytes"] for file in made["files"]}
    assert labels["3D mesh, GLB"] == len(mesh.content)
    # The views are part of the asset now: one thing on the shelf, by either id.
    assert [thing["id"] for thing in client.get("/api/state").json()["shelf"]] == [asset]
    assert chosen(client, views) == made


def test_views_that_another_program_asked_for_are_grown(client, painter):
    job = Job("generate", {"prompt": "a red cup"})  # the worker's defaults are all the rest
    painter.queue.add(job)
    painter.take()
    painter.views()
    painter.finish()
    post(client, f"/api/jobs/{job.id}/grow")
    request = painter.take().request
    assert (request["prompt"], request["seed"], request["sds"]["preset"]) == ("a red cup", 0, "mini")


def test_the_workers_know_what_the_page_asks_for(client, painter):
    from mvdream_fast.dreambooth import Flags, check_flags
    from mvdream_fast.jobs.making import ViewsRequest

    views = post(client, "/api/views", prompt="a red chair", negative_prompt="legs")
    checked(ViewsRequest, painter.take().request, "", ArgumentError)
    painter.finish()
    post(client, f"/api/jobs/{views}/grow")
    wanted = run_of(painter.take().request, "the job")
    assert (wanted.prompt, wanted.config.preset, wanted.config.negative_prompt) == ("a red chair", "mini", "legs")
    post(client, "/api/subjects", noun="chair", photos=[upload(client, photo())["id"]])
    flags = painter.take().request
    flags = flags | {"instance_prompt": flags["prompt"], "instance_data_dir": Path(flags["instance_data_dir"])}
    check_flags(Flags(**{name: value for name, value in flags.items() if name != "prompt"}))
    assert len(list_photos(flags["instance_data_dir"])) == 1


def test_a_report_is_saved_and_never_shown(client, painter):
    views = post(client, "/api/views", prompt="a cat")
    painter.take()
    painter.finish()
    asset = post(client, f"/api/jobs/{views}/grow")
    painter.take()
    painter.finish()
    answer = client.get(f"/files/{asset}/report.html")
    assert answer.headers["content-disposition"].startswith("attachment")
    assert "script-src 'self'" in answer.headers["content-security-policy"]


def test_what_was_asked_before_is_not_made_again(client, painter):
    first = post(client, "/api/views", prompt="a cat")
    assert post(client, "/api/views", prompt="a cat ") == first
    assert len(painter.queue.jobs()) == 1
    assert post(client, "/api/views", prompt="a cat", seed=1) != first


def test_a_server_that_starts_again_shows_the_same(client, painter):
    done = post(client, "/api/views", prompt="a cat")
    painter.take()
    painter.views()
    painter.finish()
    post(client, "/api/views", prompt="a dog")
    before = client.get("/api/state", params={"id": done}).json()
    assert started(painter).get("/api/state", params={"id": done}).json() == before
    assert (before["waiting"], before["running"]) == (1, 0)


def test_jobs_are_cancelled_and_tried_again(client, painter):
    waits = post(client, "/api/views", prompt="a cat")
    post(client, f"/api/jobs/{waits}/cancel")
    assert chosen(client, waits)["state"] == "cancelled"
    assert painter.queue.claim("painter") is None
    post(client, f"/api/jobs/{waits}/retry")
    assert painter.take().id == waits
    painter.lease.fail("there was no memory left", 4)
    failed = chosen(client, waits)
    assert (failed["state"], failed["error"], failed["can"]) == ("failed", "there was no memory left", ["retry"])
    assert post(client, "/api/views", prompt="a cat") == waits  # to ask again is to try again
    assert chosen(client, waits)["state"] == "queued"


def test_who_waits_knows_how_many_are_before(client, painter):
    ids = [post(client, "/api/views", prompt=f"{i} cats") for i in range(3)]
    painter.take()
    state = client.get("/api/state").json()
    assert [(thing["id"], thing["state"], thing["ahead"]) for thing in state["queue"]] == [
        (ids[0], "running", 0), (ids[1], "queued", 0), (ids[2], "queued", 1),
    ]  # fmt: skip


def test_old_things_are_found_by_their_words(client, painter):
    for i in range(6):
        post(client, "/api/views", prompt=f"{'Red' if i % 2 else 'blue'} chair {i}")
        painter.take()
        painter.finish()
    ask = lambda **query: client.get("/api/state", params=query).json()  # noqa: E731
    titles = lambda state: [thing["title"] for thing in state["shelf"]]  # noqa: E731
    assert titles(ask(find="chair RED")) == ["Red chair 5", "Red chair 3", "Red chair 1"]
    assert (titles(ask(limit=2)), ask(limit=2)["more"]) == (["Red chair 5", "blue chair 4"], True)
    assert ask(limit=6)["more"] is False


def test_an_unchanged_state_is_not_sent_again(client):
    tag = client.get("/api/state").headers["etag"]
    assert client.get("/api/state", headers={"if-none-match": tag}).status_code == 304
    post(client, "/api/views", prompt="a cat")
    assert client.get("/api/state", headers={"if-none-match": tag}).status_code == 200


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ({"prompt": ""}, "The prompt is empty"),
        ({"prompt": "x" * 9000}, "The prompt must be at most 8192 bytes long, got 9000"),
        ({"prompt": "a\0cat"}, r"The prompt holds the control character U\+0000 at place 2"),
        ({"prompt": "a cat", "negative_prompt": "\x07"}, "control character U.0007"),
        ({"prompt": ["a cat"]}, "Prompt must be a .*string"),
        ({"prompt": "a cat", "seed": -1}, "Seed must be at least 0"),
        ({"prompt": "a cat", "seed": "3"}, "Seed must be an integer"),
        ({"prompt": "a cat", "model": "/etc/passwd"}, r"Unknown key\(s\) model"),
        ({"prompt": "a cat", "subject": "../../etc"}, "There is no such thing here"),
        ({}, "Prompt is missing"),
    ],
)
def test_what_cannot_be_drawn_is_one_sentence(client, painter, asked, sentence):
    answer = client.post("/api/views", json=asked)
    assert answer.status_code in (400, 404)
    assert set(answer.json()) == {"error"}
    assert re.search(sentence, answer.json()["error"])
    assert painter.queue.jobs() == []


def test_the_queue_has_an_end(client, monkeypatch):
    monkeypatch.setattr(boards, "MAX_WAITING", 2)
    post(client, "/api/views", prompt="a cat")
    post(client, "/api/views", prompt="a dog")
    assert post(client, "/api/views", 429, prompt="a cow").startswith("2 things wait already")
    post(client, "/api/views", prompt="a dog")  # which waits already


def photo(color=(200, 30, 40), size=(700, 500), kind="JPEG", **options) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, color).save(out, kind, **options)
    return out.getvalue()


def upload(client, data, status=200):
    answer = client.post("/api/photos", content=data)
    assert answer.status_code == status, answer.text
    return answer.json()


def test_a_subject_is_learned_and_drawn(client, painter):
    ids = [upload(client, photo((i, 30, 40)))["id"] for i in range(3)]
    assert (
        post(client, "/api/subjects", 400, noun="chair", photos=[])
        == "1 to 50 photos can be learned, got 0; choose others"
    )
    subject = post(client, "/api/subjects", noun="Wooden  Chair", photos=[*ids, ids[0]])
    job = painter.take()
    assert job.request["prompt"] == "a photo of a sks wooden chair"
    folder = painter.root / "uploads" / "sets"
    assert job.request["instance_data_dir"].startswith(str(folder))
    photos = sorted(path.name for path in folder.glob("*/*"))
    assert photos == ["00.png", "01.png", "02.png"]
    # Not before it is learned.
    assert "not learned yet" in post(client, "/api/views", 400, prompt="a photo of a sks chair", subject=subject)
    painter.learn()
    painter.finish()
    learned = chosen(client, subject)
    assert (learned["kind"], learned["can"]) == ("subject", ["use"])
    assert colors(client, learned["thumb"]).shape == colors(client, learned["views"]).shape == (64, 256, 3)
    assert client.get("/api/state").json()["subjects"] == [{"id": subject, "title": "a photo of a sks wooden chair"}]
    views = post(client, "/api/views", prompt="a photo of a sks chair", subject=subject)
    assert painter.take().request["model"] == str(painter.root / "assets" / job.name / "model")
    drawn = chosen(client, views)
    assert drawn["subject"] == subject
    assert drawn["about"] == ["seed 0", "the model of “a photo of a sks wooden chair”"]


def test_a_photo_is_written_anew(client, painter):
    exif = Image.Exif()
    exif[0x010E] = "where I live"
    data = photo(size=(600, 300), exif=exif) + b"<script>a tail</script>"
    named = upload(client, data)
    kept = client.get("/" + named["url"]).content
    assert Image.open(io.BytesIO(kept)).size == (SIZE, SIZE)
    assert b"where I live" not in kept
    assert b"script" not in kept
    assert upload(client, data)["id"] == named["id"]
    assert [path.name for path in (painter.root / "uploads" / "photos").iterdir()] == [f"{named['id']}.png"]


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"", "This file cannot be read as PNG, JPEG, WebP or HEIC"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "This file cannot be read as PNG, JPEG, WebP or HEIC"),
        (photo()[:200], "This file cannot be read as PNG, JPEG, WebP or HEIC"),
        (photo(kind="GIF"), "This file cannot be read as PNG, JPEG, WebP or HEIC"),
    ],
)
def test_what_is_no_photo_is_not_kept(client, painter, data, sentence):
    assert upload(client, data, 400)["error"].startswith(sentence)
    assert str(painter.root) not in upload(client, data, 400)["error"]
    assert list((painter.root / "uploads" / "photos").iterdir()) == []


def test_a_photo_of_too_many_pixels_is_not_decoded(client):
    out = io.BytesIO()
    Image.new("1", (30000, 3000)).save(out, "PNG")
    assert upload(client, out.getvalue(), 400)["error"] == (
        "This file must have at most 64 million pixels, got 30000 x 3000; make it smaller"
    )


def test_photos_that_nobody_learned_go_in_the_end(client, painter, monkeypatch):
    monkeypatch.setattr("mvdream_fast.web.uploads.MAX_KEPT", 2)
    names = [upload(client, photo((i, 0, 0)))["id"] for i in range(4)]
    assert client.get(f"/photos/{names[0]}.png").status_code == 404
    assert len(list((painter.root / "uploads" / "photos").iterdir())) == 2
    assert "not there any more" in post(client, "/api/subjects", 400, noun="cup", photos=names)


@pytest.mark.parametrize(
    "path",
    [
        "/files/{id}/config.json", "/files/{id}/../queue.json", "/files/{id}/..%2f..%2fqueue.json",
        "/files/../queue.json",
        "/files/{id}/preview/..%2fviews.png", "/files/{id}/ckpt/1.png", "/files/{id}/preview/-1.png",
        "/files/{id}/preview/99999999999999999999.png", "/files/0000000000000000/views.png", "/files/%2e%2e/views.png",
        "/photos/..%2f..%2fqueue.png", "/photos/{id}.png", "/page/index.html", "/board.py", "/docs", "/openapi.json",
    ],
)  # fmt: skip
def test_no_address_is_a_path(client, painter, path):
    job_id = post(client, "/api/views", prompt="a cat")
    painter.take()
    painter.views()
    (painter.folder / "config.json").write_text("{}")
    answer = client.get(path.format(id=job_id))
    assert answer.status_code in (400, 404), answer.text
    assert set(answer.json()) == {"error"}


def test_every_file_of_the_page_is_its_own(client):
    """No address of another host in any of them, and none that is not served."""
    page = client.get("/").text
    for name in ("page.js", "base.js", "style.css", "turner.js", "icon.svg"):
        answer = client.get(f"/{name}")
        assert answer.status_code == 200
        page += answer.text
    hosts = {urlsplit(word).netloc for word in page.replace('"', " ").replace("'", " ").split() if "://" in word}
    assert hosts <= {"www.w3.org"}  # the name of SVG's language, which nobody fetches


def test_a_broken_body_is_one_sentence(client):
    for content in (b"{", b"[]", b"\xff", json.dumps("x").encode()):
        answer = client.post("/api/views", content=content, headers={"content-type": "application/json"})
        assert (answer.status_code, list(answer.json())) == (400, ["error"])


def test_a_fault_of_ours_says_nothing_of_the_inside(painter, monkeypatch):
    def broken(*_):
        raise RuntimeError(f"secret {painter.root}")

    monkeypatch.setattr(Board, "state", broken)
    client = started(painter)
    quiet = TestClient(client.app, base_url="http://127.0.0.1:7008", raise_server_exceptions=False)
    answer = quiet.get("/api/state")
    assert (answer.status_code, answer.json()) == (500, {"error": "The server has a fault; its terminal says which"})


def test_strip_is_what_it_says():
    """The painter's images, by hand: red in the middle of every view, grey around."""
    image = np.asarray(Image.open(io.BytesIO(png(strip(3, 0.5)))))
    assert image.shape == (192, 256, 3)
    assert [tuple(image[32, x]) for x in (32, 96, 0, 63)] == [(214, 40, 30), (214, 40, 30), (128,) * 3, (128,) * 3]


def test_photos_that_cannot_be_kept_are_one_sentence(tmp_path, monkeypatch):
    image = png(strip(3, 0.5))
    (tmp_path / "photos").touch()
    with pytest.raises(OutputError, match="the folder .*photos cannot be made: a file is in the way"):
        Uploads(tmp_path).add(image)
    (tmp_path / "photos").unlink()

    def full(path, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    name = Uploads(tmp_path).add(image)
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OutputError, match="the photo cannot be kept as .*: No space left on device; make room"):
        Uploads(tmp_path).add(image)
    (tmp_path / "sets").touch()
    with pytest.raises(OutputError, match="the folder .* cannot be made: a file is in the way"):
        Uploads(tmp_path).collect([name])
