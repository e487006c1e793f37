"""Provide what a local Ray instance needs on this machine: a folder with a short path, and a token.

Ray's defaults are `$TMPDIR/ray`, which may belong to another user or be too long for the names of sockets, and
`~/.ray/auth_token`, which needs a writable home.
"""

import contextlib
import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from filelock import FileLock, Timeout

from nkat_ray.errors import UserError
from nkat_ray.fields import place_fault
from nkat_ray.files import is_own

PREFIX: Final = "nkat-"
LOCK_FILE: Final = "driver.lock"
LONGEST_SOCKET: Final = 107 if sys.platform == "linux" else 103  # bytes of a socket's path; macOS allows fewer
RAYS_PART: Final = len("/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store")
OWN_PART: Final = len(f"/{PREFIX}") + 8  # of a folder that tempfile names
LONGEST_PLACE: Final = LONGEST_SOCKET - RAYS_PART - OWN_PART
USUAL_PLACES: Final = ("/tmp", "/var/tmp")


def place_for_ray() -> Path:
    """Choose the folder for a local instance's sockets, logs and spilled objects.

    $RAY_TMPDIR if it is set, else the first of $TMPDIR, /tmp and /var/tmp that is writable and short enough.

    Raises:
        UserError: there is none (states the reason for each), or Ray cannot start in the current folder.
    """
    here = str(Path.cwd())
    if fault := place_fault(here):
        raise UserError(f"the current folder is {here!r}; {fault}")
    typed = os.environ.get("RAY_TMPDIR")
    places = [typed] if typed else list(dict.fromkeys([tempfile.gettempdir(), *USUAL_PLACES]))
    reasons = {place: _unfit(Path(place)) for place in places}
    for place, reason in reasons.items():
        if reason is None:
            return Path(place)
    said = ", ".join(f"{place} {reason}" for place, reason in reasons.items())
    raise UserError(
        f"a local Ray instance needs a folder for its sockets: {said}; set RAY_TMPDIR to a writable folder of at most "
        f"{LONGEST_PLACE} bytes"
    )


def _unfit(place: Path) -> str | None:
    """Return why Ray cannot use a folder; None if it can."""
    if len(os.fsencode(place)) > LONGEST_PLACE and sys.platform != "win32":  # Ray uses no such sockets on Windows
        return f"has {len(os.fsencode(place))} bytes"
    if fault := place_fault(str(place)):
        return fault.removeprefix("it ")
    try:
        tempfile.TemporaryDirectory(dir=place).cleanup()
    except OSError as error:
        return f"cannot be written ({error.strerror})"
    return None


@contextlib.contextmanager
def own_folder() -> Iterator[Path]:
    """Create a folder for one local instance, for the duration of a `with` block.

    After an error the folder is kept, since it contains Ray's logs. Folders that killed drivers left behind are removed
    here.

    Raises:
        UserError: there is no suitable place.
    """
    place = place_for_ray()
    _remove_abandoned(place)
    folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=place))
    fault = False
    try:
        with FileLock(folder / LOCK_FILE):
            yield folder
    except Exception as error:
        fault = not isinstance(error, UserError)
        raise
    finally:
        if not fault:  # after the lock is released, because Windows does not remove open files
            shutil.rmtree(folder, ignore_errors=True)


def _remove_abandoned(place: Path) -> None:
    """Remove this user's folders whose lock is free, because their driver is gone."""
    for lock in place.glob(f"{PREFIX}*/{LOCK_FILE}"):
        with contextlib.suppress(OSError, Timeout):
            if is_own(lock):
                FileLock(lock).acquire(timeout=0).lock.release()
                shutil.rmtree(lock.parent, ignore_errors=True)


def ensure_token() -> None:
    """Set a token for the local instance in the environment, unless the user has one that Ray can read.

    Ray would write a token to `~/.ray/auth_token`, and could not start without a writable home.
    """
    if os.environ.get("RAY_AUTH_MODE", "token") != "token" or "RAY_AUTH_TOKEN" in os.environ:
        return
    file = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or os.path.expanduser("~/.ray/auth_token"))  # noqa: PTH111
    try:
        known = bool(file.read_text(encoding="utf-8").strip())
    except (OSError, UnicodeDecodeError):
        known = False
    if not known:
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
