"""The user's cache: its folder, the lock that downloads share, and the memory of checks already made."""

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import platformdirs
from filelock import FileLock, Timeout

from nkat_ray.data.dataset import Unavailable
from nkat_ray.data.parquet import atomic_file

MEMORY_VERSION: Final = 1  # raise it when the checks change, so that files are checked again
LOCK_WAIT_S: Final = 3600.0  # a slow line may need this long for the largest archive


def cache_folder() -> Path:
    """Where fetched datasets and the memory of checks are kept (XDG_CACHE_HOME moves it on Linux)."""
    return platformdirs.user_cache_path("nkat-ray") / "data"


@dataclass(frozen=True)
class Check:
    """The outcome of checking one file: it was whole and consistent."""

    sha256: str
    """Of the file."""
    content: str
    """SHA-256 of the decoded split."""
    known: bool
    """The content is a known release."""


class Memory:
    """Checks already made, by path, size and modification time, in a small JSON file of the cache.

    A cache that cannot be read or written only costs time: the files are checked again.
    """

    def __init__(self, folder: Path, *, fresh: bool = False) -> None:
        self._file = folder / "checked.json"
        self._fresh = fresh  # recall nothing, so that everything is checked anew

    def recall(self, path: Path) -> Check | None:
        """The earlier outcome for exactly this file, or None."""
        entry = None if self._fresh else self._read().get(self._key(path))
        try:
            return Check(**entry) if entry is not None else None
        except TypeError:
            return None  # written by another version

    def remember(self, path: Path, check: Check) -> None:
        """Keep an outcome; forgets older ones of the same path."""
        with suppress(OSError, Timeout):
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(self._file.with_suffix(".lock"), timeout=5), atomic_file(self._file) as temporary:
                prefix = self._key(path).rpartition("|")[0].rpartition("|")[0]
                entries = {key: entry for key, entry in self._read().items() if not key.startswith(f"{prefix}|")}
                entries[self._key(path)] = asdict(check)
                temporary.write_text(json.dumps(entries, indent=1))

    def _read(self) -> dict[str, Any]:
        try:
            entries = json.loads(self._file.read_text())
        except (OSError, ValueError):
            return {}
        return entries if isinstance(entries, dict) else {}

    @staticmethod
    def _key(path: Path) -> str:
        stat = path.stat()
        return f"{MEMORY_VERSION}|{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}"


@contextmanager
def fetch_lock(folder: Path, name: str) -> Iterator[None]:
    """Held by the one process on this machine that fetches dataset `name`; the others wait for it.

    Raises:
        Unavailable: the cache cannot be written, or another process held the lock for an hour.
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
