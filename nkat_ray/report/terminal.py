"""Print a run's report on the terminal (rich), on a console that knows --quiet, --json, pipes and notebooks."""

import contextlib
import io
import json
import logging
import math
import os
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Final, TypeVar

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from nkat_ray.config import ScreenConfig
from nkat_ray.errors import one_line
from nkat_ray.files import BEST_FOLDER, REPORT_FILE, STAGE2_FILE, SUMMARY_FILE, TENSORBOARD_FOLDER, TRIALS_FILE
from nkat_ray.metrics import LAMBDA_MODELS, STAGE2_DATASETS
from nkat_ray.record import scoring, tables
from nkat_ray.record.run_folder import RecordedRun
from nkat_ray.record.scoring import dataset_name, datasets_of, number, rows_by_dataset, stage2_status
from nkat_ray.report.wording import after_the_fact, closest_sentence, command_line

T = TypeVar("T")

WIDTH: Final = 80  # columns of running text; tables may be wider
PIPE_WIDTH: Final = 10_000  # nothing is cut where no terminal sets a limit
NOTEBOOK_WIDTH: Final = 100
NOTEBOOK_HTML: Final = '<pre style="white-space:pre-wrap;line-height:normal">{}</pre>'
REFRESH_S: Final = 0.5  # of a notebook's output
VERDICT_STYLE: Final = {"reached": "bold green", "not reached": "bold red", "undecided": "bold yellow"}


class Screen(Console):
    """A command's console, which obeys --quiet and --json (docs/spec.md section 7).

    By default everything goes to stdout. `quiet` prints only the result. `as_json` prints one JSON document to stdout,
    and everything else to stderr, or nowhere with `quiet` as well. In a pipe tables have their full width. Characters
    that the encoding lacks are replaced by escape sequences, so that they cannot make a command fail.
    """

    def __init__(self, *, quiet: bool = False, as_json: bool = False, **options: Any) -> None:
        replace_what_cannot_be_shown()
        super().__init__(stderr=as_json, quiet=quiet, **options)
        if not (self.is_terminal or self.is_jupyter or os.environ.get("COLUMNS") or "width" in options):
            self.width = PIPE_WIDTH
        self._as_json = as_json
        self._stdout = sys.stdout
        self.document: Mapping[str, Any] = {}  # the result, once there is one
        self.faults: list[str] = []

    @contextlib.contextmanager
    def kept_clean(self) -> Iterator[None]:
        """Redirect the output of libraries to stderr with `as_json`, so that stdout has only the document."""
        with contextlib.redirect_stdout(sys.stderr) if self._as_json else contextlib.nullcontext():
            yield

    def on_broken_pipe(self) -> None:
        """Continue without output after the reader of a pipe has closed it, so that the command ends normally."""
        self.quiet = True
        discard_output()

    @contextlib.contextmanager
    def phase(self, text: str) -> Iterator[None]:
        """Show what is in progress until the block ends: with a spinner on a terminal, else as one line."""
        if is_live(self) and not self.quiet:
            with self.status(text, spinner="line", refresh_per_second=4):
                yield
        else:
            self.print(text, markup=False, highlight=False, soft_wrap=True)
            yield

    @contextlib.contextmanager
    def entering(self, text: str, context: AbstractContextManager[T]) -> Iterator[T]:
        """Enter a slow context while a phase is shown; yield the context's value."""
        with contextlib.ExitStack() as stack:
            with self.phase(text):
                entered = stack.enter_context(context)
            yield entered

    def conclude(self, document: Mapping[str, Any], lines: Sequence[str]) -> None:
        """Print the result for scripts: the document with `as_json`, else the lines with `quiet`, else nothing."""
        self.document = document
        if self._as_json:
            plain_ascii = not (self._stdout.encoding or "utf-8").lower().startswith("utf")
            text = json.dumps(tables.plain(document), indent=2, allow_nan=False, ensure_ascii=plain_ascii)
            print(text, file=self._stdout, flush=True)
        elif self.quiet:
            print(*lines, sep="\n", file=self._stdout, flush=True)

    def fault(self, text: str) -> None:
        """Print one line about an internal error to stderr, also with --quiet, and remember it."""
        self.faults.append(text)
        Console(stderr=True).print(f"error: {text}", markup=False, highlight=False, soft_wrap=True)


class NotebookScreen(Screen):
    """A console in a notebook: the printed lines, and the live display below them, are one output that is updated."""

    def __init__(self, *, quiet: bool = False) -> None:
        super().__init__(quiet=quiet, **_in_memory())
        # Ray, and tqdm, which Optuna loads, recommend ipywidgets in every notebook; nothing here would use it.
        logging.getLogger("ray.widgets").setLevel(logging.WARNING)
        warnings.filterwarnings("ignore", "IProgress not found")
        self._below: RenderableType | None = None
        self._output: Any = None
        self._due_s = 0.0

    def print(self, *objects: Any, **options: Any) -> None:
        """Print as rich does, and update the output at once."""
        super().print(*objects, **options)
        self.refresh(at_once=True)

    def show_below(self, live: RenderableType | None) -> None:
        """Show something below the printed lines, redrawn at every refresh; None removes it."""
        self._below = live
        self.refresh(at_once=True)

    def refresh(self, *, at_once: bool = False) -> None:
        """Update the notebook's output, at most twice per second unless `at_once`."""
        from IPython.display import display

        if self.quiet or (time.monotonic() < self._due_s and not at_once):
            return
        self._due_s = time.monotonic() + REFRESH_S
        live = Console(**_in_memory())
        live.print("" if self._below is None else self._below, end="")
        parts = (self, live)
        html = [part.export_html(clear=False, inline_styles=True, code_format="{code}") for part in parts]
        plain = [part.export_text(clear=False) for part in parts]
        content = {"text/html": NOTEBOOK_HTML.format("".join(html)), "text/plain": "".join(plain)}
        if self._output is None:
            self._output = display(content, raw=True, display_id=True)
        else:
            self._output.update(content, raw=True)


def _in_memory() -> dict[str, Any]:
    return {"file": io.StringIO(), "record": True, "width": NOTEBOOK_WIDTH, "force_jupyter": False}


def replace_what_cannot_be_shown() -> None:
    """Make stdout replace characters that its encoding lacks, as stderr does, instead of raising an error."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def is_live(console: Console) -> bool:
    """Return whether a live display is possible: on a real terminal, but not in a cell of a notebook.

    `!python tune_round2.py` in a notebook looks like a terminal, but keeps every frame of a live display as output.
    """
    return console.is_terminal and not console.is_dumb_terminal and "JPY_PARENT_PID" not in os.environ


def discard_output() -> None:
    """Discard what is still buffered for stdout, so that Python reports no error about it at its end."""
    with contextlib.suppress(OSError, ValueError):  # a stand-in without a file has nothing to discard
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.__stdout__.fileno() if sys.__stdout__ else 1)


@contextlib.contextmanager
def screen_of(config: ScreenConfig) -> Iterator[Screen]:
    """Yield a command's console, which obeys --quiet and --json."""
    notebook = Console().is_jupyter and not config.json
    screen = NotebookScreen(quiet=config.quiet) if notebook else Screen(quiet=config.quiet, as_json=config.json)
    with screen.kept_clean():
        yield screen


def result_lines(
    summary: Mapping[str, Any], stage2: Sequence[Mapping[str, Any]], folder: Path | None = None
) -> list[str]:
    """Return what --quiet prints of a run: notices, the verdict, the paths to open."""
    paths = [] if folder is None else [f"{name}: {path}" for name, path in _paths(folder).items()]
    return [
        *(f"! {notice}" for notice in scoring.notices(summary)),
        scoring.written_verdict(summary).sentence,
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
    """Print the result of a run; within 80 columns, unless a dataset of the user's own has a long name.

    Args:
        trials: rows of trials.parquet; none for an evaluation, which has no search.
        folder: the run's folder, for the paths at the end.
    """
    winner = summary["winner"]["trial"] if summary["winner"] else None
    for notice in scoring.notices(summary):
        _print(console, Text(f"! {notice}", style="bold yellow"))
    if winner is None:
        _print(console, _closest_miss(summary, trials))
    else:
        datasets = datasets_of(summary)
        _print(console, _score_table(stage2, winner), _dataset_table(stage2, winner, datasets))
        _print(
            console,
            *_remarks(stage2, winner, datasets),
            Text(scoring.model_sentence(stage2, winner, summary["lambda_model"])),
        )
    if trials:
        _print(console, _counts_line(trials, summary))
    verdict = scoring.written_verdict(summary)
    _print(console, Text(verdict.sentence, style=VERDICT_STYLE[verdict.status]))
    if folder is not None:
        if command := after_the_fact(summary, folder):
            _print(console, Text("Stage 2 on the best trials all the same, beside this verdict:"))
            console.print(f"  {command}", markup=False, highlight=False, soft_wrap=True)
        _print_paths(console, folder)


def report_text(run: RecordedRun) -> str:
    """Return what `final_report` prints of a run, without colours."""
    text = io.StringIO()
    console = Console(file=text, width=WIDTH, force_jupyter=False, force_terminal=False)
    final_report(run.summary, run.trials, run.stage2, console, folder=run.folder)
    return text.getvalue().rstrip()


def _print(console: Console, *parts: RenderableType) -> None:
    for part in parts:
        width = min(WIDTH, console.width) if isinstance(part, Text) else None
        console.print(part, width=width, highlight=False)


def _score_table(stage2: Sequence[Mapping[str, Any]], winner: int) -> Table:
    counted = scoring.datasets_counted(stage2, winner)
    table = plain_table(f"Trial {winner} on the test images, {counted} of {len(STAGE2_DATASETS)} datasets count")
    table.add_column("metric")
    for name in ("before", "now", "target", "gap"):
        table.add_column(name, justify="right")
    for line in scoring.scorecard(stage2, winner):
        gap = "-" if math.isnan(line.now) else f"{line.gap:+.3f}{' met' if line.state == 'met' else ''}"
        now = number(line.now) + (f" [{line.interval[0]:.3f}, {line.interval[1]:.3f}]" if line.interval else "")
        style = {"met": "green", "missed": "red", "open": "yellow"}[line.state]
        name = scoring.METRIC_NAMES[line.metric]
        if line.metric != "robustness":
            name += f" ({counted} of {len(STAGE2_DATASETS)})"
        table.add_row(name, f"{line.before:.2f}", Text(now), f">= {line.target:.2f}", Text(gap, style=style))
    return table


def _dataset_table(stage2: Sequence[Mapping[str, Any]], winner: int, datasets: Sequence[str]) -> Table:
    table = plain_table("Datasets: test accuracy, 95 % interval, TPE under the three lambda models")
    table.add_column("dataset", overflow="fold")
    for name in ("accuracy", "interval", "n", "target", "TPE", "target", "notes", "count", "mill."):
        table.add_column(name, justify="right", no_wrap=True)
    rows = rows_by_dataset(stage2, winner)
    for dataset in datasets:
        table.add_row(dataset_name(dataset), *_dataset_cells(dataset, rows.get(dataset, {})))
    return table


def _dataset_cells(dataset: str, row: Mapping[str, Any]) -> list[Text]:
    accuracy, status = row.get("test_accuracy"), stage2_status(row)
    accuracy_target, tpe_target = scoring.dataset_targets(dataset)
    shown = Text(status, style="yellow")
    if accuracy is not None:
        text = number(accuracy) if status == "ok" else f"{number(accuracy)} {status}"
        shown = Text(text, style=_style(accuracy, accuracy_target))
    interval = "" if accuracy is None else f"{_short(row['ci_low'])}-{_short(row['ci_high'])}"
    return [
        shown,
        Text(interval),
        Text("" if accuracy is None else str(row["n_test"])),
        Text(number(accuracy_target, 2)),
        Text(number(row.get("tpe")), style=_style(row.get("tpe"), tpe_target)),
        Text(number(tpe_target, 2)),
        *(Text(number(row.get(f"tpe_{model}"), 2)) for model in LAMBDA_MODELS),
    ]


def _remarks(stage2: Sequence[Mapping[str, Any]], winner: int, datasets: Sequence[str]) -> list[Text]:
    """Return why datasets have no score, and which of the notes' datasets the run did not include."""
    rows = rows_by_dataset(stage2, winner)
    lines = [f"{dataset_name(name)}: {one_line(row['error'])}" for name, row in rows.items() if row.get("error")]
    if absent := [dataset_name(name) for name in STAGE2_DATASETS if name not in datasets]:
        lines.append(f"Not among --datasets, although the target is about all four: {', '.join(absent)}")
    return [Text(line, style="yellow") for line in lines]


def _counts_line(trials: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]) -> Text:
    counts = ", ".join(f"{reason} {n}" for reason, n in scoring.stop_counts(trials).items()) or "none ended"
    return Text(
        f"{len(trials)} trials ({counts}); {len(summary['survivors'])} passed the gate of {summary['gate']:.2f}"
    )


def _closest_miss(summary: Mapping[str, Any], trials: Sequence[Mapping[str, Any]]) -> Text:
    if summary["survivors"]:
        return Text("Stage 2 has no result yet.", style="bold")
    miss = scoring.nearest_miss(trials, summary["gate"])
    if miss is None:
        return Text("No trial passed the gate, and none has a score.", style="bold")
    return Text(f"No trial passed the gate. {closest_sentence(miss, summary['gate'])}", style="bold")


def _print_paths(console: Console, folder: Path) -> None:
    for name, path in _paths(folder).items():  # whole, so they can be copied
        console.print(f"{name:>11}  {path}", markup=False, highlight=False, soft_wrap=True)


def _paths(folder: Path) -> dict[str, str]:
    """Return the paths of the results by name; for TensorBoard the command that shows it."""
    files = {"report": REPORT_FILE, "model": BEST_FOLDER, "tables": TRIALS_FILE}
    paths = {name: str(folder / file) for name, file in files.items() if (folder / file).exists()}
    events = folder / TENSORBOARD_FOLDER
    return paths | ({"TensorBoard": command_line(["tensorboard", "--logdir", str(events)])} if events.exists() else {})


def _short(value: float | None) -> str:
    return number(value).removeprefix("0")


def _style(value: float | None, target: float | None) -> str:
    return "" if value is None or target is None else "green" if value >= target else "red"


def plain_table(title: str) -> Table:
    """Return an empty table without a frame."""
    return Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 1, 0, 0), pad_edge=False)


def print_report(folder: Path, screen: Screen) -> None:
    """Print a run's report from its files."""
    summary, stage2 = tables.read_summary(folder / SUMMARY_FILE), tables.read_rows(folder / STAGE2_FILE)
    final_report(summary, tables.read_rows(folder / TRIALS_FILE), stage2, screen, folder=folder)
    screen.conclude({**summary, "folder": folder.absolute()}, result_lines(summary, stage2, folder))
