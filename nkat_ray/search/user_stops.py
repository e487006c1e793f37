"""End the trials that the user names while the run is in progress (`nkat stop`, docs/spec.md section 6.1)."""

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Final

import ray
from ray.tune.experiment import Trial

from nkat_ray.record.journal import RunState, TrialRecord
from nkat_ray.record.requests import requested_stops
from nkat_ray.search.stops import Stop, leave_on_trial

POLL_S: Final = 2.0
STOPPED: Final = Stop("user", "stopped with nkat stop")  # no epoch: a result can still be on its way to the driver


class UserStops:
    """Read the requests in a run's folder, and end the trials that they name.

    A trial that trains ends at once, inside its epoch: its process is killed, which frees its slot, and the reason lies
    on Tune's trial for the recorder. A trial that waits for its slot ends when it has it. A request stays until the
    end is in the journal, so that the next driver acts on one that this driver did not live to fulfil.
    """

    def __init__(self, folder: Path, state: RunState) -> None:
        self._folder, self._state, self._next_s = folder, state, 0.0

    def stop(self, record: TrialRecord) -> Stop | None:
        """Return why a trial ends that no process trains; None without a request."""
        return STOPPED if record.trial in requested_stops(self._folder) else None

    def act(self, trials: Iterable[Trial]) -> None:
        """End Tune's trials that are to stop, every two seconds, and remove the requests that are fulfilled."""
        if time.monotonic() < self._next_s:
            return
        self._next_s = time.monotonic() + POLL_S
        for number, file in requested_stops(self._folder).items():
            record = self._state.trials.get(number)
            if record is not None and record.ended:
                file.unlink(missing_ok=True)
                continue
            for trial in trials:
                if trial.config["trial"] == number and trial.status == Trial.RUNNING and record is not None:
                    _kill(trial)


def _kill(trial: Trial) -> None:
    """Kill a trial's process; Tune then reports an error that is not tried again."""
    leave_on_trial(trial, STOPPED)
    trial.max_failures = 0
    if trial.temporary_state.ray_actor is not None:
        ray.kill(trial.temporary_state.ray_actor)
