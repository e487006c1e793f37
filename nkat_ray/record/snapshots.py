"""Observers that write during a run: notices, tables, and the copy of the run's folder in a bucket."""

import time
from collections.abc import Mapping
from typing import Any, Final

from nkat_ray.record.observer import Observer
from nkat_ray.record.run import Run
from nkat_ray.record.summary import write_tables

SNAPSHOT_S: Final = 10.0  # least time between two snapshots of the tables
SNAPSHOT_SHARE: Final = 0.05  # largest fraction of the driver's time for snapshots, which grow with the trials
PUSH_S: Final = 60.0  # between two copies into a bucket: the most that is lost with the head node


class NoticesInJournal(Observer):
    """Write every notice into the journal, for the reports."""

    def __init__(self, run: Run) -> None:
        self._journal = run.journal

    def on_notice(self, text: str) -> None:
        """Write the notice into the journal."""
        self._journal.write("notice", text=text)


class Snapshots(Observer):
    """Write the tables during a run, and copy its folder into its bucket.

    If the disk or the bucket fails, the journal gets a notice, and the next snapshot or copy tries again.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._due_s = 0.0
        self._push_due_s = time.monotonic() + PUSH_S

    def on_trial_end(self, trial: int, row: Mapping[str, Any]) -> None:
        """Take a snapshot if one is due."""
        self._snapshot()

    def on_stage2_row(self, row: Mapping[str, Any]) -> None:
        """Take a snapshot if one is due."""
        self._snapshot()

    def on_tick(self) -> None:
        """Copy the folder every `PUSH_S` seconds, even if no trial ends."""
        if time.monotonic() >= self._push_due_s:
            self._push()

    def _snapshot(self) -> None:
        started_s = time.monotonic()
        if started_s < self._due_s:
            return
        try:
            write_tables(self._run.folder, self._run.config, self._run.state)
        except OSError as error:
            self._notice(error)
        self._push()
        now_s = time.monotonic()
        self._due_s = now_s + max(SNAPSHOT_S, (now_s - started_s) / SNAPSHOT_SHARE)

    def _push(self) -> None:
        try:
            self._run.storage.push()
        except OSError as error:
            self._notice(error)
        self._push_due_s = time.monotonic() + PUSH_S

    def _notice(self, error: OSError) -> None:
        text = f"the run's files could not be written or copied just now ({error})"
        self._run.journal.write("notice", text=text)
