"""A run's report on the terminal, in 80 columns (rich), and the console that knows --quiet and --json."""

import contextlib
import json
import math
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from nkat_ray.files import BEST_FOLDER, REPORT_FILE, TENSORBOARD_FOLDER, TRIALS_FILE
from nkat_ray.metrics import LAMBDA_MODELS, STAGE2_DATASETS
from nkat_ray.report import results, tables
from nkat_ray.report.results import number

WIDTH: Final = 80
VERDICT_STYLE: Final = {"reached": "bold green", "not reached": "bold red", "undecided": "bold yellow"}


class Screen(Console):
    """A command's console, and what --quiet and --json make of it (docs/spec.md section 7).

    Neither: all goes to stdout. `quiet`: nothing but the result. `as_json`: stdout gets one JSON document, and all else
    goes to stderr, or nowhere with `quiet` as well.
    """

    def __init__(self, *, quiet: bool = False, as_json: bool = False) -> None:
        super().__init__(stderr=as_json, quiet=quiet)
        self._as_json = as_json
        self._stdout = sys.stdout

    @contextlib.contextmanager
    def kept_clean(self) -> Iterator[None]:
        """With `as_json` whatever a library prints goes to stderr: stdout is the document's alone."""
        with contextlib.redirect_stdout(sys.stderr) if self._as_json else contextlib.nullcontext():
            yield

    def conclude(self, document: Mapping[str, Any], lines: Sequence[str]) -> None:
        """The result for scripts: the document with `as_json`, else the lines with `quiet`, else nothing."""
        if self._as_json:
            text = json.dumps(tables.plain(document), indent=2, allow_nan=False, ensure_ascii=False)
            print(text, file=self._stdout, flush=True)
        elif self.quiet:
            print(*lines, sep="\n", file=self._stdout, flush=True)


def result_lines(
    summary: Mapping[str, Any], stage2: Sequence[Mapping[str, Any]], folder: Path | None = None
) -> list[str]:
    """What --quiet prints of a run: what a reader must know, the verdict, the paths to open."""
    paths = [] if folder is None else [f"{name}: {path}" for name, path in _paths(folder).items()]
    return [
        *(f"! {notice}" for notice in results.notices(summary)),
        results.verdict_of(summary, stage2).sentence,
        *paths,
    ]


def final_report(
    summary: Mapping[str, Any],
    trials: Sequence[Mapping[str, Any]],
    stage2: Sequence[Mapping[str, Any]],
    console: Console,
    *,
    folder: Path | None = None,
) -> None:
    """Print what a run found, within 80 columns.

    Args:
        summary: summary.json's keys (docs/spec.md section 8).
        trials: rows of trials.parquet.
        stage2: rows of stage2.parquet.
        console: where to print.
        folder: the run's folder, for the paths at the end.
    """
    winner = summary["winner"]["trial"] if summary["winner"] else None
    for notice in results.notices(summary):
        _print(console, Text(f"! {notice}", style="bold yellow"))
    if winner is None:
        _print(console, _miss_lines(summary, trials))
    else:
        _print(console, _score_table(stage2, winner), _dataset_table(stage2, winner))
        _print(
            console,
            *_fault_lines(stage2, winner),
            Text(results.model_sentence(stage2, winner, summary["lambda_model"])),
        )
    _print(console, _counts_line(trials, summary))
    verdict = results.verdict_of(summary, stage2)
    _print(console, Text(verdict.sentence, style=VERDICT_STYLE[verdict.status]))
    if folder is not None:
        _print_paths(console, folder)


def _print(console: Console, *parts: RenderableType) -> None:
    for part in parts:
        console.print(part, width=min(WIDTH, console.width), highlight=False)


def _score_table(stage2: Sequence[Mapping[str, Any]], winner: int) -> Table:
    counted = results.datasets_counted(stage2, winner)
    table = plain_table(f"Trial {winner} on the test images, {counted} of {len(STAGE2_DATASETS)} datasets count")
    table.add_column("metric")
    for name in ("before", "now", "target", "gap"):
        table.add_column(name, justify="right")
    for line in results.scorecard(stage2, winner):
        gap = "-" if math.isnan(line.now) else f"{line.gap:+.3f}{' met' if line.state == 'met' else ''}"
        now = number(line.now) + (f" [{line.interval[0]:.3f}, {line.interval[1]:.3f}]" if line.interval else "")
        style = {"met": "green", "missed": "red", "open": "yellow"}[line.state]
        name = results.METRIC_NAMES[line.metric]
        if line.metric != "robustness":
            name += f" ({counted} of {len(STAGE2_DATASETS)})"
        table.add_row(name, f"{line.before:.2f}", Text(now), f">= {line.target:.2f}", Text(gap, style=style))
    return table


def _dataset_table(stage2: Sequence[Mapping[str, Any]], winner: int) -> Table:
    table = plain_table("Datasets: test accuracy, 95 % interval, TPE under the three lambda models")
    table.add_column("dataset")
    for name in ("accuracy", "interval", "n", "target", "TPE", "target", "notes", "count", "mill."):
        table.add_column(name, justify="right")
    rows = results.of_trial(stage2, winner)
    for dataset in STAGE2_DATASETS:
        table.add_row(results.DATASET_NAMES[dataset], *_dataset_cells(dataset, rows.get(dataset)))
    return table


def _dataset_cells(dataset: str, row: Mapping[str, Any] | None) -> list[Text]:
    accuracy_target, tpe_target = results.dataset_targets(dataset)
    if row is None or row.get("test_accuracy") is None:
        status = "missing" if row is None else row["status"]
        return [
            Text(status, style="yellow"),
            *[Text("")] * 2,
            Text(f"{accuracy_target:.2f}"),
            Text(""),
            Text(f"{tpe_target:.2f}"),
        ]
    failed = row["status"] != "ok"
    interval = f"{_short(row['ci_low'])}-{_short(row['ci_high'])}"
    return [
        Text(
            number(row["test_accuracy"]) + (" failed" if failed else ""),
            style=_style(row["test_accuracy"], accuracy_target),
        ),
        Text(interval),
        Text(str(row["n_test"])),
        Text(f"{accuracy_target:.2f}"),
        Text(number(row["tpe"]), style=_style(row["tpe"], tpe_target)),
        Text(f"{tpe_target:.2f}"),
        *(Text(number(row[f"tpe_{model}"], 2)) for model in LAMBDA_MODELS),
    ]


def _fault_lines(stage2: Sequence[Mapping[str, Any]], winner: int) -> list[Text]:
    faults = {name: row["error"] for name, row in results.of_trial(stage2, winner).items() if row.get("error")}
    return [
        Text(f"{results.DATASET_NAMES[name]}: {' '.join(error.split())}", style="yellow")
        for name, error in faults.items()
    ]


def _counts_line(trials: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]) -> Text:
    counts = ", ".join(f"{reason} {n}" for reason, n in results.stop_counts(trials).items()) or "none ended"
    return Text(
        f"{len(trials)} trials ({counts}); {len(summary['survivors'])} passed the gate of {summary['gate']:.2f}"
    )


def _miss_lines(summary: Mapping[str, Any], trials: Sequence[Mapping[str, Any]]) -> Text:
    gate = summary["gate"]
    if summary["survivors"]:
        return Text("Stage 2 has no result yet.", style="bold")
    miss = results.nearest_miss(trials, gate)
    if miss is None:
        return Text("No trial passed the gate, and none has a score.", style="bold")
    missing = f"{miss.needed - miss.accuracy:.3f} was missing" if miss.needed <= 1 else "no accuracy reaches that"
    return Text(
        f"No trial passed the gate. Closest: trial {miss.trial} with an accuracy of {miss.accuracy:.3f}; at its lambda "
        f"of {miss.lambda_theory:.2f} the gate of {gate:.2f} asks for {miss.needed:.3f}: {missing}.",
        style="bold",
    )


def _print_paths(console: Console, folder: Path) -> None:
    for name, path in _paths(folder).items():  # whole, so they can be copied
        console.print(f"{name:>11}  {path}", markup=False, highlight=False, soft_wrap=True)


def _paths(folder: Path) -> dict[str, str]:
    """What there is to open; TensorBoard as the command that opens it."""
    files = {"report": REPORT_FILE, "model": BEST_FOLDER, "tables": TRIALS_FILE}
    paths = {name: str(folder / file) for name, file in files.items() if (folder / file).exists()}
    events = folder / TENSORBOARD_FOLDER
    return paths | ({"TensorBoard": f"tensorboard --logdir {shlex.quote(str(events))}"} if events.exists() else {})


def _short(value: float | None) -> str:
    return number(value).removeprefix("0")


def _style(value: float | None, target: float | None) -> str:
    return "" if value is None or target is None else "green" if value >= target else "red"


def plain_table(title: str) -> Table:
    """A table without a frame."""
    return Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 1, 0, 0), pad_edge=False)
