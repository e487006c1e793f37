"""Requests to a run in progress: files in its folder, by which `nkat stop` asks the driver to end a trial."""

from pathlib import Path

from nkat_ray.files import STOP_FOLDER, write_atomically


def request_stop(folder: Path, trial: int) -> None:
    """Ask the driver of a run to end a trial."""
    (folder / STOP_FOLDER).mkdir(exist_ok=True)
    write_atomically(folder / STOP_FOLDER / str(trial), b"")


def requested_stops(folder: Path) -> dict[int, Path]:
    """Return the files of the requests in a run's folder, by the trials' numbers."""
    files = (folder / STOP_FOLDER).glob("[0-9]*")
    return {int(file.name): file for file in files if file.name.isascii() and file.name.isdecimal()}
