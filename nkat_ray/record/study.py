"""The file with the Optuna study of a run."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import optuna
    from optuna.storages import JournalStorage


def open_study_file(path: Path) -> "JournalStorage":
    """Open the file with a run's study, in Optuna's journal format.

    The lock is a file that is created exclusively. Optuna's default lock is a symbolic link, which Windows allows only
    in developer mode and some file systems do not support. The format of the study is the same.
    """
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

    return JournalStorage(JournalFileBackend(str(path), JournalFileOpenLock(str(path))))


def load_study(path: Path) -> "optuna.Study | None":
    """Load a run's Optuna study without writing anything; None if there is none yet."""
    import optuna

    if not path.exists():  # to open it would make it
        return None
    storage = open_study_file(path)
    names = optuna.get_all_study_names(storage)
    return optuna.load_study(study_name=names[-1], storage=storage) if names else None
