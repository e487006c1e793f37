"""The user's cache: its folder, the lock for downloads, and the results of earlier checks."""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import platformdirs
from filelock import FileLock, Timeout

from nkat_ray.data.dataset import Shape, SplitName, Unavailable
from nkat_ray.errors import UserError
from nkat_ray.files import is_own, write_atomically

MEMORY_VERSION: Final = 2  # increase it when the checks change, so that files are checked again
LOCK_WAIT_S: Final = 3600.0  # longest wait for another download, which may be slow


def user_cache() -> Path:
    """Return this user's cache folder; without a home, a private folder in the temporary one.

    Raises:
        UserError: there is no home, and the private folder belongs to another user.
    """
    try:
        return platformdirs.user_cache_path("nkat-ray")
    except RuntimeError:  # a container's user without a home and without an entry
        folder = Path(tempfile.gettempdir()) / f"nkat-ray-{getattr(os, 'getuid', int)()}"
        folder.mkdir(mode=0o700, exist_ok=True)
        if not is_own(folder):
            raise UserError(f"{folder} belongs to another user; set XDG_CACHE_HOME to a folder of your own") from None
        return folder


def cache_folder() -> Path:
    """Return the folder of downloaded datasets and of results of checks (XDG_CACHE_HOME moves it on Linux)."""
    return user_cache() / "data"


@dataclass(frozen=True)
class Check:
    """The result of checking all files of a dataset, which were intact and consistent."""

    contents: Mapping[SplitName, str]  # SHA-256 of each split, decoded
    sizes: Mapping[SplitName, int]  # number of images
    shape: Shape  # shape of every image
    files: dict[str, str] = field(default_factory=dict)  # SHA-256 of each Parquet file, by its name


class Memory:
    """Results of earlier checks, by path, size and modification time, in a small JSON file of the cache.

    If the cache cannot be read or written, the files are simply checked again.
    """

    def __init__(self, folder: Path, *, fresh: bool = False) -> None:
        self._file = folder / "checked.json"
        self._fresh = fresh  # recall nothing, so that everything is checked again

    def recall(self, files: Sequence[Path]) -> Check | None:
        """Return the earlier result for exactly these files, or None."""
        place, state = _key(files)
        entry = {} if self._fresh else self._read().get(place, {})
        try:
            check = entry["check"] if entry["state"] == state else None
            return check and Check(**{**check, "shape": tuple(check["shape"])})
        except (KeyError, TypeError):
            return None  # no entry, or one of another version

    def remember(self, files: Sequence[Path], check: Check) -> None:
        """Store a result, replacing an older one of the same files."""
        with suppress(OSError, Timeout):
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(self._file.with_suffix(".lock"), timeout=5):
                place, state = _key(files)
                entries = self._read() | {place: {"state": state, "check": asdict(check)}}
                write_atomically(self._file, json.dumps(entries, indent=1).encode())

    def _read(self) -> dict[str, Any]:
        try:
            entries = json.loads(self._file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return {}
        return entries if isinstance(entries, dict) else {}


def _key(files: Sequence[Path]) -> tuple[str, str]:
    """Return the location of files, and a digest of their names, sizes and modification times."""
    stats = [(str(file), (stat := file.stat()).st_size, stat.st_mtime_ns) for file in files]
    return str(files[0].resolve()), hashlib.sha256(repr((MEMORY_VERSION, stats)).encode()).hexdigest()


@contextmanager
def fetch_lock(folder: Path, name: str) -> Iterator[None]:
    """Let one process per machine fetch dataset `name`; the others wait for it.

    Raises:
        Unavailable: the cache cannot be written, or another process had the lock for an hour.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / f"{name}.lock", timeout=LOCK_WAIT_S)
        lock.acquire()
    except Timeout as error:
        raise Unavailable(f"another process has been fetching it into {folder} for {LOCK_WAIT_S:.0f} s") from error
    except OSError as error:
        raise Unavailable(f"the cache {folder} cannot be written ({error.strerror})") from error
    try:
        yield
    finally:
        lock.release()
