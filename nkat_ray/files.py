"""What the files of a run are called (docs/spec.md section 8), and how one is replaced."""

import os
import secrets
from pathlib import Path
from typing import Final

CONFIG_FILE: Final = "config.json"
SUMMARY_FILE: Final = "summary.json"
TRIALS_FILE: Final = "trials.parquet"
CURVES_FILE: Final = "curves.parquet"
STAGE2_FILE: Final = "stage2.parquet"
REPORT_FILE: Final = "report.html"
JOURNAL_FILE: Final = "journal.jsonl"  # what happened, line by line: what --resume goes on from
STUDY_FILE: Final = "optuna_journal.log"  # Optuna's study
TENSORBOARD_FOLDER: Final = "tensorboard"
STAGE2_FOLDER: Final = "stage2"  # weights of each survivor on each dataset
BEST_FOLDER: Final = "best"  # the winner as it was trained on CIFAR-10
WEIGHTS_FILE: Final = "weights.safetensors"


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
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
