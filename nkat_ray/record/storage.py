"""The storage of a run: a local folder, and its copy in a bucket if the storage path is one.

Optuna's journal, TensorBoard's event files and the run's own journal must be local. With a bucket as storage path, they
are in a local folder that is copied into the bucket during the run and at its end; `--resume` fetches it from there.
"""

import hashlib
import tempfile
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow.fs
from filelock import FileLock, Timeout

from nkat_ray.data.cache import user_cache
from nkat_ray.errors import UserError
from nkat_ray.fields import place_fault
from nkat_ray.files import CONFIG_FILE, JOURNAL_FILE, is_own, nearest_existing

LOCK_FILE = "driver.lock"
TUNE_FOLDER = "tune"


@dataclass(frozen=True)
class RunStorage:
    """The storage of one run."""

    local: Path  # folder of the files that must be local
    remote: str | None  # URI of its copy in a bucket; None if the storage path is a folder
    _pushed: dict[str, tuple[int, int]] = field(default_factory=dict, compare=False, repr=False)  # size, mtime

    @property
    def tune_folder(self) -> str:
        """Folder or URI for Tune's trials and checkpoints, which every node must be able to access."""
        return f"{self.remote}/{TUNE_FOLDER}" if self.remote else str(self.local / TUNE_FOLDER)

    def exists(self) -> bool:
        """Return whether a run was started here."""
        if self.remote is None:
            return self.local.exists() and any(p.name != LOCK_FILE for p in self.local.iterdir())
        return bool(_info(f"{self.remote}/{CONFIG_FILE}").type == pyarrow.fs.FileType.File)

    def push(self) -> None:
        """Copy files that changed since the last call into the bucket; do nothing without a bucket.

        Raises:
            OSError: the bucket is unreachable.
        """
        if self.remote is None:
            return
        filesystem, path = pyarrow.fs.FileSystem.from_uri(self.remote)
        filesystem.create_dir(path, recursive=True)
        for file in sorted(self.local.rglob("*")):
            inside = file.relative_to(self.local)
            if not file.is_file() or not _is_copied(inside):
                continue
            state = file.stat()
            if self._pushed.get(str(inside)) != (state.st_size, state.st_mtime_ns):
                filesystem.create_dir(f"{path}/{inside.parent.as_posix()}", recursive=True)
                pyarrow.fs.copy_files(str(file), f"{path}/{inside.as_posix()}", destination_filesystem=filesystem)
                self._pushed[str(inside)] = (state.st_size, state.st_mtime_ns)

    def pull(self) -> None:
        """Fetch a run's files from its bucket, unless the local journal is at least as long (it only grows).

        Raises:
            RunHeld: a live driver on this machine uses them.
        """
        if self.remote is None or not self.exists():
            return
        filesystem, path = pyarrow.fs.FileSystem.from_uri(self.remote)
        found = filesystem.get_file_info(pyarrow.fs.FileSelector(path, recursive=True, allow_not_found=True))
        listed = [info for info in found if info.type == pyarrow.fs.FileType.File]
        files = {str(PurePosixPath(info.path).relative_to(path)): info for info in listed}
        with self.lock():
            journal = self.local / JOURNAL_FILE
            if journal.exists() and journal.stat().st_size >= getattr(files.get(JOURNAL_FILE), "size", 0):
                return
            for inside, info in files.items():
                if _is_copied(Path(inside)):
                    (self.local / inside).parent.mkdir(parents=True, exist_ok=True)
                    pyarrow.fs.copy_files(info.path, str(self.local / inside), source_filesystem=filesystem)

    def lock(self) -> AbstractContextManager[Any]:
        """Lock the run's folder for this driver, until the end of a `with` block.

        Raises:
            RunHeld: another live driver uses the run.
        """
        self.local.mkdir(parents=True, exist_ok=True)
        try:
            return FileLock(self.local / LOCK_FILE).acquire(timeout=0)  # `with` on the lock itself would acquire twice
        except Timeout as error:
            raise RunHeld(
                f"{self.local} is in use by another live driver; wait for it to end, or choose another --name"
            ) from error


class RunHeld(UserError):
    """Another live driver uses the run."""


def run_storage(storage_path: str, name: str) -> RunStorage:
    """Return the storage of the run called `name`."""
    if is_uri(storage_path):
        remote = f"{storage_path.rstrip('/')}/{name}"
        digest = hashlib.sha256(remote.encode()).hexdigest()[:12]  # the same name in another bucket is another run
        return RunStorage(user_cache() / "runs" / f"{name}-{digest}", remote)
    return RunStorage((Path(storage_path).expanduser() / name).absolute(), None)


def find_run(run: str, storage_path: str) -> Path | None:
    """Return the folder of a run, given by its name under the storage path or by its path; None if there is none."""
    folder = Path(run).expanduser()
    if "/" not in run:
        storage = run_storage(storage_path, run)
        storage.pull()
        folder = storage.local if storage.local.is_dir() or not folder.is_dir() else folder
    return None if is_uri(run) or not folder.is_dir() else folder.absolute()


def newest_run(storage_path: str) -> str | None:
    """Return the name of the newest run; None if there is none."""
    if is_uri(storage_path):
        filesystem, path = pyarrow.fs.FileSystem.from_uri(storage_path)
        folders = filesystem.get_file_info(pyarrow.fs.FileSelector(path, allow_not_found=True))  # not their checkpoints
        names = [Path(info.path).name for info in folders]
        configs = filesystem.get_file_info([f"{path}/{name}/{CONFIG_FILE}" for name in names])
        found = [(i.mtime, n) for i, n in zip(configs, names, strict=True) if i.type == pyarrow.fs.FileType.File]
        return max(found)[1] if found else None
    runs = Path(storage_path).expanduser().glob(f"*/{CONFIG_FILE}")
    newest = max(runs, key=lambda path: path.stat().st_mtime, default=None)
    return newest.parent.name if newest else None


def check_writable(storage_path: str) -> None:
    """Refuse (UserError) a storage path that cannot be reached or written."""
    if is_uri(storage_path):
        try:
            _info(storage_path)
        except (OSError, ValueError) as error:
            raise UserError(
                f"storage_path is {storage_path!r}; it cannot be reached ({error}); check URI and credentials"
            ) from error
        return
    existing = existing_folder(storage_path)
    try:  # permissions alone are not enough: root, /proc, a read-only file system, a full disk
        tempfile.TemporaryDirectory(dir=existing).cleanup()
    except OSError as error:
        raise UserError(
            f"storage_path is {storage_path!r}; {existing} cannot be written ({error.strerror}); "
            "choose another --storage_path"
        ) from error


def existing_folder(storage_path: str) -> Path:
    """Return the folder that a storage path names, or the nearest one above it that exists.

    Raises:
        UserError: a file is in the way, or a name is too long or not in UTF-8.
    """
    try:
        path = Path(storage_path).expanduser().absolute()  # the current folder has names, too
        existing = nearest_existing(path)
    except (OSError, RuntimeError) as error:  # RuntimeError: no home of that user
        fault = getattr(error, "strerror", None) or str(error)
        raise UserError(f"storage_path is {storage_path!r}; {fault}; choose another --storage_path") from error
    if fault := place_fault(str(path)):
        raise UserError(f"storage_path is {storage_path!r}, {str(path)!r}; {fault}")
    if not existing.is_dir():
        raise UserError(f"storage_path is {storage_path!r}; {existing} is no folder; choose another --storage_path")
    return existing


def check_owner(folder: Path) -> None:
    """Refuse (UserError) the folder of another user, since its files determine what this process loads."""
    if not is_own(folder):
        raise UserError(f"{folder} belongs to user {folder.stat().st_uid}, not to you; only your own runs are resumed")


def _is_copied(inside: Path) -> bool:
    """Return whether to copy a file of a run's folder into the bucket; Tune copies its own files."""
    return inside.parts[0] != TUNE_FOLDER and not inside.name.startswith(".") and inside.name != LOCK_FILE


def is_uri(storage_path: str) -> bool:
    """Return whether the storage path is a bucket or another URI."""
    return "://" in storage_path


def _info(uri: str) -> pyarrow.fs.FileInfo:
    filesystem, path = pyarrow.fs.FileSystem.from_uri(uri)
    return filesystem.get_file_info(path)
