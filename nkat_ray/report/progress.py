"""A run on the terminal while it goes on: a live display in 80 columns (rich).

Where the output is no terminal it degrades to plain lines, one a finished trial.
"""

import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from nkat_ray.metrics import EPOCH, LOCAL_TPE, NOTES_GATE, VAL_ACCURACY
from nkat_ray.report.results import duration, number
from nkat_ray.report.terminal import WIDTH, plain_table

RUNNING_SHOWN: Final = 12  # running trials listed; the rest is a count


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
            "" if gate == NOTES_GATE else f" (the notes' gate is {NOTES_GATE:.2f})"
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
        table = plain_table("")
        table.title = None
        for name in ("trial", "epoch", "val accuracy", "Local TPE", ""):
            table.add_column(name, justify="right")
        for trial, running in list(self._running.items())[:RUNNING_SHOWN]:
            passed = "passed the gate" if trial in self._survivors else ""
            epoch = f"{running.epoch}/{running.epochs}"
            figures = number(running.accuracy), number(running.tpe)
            table.add_row(str(trial), epoch, *figures, Text(passed, style="green"))
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
