"""The report in a real browser without network: no error, no request, the legend works, dark, phone and print."""

import base64
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest

from nkat_ray.report.html import compare, write_report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium: apt-get install chromium"),
]


class Browser:
    """One page of a headless Chromium, driven over its DevTools pipe, so that no driver is needed.

    It records console errors, exceptions and every request.
    """

    def __init__(self, profile: Path) -> None:
        assert CHROMIUM is not None
        read_there, self._write = os.pipe()
        self._read, write_there = os.pipe()
        flags = "--headless=new --no-sandbox --disable-gpu --remote-debugging-pipe --no-first-run --disable-extensions"
        command = f'exec "{CHROMIUM}" {flags} --user-data-dir="{profile}" about:blank 3<&{read_there} 4>&{write_there}'
        self._process = subprocess.Popen(
            ["bash", "-c", command],
            pass_fds=(read_there, write_there),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(read_there)
        os.close(write_there)
        self._buffer = b""
        self._sent = 0
        self._session: str | None = None
        self.errors: list[str] = []
        self.requests: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.terminate()
        self._process.wait(timeout=20)
        os.close(self._read)
        os.close(self._write)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Send a command and return its result; events that come meanwhile are recorded."""
        self._sent += 1
        message = {"id": self._sent, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._sent:
                assert "error" not in answer, answer
                return dict(answer["result"])
            self._record(answer)

    def open(self, path: Path, *, width: int = 1200, height: int = 900, dark: bool = False) -> None:
        """Load a file and wait until it is drawn."""
        phone = width < 600
        size = {"width": width, "height": height, "deviceScaleFactor": 2 if phone else 1, "mobile": phone}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        self.dark(dark)
        self.call("Page.navigate", url=path.as_uri())
        for _ in range(200):
            if self.eval("document.readyState") == "complete" and self.eval("location.protocol") == "file:":
                break
            time.sleep(0.05)
        self.settle()

    def dark(self, on: bool) -> None:
        """Prefer dark, or light."""
        feature = {"name": "prefers-color-scheme", "value": "dark" if on else "light"}
        self.call("Emulation.setEmulatedMedia", features=[feature])

    def settle(self) -> None:
        """Let drawing and transitions come to rest."""
        self.eval("new Promise(done => setTimeout(() => requestAnimationFrame(done), 600))")

    def eval(self, expression: str) -> Any:
        """The value of a script expression; a promise is awaited."""
        answer = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def click(self, x: float, y: float) -> None:
        """Click at a point of the window."""
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def screenshot(self, path: Path) -> None:
        """The whole page as PNG."""
        data = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)["data"]
        path.write_bytes(base64.b64decode(data))

    def pdf(self, path: Path) -> None:
        """The page as it prints."""
        data = self.call("Page.printToPDF", printBackground=False)["data"]
        path.write_bytes(base64.b64decode(data))

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            chunk = os.read(self._read, 1 << 20)
            assert chunk, "chromium has gone"
            self._buffer += chunk
        line, self._buffer = self._buffer.split(b"\0", 1)
        return dict(json.loads(line))

    def _record(self, event: dict[str, Any]) -> None:
        params = event.get("params", {})
        match event.get("method"):
            case "Runtime.exceptionThrown":
                self.errors.append(str(params["exceptionDetails"]))
            case "Runtime.consoleAPICalled" if params["type"] in ("error", "warning"):
                self.errors.append(str(params["args"]))
            case "Log.entryAdded" if params["entry"]["level"] == "error":
                self.errors.append(params["entry"]["text"])
            case "Network.requestWillBeSent":
                self.requests.append(params["request"]["url"])


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    with Browser(tmp_path / "profile") as opened:
        yield opened


def quiet(browser: Browser, path: Path) -> bool:
    """No console error, and no request but for the file itself."""
    return browser.errors == [] and set(browser.requests) == {path.as_uri()}


@pytest.mark.parametrize(
    "options",
    [{"journal": True}, {"gate": 1.0}, {"running": True}, {"emnist": None}, {"repeat": 6, "journal": True}],
)
def test_report_opens_without_error_or_request(
    make_run: Callable[..., Any], browser: Browser, options: dict[str, Any]
) -> None:
    path = write_report(make_run(**options).folder)
    browser.open(path)
    assert quiet(browser, path)
    drawn = browser.eval("[...document.querySelectorAll('.chart')].map(chart => !!chart.querySelector('svg'))")
    assert drawn
    assert all(drawn)


def test_legend_hides_a_group_of_curves(make_run: Callable[..., Any], browser: Browser) -> None:
    browser.open(write_report(make_run().folder))
    shown = "document.querySelectorAll('#chart-1 .scatterlayer .trace').length"
    before = browser.eval(shown)
    browser.eval("document.querySelector('#chart-1').scrollIntoView()")
    entry = browser.eval(
        "(() => { const item = [...document.querySelectorAll('#chart-1 .legend .traces')]"
        ".find(item => item.textContent === 'asha'); const box = item.getBoundingClientRect();"
        "return [box.x + box.width / 2, box.y + box.height / 2]; })()"
    )
    browser.click(*entry)
    browser.settle()
    assert browser.eval(shown) == before - 2


def test_dark_and_light_follow_the_reader(make_run: Callable[..., Any], browser: Browser, tmp_path: Path) -> None:
    path = write_report(make_run().folder)
    browser.open(path, dark=True)
    ink = "getComputedStyle(document.querySelector('#chart-1 .xtick text')).fill"
    dark = browser.eval(ink), browser.eval("getComputedStyle(document.body).backgroundColor")
    browser.screenshot(tmp_path / "dark.png")
    browser.dark(False)
    browser.settle()
    light = browser.eval(ink), browser.eval("getComputedStyle(document.body).backgroundColor")
    browser.screenshot(tmp_path / "light.png")
    assert dark == ("rgb(230, 233, 237)", "rgb(20, 23, 27)")
    assert light == ("rgb(27, 31, 36)", "rgb(255, 255, 255)")
    assert quiet(browser, path)
    assert (tmp_path / "dark.png").stat().st_size > 10_000


@pytest.mark.parametrize("width", [360, 390, 1200])
def test_no_page_is_wider_than_the_window(make_run: Callable[..., Any], browser: Browser, width: int) -> None:
    path = write_report(make_run(journal=True).folder)
    browser.open(path, width=width, height=800)
    assert browser.eval("document.documentElement.scrollWidth") <= width
    assert browser.eval("document.querySelector('table').scrollWidth") <= width  # the scores need no scrolling
    assert quiet(browser, path)


def test_print_fits_the_paper(make_run: Callable[..., Any], browser: Browser, tmp_path: Path) -> None:
    browser.open(write_report(make_run().folder), dark=True)
    browser.eval("window.dispatchEvent(new Event('beforeprint'))")
    widths = browser.eval("[...document.querySelectorAll('.chart .main-svg')].map(svg => svg.clientWidth)")
    assert max(widths) <= 700
    assert browser.eval("getComputedStyle(document.querySelector('#chart-1 .xtick text')).fill") == "rgb(0, 0, 0)"
    browser.eval("window.dispatchEvent(new Event('afterprint'))")
    browser.pdf(tmp_path / "print.pdf")
    assert (tmp_path / "print.pdf").read_bytes().startswith(b"%PDF")


def test_several_runs_open_without_error_or_request(
    make_run: Callable[..., Any], browser: Browser, tmp_path: Path
) -> None:
    runs = [make_run("one").folder, make_run("two", gate=1.0).folder, make_run("three", running=True).folder]
    path = compare(*runs, out=tmp_path / "compare.html")
    browser.open(path)
    assert quiet(browser, path)
