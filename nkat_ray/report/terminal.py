"""A run on the terminal: the live display while it goes on, and the report at its end (rich).

Both fit 80 columns. Where the output is no terminal the display degrades to plain lines, one a finished trial.
"""

import contextlib
import json
import math
import shlex
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from nkat_ray.files import BEST_FOLDER, REPORT_FILE, TENSORBOARD_FOLDER, TRIALS_FILE
from nkat_ray.metrics import EPOCH, LAMBDA_MODELS, LOCAL_TPE, STAGE2_DATASETS, VAL_ACCURACY
from nkat_ray.report import results, tables
from nkat_ray.report.results import duration, number

WIDTH: Final = 80
RUNNING_SHOWN: Final = 12  # running trials listed; the rest is a count
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
    table = _table(f"Trial {winner} on the test images, {counted} of {len(STAGE2_DATASETS)} datasets count")
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
    table = _table("Datasets: test accuracy, 95 % interval, TPE under the three lambda models")
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


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 1, 0, 0), pad_edge=False)


@dataclass
class _Running:
    """A trial in flight."""

    epochs: int
    epoch: int = 0
    accuracy: float = math.nan
    tpe: float = math.nan


class Progress:
    """The live display of a search; plain lines where the output is no terminal; silent when quiet.

    A context manager. It learns of the search only through its methods, which search's callbacks call from one thread.

    Args:
        name: the run's name.
        preset: its preset.
        gate: Local TPE that a trial must reach.
        data: one phrase for people on where the images come from.
        epochs: epochs a trial trains when nothing stops it, for the time left.
        console: where to print; default: standard output.
        quiet: print nothing.
        clock: seconds, monotonic; for tests.
    """

    def __init__(
        self,
        *,
        name: str,
        preset: str,
        gate: float,
        data: str,
        epochs: int,
        console: Console | None = None,
        quiet: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.console = console or Console(highlight=False)
        self._header = f"{name}  preset {preset}  gate {gate:.2f}" + (
            "" if gate == results.NOTES_GATE else f" (the notes' gate is {results.NOTES_GATE:.2f})"
        )
        self._data = data
        self._epochs = epochs
        self._quiet = quiet
        self._clock = clock
        self._began = clock()
        self._live: Live | None = None
        self._lock = threading.Lock()  # rich's refresh thread reads what the search's thread writes
        self._total = 0
        self._ended: dict[int, str] = {}
        self._ended_epochs: dict[int, int] = {}
        self._running: dict[int, _Running] = {}
        self._epochs_done = 0  # in this process: after a resume the rate must not count earlier ones
        self._survivors: set[int] = set()
        self._best = math.nan
        self._best_trial = -1
        self._stage2_total = 0
        self._stage2_done = 0
        self._stage2_began = 0.0

    def __enter__(self) -> Self:
        self._began = self._clock()
        if self._quiet:
            return self
        if self.console.is_terminal:
            self._live = Live(get_renderable=self._render, console=self.console, refresh_per_second=2, transient=True)
            self._live.start()
        else:
            self._line(self._header)
            self._line(f"data: {self._data}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def notice(self, text: str) -> None:
        """Say something that stays on the screen."""
        self._line(f"note: {text}")

    def on_start(self, total: int, ended: Sequence[Mapping[str, Any]] = ()) -> None:
        """Stage 1 begins with so many trials, of which some had ended before a resume (rows of trials.parquet)."""
        with self._lock:
            self._total = total
            for row in ended:
                self._count_end(row["trial"], row)

    def on_trial_start(self, trial: int, config: Mapping[str, Any]) -> None:
        """A trial has a slot and begins, or begins again after a fault."""
        with self._lock:
            self._running[trial] = _Running(epochs=int(config.get("epochs", self._epochs)))

    def on_result(self, trial: int, result: Mapping[str, Any]) -> None:
        """A trial has finished an epoch."""
        with self._lock:
            running = self._running.setdefault(trial, _Running(epochs=self._epochs))
            running.epoch = int(result[EPOCH])
            running.accuracy = _nan(result.get(VAL_ACCURACY))
            running.tpe = _nan(result.get(LOCAL_TPE))
            self._epochs_done += 1
            self._note_best(trial, running.tpe)

    def on_trial_end(self, trial: int, row: Mapping[str, Any]) -> None:
        """A trial has ended: its row of trials.parquet."""
        with self._lock:
            self._count_end(trial, row)
            line = self._end_line(trial, row)
        if self._live is None:
            self._line(line)

    def on_survivor(self, trial: int) -> None:
        """A trial has reached the gate."""
        with self._lock:
            self._survivors.add(trial)
        if self._live is None:
            self._line(f"trial {trial} passed the gate")

    def stage2_start(self, total: int) -> None:
        """Stage 2 begins with so many evaluations (survivors x datasets)."""
        with self._lock:
            self._stage2_total, self._stage2_done, self._stage2_began = total, 0, self._clock()
        if self._live is None:
            self._line(f"Stage 2: {total} evaluations")

    def stage2_done(self, trial: int, dataset: str, row: Mapping[str, Any]) -> None:
        """One survivor has been evaluated on one dataset: its row of stage2.parquet."""
        with self._lock:
            self._stage2_done += 1
            done = f"{self._stage2_done} of {self._stage2_total} done, {self._time_line()}"
        if self._live is None:
            tested = row.get("test_accuracy") is not None
            what, accuracy = ("test", row["test_accuracy"]) if tested else ("validation", row.get("val_accuracy"))
            figure = f"{row['status']}, {what} accuracy {number(accuracy)}"
            self._line(f"Stage 2: trial {trial} on {dataset}: {figure} | {done}")

    def seconds_left(self) -> float:
        """Estimated seconds until the stage ends, from the epochs done and remaining; NaN before there is any."""
        now = self._clock()
        if self._stage2_total:
            left = self._stage2_total - self._stage2_done
            return (now - self._stage2_began) / self._stage2_done * left if self._stage2_done else math.nan
        if not self._epochs_done:
            return math.nan
        return (now - self._began) / self._epochs_done * self._epochs_left()

    def _epochs_left(self) -> float:
        """Epochs still to train: trials to come count as long as the ended ones were (ASHA ends many early)."""
        ended = self._ended_epochs.values()
        typical = sum(ended) / len(ended) if ended else self._epochs
        to_come = max(0, self._total - len(self._ended) - len(self._running))
        return to_come * typical + sum(
            max(0.0, min(r.epochs, max(typical, r.epoch)) - r.epoch) for r in self._running.values()
        )

    def _count_end(self, trial: int, row: Mapping[str, Any]) -> None:
        self._running.pop(trial, None)
        self._ended[trial] = row.get("stop_reason") or "?"
        self._ended_epochs[trial] = int(row.get("epochs") or 0)
        if row.get("passed_gate"):
            self._survivors.add(trial)
        self._note_best(trial, _nan(row.get("best_local_tpe")))

    def _note_best(self, trial: int, tpe: float) -> None:
        if tpe > self._best or (math.isnan(self._best) and not math.isnan(tpe)):
            self._best, self._best_trial = tpe, trial

    def _end_line(self, trial: int, row: Mapping[str, Any]) -> str:
        accuracy, tpe = number(row.get("best_val_accuracy")), number(row.get("best_local_tpe"))
        gate = ", passed the gate" if row.get("passed_gate") else ""
        what = f"trial {trial}: {row.get('stop_reason')} after {row.get('epochs') or 0} epochs{gate}"
        state = f"{len(self._ended)} of {self._total} done, {self._time_line()}"
        return f"{what} | accuracy {accuracy}, Local TPE {tpe} | {state}"

    def _time_line(self) -> str:
        left = self.seconds_left()
        return duration(self._clock() - self._began) + ("" if math.isnan(left) else f", about {duration(left)} left")

    def _line(self, text: str) -> None:
        if not self._quiet:
            self.console.print(text, markup=False, highlight=False, soft_wrap=not self.console.is_terminal)

    def _render(self) -> RenderableType:
        with self._lock:
            data = Text(f"data: {self._data}", style="dim", no_wrap=True, overflow="ellipsis")
            parts: list[RenderableType] = [Text(self._header, style="bold"), data]
            parts.append(self._bar_line())
            if self._running and not self._stage2_total:
                parts.append(self._running_table())
            parts.append(self._state_line())
        return _Narrow(Group(*parts))

    def _bar_line(self) -> Table:
        stage2 = self._stage2_total > 0
        done, total = (self._stage2_done, self._stage2_total) if stage2 else (len(self._ended), self._total)
        grid = Table.grid(padding=(0, 1))
        what = "Stage 2" if stage2 else "Stage 1"
        unit = "evaluations" if stage2 else "trials"
        grid.add_row(
            what,
            ProgressBar(total=max(1, total), completed=done, width=24),
            f"{done}/{total} {unit}",
            self._time_line(),
        )
        return grid

    def _running_table(self) -> Table:
        table = _table("")
        table.title = None
        for name in ("trial", "epoch", "val accuracy", "Local TPE", ""):
            table.add_column(name, justify="right")
        for trial, running in list(self._running.items())[:RUNNING_SHOWN]:
            passed = "passed the gate" if trial in self._survivors else ""
            epoch = f"{running.epoch}/{running.epochs}"
            table.add_row(
                str(trial),
                epoch,
                number(running.accuracy),
                number(running.tpe),
                Text(passed, style="green"),
            )
        if len(self._running) > RUNNING_SHOWN:
            table.add_row(f"+{len(self._running) - RUNNING_SHOWN}", "more", "", "", "")
        return table

    def _state_line(self) -> Text:
        counts: dict[str, int] = {}
        for reason in self._ended.values():
            counts[reason] = counts.get(reason, 0) + 1
        parts = [f"{reason} {n}" for reason, n in sorted(counts.items())]
        best = "" if math.isnan(self._best) else f"best Local TPE {self._best:.3f} (trial {self._best_trial})"
        return Text("  ".join(filter(None, [*parts, f"survivors {len(self._survivors)}", best])))


class _Narrow:
    """Renders its content in at most 80 columns, also on a wider terminal."""

    def __init__(self, content: RenderableType) -> None:
        self.content = content

    def __rich_console__(self, console: Console, options: Any) -> Any:
        yield from console.render(self.content, options.update(width=min(WIDTH, options.max_width)))


def _nan(value: Any) -> float:
    return math.nan if value is None else float(value)
