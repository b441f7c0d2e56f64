"""The page in a real browser, over a real server and queue, with a painter in place of the workers."""

import contextlib
import functools
import socket
import threading
import time
from urllib.parse import urlsplit

import httpx2
import numpy as np
import pytest
import uvicorn
from PIL import Image
from reference import until as waiting
from reference.browser import CHROMIUM, Browser
from reference.painter import Painter

from mvdream_fast.web.app import make_app
from mvdream_fast.web.board import Board

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine (Debian: chromium)")
NAMED = {"button", "link", "textbox", "searchbox", "spinbutton", "combobox", "slider", "progressbar", "image"}
until = functools.partial(waiting.until, seconds=90.0)


@contextlib.contextmanager
def serving(root, port, token=None):
    """A server in this process, on the folder of a queue."""
    app = make_app(Board(root), token)
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="error", lifespan="off"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until(lambda: server.started)
    try:
        yield
    finally:
        server.should_exit = server.force_exit = True
        thread.join()


def a_port():
    """One that is free."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Page:
    """The browser on the page, and a painter behind it."""

    def __init__(self, browser, root, port):
        self.browser, self.painter, self.url = browser, Painter(root), f"http://127.0.0.1:{port}/"
        self.port = port

    def open(self, width=1000, height=900, job_id=""):
        self.browser.open("about:blank")
        self.browser.open(f"{self.url}#{job_id}", width, height)
        self.until("document.querySelector('#place').textContent")

    def js(self, expression):
        answer = self.browser.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def until(self, expression):
        """Until it is true on the page, which may be in the middle of a reload."""

        def holds():
            with contextlib.suppress(AssertionError, RuntimeError):
                return self.js(expression)

        return until(holds)

    def type(self, text):
        self.browser.call("Input.insertText", text=text)

    def press(self, key, **more):
        text = {"Enter": "\r"}.get(key)
        for kind in ("keyDown", "keyUp"):
            code = {"Enter": 13, "Tab": 9}.get(key, 0)
            extra = {"text": text} if text and kind == "keyDown" else {}
            self.browser.call(
                "Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, **extra, **more
            )

    def click(self, selector):
        self.until(f"{shown(selector)} && !document.querySelector({selector!r}).ariaDisabled")
        self.js(f"document.querySelector({selector!r}).click()")

    def ask(self, prompt):
        self.js("document.querySelector('#prompt').focus()")
        self.js("document.querySelector('#prompt').value = ''")
        self.type(prompt)
        self.press("Enter")
        self.until("!document.querySelector('#stage').hidden && document.querySelector('#stage-title').textContent == "
                   f"{prompt!r}")  # fmt: skip
        return self.js("location.hash.slice(1)")

    def text(self, selector):
        return self.js(f"document.querySelector({selector!r}).textContent")

    def drawn(self, prompt="a red box"):
        """Four views of a prompt, done."""
        job_id = self.ask(prompt)
        self.painter.take()
        self.painter.views()
        self.painter.finish()
        return job_id

    def grown(self, prompt="a red box"):
        self.drawn(prompt)
        self.click("#grow")
        self.until(f"{shown('#cancel')}")
        until(lambda: len(self.painter.queue.jobs()) == 2)
        self.painter.take()
        self.painter.views()
        self.painter.grow(300, 600)


def shown(selector):
    return f"document.querySelector({selector!r})?.checkVisibility()"


def loaded(selector):
    return f"{shown(selector)} && document.querySelector({selector!r}).naturalWidth > 0"


@pytest.fixture(scope="module")
def browser():
    with Browser() as browser:
        browser.call("Accessibility.enable")
        yield browser


@pytest.fixture
def page(browser, tmp_path):
    port = a_port()
    browser.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-reduced-motion", "value": "reduce"}])
    browser.requested.clear()
    browser.complaints.clear()
    with serving(tmp_path / "out", port):
        page = Page(browser, tmp_path / "out", port)
        page.open()
        yield page
        browser.open("about:blank")
    assert not browser.complaints
    assert {urlsplit(url).netloc for url in browser.requested} <= {"", f"127.0.0.1:{port}", "blank"}


def red(shot):
    r, g, b = shot.astype(int).transpose(2, 0, 1)
    return (r > 90) & (r > 2.5 * g) & (r > 2.5 * b)


def canvas(page):
    """What the canvas shows: [Hp, Wp, 3]."""
    page.js("document.querySelector('#canvas').scrollIntoView({block: 'start', behavior: 'instant'})")
    box = page.js("(({x, y, width, height}) => [x, y, width, height])"
                  "(document.querySelector('#canvas').getBoundingClientRect())")  # fmt: skip
    x, y, width, height = (max(0, int(side)) for side in box)
    return page.browser.screenshot()[y : y + height, x : x + width]


def test_from_a_prompt_to_an_asset_that_turns(page):
    job_id = page.ask("a red box")
    assert page.text("#stage-state") == "Waiting"
    assert page.painter.take().id == job_id
    page.until("document.querySelector('#stage-state').textContent == 'Drawing the four views'")
    page.painter.views()
    page.until(loaded("#views-image"))
    page.painter.finish()
    page.click("#grow")
    page.until("document.querySelector('#stage-about').textContent.startsWith('3D asset')")
    page.painter.take()
    page.painter.views()
    for done in (60, 120):
        page.painter.grow(done, 600)
        page.until(f"document.querySelector('#stage-pace').textContent.startsWith('step {done} of 600')")
        page.until(f"document.querySelector('#growth-at').textContent == 'step {done}'")
        assert page.js("document.querySelector('#bar').value") == done / 600
    page.until(loaded("#growth-image"))
    assert page.js("document.title").startswith("20 % · a red box")
    page.js("document.querySelector('#growth-step').value = 0")
    page.js("document.querySelector('#growth-step').dispatchEvent(new Event('input'))")
    assert page.text("#growth-at") == "step 60"  # and stays there, while the asset grows on
    page.painter.grow(600, 600)
    page.until("document.querySelector('#growth-step').max == 2")
    assert page.text("#growth-at") == "step 60"

    page.painter.finish()
    page.until(shown("#canvas"))
    until(lambda: red(canvas(page)).sum() > 5000)
    before = canvas(page)
    rows, columns = np.nonzero(red(before))
    assert np.ptp(rows) > np.ptp(columns)  # the box stands on its short side: up is up
    page.js("document.querySelector('#canvas').focus()")
    page.press("ArrowRight")
    until(lambda: (canvas(page) != before).any())
    links = page.js("[...document.querySelectorAll('#files a')].map((a) => a.getAttribute('href').split('?')[0])")
    assert [link.split("/")[-1] for link in links] == ["mesh.glb", "turntable.webp", "views.png", "report.html"]
    assert httpx2.get(page.url + links[0]).content[:4] == b"glTF"


def test_a_reload_in_the_middle_shows_where_it_is(page):
    page.grown()
    page.until(loaded("#growth-image"))
    page.js("location.reload()")
    page.until("document.querySelector('#stage-pace').textContent.startsWith('step 300 of 600')")
    page.until(loaded("#growth-image"))


def test_another_tab_sees_the_same_and_cancels(page):
    page.grown()
    job_id = page.js("location.hash.slice(1)")
    page.until("document.querySelectorAll('#jobs li').length == 1")
    assert httpx2.post(f"{page.url}api/jobs/{job_id}/cancel").status_code == 200
    page.until("document.querySelector('#stage-state').textContent == 'Cancelled'")
    page.until("document.querySelector('#queue').hidden")
    page.click("#retry")
    page.until("document.querySelector('#stage-state').textContent == 'Waiting'")
    page.click("#jobs button")  # the queue's own button
    page.until("document.querySelector('#stage-state').textContent == 'Cancelled'")


def test_who_has_the_token_gets_in(browser, tmp_path):
    token, port = "a-token-of-some-length", a_port()
    page = Page(browser, tmp_path / "out", port)
    with serving(page.painter.root, port, token):
        browser.open(page.url)
        page.until(shown("#token"))
        page.js("document.querySelector('#token').focus()")
        page.type("a-token-of-another-length")
        page.press("Enter")
        page.until(shown("[role=alert]"))
        assert page.text("[role=alert]") == "That is not the token."
        page.js("document.querySelector('#token').focus()")
        page.type(token)
        page.press("Enter")
        page.until("document.querySelector('#place').textContent")
        page.drawn()
        page.until(loaded("#views-image"))
        browser.open("about:blank")


def test_a_killed_server_loses_nothing(browser, tmp_path):
    root, port = tmp_path / "out", a_port()
    page = Page(browser, root, port)
    with serving(root, port):
        page.open()
        page.grown()
        page.until(loaded("#growth-image"))
    page.until(shown("#offline"))
    assert "nothing that was made is lost" in page.text("#offline")
    page.painter.grow(360, 600)  # the worker goes on meanwhile
    with serving(root, port):
        page.until("document.querySelector('#offline').hidden")
        page.until("document.querySelector('#stage-pace').textContent.startsWith('step 360 of 600')")
        page.painter.finish()
        page.until(shown("#canvas"))
        page.open()  # the next day
        page.until("document.querySelectorAll('#shelf li').length == 1")
        page.click("#shelf a")
        page.until(shown("#canvas"))
    browser.complaints.clear()
    browser.open("about:blank")


def test_what_people_write_is_only_text(page):
    evil = '<img src=x onerror="window.hacked=1">&amp;</p>'
    page.drawn(evil)
    page.until("document.querySelectorAll('#shelf li').length == 1")
    assert page.text("#stage-title") == evil
    assert page.text("#shelf .words") == evil
    assert page.js("document.querySelectorAll('img[src=x]').length") == 0
    assert page.js("window.hacked") is None


def test_errors_are_one_sentence_by_their_field(page):
    page.js("document.querySelector('#prompt').value = '   '")
    page.js("document.querySelector('#prompt').focus()")
    page.press("Enter")
    page.until(shown("#ask-error"))
    assert page.text("#ask-error") == 'The prompt is empty; describe an object, for example "a brown bulldog"'
    page.ask("a red box")
    assert page.js("document.querySelector('#ask-error').hidden")
    page.painter.take()
    page.painter.lease.fail("there was no memory left")
    page.until(shown("#stage-error"))
    assert page.text("#stage-error") == "there was no memory left"
    assert page.js(shown("#retry"))


def test_photos_are_shown_left_out_and_learned(page, tmp_path):
    paths = []
    for i in range(3):
        paths.append(str(tmp_path / f"{i}.jpg"))
        Image.new("RGB", (90, 60), (80 * i, 90, 90)).save(paths[-1])
    paths.append(str(tmp_path / "notes.txt"))
    (tmp_path / "notes.txt").write_text("no photo")
    node = page.browser.call("Runtime.evaluate", expression="document.querySelector('#photos')")["result"]["objectId"]
    page.browser.call("DOM.setFileInputFiles", files=paths, objectId=node)
    page.until("document.querySelectorAll('#uploads img').length == 3")
    page.until(shown("#teach-error"))
    assert page.text("#teach-error").startswith("notes.txt: This file cannot be read as PNG, JPEG")
    page.click("#uploads button")
    assert page.js("document.querySelectorAll('#uploads img').length") == 2
    page.js("document.querySelector('#noun').value = 'cup'")
    page.click("#teach button[type=submit]")
    page.until("document.querySelector('#stage-title').textContent == 'a photo of a sks cup'")
    page.painter.take()
    page.painter.learn()
    page.painter.finish()
    page.click("#use")
    assert page.js("document.querySelector('#subject').selectedOptions[0].textContent") == "a photo of a sks cup"
    page.press("Enter")
    page.until("document.querySelector('#stage-about').textContent.includes('the model of “a photo of a sks cup”')")


def test_old_things_are_found(page):
    for prompt in ("a red box", "a blue cup", "a red cup"):
        page.drawn(prompt)
    page.until("document.querySelectorAll('#shelf li').length == 3")
    page.js("document.querySelector('#find').focus()")
    page.type("cup red")
    page.until("document.querySelectorAll('#shelf li').length == 1")
    assert page.text("#shelf .words") == "a red cup"
    page.type(" nothing")
    page.until(shown("#empty"))


def names(page):
    """(role, name) of everything that a screen reader tells of."""
    nodes = page.browser.call("Accessibility.getFullAXTree")["nodes"]
    kept = [node for node in nodes if not node.get("ignored")]
    return [(node["role"]["value"], node.get("name", {}).get("value", "")) for node in kept]


def test_a_screen_reader_has_a_name_for_everything(page):
    page.grown()
    page.until(loaded("#growth-image"))
    page.js("document.querySelector('details').open = true")
    growing = names(page)
    page.painter.finish()
    page.until(shown("#canvas"))
    found = growing + names(page)
    assert {role for role, _ in found} >= NAMED
    assert [(role, name) for role, name in found if role in NAMED and not name] == []
    assert ("button", "Cancel a red box, 3D asset") in found
    assert ("progressbar", "Progress of a red box") in found
    assert ("image", "a red box, a 3D asset to turn") in found
    assert ("main", "") in found
    levels = page.js(
        "[...document.querySelectorAll('h1, h2, h3')].filter((h) => h.checkVisibility()).map((h) => h.tagName)"
    )
    assert levels[0] == "H1"
    assert "H1" not in levels[1:]
    assert page.js("document.querySelector('#status').getAttribute('aria-live')") == "polite"
    page.until("document.querySelector('#status').textContent == 'a red box, 3D asset: done'")


def test_the_keyboard_reaches_everything_and_is_seen(page):
    page.grown()
    page.painter.finish()
    page.until(shown("#canvas"))
    page.until("document.querySelectorAll('#files a').length == 4")
    wanted = page.js("[...document.querySelectorAll('a, button, input, select, summary, canvas')]"
                     ".filter((e) => e.checkVisibility()).length")  # fmt: skip
    page.js("document.querySelector('.skip').focus()")
    for _ in range(wanted - 1):  # all but the first
        page.press("Tab")
        page.js("(window.passed ||= new Set()).add(document.activeElement)")
        assert page.js("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    assert page.js("window.passed.size") == wanted - 1


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_small_screen(page, scheme):
    features = [
        {"name": "prefers-color-scheme", "value": scheme},
        {"name": "prefers-reduced-motion", "value": "reduce"},
    ]
    page.browser.call("Emulation.setEmulatedMedia", features=features)
    page.grown("a" * 300 + " red box")
    page.painter.finish()
    page.open(360, 700, page.js("location.hash.slice(1)"))
    page.until(shown("#canvas"))
    page.js("document.querySelector('details').open = true")
    assert page.js("document.documentElement.scrollWidth") <= 360
    light = page.browser.screenshot()[5, 5].mean() > 128
    assert light == (scheme == "light")
    small = page.js("[...document.querySelectorAll('button:not(.word), input:not([type=file], [type=range]), select, "
                    ".button')].filter((e) => e.checkVisibility() && e.getBoundingClientRect().height < 24)"
                    ".length")  # fmt: skip
    assert small == 0


def test_nothing_moves_for_who_asks_for_none(page):
    page.grown()
    page.painter.finish()
    page.until(shown("#canvas"))
    until(lambda: red(canvas(page)).sum() > 1000)
    first = canvas(page)
    time.sleep(0.5)
    assert (canvas(page) == first).all()
    page.click("[data-turn=spin]")
    until(lambda: (canvas(page) != first).any())
    page.click("[data-turn=spin]")
    assert page.js("document.querySelector('[data-turn=spin]').getAttribute('aria-pressed')") == "false"
