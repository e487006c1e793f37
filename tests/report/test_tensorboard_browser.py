"""A real TensorBoard over a run's event files, in a real browser."""

import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from nkat_ray.files import TENSORBOARD_FOLDER, TRIALS_FILE
from nkat_ray.record import tables
from nkat_ray.report.tensorboard import TensorBoardLog

pytestmark = pytest.mark.browser
STARTS_S = 120.0
DEEP = """(() => { const found = []; const walk = node => { if (node.shadowRoot) walk(node.shadowRoot);
  for (const child of node.children) { found.push(child); walk(child); } }; walk(document); return found; })()"""


LESS = ["conv_stem", "epochs", "train_s", "lambda_theory", "patch_size", "best_val_accuracy"]  # for the picture


@contextmanager
def tensorboard(logdir: Path) -> Iterator[str]:
    """TensorBoard on localhost, at a free port; its address."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", logdir, "--host", "localhost", "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://localhost:{port}/"
    try:
        end = time.monotonic() + STARTS_S
        while not answers(url):
            assert process.poll() is None, "tensorboard has gone"
            assert time.monotonic() < end, "tensorboard does not answer"
            time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        process.wait(timeout=20)


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


@pytest.fixture
def logdir(shown_run: Path, make_run: Callable[..., Any], tmp_path: Path) -> Path:
    """Event files of the shown run; those of the fake one are written here."""
    folder = shown_run / TENSORBOARD_FOLDER
    if not folder.exists():
        run = make_run()
        with TensorBoardLog(folder) as log:
            for row in run.trials:
                log.on_trial_start(row["trial"], tables.config_of(row))
                for result in (point for point in run.curves if point["trial"] == row["trial"]):
                    log.on_epoch(row["trial"], result)
                log.on_trial_end(row["trial"], row)
            log.stage2(run.summary, run.stage2, run.curves)
    return folder


def texts(browser: Any) -> str:
    """All text of the page, inside shadow trees too."""
    return str(browser.eval(f"{DEEP}.filter(e => !e.children.length).map(e => e.textContent.trim()).join('\\n')"))


def test_hparams_lists_every_trial(logdir: Path, shown_run: Path, browser: Any, screenshots: Path) -> None:
    trials = tables.read_rows(shown_run / TRIALS_FILE)
    with tensorboard(logdir) as url:
        browser.open(f"{url}#hparams", width=1400, height=600)
        browser.until(
            f"{DEEP}.some(e => !e.children.length && e.textContent.includes('trial_{trials[-1]['trial']:04} '))"
        )
        shown = texts(browser)
        browser.eval(f"{DEEP}.filter(e => {LESS}.includes(e.textContent.trim()) && e.checked).forEach(e => e.click())")
        browser.settle()
        browser.screenshot(screenshots / "tensorboard-hparams.png", whole=False)
    assert browser.errors == []
    assert [request for request in browser.requests if not request.startswith((url, "data:", "blob:"))] == []
    for row in trials:
        assert f"trial_{row['trial']:04} " in shown


def test_one_chart_has_baseline_winner_and_gate(logdir: Path, browser: Any, screenshots: Path) -> None:
    with tensorboard(logdir) as url:
        browser.open(f"{url}#custom_scalars", width=1400, height=800)
        browser.until(f"{DEEP}.some(e => e.textContent.includes('Local TPE: baseline, winner and gate'))")
        lines = f"{DEEP}.filter(e => e.tagName === 'VZ-LINE-CHART2' || e.tagName === 'VZ-DATA-SERIES').length"
        browser.until(f"{lines} > 0")
        browser.settle()
        browser.screenshot(screenshots / "tensorboard-comparison.png", whole=False)
    assert browser.errors == []
