"""A small DevTools client for headless Chromium: opens a page, waits for what it shows, and says what was fetched."""

import base64
import contextlib
import io
import json
import shutil
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    "--headless=new", "--no-sandbox", "--use-angle=swiftshader", "--enable-unsafe-swiftshader",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run",
    "--disable-default-apps", "--disable-extensions", "--disable-dev-shm-usage", "--mute-audio",
    "--proxy-server=direct://", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
    # The sandboxed frame of a report stays in the page's process, where its requests are seen too.
    "--disable-features=IsolateSandboxedIframes,Translate,OptimizationHints,MediaRouter",
    "--window-size=1000,900", "--remote-debugging-port=0",
]  # fmt: skip


class Browser:
    """`with Browser() as browser:` one Chromium process with one page."""

    def __enter__(self) -> "Browser":
        from websockets.sync.client import connect

        self._profile = tempfile.mkdtemp(prefix="chromium-")
        line = [CHROMIUM, *FLAGS, f"--user-data-dir={self._profile}", "about:blank"]
        self._process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        port = self._port()
        pages = json.loads(urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list", timeout=30).read())
        address = next(page["webSocketDebuggerUrl"] for page in pages if page["type"] == "page")
        self._socket = connect(address, max_size=None, proxy=None)
        self._n_calls = 0
        self.requested: list[str] = []  # every address that the page asked for
        self.complaints: list[str] = []
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.call(f"{domain}.enable")
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()
        self._process.kill()
        self._process.wait()
        shutil.rmtree(self._profile, ignore_errors=True)

    def _port(self) -> str:
        file = Path(self._profile) / "DevToolsActivePort"
        for _ in range(600):
            if file.exists() and "\n" in file.read_text():
                return file.read_text().splitlines()[0]
            if self._process.poll() is not None:
                raise RuntimeError(f"{CHROMIUM} ended with {self._process.returncode}")
            time.sleep(0.1)
        raise RuntimeError(f"{CHROMIUM} did not open its debugging port in a minute")

    def call(self, method: str, **parameters) -> dict:
        """A DevTools command and its result; events that arrive before it are noted."""
        self._n_calls += 1
        self._socket.send(json.dumps({"id": self._n_calls, "method": method, "params": parameters}))
        while True:
            message = json.loads(self._socket.recv(timeout=200))
            if message.get("id") == self._n_calls:
                if "error" in message:
                    raise RuntimeError(f"{method}: {message['error']}")
                return message["result"]
            self._note(message)

    def _note(self, event: dict) -> None:
        parameters = event.get("params", {})
        if event.get("method") == "Network.requestWillBeSent":
            self.requested.append(parameters["request"]["url"])
        elif event.get("method") == "Network.webSocketCreated":
            self.requested.append(parameters["url"])
        elif event.get("method") == "Runtime.exceptionThrown":
            self.complaints.append(json.dumps(parameters["exceptionDetails"])[:500])

    def open(self, address: str, width: int = 1000, height: int = 900) -> None:
        """Small pages are drawn sooner: all of it is done by the processor."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.call("Page.navigate", url=address)

    def screenshot(self) -> np.ndarray:
        """What the page shows now: [Hp, Wp, 3] uint8."""
        data = base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])
        return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))

    def wait_for(self, holds: Callable[[np.ndarray], bool], seconds: float = 200) -> np.ndarray:
        """The first screenshot for which `holds`; raises AssertionError when none comes in time."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            with contextlib.suppress(RuntimeError):  # while a page is being exchanged there is nothing to show
                screenshot = self.screenshot()
                if holds(screenshot):
                    return screenshot
            time.sleep(0.2)
        raise AssertionError(
            f"the page never showed it; complaints: {self.complaints}, requested: {self.requested[:9]}"
        )
