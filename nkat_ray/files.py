"""Names of a run's files (docs/spec.md section 8), and atomic writing."""

import os
import secrets
import time
from pathlib import Path
from typing import Final

CONFIG_FILE: Final = "config.json"
SUMMARY_FILE: Final = "summary.json"
TRIALS_FILE: Final = "trials.parquet"
CURVES_FILE: Final = "curves.parquet"
STAGE2_FILE: Final = "stage2.parquet"
REPORT_FILE: Final = "report.html"
JOURNAL_FILE: Final = "journal.jsonl"  # the events of the run, from which --resume continues
STUDY_FILE: Final = "optuna_journal.log"  # Optuna's study
ERROR_FILE: Final = "error.log"  # of a fault: the traceback
STOP_FOLDER: Final = "stop"  # requests of `nkat stop`, each named by its trial's number
TENSORBOARD_FOLDER: Final = "tensorboard"
STAGE2_FOLDER: Final = "stage2"  # weights of each survivor on each dataset
BEST_FOLDER: Final = "best"  # the winner as it was trained on CIFAR-10
WEIGHTS_FILE: Final = "weights.safetensors"

REPLACE_PAUSES_S: Final = (0.1, 0.2, 0.4, 0.8)


def write_atomically(path: Path, data: bytes | memoryview) -> None:
    """Write a file so that a reader sees the old one or the new one, never a part.

    Raises:
        OSError: the disk is full or not writable; the old file is untouched and no part is left behind.
    """
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with part.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        _replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _replace(part: Path, path: Path) -> None:
    """Replace a file; on Windows wait up to 1.5 s for a reader (TensorBoard, a virus scanner) to close it."""
    for pause_s in REPLACE_PAUSES_S:
        try:
            os.replace(part, path)
            return
        except PermissionError:
            time.sleep(pause_s)
    os.replace(part, path)


def nearest_existing(path: Path) -> Path:
    """Return a path if it exists, else the nearest folder above it that does."""
    return next(place for place in (path, *path.parents) if place.exists())


def without_cut_line(path: Path) -> Path:
    """Drop the last line of a file, which may be missing, if a kill has cut it short; return the path."""
    if path.exists():
        data = path.read_bytes()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            os.truncate(path, whole)
    return path


def is_own(path: Path) -> bool:
    """Return whether a file belongs to this user; always True on Windows, which has no user ids."""
    return not hasattr(os, "getuid") or path.stat().st_uid == os.getuid()
