"""A fake but plausible run folder: 8 trials, one of each end. One that has ended has tables, one that goes on has a
journal. And a browser."""

import base64
import dataclasses
import io
import json
import math
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest
from PIL import Image

from nkat_ray.config import RunConfig, TrialConfig
from nkat_ray.files import CONFIG_FILE, CURVES_FILE, JOURNAL_FILE, STAGE2_FILE, SUMMARY_FILE, TRIALS_FILE
from nkat_ray.metrics import (
    ACCURACY_TARGETS,
    GLOBAL_TARGETS,
    STAGE2_DATASETS,
    TPE_TARGETS,
    lambda_notes,
    tpe_score,
    wilson_interval,
)
from nkat_ray.record import scoring, tables
from nkat_ray.space import SPACES

EPOCHS = 12
GATE = 0.42
CLASSES = {"mnist": 10, "fashion_mnist": 10, "emnist_letters": 26, "cifar10": 10}
# (how it ends, epochs, the accuracy its curve tends to, configuration)
ENDS: tuple[tuple[str | None, int, float, dict[str, Any]], ...] = (
    ("finished", 12, 0.63, {}),
    ("gate", 12, 0.53, {"conv_stem": "off", "patch_size": 4, "depth": 5, "temperature": 0.6}),
    ("asha", 3, 0.40, {"embed_dim": 448, "depth": 6, "temperature": 0.83, "top_p": 0.91}),
    ("nan", 4, 0.45, {"conv_stem": "off", "depth": 9, "temperature": 0.97, "top_p": 0.95}),
    ("smoke", 10, 0.43, {"conv_stem": "off", "patch_size": 4, "embed_dim": 512, "temperature": 0.71}),
    ("finished", 12, 0.69, {"conv_stem": "small", "embed_dim": 512, "depth": 6, "temperature": 0.66, "top_p": 0.86}),
    ("error", 0, 0.0, {"embed_dim": 512, "depth": 9, "temperature": 0.9, "top_p": 0.93}),
    ("asha", 9, 0.66, {"conv_stem": "small", "patch_size": 4, "depth": 8, "temperature": 0.78, "top_p": 0.88}),
)


@dataclass(frozen=True)
class FakeRun:
    """A run folder and what was written into it."""

    folder: Path
    trials: list[tables.Row]
    curves: list[tables.Row]
    stage2: list[tables.Row]
    summary: dict[str, Any]


def fake_curve(trial: int, epochs: int, accuracy: float, lam: float, *, diverges: bool) -> list[tables.Row]:
    rows = []
    for epoch in range(1, epochs + 1):
        value = accuracy * (1 - 0.75 * math.exp(-epoch / 2.5)) + 0.004 * math.sin(3.0 * epoch + trial)
        broken = diverges and epoch == epochs
        rows.append(
            {
                "trial": trial,
                "epoch": epoch,
                "train_loss": math.nan if broken else 2.3 * math.exp(-epoch / 9) + 0.02 * math.cos(epoch),
                "val_accuracy": math.nan if broken else round(value, 4),
                "local_tpe": math.nan if broken else tpe_score(round(value, 4), lam),
                "lr": 2e-4 * min(1, epoch / 2) * 0.5 * (1 + math.cos(math.pi * epoch / EPOCHS)),
                "images_per_s": 2400.0 + 50 * trial + 7 * epoch,
                "epoch_s": 4.0 + 0.3 * trial,
                "started_s": 20.0 * (trial // 2) + (epoch - 1) * (4.0 + 0.3 * trial),
            }
        )
    return rows


def fake_trial(trial: int, reason: str | None, curve: list[tables.Row], config: TrialConfig, gate: float) -> tables.Row:
    lam = lambda_notes(config.conv_stem, config.embed_dim)
    scored = [row for row in curve if math.isfinite(row["local_tpe"])]
    best = max(scored, key=lambda row: row["local_tpe"], default=None)
    train_s = sum(row["epoch_s"] for row in curve)
    return {
        "trial": trial,
        "trial_id": f"a1b2c_{trial:05}",
        **{tables.CONFIG_PREFIX + name: value for name, value in vars(config).items()},
        "stop_reason": reason,
        "epochs": len(curve),
        "best_epoch": best and best["epoch"],
        "best_val_accuracy": best and best["val_accuracy"],
        "best_local_tpe": best and best["local_tpe"],
        "lambda_theory": lam,
        "passed_gate": bool(best and best["local_tpe"] >= gate),
        "seed": 1000 + trial,
        "gpus": 0.5,
        "cpus": 2.0,
        "node": f"10.0.0.{1 + trial % 2}",
        "started_s": 20.0 * (trial // 2),
        "start_s": 0.4,
        "train_s": train_s,
        "wall_s": train_s + 3.0,
        "error": "RuntimeError: CUDA out of memory <b>[/red]" if reason == "error" else None,
        "stop_detail": f"stopped by {reason}",
    }


def fake_stage2(
    trial: int, lam: float, accuracies: dict[str, float | None], *, n_test: int = 10_000, n_val: int = 5000
) -> list[tables.Row]:
    """Rows of one survivor; an accuracy of None is a missing dataset."""
    rows = []
    for dataset in STAGE2_DATASETS:
        accuracy = accuracies[dataset]
        row: tables.Row = {
            "trial": trial,
            "dataset": dataset,
            "classes": CLASSES[dataset],
            "mode": "finetune" if dataset != "cifar10" else "as it is",
            "status": "missing",
            "seconds": 30.0,
        }
        if accuracy is None:
            rows.append(row | {"error": "not found: <script>alert(1)</script>"})
            continue
        successes = round(accuracy * n_test)
        accuracy = successes / n_test
        low, high = wilson_interval(successes, n_test)
        rows.append(
            row
            | {
                "status": "ok" if accuracy > 1 / CLASSES[dataset] else "failed",
                "val_accuracy": accuracy,
                "n_val": n_val,
                "val_tpe": tpe_score(accuracy, lam),
                "test_accuracy": accuracy,
                "n_test": n_test,
                "ci_low": low,
                "ci_high": high,
                "tpe": tpe_score(accuracy, lam),
                "tpe_notes": tpe_score(accuracy, lam),
                "tpe_counted": tpe_score(accuracy, 28),
                "tpe_millions": tpe_score(accuracy, 12.6),
            }
        )
    return rows


def fake_summary(
    trials: list[tables.Row], stage2: list[tables.Row], *, gate: float, preset: str, source: str, exit_code: int | None
) -> dict[str, Any]:
    survivors = [row["trial"] for row in trials if row["passed_gate"]]
    order = scoring.rank(stage2, {row["trial"]: row["lambda_theory"] for row in trials})
    winner = order[0] if order else None
    summary = {
        "preset": preset,
        "gate": gate,
        "lambda_model": "notes",
        "seed": 7,
        "data": {
            name: {"source": source, "digest": "sha256:" + f"{i}" * 64, "images": {"train": 60_000, "test": 10_000}}
            for i, name in enumerate(STAGE2_DATASETS)
        },
        "n_trials": len(trials),
        "stop_reasons": scoring.stop_counts(trials),
        "survivors": survivors,
        "ranking": order,
        "winner": None if winner is None else fake_winner(winner, trials, stage2),
        "targets": {"accuracy": ACCURACY_TARGETS, "tpe": TPE_TARGETS, **GLOBAL_TARGETS},
        "training_share": 0.91,
        "trial_start_s": 0.3,
        "wall_s": 312.5,
        "versions": {"nkat_ray": "0.1.0", "python": "3.11.2", "torch": "2.15.0", "ray": "2.60.0"},
        "exit_code": exit_code,
    }
    verdict = scoring.verdict_of(summary, stage2)
    return {**summary, "verdict": verdict.status, "verdict_sentence": verdict.sentence}


def fake_winner(winner: int, trials: list[tables.Row], stage2: list[tables.Row]) -> dict[str, Any]:
    scores = scoring.result_scores(stage2, winner)
    return {
        "trial": winner,
        "config": tables.config_of(trials[winner]),
        "val_global_tpe": scoring.validation_scores(stage2, winner).global_tpe,
        "global_tpe": scores.global_tpe,
        "consistency": scores.consistency,
        "robustness": scores.robustness,
        "datasets": {row["dataset"]: {"accuracy": row.get("test_accuracy"), "tpe": row.get("tpe")} for row in stage2},
    }


def fake_journal(path: Path, trials: list[tables.Row], curves: list[tables.Row], start_s: float = 1.7e9) -> None:
    """Write the journal of the same trials as a driver leaves it while the run goes on."""
    events: list[dict[str, Any]] = [{"event": "run", "time_s": start_s}]
    for row in trials:
        number, config = row["trial"], tables.config_of(row)
        params = {name: config[name] for name in SPACES["round2"]}
        known = {"trial": number, "time_s": start_s + row["started_s"]}
        events.append(known | {"event": "proposed", "params": params, "seed": row["seed"], "study_number": number})
        events.append(known | {"event": "started", "trial_id": row["trial_id"]})
        resources = {key: row[key] for key in ("lambda_theory", "node", "gpus", "cpus")}
        for point in (point for point in curves if point["trial"] == number):
            ended_s = start_s + point["started_s"] + point["epoch_s"]
            reported = {**point, **resources, "started_s": start_s + point["started_s"]}
            events.append({"event": "result", "trial": number, "time_s": ended_s, "row": reported, "checkpoint": None})
        if row["stop_reason"]:
            end = {key: row[key] for key in ("stop_reason", "stop_detail", "error")}
            events.append(known | end | {"event": "end", "time_s": known["time_s"] + row["wall_s"]})
    events.sort(key=lambda event: event["time_s"])
    path.write_text("".join(json.dumps(event) + "\n" for event in events))


def build_run(
    folder: Path,
    *,
    gate: float = GATE,
    preset: str = "laptop",
    source: str = "torchvision's layout in /data",
    emnist: float | None = 0.88,
    running: bool = False,
    repeat: int = 1,
    epochs: int = EPOCHS,
    **fields: Any,
) -> FakeRun:
    """Write a run folder.

    Args:
        folder: where to.
        gate: 1.0 lets no trial pass.
        preset: of the run.
        source: where the images came from.
        emnist: accuracy on EMNIST letters; None where that dataset is missing.
        running: the run has not ended: there is a journal, and there are neither tables nor a summary.
        repeat: multiplies the trials.
        epochs: of a trial that ran to its end.
        fields: further fields of config.json.
    """
    folder.mkdir(parents=True, exist_ok=True)
    trials: list[tables.Row] = []
    curves: list[tables.Row] = []
    stage2: list[tables.Row] = []
    for trial in range(repeat * len(ENDS)):
        reason, length, accuracy, changes = ENDS[trial % len(ENDS)]
        config = TrialConfig(epochs=epochs, **changes)
        lam = lambda_notes(config.conv_stem, config.embed_dim)
        curve = fake_curve(trial, length * epochs // EPOCHS, accuracy, lam, diverges=reason == "nan")
        row = fake_trial(trial, reason, curve, config, gate)
        if running and trial == repeat * len(ENDS) - 1:
            row |= {"stop_reason": None, "wall_s": None}
        trials.append(row)
        curves += curve
        if row["passed_gate"] and not running:
            shown = {
                "mnist": 0.985,
                "fashion_mnist": 0.89,
                "emnist_letters": emnist,
                "cifar10": row["best_val_accuracy"] - 0.01,
            }
            stage2 += fake_stage2(trial, lam, shown)
    exit_code = None if running else 0 if stage2 else 3
    summary = fake_summary(trials, stage2, gate=gate, preset=preset, source=source, exit_code=exit_code)
    config = RunConfig.from_preset(preset, name=folder.name, gate=gate, epochs=epochs, space="round2")
    saved = {**dataclasses.asdict(config), "fixed": [], "found": summary["data"], **fields}
    (folder / CONFIG_FILE).write_text(json.dumps(tables.plain(saved)))
    if running:
        fake_journal(folder / JOURNAL_FILE, trials, curves)
    else:
        tables.write_rows(folder / TRIALS_FILE, trials)
        tables.write_rows(folder / CURVES_FILE, curves)
        tables.write_rows(folder / STAGE2_FILE, stage2)
        tables.write_summary(folder / SUMMARY_FILE, summary)
    return FakeRun(folder, trials, curves, stage2, summary)


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., FakeRun]:
    """`make_run(**options)`: a fresh fake run folder."""
    return lambda name="fake-run", **options: build_run(tmp_path / name, **options)


@pytest.fixture
def stage2_rows() -> Callable[..., list[tables.Row]]:
    """`stage2_rows(trial, lam, {dataset: accuracy})`: rows of one survivor."""
    return fake_stage2


# --- a browser --------------------------------------------------------------------------------------------------------

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Browser:
    """One page of a headless Chromium, driven over its DevTools pipe, so that no driver is needed.

    It records console errors and warnings, exceptions and every request.
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
        self.warnings: list[str] = []
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

    def open(self, page: Path | str, *, width: int = 1200, height: int = 900, dark: bool = False) -> None:
        """Load a file or an address and wait until it is drawn."""
        phone = width < 600
        size = {"width": width, "height": height, "deviceScaleFactor": 2 if phone else 1, "mobile": phone}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        self.call("Emulation.setScrollbarsHidden", hidden=True)  # no reader's picture needs them
        self.dark(dark)
        self.call("Page.navigate", url=page.as_uri() if isinstance(page, Path) else page)
        self.until("document.readyState === 'complete' && location.protocol !== 'about:'")
        self.settle()

    def until(self, condition: str, timeout_s: float = 30) -> None:
        """Wait until a script expression is true."""
        end = time.monotonic() + timeout_s
        while not self.eval(condition):
            assert time.monotonic() < end, condition
            time.sleep(0.05)

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

    def screenshot(self, path: Path, *, whole: bool = True) -> None:
        """The whole page, or the window, as PNG of at most 256 colours: it may go into the documents."""
        data = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)["data"]
        with Image.open(io.BytesIO(base64.b64decode(data))) as picture:
            picture.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)

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
            case "Runtime.consoleAPICalled" if params["type"] in ("error", "assert"):
                self.errors.append(str(params["args"]))
            case "Runtime.consoleAPICalled" if params["type"] == "warning":
                self.warnings.append(str(params["args"]))
            case "Log.entryAdded" if params["entry"]["level"] == "error":
                self.errors.append(params["entry"]["text"])
            case "Network.requestWillBeSent":
                self.requests.append(params["request"]["url"])


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    """A headless Chromium with an empty profile."""
    if CHROMIUM is None:
        pytest.skip("no chromium: apt-get install chromium")
    with Browser(tmp_path / "profile") as opened:
        yield opened


@pytest.fixture
def screenshots(tmp_path: Path) -> Path:
    """Where screenshots go: $NKAT_SCREENSHOTS (docs/images, for the documents), else nowhere that stays."""
    folder = Path(os.environ.get("NKAT_SCREENSHOTS") or tmp_path / "screenshots")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture
def shown_run(make_run: Callable[..., FakeRun]) -> Path:
    """The run on the screenshots: the folder $NKAT_SCREENSHOT_RUN, else the fake one, which says so."""
    folder = os.environ.get("NKAT_SCREENSHOT_RUN")
    return Path(folder) if folder else make_run("made-up-example").folder
