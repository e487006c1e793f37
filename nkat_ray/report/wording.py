"""Build phrases that several parts of the report share."""

import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nkat_ray.record.scoring import Miss, number


def design_label(config: Mapping[str, Any]) -> str:
    """Name a network by what sets its size, in the order stem, patch, width and depth: `tiny p2 384x7`.

    Args:
        config: fields of ModelConfig; of these `conv_stem`, `patch_size`, `embed_dim` and `depth` are needed.
    """
    stem = "no stem" if config["conv_stem"] == "off" else config["conv_stem"]
    return f"{stem} p{config['patch_size']} {config['embed_dim']}x{config['depth']}"


def closest_sentence(miss: Miss, gate: float) -> str:
    """Say how far the trial that came closest is from the gate."""
    lacks = f"{miss.needed - miss.accuracy:.3f} more" if miss.needed <= 1 else "more than 1, which is impossible"
    return (
        f"Trial {miss.trial} is closest to the gate, with an accuracy of {miss.accuracy:.3f}. At its lambda of "
        f"{miss.lambda_theory:.2f} the gate of {gate:.2f} needs {miss.needed:.3f}, {lacks}."
    )


def accuracy_phrase(row: Mapping[str, Any]) -> str:
    """Return a row's test accuracy, or that on the validation images before it is tested."""
    tested = row.get("test_accuracy") is not None
    return f"test {number(row['test_accuracy'])}" if tested else f"validation {number(row.get('val_accuracy'))}"


def after_the_fact(summary: Mapping[str, Any], folder: Path) -> str:
    """Return the command that runs Stage 2 on a run's best trials; empty with survivors, or without kept weights."""
    kept = summary.get("weights_kept")
    if summary["survivors"] or not kept:
        return ""
    return command_line(["nkat", "evaluate", str(folder.absolute()), "--best", str(len(kept))])


def spoken_time(seconds: float) -> str:
    """Format a time in one unit: `40 s`, `12 min`, `3.5 h`, `9 days`."""
    for unit, size, up_to in (("s", 1, 90), ("min", 60, 90 * 60), ("h", 3600, 72 * 3600)):
        if seconds < up_to:
            return f"{seconds / size:.2g} {unit}"
    return f"{seconds / 86400:.3g} days"


def command_line(words: Sequence[str]) -> str:
    """Join the words of a command, quoted for the shells of this system: POSIX, or PowerShell and cmd."""
    return subprocess.list2cmdline(words) if sys.platform == "win32" else shlex.join(words)
