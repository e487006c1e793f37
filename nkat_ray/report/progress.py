"""Show the progress of a run: a live display on a terminal and in a notebook, else lines (docs/spec.md section 7).

The live display (live.py) has a bar for the stage, one per running trial, and in Stage 2 a grid of survivors and
datasets. Lines about trials that have ended stay in the scrollback above it. tally.py counts and estimates.
"""

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, Self

from rich.console import Console
from rich.progress import TaskID

from nkat_ray.config import RunConfig
from nkat_ray.data import Dataset, Missing
from nkat_ray.metrics import EPOCH, LOCAL_TPE, NOTES_GATE, VAL_ACCURACY
from nkat_ray.record.observer import Observer
from nkat_ray.record.scoring import duration, number, stage2_status
from nkat_ray.report.live import Cells, LiveDisplay, survivors_grid
from nkat_ray.report.tally import Evaluations, Trials, survivor_cost
from nkat_ray.report.terminal import NotebookScreen, is_live
from nkat_ray.report.wording import accuracy_phrase, design_label

EPOCH_LINES: Final = 4  # plain lines per trial while it trains: after its first epoch and at each quarter


class Progress(Observer):
    """Show a run: an observer of it, and a context manager.

    On a terminal and in a notebook's own process there is a live display; in a pipe, a log or a notebook's `!command`
    plain lines; nothing on a quiet console. Its methods are called from one thread.

    Args:
        datasets: the datasets of Stage 2, Stage 1's among them, for the header and the estimate of the time left.
    """

    def __init__(
        self,
        config: RunConfig,
        datasets: Mapping[str, Dataset | Missing],
        *,
        title: str | None = None,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.console = console or Console(highlight=False)
        self._config, self._base, self._clock = config, vars(config.trial), clock
        notes = "" if config.gate == NOTES_GATE else f" (the notes' gate is {NOTES_GATE:.2f})"
        self._header = [
            f"{title or config.name}  preset {config.preset}  gate {config.gate:.2f}{notes}",
            *(f"data: {name}: {_source(dataset)}" for name, dataset in datasets.items()),
        ]
        self._notebook = self.console if isinstance(self.console, NotebookScreen) else None
        self._live = (is_live(self.console) or self._notebook is not None) and not self.console.quiet
        self._display = LiveDisplay(self.console, self._time_line, live=self._live)
        self._stage: TaskID | None = None
        self._began = self._training_began = clock()
        self._estimate = (self._began, math.nan)  # seconds left of the whole run, and when that was estimated
        self._trials = Trials(epochs=config.epochs)
        self._tasks: dict[int, TaskID] = {}  # of the running trials
        self._survivor_cost = survivor_cost(config, datasets)
        self._stage2: Evaluations | None = None

    def __enter__(self) -> Self:
        self._began = self._training_began = self._clock()
        for line in self._header:
            self._line(line)
        self._display.phase = "preparing"
        self._display.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._display.stop()

    def on_tick(self) -> None:
        """Draw the display of a notebook again; on a terminal a thread of rich does that."""
        if self._notebook is not None:
            self._notebook.refresh()

    def on_notice(self, text: str) -> None:
        """Print a line that stays on the screen."""
        self._line(f"note: {text}")

    def on_stage1_start(self, total: int, ended: Sequence[Mapping[str, Any]] = ()) -> None:
        """Begin Stage 1 with `total` trials; `ended` are rows of trials.parquet of trials that have already ended."""
        self._trials.total = total
        for row in ended:
            self._trials.end(row["trial"], row)
        self._begin("Stage 1", total=total, completed=len(ended), unit="trials")
        self._phase("starting workers")
        self._refresh()

    def on_trial_start(self, trial: int, params: Mapping[str, Any]) -> None:
        """Show a trial that begins, or begins again after a fault; `params` are the values proposed for it."""
        if not self._trials.labels:  # the time that the first workers took says nothing about the trials to come
            self._training_began = self._clock()
        again = trial in self._trials.labels
        self._trials.start(trial, design_label({**self._base, **params}))
        self._show_trial(trial)
        if not self._live:
            self._line(f"trial {trial} starts{' again' if again else ''}: {self._trials.labels[trial]}")
        self._refresh()

    def on_epoch(self, trial: int, row: Mapping[str, Any]) -> None:
        """Show a trial's newest epoch; `row` is what the trial reported."""
        self._trials.epoch(trial, row)
        self._show_trial(trial)
        self._refresh()
        epoch, last = int(row[EPOCH]), self._config.epochs
        quarter = epoch * EPOCH_LINES // last > (epoch - 1) * EPOCH_LINES // last
        if not self._live and epoch < last and (epoch == 1 or quarter):
            self._line(f"trial {trial}: epoch {epoch} of {last}, {_scores(row)} | {self._time_line()}")

    def on_survivor(self, trial: int) -> None:
        """Mark a trial that has reached the gate."""
        self._trials.survivors.add(trial)
        if trial in self._trials.running:
            self._show_trial(trial)
        if not self._live:
            self._line(f"trial {trial} passed the gate")
        self._refresh()

    def on_trial_end(self, trial: int, row: Mapping[str, Any]) -> None:
        """Print the result of a trial; `row` is its row of trials.parquet."""
        self._trials.end(trial, row)
        if trial in self._tasks:
            self._display.remove_task(self._tasks.pop(trial))
        if self._stage is not None:
            self._display.update(self._stage, completed=len(self._trials.ended))
        self._refresh()
        gate = ", passed the gate" if row.get("passed_gate") else ""
        best = {VAL_ACCURACY: row.get("best_val_accuracy"), LOCAL_TPE: row.get("best_local_tpe")}
        epochs = row.get("epochs") or 0
        ended = f"{row.get('stop_reason')} after {epochs} epoch{'' if epochs == 1 else 's'}"
        line = f"trial {trial}: {ended}{gate} | {_scores(best)}"
        if self._live:  # the display has the count and the time
            self._line(f"{line} | {self._trials.labels.get(trial, '')}".removesuffix(" | "))
        else:
            self._line(f"{line} | {len(self._trials.ended)} of {self._trials.total} done, {self._time_line()}")

    def on_stage2_start(
        self, survivors: Sequence[int], datasets: Sequence[str], done: Iterable[Mapping[str, Any]] = ()
    ) -> None:
        """Begin Stage 2; `done` are rows of stage2.parquet that an earlier driver wrote."""
        self._stage2 = Evaluations(list(survivors), list(datasets), began=self._clock())
        for row in done:
            self._stage2.add(row, earlier=True)
        for task in self._tasks.values():
            self._display.remove_task(task)
        self._tasks.clear()
        if not self._live:
            self._line(f"Stage 2: {self._stage2.total - self._stage2.done} evaluations")
        self._begin("Stage 2", total=self._stage2.total, completed=self._stage2.done, unit="evaluations")
        self._phase("starting workers")
        self._refresh()

    def on_stage2_row(self, row: Mapping[str, Any]) -> None:
        """Show that a survivor was validated or tested on a dataset; `row` is its row of stage2.parquet."""
        done = ""
        if self._stage2 is not None:  # with `--feedback global` survivors are validated during Stage 1
            self._stage2.add(row)
            assert self._stage is not None
            self._phase("")
            self._display.update(self._stage, completed=self._stage2.done)
            self._refresh()
            done = f" | {self._stage2.done} of {self._stage2.total} done, {self._time_line()}"
        if not self._live:
            self._line(f"Stage 2: trial {row['trial']} on {row['dataset']}: {_evaluation(row)}{done}")

    def seconds_left(self) -> float:
        """Estimate the seconds until the run ends, both stages together; NaN before the first epoch has ended."""
        trained = self._trials.epochs_done
        rate = (self._clock() - self._training_began) / trained if trained else math.nan  # seconds per epoch
        if self._stage2 is None:
            return rate * (self._trials.epochs_left() + self._trials.expected_survivors() * self._survivor_cost)
        elapsed = self._clock() - self._stage2.began
        if self._stage2.cost_done:
            return elapsed / self._stage2.cost_done * self._stage2.cost_left()
        left = rate * len(self._stage2.survivors) * self._survivor_cost - elapsed
        return left if math.isnan(left) else max(0.0, left)

    def _begin(self, stage: str, *, total: int, completed: int, unit: str) -> None:
        if self._stage is not None:
            self._display.remove_task(self._stage)
        self._stage = self._display.add_task(stage, total=total, completed=completed, cells=Cells(unit))

    def _phase(self, text: str) -> None:
        """Show what the run waits for, until there are results to show."""
        self._display.phase = text
        if text and not self._live:
            self._line(text)

    def _show_trial(self, trial: int) -> None:
        running = self._trials.running[trial]
        row, passed = running.row, "  passed" if trial in self._trials.survivors else ""
        scores = f"accuracy {number(row.get(VAL_ACCURACY))}  TPE {number(row.get(LOCAL_TPE))}{passed}"
        cells = Cells("epochs", self._trials.labels.get(trial, ""), scores if running.epoch else "starting")
        if trial not in self._tasks:
            self._tasks[trial] = self._display.add_task(f"trial {trial}", total=None, cells=cells)
        total = self._config.epochs if running.epoch else None  # before the first epoch the bar only pulses
        self._display.update(self._tasks[trial], completed=running.epoch, total=total, cells=cells)
        self._phase("")

    def _refresh(self) -> None:
        """Update the parts of the display other than its bars."""
        self._estimate = (self._clock(), self.seconds_left())
        self._display.state = self._trials.summary()
        self._display.grid = None if self._stage2 is None else survivors_grid(self._stage2)
        self.on_tick()

    def _time_line(self) -> str:
        now, (then, left) = self._clock(), self._estimate
        estimate = "" if math.isnan(left) else f", about {duration(max(0.0, left - (now - then)))} left"
        return duration(now - self._began) + estimate

    def _line(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)


def _source(dataset: Dataset | Missing) -> str:
    return f"missing: {dataset.reason}" if isinstance(dataset, Missing) else dataset.source


def _scores(row: Mapping[str, Any]) -> str:
    return f"accuracy {number(row.get(VAL_ACCURACY))}, Local TPE {number(row.get(LOCAL_TPE))}"


def _evaluation(row: Mapping[str, Any]) -> str:
    status = stage2_status(row)
    if status in ("missing", "failed"):
        return f"{status}: {row.get('error')}"
    return f"{accuracy_phrase(row)}, {status}" if status == "at chance" else accuracy_phrase(row)
