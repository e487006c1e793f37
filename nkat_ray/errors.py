"""Exit codes (docs/spec.md section 8), the error for bad input, and helpers for messages of one line."""

import difflib
import importlib.metadata
from collections.abc import Iterable
from typing import Final

DONE: Final = 0  # of a search: at least one trial passed the gate, and Stage 2 is done
FAULT: Final = 1  # an internal error, or no dataset of Stage 2 counts
BAD_INPUT: Final = 2
NO_SURVIVOR: Final = 3  # no trial passed the gate
NO_GO: Final = 4  # `nkat train --smoke`
UNHEALTHY: Final = 5  # `nkat doctor` found a fault
INTERRUPTED: Final = 130

RESUMABLE: Final = (None, FAULT, INTERRUPTED)  # of a run; None while it is in progress, or after its driver was killed


class UserError(ValueError):
    """Bad input. The message is one line with the value, the allowed range and what to do; the exit code is 2."""

    def _render_traceback_(self) -> list[str]:
        """Show that line alone in a notebook: IPython calls this instead of printing a traceback."""
        return [f"{type(self).__name__}: {self}"]


def suggestion(word: str, allowed: Iterable[object]) -> str:
    """Return `; did you mean NAME?` if an allowed name is similar to the word, else an empty string."""
    near = difflib.get_close_matches(word, [str(name) for name in allowed], 1)
    return f"; did you mean {near[0]}?" if near else ""


def one_line(error: object) -> str:
    """Shorten an error to its last line with text (in a traceback the exception), 500 characters at most."""
    return _lines(error)[-1][:500]


def first_line(error: object) -> str:
    """Shorten an error to its first line with text, 500 characters at most."""
    return _lines(error)[0][:500]


def _lines(error: object) -> list[str]:
    """Return the lines with text; of an error without text, its type."""
    return [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]


def cuda_build_advice() -> str:
    """Return advice for a machine with a GPU whose PyTorch is a CPU build, as PyPI's is on Windows."""
    found = (f"{name}=={importlib.metadata.version(name).split('+')[0]}" for name in ("torch", "torchvision"))
    command = f"uv pip install --torch-backend=auto --reinstall {' '.join(found)}"
    return f"`{command}` installs the build with CUDA; then type `uv run --no-sync` instead of `uv run`"
