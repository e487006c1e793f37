"""The command line: `nkat COMMAND` and tune_round2.py. Dispatch, error messages, and exit codes.

Bad input (a UserError) ends with one line and exit code 2, before torch or Ray is loaded. Anything else is a fault:
exit code 1, one line, and the path of a log with the traceback.
"""

import errno
import importlib
import os
import sys
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path

from nkat_ray import __version__
from nkat_ray.errors import BAD_INPUT, DONE, FAULT, INTERRUPTED, UserError, one_line, suggestion

PATH_FAULTS = {
    errno.EACCES, errno.EEXIST, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENOENT, errno.ENOTDIR, errno.EPERM,
    errno.EROFS,
}  # fmt: skip
COMMANDS = {
    "tune": "Search: Stage 1 on CIFAR-10, the gate, Stage 2 on four datasets, the report.",
    "train": "Train one configuration on one dataset, without Ray.",
    "evaluate": "Run Stage 2 alone, on a run's survivors or on one model.",
    "simulate": "Show what the targets demand under each lambda, and where the notes contradict themselves.",
    "report": "Write the report of a run again, or compare several runs.",
    "stop": "Stop one trial of a run in progress.",
    "explain": "Show what a trained network attends to, on one page.",
    "data": "List, fetch, verify and import datasets.",
    "doctor": "Check a machine or a cluster before a run.",
}


def tune(argv: Sequence[str]) -> int:
    """Run `nkat tune`, which tune_round2.py calls; return the exit code."""
    return _guarded("tune", argv)


def main() -> None:
    """Run the console script `nkat`."""
    name, *argv = sys.argv[1:] or [""]
    sys.exit(_guarded(name, argv))


def run_command(name: str, argv: Sequence[str]) -> int:
    """Run a command by name; return its exit code.

    Raises:
        UserError: there is no such command, or its flags are not allowed.
        SystemExit: the help was printed.
    """
    if name in ("", "-h", "--help", "--version"):
        print(f"nkat-ray {__version__}" if name == "--version" else _usage())
        return DONE if name else BAD_INPUT
    if name not in COMMANDS:
        near = suggestion(name, COMMANDS)
        raise UserError(f"there is no command {name!r}{near or '; allowed: ' + ', '.join(COMMANDS)}")
    code: int = importlib.import_module(f"nkat_ray.commands.{name}").main(argv)
    return code


def _usage() -> str:
    lines = [f"  {name:<10}{summary}" for name, summary in COMMANDS.items()]
    return "\n".join(["usage: nkat COMMAND [flags]; `nkat COMMAND --help` shows the flags", "", *lines])


def _guarded(name: str, argv: Sequence[str]) -> int:
    """Run a command, and convert every way in which it can end to an exit code."""
    try:
        try:
            code = run_command(name, argv)
        except SystemExit as ended:  # after `--help`
            code = int(ended.code or DONE)
        sys.stdout.flush()  # here, where a reader that has left is no error
        return code
    except BrokenPipeError:  # `nkat ... | head`: the reader has left
        from nkat_ray.report.terminal import discard_output

        discard_output()
        return DONE
    except UserError as error:
        _say_error(" ".join(str(error).split()))
        return BAD_INPUT
    except KeyboardInterrupt:
        _say_error("interrupted")
        return INTERRUPTED
    except OSError as error:
        if not _is_about_typed_path(error, argv):
            return _log_fault()
        _say_error(f"{os.fspath(error.filename)!r}: {error.strerror}; choose another path")
        return BAD_INPUT
    except Exception:
        return _log_fault()


def _is_about_typed_path(error: OSError, argv: Sequence[str]) -> bool:
    """Return whether the error means that a typed path, or one above or below it, cannot be used (not a full disk)."""
    if error.errno not in PATH_FAULTS or not isinstance(error.filename, str | os.PathLike):
        return False
    failed = Path(error.filename).absolute()
    words = [word.rpartition("=")[2] for word in argv if "\0" not in word]
    paths = [Path(word).absolute() for word in words]
    named = any(word in failed.parts for word in words)
    return named or any(failed.is_relative_to(path) or path.is_relative_to(failed) for path in paths)


def _log_fault() -> int:
    """Report an internal error of a command that has no run folder: print one line, write the traceback to a file."""
    text = traceback.format_exc()
    handle, log = tempfile.mkstemp(prefix="nkat-", suffix=".log")
    with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
        file.write(text)
    _say_error(f"{one_line(text)}; the log is {log}")
    return FAULT


def _say_error(text: str) -> None:
    from rich.console import Console

    Console(stderr=True).print(f"error: {text}", style="bold red", markup=False, highlight=False, soft_wrap=True)
