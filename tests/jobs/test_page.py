"""What is shown of a queue: its line, the live page, the page of all assets and its search in a real browser."""

from html.parser import HTMLParser

import pytest
from reference.browser import CHROMIUM, Browser

from mvdream_fast.jobs.job import Job, Progress, State, Status
from mvdream_fast.jobs.page import MOST, line, live_page, summary_page, write_pages
from mvdream_fast.jobs.store import open_store

EVIL = '<img src=x onerror=alert(1)> & "quotes"'


def job(prompt: str, kind: str = "sds", **more) -> Job:
    return Job(kind, {"prompt": prompt, **more})


ROWS = [
    (job("a red car", seed=7), Status(State.DONE, seconds=61.2, result={"folder": "assets/a-red-car-1"})),
    (job("a red chair", "generate"), Status(State.DONE, result={"folder": "assets/a-red-chair-2"})),
    (job("a blue car"), Status(State.FAILED, message="density is empty", exit_code=6)),
    (job(EVIL), Status(State.RUNNING, Progress(30, 120, "growing"), "w-3", 12.0, attempt=2)),
    (job("a green car"), Status(State.RUNNING, Progress(90, 120), "w-4", 80.0, attempt=1)),
    (job("a table"), Status()),
    (job("a lamp"), Status(State.CANCELLED)),
]


def test_the_line():
    assert line(ROWS) == "2 of 7 done, 2 running (50 %), 1 failed, 1 cancelled"
    # One of the two was made in these 100 s, with a quarter and three quarters of two others: 50 s each. Left are the
    # other halves and one that waits.
    assert line(ROWS, 100.0, 1) == "2 of 7 done, 2 running (50 %), 1 failed, 1 cancelled, 1.7 min left"
    assert line([(job("x"), Status())]) == "0 of 1 done"


class Tags(HTMLParser):
    """The tags of a page in order, with their attributes."""

    def __init__(self, text: str):
        super().__init__()
        self.found: list[tuple[str, dict]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.found.append((tag, dict(attrs)))

    def of(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.found if name == tag]


def test_the_live_page_shows_what_is_at_work_and_what_failed():
    page = live_page(ROWS, "told")
    tags = Tags(page)
    assert [meta for meta in tags.of("meta") if meta.get("http-equiv") == "refresh"] == [
        {"http-equiv": "refresh", "content": "2"}
    ]
    assert tags.of("progress") == [{"max": "7", "value": "4"}]
    assert "<td>30 of 120</td><td>growing</td><td>w-3</td><td>12 s</td><td>2</td>" in page
    assert "<td>a blue car</td><td>density is empty</td><td>6</td>" in page
    assert tags.of("img") == [], "a prompt is no markup"
    assert not [meta for meta in Tags(live_page(ROWS, "told", live=False)).of("meta") if "http-equiv" in meta]
    many = live_page([(job(f"p{i}"), Status()) for i in range(MOST + 3)], "told")
    assert many.count("<tr>") == MOST + 1
    assert "and 3 more" in many


def test_the_summary_shows_every_asset_and_every_failure():
    tags = Tags(summary_page(ROWS, "told"))
    assert [(image["src"], image["alt"]) for image in tags.of("img")] == [
        ("assets/a-red-car-1/turntable.webp", "a red car, turning"),
        ("assets/a-red-chair-2/views.png", "a red chair, four views"),
    ]
    assert [a["href"] for a in tags.of("a")] == [
        "progress.html", "assets/a-red-car-1/report.html", "assets/a-red-car-1/mesh.glb",
    ]  # fmt: skip
    assert len(tags.of("figure")) == 3
    assert not [x for _, x in tags.found if any(str(v).startswith(("http:", "https:", "//")) for v in x.values())]


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_the_search_in_a_browser(tmp_path):
    write_pages(open_store(tmp_path), ROWS, "told")
    with Browser() as browser:
        browser.open((tmp_path / "index.html").as_uri())
        browser.wait_for(lambda shot: (shot[..., 0] == 0xDD).any())

        def shown(words: str) -> str:
            script = (
                f"search.value = {words!r}; search.dispatchEvent(new Event('input'));"
                "seen = figures.filter((f) => f.checkVisibility()).map((f) => f.dataset.words.slice(0, 10));"
                "[found.textContent, ...seen].join()"
            )
            return browser.call("Runtime.evaluate", expression=script)["result"]["value"]

        assert shown("") == "3 of 3,a red car ,a red chai,a blue car"
        assert shown("CAR re") == "1 of 3,a red car "
        assert shown("failed") == "1 of 3,a blue car"
        assert shown("elephant") == "0 of 3"
        assert {url.partition(":")[0] for url in browser.requested} <= {"file", "data"}
