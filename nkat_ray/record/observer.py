"""The interface of a run's observers, such as the display, TensorBoard and the snapshots of the tables."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any


class Observer:
    """Observe a run. Every method does nothing unless a subclass overrides it.

    Methods are called from the driver's main thread, in the order of the events, after each event is in the journal.
    Rows have the columns of docs/spec.md section 8.
    """

    def on_stage1_start(self, total: int, ended: Sequence[Mapping[str, Any]]) -> None:
        """Handle the start of Stage 1.

        Args:
            total: number of trials.
            ended: rows of trials.parquet of the trials that earlier drivers ended.
        """

    def on_trial_start(self, trial: int, params: Mapping[str, Any]) -> None:
        """Handle the start of a trial, or its restart after an error."""

    def on_epoch(self, trial: int, row: Mapping[str, Any]) -> None:
        """Handle an epoch that a trial has reported."""

    def on_survivor(self, trial: int) -> None:
        """Handle a trial that has reached the gate for the first time."""

    def on_trial_end(self, trial: int, row: Mapping[str, Any]) -> None:
        """Handle the end of a trial; `row` is its row of trials.parquet."""

    def on_stage2_start(
        self, survivors: Sequence[int], datasets: Sequence[str], done: Sequence[Mapping[str, Any]]
    ) -> None:
        """Handle the start of Stage 2, which validates and then tests every survivor on every dataset.

        Args:
            done: finished rows of stage2.parquet, one per validation and one per test.
        """

    def on_stage2_row(self, row: Mapping[str, Any]) -> None:
        """Handle a validation or a test of a survivor; `row` is its row of stage2.parquet."""

    def on_tick(self) -> None:
        """Do periodic work: called several times per second in Stage 1, about once per second in Stage 2."""

    def on_notice(self, text: str) -> None:
        """Handle a notice, one line for the user."""


class Observers(Observer):
    """Pass each event to several observers, in order."""

    def __init__(self, observers: Iterable[Observer]) -> None:
        self._observers = tuple(observers)


def _to_all(name: str) -> Callable[..., None]:
    def forward(self: Observers, *arguments: Any) -> None:
        for observer in self._observers:
            getattr(observer, name)(*arguments)

    return forward


for _name in [name for name in vars(Observer) if name.startswith("on_")]:
    setattr(Observers, _name, _to_all(_name))
