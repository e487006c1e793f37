"""The report in a real browser without network: no error, no request, the legend works, dark, phone and print."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nkat_ray.files import TRIALS_FILE
from nkat_ray.report import tables
from nkat_ray.report.comparison import compare
from nkat_ray.report.html import write_report

pytestmark = pytest.mark.browser


def quiet(browser: Any, path: Path) -> bool:
    """No console error or warning, and no request but for the file itself."""
    return browser.errors == [] and browser.warnings == [] and set(browser.requests) == {path.as_uri()}


@pytest.mark.parametrize(
    "options",
    [{"journal": True}, {"gate": 1.0}, {"running": True}, {"emnist": None}, {"repeat": 6, "journal": True}],
)
def test_report_opens_without_error_or_request(
    make_run: Callable[..., Any], browser: Any, options: dict[str, Any]
) -> None:
    path = write_report(make_run(**options).folder)
    browser.open(path)
    assert quiet(browser, path)
    drawn = browser.eval("[...document.querySelectorAll('.chart')].map(chart => !!chart.querySelector('svg'))")
    assert drawn
    assert all(drawn)


def test_legend_hides_a_group_of_curves(make_run: Callable[..., Any], browser: Any) -> None:
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


def test_dark_and_light_follow_the_reader(shown_run: Path, browser: Any, screenshots: Path, tmp_path: Path) -> None:
    path = write_report(shown_run, tmp_path / "report.html")
    browser.open(path, width=1000, height=1400, dark=True)
    ink = "getComputedStyle(document.querySelector('#chart-1 .xtick text')).fill"
    dark = browser.eval(ink), browser.eval("getComputedStyle(document.body).backgroundColor")
    browser.screenshot(screenshots / "report-dark.png", whole=False)
    browser.dark(False)
    browser.settle()
    light = browser.eval(ink), browser.eval("getComputedStyle(document.body).backgroundColor")
    browser.screenshot(screenshots / "report-light.png", whole=False)
    assert dark == ("rgb(230, 233, 237)", "rgb(20, 23, 27)")
    assert light == ("rgb(27, 31, 36)", "rgb(255, 255, 255)")
    assert quiet(browser, path)
    assert (screenshots / "report-dark.png").stat().st_size > 10_000


def test_a_phone_shows_it_all(shown_run: Path, browser: Any, screenshots: Path, tmp_path: Path) -> None:
    path = write_report(shown_run, tmp_path / "report.html")
    browser.open(path, width=390, height=844)
    assert browser.eval("document.documentElement.scrollWidth") <= 390
    browser.screenshot(screenshots / "report-phone.png", whole=False)
    assert quiet(browser, path)


def test_hostile_data_stay_text(make_run: Callable[..., Any], browser: Any) -> None:
    hostile = "</script><img src=x onerror=alert(1)><b>"
    run = make_run()
    rows = tables.read_trials(run.folder / TRIALS_FILE)
    for row in rows:
        row |= {"error": hostile, "node": hostile, "config/conv_stem": hostile, "stop_detail": hostile}
    tables.write_trials(run.folder / TRIALS_FILE, rows)
    path = write_report(run.folder)
    browser.open(path)
    assert quiet(browser, path)
    assert browser.eval("document.querySelectorAll('img, main b').length") == 0
    lane = "[...document.querySelectorAll('.chart')].pop().querySelector('.ytick text').textContent"
    assert browser.eval(lane).startswith(hostile)


@pytest.mark.parametrize("width", [360, 390, 1200])
def test_no_page_is_wider_than_the_window(make_run: Callable[..., Any], browser: Any, width: int) -> None:
    path = write_report(make_run(journal=True).folder)
    browser.open(path, width=width, height=800)
    assert browser.eval("document.documentElement.scrollWidth") <= width
    assert browser.eval("document.querySelector('table').scrollWidth") <= width  # the scores need no scrolling
    assert quiet(browser, path)


def test_print_fits_the_paper(make_run: Callable[..., Any], browser: Any, tmp_path: Path) -> None:
    browser.open(write_report(make_run().folder), dark=True)
    browser.eval("window.dispatchEvent(new Event('beforeprint'))")
    widths = browser.eval("[...document.querySelectorAll('.chart .main-svg')].map(svg => svg.clientWidth)")
    assert max(widths) <= 700
    assert browser.eval("getComputedStyle(document.querySelector('#chart-1 .xtick text')).fill") == "rgb(0, 0, 0)"
    browser.eval("window.dispatchEvent(new Event('afterprint'))")
    browser.pdf(tmp_path / "print.pdf")
    assert (tmp_path / "print.pdf").read_bytes().startswith(b"%PDF")


def test_several_runs_open_without_error_or_request(make_run: Callable[..., Any], browser: Any, tmp_path: Path) -> None:
    runs = [make_run("one").folder, make_run("two", gate=1.0).folder, make_run("three", running=True).folder]
    path = compare(*runs, out=tmp_path / "compare.html")
    browser.open(path)
    assert quiet(browser, path)
