"""The report and the live page in a real browser: the asset is on the canvas, and nothing came from a network."""

from urllib.parse import urlsplit

import numpy as np
import pytest
import torch
from reference.browser import CHROMIUM, Browser
from reference.studio import TINY, fresh_asset

from mvdream_fast.distill.config import settings_of
from mvdream_fast.distill.report import write_report
from mvdream_fast.distill.viewer import Viewer
from mvdream_fast.scene.asset import Asset
from mvdream_fast.scene.mesh.mesh import extract_mesh

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine (Debian: chromium)")

RECORDS = [
    {"step": i, "loss": 1.0 / (i + 1), "opacity": 0.2, "occupancy": 0.5, "seconds": {"vae": 0.1}} for i in range(9)
]


class Ball(Asset):
    """A red ball, as an asset."""

    def __init__(self):
        super().__init__(fresh_asset().representation, "a red ball", settings=settings_of(TINY))

    def mesh(self, *_):
        density = lambda points: 100 * torch.sigmoid(40 * (0.5 - points.norm(dim=-1)))  # noqa: E731
        red = lambda points: torch.tensor([0.9, 0.05, 0.05]).expand(len(points), 3)  # noqa: E731
        return extract_mesh(density, red, radius=1.0, threshold=50.0, resolution=24)


@pytest.fixture(scope="module")
def browser():
    with Browser() as browser:
        yield browser


def n_red(screenshot: np.ndarray) -> int:
    r, g, b = screenshot.astype(int).transpose(2, 0, 1)
    return int(((r > 90) & (r > 2.5 * g) & (r > 2.5 * b)).sum())


def outside(browser: Browser, *allowed: str) -> list[str]:
    """Requested addresses that are no part of the page itself."""
    inline = ("data", "blob", "about")
    return [url for url in browser.requested if urlsplit(url).scheme not in inline and not url.startswith(allowed)]


def test_the_report_turns_the_asset_without_a_network(browser, tmp_path):
    config = {"prompt": "a red ball", "seed": 0, "sds": {"preset": "mini"}}
    path = write_report(tmp_path, config, RECORDS, ["a note"], Ball().mesh())
    browser.requested.clear()
    browser.open(path.as_uri())
    screenshot = browser.wait_for(lambda screenshot: n_red(screenshot) > 5000)
    rows, columns = np.nonzero((screenshot.astype(int)[:, :, 0] > 90) & (screenshot[:, :, 1] < 60))
    assert 0.5 < np.ptp(rows) / np.ptp(columns) < 2  # a ball, not a bar
    assert (screenshot == 128).all(-1).sum() > 5000  # around it, the grey of the views
    assert outside(browser, path.as_uri()) == []
    assert not browser.complaints


def test_the_live_page_shows_the_growing_asset(browser):
    viewer = Viewer(title="a red ball")
    try:
        viewer.show(Ball())
        browser.requested.clear()
        browser.open(viewer.url, 480, 360)
        browser.wait_for(lambda screenshot: n_red(screenshot) > 1000)
        own = (f"http://127.0.0.1:{viewer.port}", f"ws://127.0.0.1:{viewer.port}")
        assert outside(browser, *own) == []
    finally:
        viewer.close()
        browser.open("about:blank")
