"""The report in a real browser without network: no error, no request, the legend works, dark, phone and print."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nkat_ray.files import TRIALS_FILE
from nkat_ray.record import tables
from nkat_ray.record.run_folder import load_run
from nkat_ray.report.comparison import compare_page
from nkat_ray.report.html import write_report

pytestmark = pytest.mark.browser


def quiet(browser: Any, path: Path) -> bool:
    """No console error or warning, and no request but for the file itself."""
    return browser.errors == [] and browser.warnings == [] and set(browser.requests) == {path.as_uri()}


@pytest.mark.parametrize(
    "options",
    [{}, {"gate": 1.0}, {"running": True}, {"emnist": None}, {"repeat": 6}],
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
    shown = "document.querySelectorAll('#chart-curves .scatterlayer .trace').length"
    before = browser.eval(shown)
    browser.eval("document.querySelector('#chart-curves').scrollIntoView()")
    entry = browser.eval(
        "(() => { const item = [...document.querySelectorAll('#chart-curves .legend .traces')]"
        ".find(item => item.textContent === 'asha'); const box = item.getBoundingClientRect();"
        "return [box.x + box.width / 2, box.y + box.height / 2]; })()"
    )
    browser.click(*entry)
    browser.settle()
    assert browser.eval(shown) == before - 2


def test_dark_and_light_follow_the_reader(shown_run: Path, browser: Any, screenshots: Path, tmp_path: Path) -> None:
    path = write_report(shown_run, tmp_path / "report.html")
    browser.open(path, width=1000, height=1400, dark=True)
    ink = "getComputedStyle(document.querySelector('#chart-curves .xtick text')).fill"
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
    rows = tables.read_rows(run.folder / TRIALS_FILE)
    for row in rows:
        row |= {"error": hostile, "node": hostile, "config/conv_stem": hostile, "stop_detail": hostile}
    tables.write_rows(run.folder / TRIALS_FILE, rows)
    path = write_report(run.folder)
    browser.open(path)
    assert quiet(browser, path)
    assert browser.eval("document.querySelectorAll('img, main b').length") == 0
    lanes = "[...document.querySelectorAll('#chart-timeline .ytick text')].map(label => label.textContent)"
    assert any(label.startswith(hostile) for label in browser.eval(lanes))


@pytest.mark.parametrize("width", [360, 390, 1200])
def test_no_page_is_wider_than_the_window(make_run: Callable[..., Any], browser: Any, width: int) -> None:
    path = write_report(make_run().folder)
    browser.open(path, width=width, height=800)
    assert browser.eval("document.documentElement.scrollWidth") <= width
    assert browser.eval("document.querySelector('table').scrollWidth") <= width  # the scores need no scrolling
    assert quiet(browser, path)


def test_print_fits_the_paper(make_run: Callable[..., Any], browser: Any, tmp_path: Path) -> None:
    browser.open(write_report(make_run().folder), dark=True)
    browser.eval("window.dispatchEvent(new Event('beforeprint'))")
    widths = browser.eval("[...document.querySelectorAll('.chart .main-svg')].map(svg => svg.clientWidth)")
    assert max(widths) <= 700
    assert browser.eval("getComputedStyle(document.querySelector('#chart-curves .xtick text')).fill") == "rgb(0, 0, 0)"
    browser.eval("window.dispatchEvent(new Event('afterprint'))")
    browser.pdf(tmp_path / "print.pdf")
    assert (tmp_path / "print.pdf").read_bytes().startswith(b"%PDF")


def test_several_runs_open_without_error_or_request(make_run: Callable[..., Any], browser: Any, tmp_path: Path) -> None:
    runs = [make_run("one").folder, make_run("two", gate=1.0).folder, make_run("three", running=True).folder]
    path = compare_page([load_run(run) for run in runs]).save(tmp_path / "compare.html")
    browser.open(path, width=1000)
    assert quiet(browser, path)
    verdicts = (
        "[...document.querySelectorAll('#runs tbody td:nth-child(2)')].map(td => td.getBoundingClientRect().right)"
    )
    assert max(browser.eval(verdicts)) <= 1000


def test_the_trials_table_is_low_and_says_why_without_scrolling(make_run: Callable[..., Any], browser: Any) -> None:
    run = make_run()
    rows = tables.read_rows(run.folder / TRIALS_FILE)[:6]
    long = "epoch 2: Local TPE 0.2904 is below the third of the scores that other trials had at this epoch"
    tables.write_rows(run.folder / TRIALS_FILE, [{**row, "stop_detail": long} for row in rows])
    browser.open(write_report(run.folder), width=1200, height=900)
    assert browser.eval("document.getElementById('trial-table').clientHeight") < 300
    assert browser.eval("document.querySelector('td.why').getBoundingClientRect().right") < 1200
    assert browser.eval("document.querySelector('td.why').textContent") == long


def column(browser: Any, number: int, table: str = "trial-table") -> list[str]:
    """What a column shows, row by row; hidden rows are left out."""
    rows = f"[...document.getElementById('{table}').tBodies[0].rows].filter(row => !row.hidden)"
    return list(browser.eval(f"{rows}.map(row => row.cells[{number}].textContent.trim())"))


def test_the_trials_table_sorts_and_filters(make_run: Callable[..., Any], browser: Any) -> None:
    browser.open(write_report(make_run().folder))
    headings = browser.eval("[...document.querySelectorAll('#trial-table th')].map(cell => cell.textContent.trim())")
    (place,) = [number for number, text in enumerate(headings) if text == "accuracy"]
    accuracy = f"document.querySelectorAll('#trial-table th')[{place}].click()"
    browser.eval(accuracy)
    shown = [float(text) for text in column(browser, place) if text != "-"]
    assert shown == sorted(shown)
    browser.eval(accuracy)
    assert [float(text) for text in column(browser, place) if text != "-"] == shown[::-1]
    assert column(browser, place)[-1] == "-"  # a trial without a score comes last either way
    browser.eval("document.querySelectorAll('#trial-table th')[0].click()")
    assert column(browser, 0) == [str(n) for n in range(8)]
    browser.eval(
        "(() => { const input = document.querySelector('input[data-filter]'); input.value = 'ASHA off';"
        "input.dispatchEvent(new Event('input')); })()"
    )
    assert column(browser, 0) == []
    browser.eval(
        "(() => { const input = document.querySelector('input[data-filter]'); input.value = 'ASHA passed';"
        "input.dispatchEvent(new Event('input')); })()"
    )
    assert column(browser, 0) == ["7"]


def test_tables_are_given_as_csv_and_commands_are_copied(make_run: Callable[..., Any], browser: Any) -> None:
    run = make_run()
    browser.open(write_report(run.folder))
    browser.eval("URL.createObjectURL = blob => { window.blob = blob; return '#'; }")
    browser.eval("document.querySelector('button[data-csv=trial-table]').click()")
    lines = browser.eval("window.blob.text()").splitlines()
    assert lines[0].startswith("trial,end,why,limit,epochs,accuracy,Local TPE,lambda,patch_size,")
    assert len(lines) == 1 + len(run.trials)
    assert lines[7].startswith("6,error,RuntimeError: CUDA out of memory <b>[/red],,0,-,-,")
    browser.eval("navigator.clipboard.writeText = async text => { window.copied = text; }")
    browser.eval("document.querySelectorAll('button[data-copy-text]')[4].click()")
    assert browser.eval("window.copied").startswith("nkat train --conv_stem off --patch_size 4 --embed_dim 512")


def test_terms_explain_themselves(make_run: Callable[..., Any], browser: Any) -> None:
    path = write_report(make_run().folder)
    browser.open(path, width=390, height=844)
    for word in ("Consistency", "lambda", "gate", "Local TPE"):
        browser.eval(f"[...document.querySelectorAll('.term')].find(t => t.textContent === '{word}').click()")
        assert len(browser.eval("document.getElementById('tip').textContent")) > 40
        assert browser.eval("document.documentElement.scrollWidth") <= 390
    assert quiet(browser, path)


def test_charts_can_be_enlarged_and_saved(make_run: Callable[..., Any], browser: Any) -> None:
    browser.open(write_report(make_run().folder))
    titles = "[...document.querySelectorAll('#chart-curves .modebar-btn')].map(button => button.dataset.title)"
    assert browser.eval(titles) == ["Zoom", "Pan", "Reset axes", "Download plot as a PNG"]
    over = (
        "(() => { const box = selector => document.querySelector('#chart-curves ' + selector).getBoundingClientRect();"
        "return box('.modebar').bottom <= box('.legend').top; })()"
    )
    assert browser.eval(over)  # the buttons cover no legend
