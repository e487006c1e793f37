"""A run's folder: local files, and their copy in a bucket where the storage path is one.

Optuna's journal file, TensorBoard's event files and the run's own journal must be local. With a bucket as storage path
they lie in a local folder that is copied up at snapshots and at the end, and fetched first by `--resume`.
"""

import hashlib
import os
import shutil
import tempfile
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import platformdirs
import pyarrow.fs
from filelock import FileLock, Timeout

from nkat_ray.files import CONFIG_FILE, JOURNAL_FILE

LOCK_FILE = "driver.lock"
TUNE_FOLDER = "tune"


@dataclass(frozen=True)
class RunStorage:
    """Where one run lives.

    Attributes:
        local: folder of the files that must be local.
        remote: URI that mirrors it; None where the storage path is a folder.
    """

    local: Path
    remote: str | None
    _pushed: dict[str, tuple[int, int]] = field(default_factory=dict, compare=False, repr=False)  # size, mtime

    @property
    def tune_folder(self) -> str:
        """Where Tune writes trials and checkpoints: every node must reach it."""
        return f"{self.remote}/{TUNE_FOLDER}" if self.remote else str(self.local / TUNE_FOLDER)

    def exists(self) -> bool:
        """Whether a run was begun here."""
        if self.remote is None:
            return self.local.exists() and any(p.name != LOCK_FILE for p in self.local.iterdir())
        return bool(_info(f"{self.remote}/{CONFIG_FILE}").type == pyarrow.fs.FileType.File)

    def push(self) -> None:
        """Copy up what has changed since the last time."""
        if self.remote is None:
            return
        filesystem, path = pyarrow.fs.FileSystem.from_uri(self.remote)
        filesystem.create_dir(path, recursive=True)
        for file in sorted(self.local.rglob("*")):
            inside = file.relative_to(self.local)
            if not file.is_file() or not _is_mirrored(inside):
                continue
            state = file.stat()
            if self._pushed.get(str(inside)) != (state.st_size, state.st_mtime_ns):
                filesystem.create_dir(f"{path}/{inside.parent}", recursive=True)
                pyarrow.fs.copy_files(str(file), f"{path}/{inside}", destination_filesystem=filesystem)
                self._pushed[str(inside)] = (state.st_size, state.st_mtime_ns)

    def pull(self) -> None:
        """Fetch the mirrored files, unless the local ones go further: the journal only ever grows.

        Raises:
            RunHeld: a live driver on this machine works on them.
        """
        if self.remote is None:
            return
        filesystem, path = pyarrow.fs.FileSystem.from_uri(self.remote)
        found = filesystem.get_file_info(pyarrow.fs.FileSelector(path, recursive=True, allow_not_found=True))
        mirrored = {os.path.relpath(info.path, path): info for info in found if info.type == pyarrow.fs.FileType.File}
        with self.lock():
            journal = self.local / JOURNAL_FILE
            if journal.exists() and journal.stat().st_size >= getattr(mirrored.get(JOURNAL_FILE), "size", 0):
                return
            for inside, info in mirrored.items():
                if _is_mirrored(Path(inside)):
                    (self.local / inside).parent.mkdir(parents=True, exist_ok=True)
                    pyarrow.fs.copy_files(info.path, str(self.local / inside), source_filesystem=filesystem)

    def remove(self) -> None:
        """Remove the run, here and in the bucket."""
        shutil.rmtree(self.local, ignore_errors=True)
        if self.remote is not None:
            filesystem, path = pyarrow.fs.FileSystem.from_uri(self.remote)
            filesystem.delete_dir(path)

    def lock(self) -> AbstractContextManager[Any]:
        """Hold the run's folder for this driver, until the end of a `with` block.

        Raises:
            RunHeld: another live driver holds it.
        """
        self.local.mkdir(parents=True, exist_ok=True)
        try:
            return FileLock(self.local / LOCK_FILE).acquire(timeout=0)  # a lock itself would be taken twice by `with`
        except Timeout as error:
            raise RunHeld(
                f"{self.local} is held by another live driver; wait for it to end, or choose another --name"
            ) from error


class RunHeld(ValueError):
    """Another live driver works on the run."""


def run_storage(storage_path: str, name: str) -> RunStorage:
    """Where the run called `name` lives."""
    if is_uri(storage_path):
        remote = f"{storage_path.rstrip('/')}/{name}"
        digest = hashlib.sha256(remote.encode()).hexdigest()[:12]  # runs of one name in two buckets are two runs
        return RunStorage(Path(platformdirs.user_cache_dir("nkat-ray")) / "runs" / f"{name}-{digest}", remote)
    return RunStorage((Path(storage_path).expanduser() / name).absolute(), None)


def newest_run(storage_path: str) -> str | None:
    """Name of the run that was begun last; None if there is none."""
    if is_uri(storage_path):
        filesystem, path = pyarrow.fs.FileSystem.from_uri(storage_path)
        infos = filesystem.get_file_info(pyarrow.fs.FileSelector(path, recursive=True, allow_not_found=True))
        parts = [(info.mtime, Path(os.path.relpath(info.path, path)).parts) for info in infos]
        found = [(mtime, inside[0]) for mtime, inside in parts if inside[1:] == (CONFIG_FILE,)]  # not best/config.json
        return max(found)[1] if found else None
    runs = Path(storage_path).expanduser().glob(f"*/{CONFIG_FILE}")
    newest = max(runs, key=lambda path: path.stat().st_mtime, default=None)
    return newest.parent.name if newest else None


def check_writable(storage_path: str) -> None:
    """Refuse a storage path that cannot be written, before anything is.

    Raises:
        ValueError: says which path, and what to do.
    """
    if is_uri(storage_path):
        try:
            _info(storage_path)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"storage_path is {storage_path!r}; it cannot be reached ({error}); check URI and credentials"
            ) from error
        return
    path = Path(storage_path).expanduser().absolute()
    existing = next(parent for parent in (path, *path.parents) if parent.exists())
    try:  # permissions alone do not tell: root, /proc, a read-only file system, a full disk
        tempfile.TemporaryDirectory(dir=existing).cleanup()
    except OSError as error:
        raise ValueError(
            f"storage_path is {storage_path!r}; {existing} cannot be written ({error.strerror}); "
            "choose another --storage_path"
        ) from error


def check_owner(folder: Path) -> None:
    """Refuse the folder of another user: its files decide what this process loads.

    Raises:
        ValueError: it belongs to somebody else.
    """
    owner = folder.stat().st_uid
    if owner != os.getuid():
        raise ValueError(
            f"{folder} belongs to user {owner}, not to you ({os.getuid()}); only your own runs are resumed"
        )


def _is_mirrored(inside: Path) -> bool:
    """Whether a file below a run's folder belongs into the bucket: not Tune's (it writes there itself), nor the
    lock."""
    return inside.parts[0] != TUNE_FOLDER and not inside.name.startswith(".") and inside.name != LOCK_FILE


def is_uri(storage_path: str) -> bool:
    """Whether the storage path is a bucket or another URI."""
    return "://" in storage_path


def _info(uri: str) -> pyarrow.fs.FileInfo:
    filesystem, path = pyarrow.fs.FileSystem.from_uri(uri)
    return filesystem.get_file_info(path)
