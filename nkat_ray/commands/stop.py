"""`nkat stop`: end one trial of a run in progress."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from nkat_ray.config import ScreenConfig
from nkat_ray.errors import DONE, UserError
from nkat_ray.fields import Place, Positional, Range
from nkat_ray.files import CONFIG_FILE
from nkat_ray.flags import Program
from nkat_ray.record.journal import read_state
from nkat_ray.record.requests import request_stop
from nkat_ray.record.storage import RunHeld, RunStorage, is_uri, run_storage
from nkat_ray.report.terminal import Screen, screen_of


@dataclass(frozen=True, kw_only=True)
class StopConfig(ScreenConfig):
    """Which trial ends."""

    run: Annotated[str, Positional(), Place()]
    """Folder or bucket URI of the run. A run in a bucket is stopped on the machine of its driver."""
    trial: Annotated[int, Positional(), Range(ge=0)]
    """Number of the trial."""


PROGRAM = Program(
    name="nkat stop",
    config=StopConfig,
    summary="Stop one trial of a run in progress. Its curve counts; if it has passed the gate, it is a survivor.",
    examples=("nkat stop runs/quick-20260101-120000 3",),
)


def main(argv: Sequence[str]) -> int:
    """Request the end of the trial that the command line names; return the exit code."""
    config = PROGRAM.configured(argv)
    with screen_of(config) as screen:
        return stop(config, screen)


def stop(config: StopConfig, screen: Screen) -> int:
    """Leave the request in the run's folder, where its driver finds it within two seconds; exit code 0.

    Raises:
        UserError: there is no such run or trial, the run is not in progress, or the trial has ended.
    """
    folder = _folder_of_driven(config.run)
    trials = read_state(folder).trials
    record = trials.get(config.trial)
    if record is None or record.ended:
        why = "the run has no such trial" if record is None else f"it has ended ({record.stop_reason})"
        under_way = ", ".join(str(number) for number, other in trials.items() if not other.ended)
        raise UserError(f"trial is {config.trial}; {why}; under way: {under_way or 'none'}")
    request_stop(folder, config.trial)
    line = f"trial {config.trial} of {folder.name} ends in a few seconds, with the stop reason user"
    screen.print(line, markup=False, highlight=False, soft_wrap=True)
    screen.conclude({"run": folder.absolute(), "trial": config.trial}, [line])
    return DONE


def _folder_of_driven(run: str) -> Path:
    """Return the local folder of a run; raise a UserError if there is none, or if no driver works on it."""
    missing = f"that folder holds no run ({CONFIG_FILE} is missing)"
    idle = "it is not in progress: no driver works on it; --resume continues a run that was interrupted"
    storage = RunStorage(Path(run), None)
    if is_uri(run):
        missing = idle = "no driver of it works on this machine; type the command on its driver's machine"
        parent, _, name = run.rstrip("/").rpartition("/")
        storage = run_storage(parent, name)
    if not (storage.local / CONFIG_FILE).is_file():
        raise UserError(f"run is {run!r}; {missing}")
    try:
        with storage.lock():
            pass
    except RunHeld:
        return storage.local
    raise UserError(f"run is {run!r}; {idle}")
