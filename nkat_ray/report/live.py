"""Draw the live display of a run, with rich.progress and two more kinds of columns."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from rich import progress as rich_progress
from rich.console import Console, Group, RenderableType
from rich.constrain import Constrain
from rich.spinner import Spinner
from rich.table import Column, Table
from rich.text import Text

from nkat_ray.record.scoring import dataset_name, stage2_status
from nkat_ray.report.tally import Evaluations
from nkat_ray.report.terminal import NotebookScreen
from nkat_ray.report.wording import accuracy_phrase

WIDTH: Final = 140  # largest width of the live display, since long lines are hard to read
SHOWN: Final = 12  # number of running trials, or survivors, that are listed; the others are counted


@dataclass(frozen=True)
class Cells:
    """The texts of a task's columns beside its bar."""

    unit: str
    network: str = ""
    scores: str = ""


class _Count(rich_progress.ProgressColumn):
    """Show the progress as `done/total unit`."""

    def render(self, task: rich_progress.Task) -> Text:
        """Return the cell of a task."""
        unit = task.fields["cells"].unit
        return Text("" if task.total is None else f"{task.completed:.0f}/{task.total:.0f} {unit}")


class _Scores(rich_progress.ProgressColumn):
    """Show a trial's newest scores, green after it has passed the gate; for a stage the elapsed and remaining time."""

    def __init__(self, time_line: Callable[[], str]) -> None:
        super().__init__()
        self._time_line = time_line

    def render(self, task: rich_progress.Task) -> Text:
        """Return the cell of a task."""
        scores = task.fields["cells"].scores or self._time_line()
        return Text(scores, style="green" if "passed" in scores else "", no_wrap=True, overflow="ellipsis")


def survivors_grid(stage2: Evaluations) -> Table:
    """Draw survivors against datasets; those that are not finished come first."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for name in ("trial", *map(dataset_name, stage2.datasets)):
        table.add_column(name, no_wrap=True)
    order = sorted(stage2.survivors, key=lambda trial: (stage2.is_finished(trial), trial))
    for trial in order[:SHOWN]:
        table.add_row(str(trial), *(_cell(stage2.rows.get((trial, dataset), [])) for dataset in stage2.datasets))
    if len(order) > SHOWN:
        table.add_row(f"and {len(order) - SHOWN} more")
    return table


def _cell(rows: Sequence[Mapping[str, Any]]) -> Text:
    if not rows:
        return Text("waiting", style="dim")
    status = stage2_status(rows[-1])
    if status not in ("ok", "not tested"):
        return Text(status, style="yellow")
    return Text(accuracy_phrase(rows[-1]), style="green" if status == "ok" else "")


class LiveDisplay(rich_progress.Progress):
    """Draw the bars, and below them what the run waits for, Stage 2's grid and the counts.

    rich draws in a thread of its own. The attributes that it reads are replaced, never changed, so no lock is needed.
    """

    def __init__(self, console: Console, time_line: Callable[[], str], *, live: bool) -> None:
        self.phase, self.state = "", ""
        self.grid: Table | None = None
        self._spinner = Spinner("line")  # of ASCII characters
        bar = max(6, min(40, console.width - 74))  # what the other columns leave
        super().__init__(
            rich_progress.TextColumn("{task.description}"), rich_progress.BarColumn(bar), _Count(),
            rich_progress.TextColumn("{task.fields[cells].network}", markup=False, table_column=Column(no_wrap=True)),
            _Scores(time_line), console=console, transient=True, refresh_per_second=2,
            disable=not live or isinstance(console, NotebookScreen),
        )  # fmt: skip

    def start(self) -> None:
        """Start to draw; in a notebook the screen draws the display, below what is printed."""
        if isinstance(self.console, NotebookScreen):
            self.console.show_below(self)
        super().start()

    def stop(self) -> None:
        """Stop to draw, and remove the display."""
        if isinstance(self.console, NotebookScreen):
            self.console.show_below(None)
        super().stop()

    def get_renderables(self) -> Iterable[RenderableType]:
        """Yield the parts of the display from top to bottom, for rich."""
        tasks = self.tasks  # the stage's, then those of the running trials
        parts: list[RenderableType] = [self.make_tasks_table(tasks[: SHOWN + 1])]
        parts += [Text(f"and {len(tasks) - SHOWN - 1} more trials")] if len(tasks) > SHOWN + 1 else []
        if self.phase:
            self._spinner.update(text=self.phase)
            parts.append(self._spinner)
        parts += [self.grid] if self.grid is not None else []
        parts += [Text(self.state)] if self.state else []
        yield Constrain(Group(*parts), WIDTH)
