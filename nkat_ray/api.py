"""The Python interface for notebooks and scripts (docs/python.md). It calls what the commands call."""

import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nkat_ray.commands import train as train_command
from nkat_ray.commands import tune as tune_command
from nkat_ray.config import default_storage_path
from nkat_ray.errors import DONE, INTERRUPTED, NO_GO, NO_SURVIVOR, UserError
from nkat_ray.files import BEST_FOLDER, CONFIG_FILE, STUDY_FILE, WEIGHTS_FILE
from nkat_ray.flags import takes_flags
from nkat_ray.record import scoring, tables
from nkat_ray.record.run_folder import load_run
from nkat_ray.record.storage import find_run
from nkat_ray.report.advice import winner_command
from nkat_ray.report.comparison import compare_page
from nkat_ray.report.html import current_report, run_card
from nkat_ray.report.terminal import report_text, screen_of

if TYPE_CHECKING:
    import optuna
    import pandas as pd
    import pyarrow as pa

    from nkat_ray.model import NKATVisionTransformer

__all__ = ["Best", "Run", "UserError", "compare", "runs", "train", "tune"]

COMMAND_LINE_ONLY = ("dry_run", "json")  # flags that print for a terminal, or for other programs


@takes_flags(tune_command.PROGRAM, without=COMMAND_LINE_ONLY)
def tune(**settings: Any) -> "Run":
    """Search in this process: Stage 1, the gate, Stage 2 and the report, as `python tune_round2.py` does.

    Args:
        **settings: the flags of tune_round2.py, by name. Without `preset` it is `round2`, as there. `resume=True`
            continues a run; `quiet=True` shows nothing meanwhile.

    Returns:
        The run, even if no trial has passed the gate.

    Raises:
        UserError: a setting that does not exist or has a value that is not allowed; nothing has been written.
        KeyboardInterrupt: the run was interrupted; the message says how to continue it.
        RuntimeError: an internal fault ended the run; the message names the log.

    Examples:
        >>> run = nkat.tune(preset="quick", num_samples=6, conv_stem="tiny")
        >>> run = nkat.tune(resume=True, name="quick-20260101-120000")
    """
    config, space = tune_command.configured(settings)
    with screen_of(config) as screen:
        code = (tune_command.resume if config.resume else tune_command.start)(config, space, screen)
    run = Run(screen.document["folder"]) if screen.document else None
    if run is not None and code in (DONE, NO_SURVIVOR):
        return run
    own = {"name": config.name if run is None else run.name, "storage_path": config.storage_path}
    words = [f", {name}={value!r}" for name, value in own.items() if value not in (None, default_storage_path())]
    advice = f"continue with nkat.tune(resume=True{''.join(words)})"
    if code == INTERRUPTED:
        raise KeyboardInterrupt(f"the run was interrupted; {advice}")
    raise RuntimeError(f"{'; '.join(screen.faults)}; {advice}")


@takes_flags(train_command.PROGRAM, without=COMMAND_LINE_ONLY)
def train(**settings: Any) -> dict[str, Any]:
    """Train one configuration on one dataset in this process, without Ray, as `nkat train` does.

    Args:
        **settings: the flags of `nkat train`, by name.

    Returns:
        What `nkat train --json` prints: `test_accuracy` with its 95 % interval `ci_low` and `ci_high`, `tpe` by lambda
        model, `folder`, which has the model in `best/`, and more; with `smoke=True` `go` and `val_accuracy`.

    Raises:
        UserError: a setting that does not exist or has a value that is not allowed; nothing has been written.
        RuntimeError: the loss was not finite.

    Examples:
        >>> result = nkat.train(epochs=10, smoke=True)
        >>> result = nkat.train(**run.best.config | {"epochs": 100})
    """
    config = train_command.configured(settings)
    with screen_of(config) as screen:
        code = train_command.train(config, screen)
    if code not in (DONE, NO_GO):
        raise RuntimeError(screen.document["error"])
    return dict(screen.document)


@dataclass(frozen=True)
class Best:
    """The best survivor of a run.

    Attributes:
        trial: its number.
        config: its configuration; `nkat.train(**run.best.config)` trains it again, with another seed.
        scores: on the test images: `global_tpe`, `consistency` and `robustness`; NaN if no dataset counts.
        interval: 95 % interval of Global TPE.
        command: trains it again, with its seed and its data.
    """

    trial: int
    config: dict[str, Any]
    scores: dict[str, float]
    interval: tuple[float, float] | None
    command: str


class Run:
    """A run, as its folder recorded it when this object was made; make a new one for what has happened since.

    Args:
        run: its folder, or its name.
        storage_path: folder or bucket in which a name is looked up; default: $NKAT_STORAGE_PATH, else ./runs.

    Raises:
        UserError: there is no such run, or it is damaged.

    Examples:
        >>> run = nkat.Run("runs/quick-20260101-120000")
        >>> run.trials.sort_values("best_local_tpe").tail()
    """

    def __init__(self, run: str | os.PathLike[str], *, storage_path: str | None = None) -> None:
        where = storage_path or default_storage_path()
        folder = find_run(os.fspath(run), where)
        if folder is None:
            raise UserError(f"run is {os.fspath(run)!r}; there is no such folder, and no run of that name in {where}")
        self._run = load_run(folder)

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return self._run.folder

    @property
    def name(self) -> str:
        """The run's name."""
        return self._run.name

    @property
    def trials(self) -> "pd.DataFrame | pa.Table":
        """One row per trial: the columns of trials.parquet, as pandas' DataFrame, or pyarrow's table without pandas."""
        return tables.frame(self._run.trials, tables.TRIALS_SCHEMA)

    @property
    def curves(self) -> "pd.DataFrame | pa.Table":
        """One row per trial and epoch: the columns of curves.parquet."""
        return tables.frame(self._run.curves, tables.CURVES_SCHEMA)

    @property
    def stage2(self) -> "pd.DataFrame | pa.Table":
        """One row per survivor and dataset: the columns of stage2.parquet."""
        return tables.frame(self._run.stage2, tables.STAGE2_SCHEMA)

    @property
    def verdict(self) -> scoring.Verdict:
        """Whether the targets are reached: `status` ("reached", "not reached" or "undecided") and one `sentence`."""
        return self._run.verdict

    @property
    def best(self) -> Best | None:
        """The best survivor; None until Stage 2 has ended, and if no trial has passed the gate."""
        trial = self._run.winner
        if trial is None:
            return None
        (config,) = [tables.config_of(row) for row in self._run.trials if row["trial"] == trial]
        scores = {line.metric: line.now for line in scoring.scorecard(self._run.stage2, trial)}
        return Best(trial, config, scores, scoring.global_interval(self._run.stage2, trial), winner_command(self._run))

    @property
    def study(self) -> "optuna.Study | None":
        """The Optuna study, for `optuna.visualization` and the like; None before the first trial is proposed."""
        from nkat_ray.record.study import load_study

        return load_study(self.folder / STUDY_FILE)

    def model(self) -> "NKATVisionTransformer":
        """Load the best survivor's network, trained on CIFAR-10; nothing in the file is executed.

        Returns:
            A module on the CPU, in evaluation mode: from images (B, 3, 32, 32), normalised with `mean` and `std` of its
            `pretrained_cfg`, to logits (B, 10).

        Raises:
            UserError: the run has no best survivor yet, or its file is damaged.
        """
        from nkat_ray.train.checkpoint import read_weights

        if self._run.winner is None:
            raise UserError(f"run is {str(self.folder)!r}; it has no best survivor whose model could be loaded")
        return read_weights(self.folder / BEST_FOLDER / WEIGHTS_FILE).build()

    def report(self) -> Path:
        """Return the run's page, report.html; it is written again if it is missing or older than the run's tables."""
        return current_report(self._run)

    def __repr__(self) -> str:
        return report_text(self._run)

    def _repr_html_(self) -> str:
        return run_card(self._run)


class Runs(list[Run]):
    """Runs, the oldest first; shown as one line each."""

    def __repr__(self) -> str:
        return "\n".join(f"{run.name}: {run.verdict.sentence}" for run in self) or "no runs"


def runs(folder: str | os.PathLike[str] | None = None) -> Runs:
    """Return the runs in a folder (default: $NKAT_STORAGE_PATH, else ./runs), the oldest first.

    One that cannot be read is left out, with a warning. A folder that does not exist is a UserError.

    Example:
        >>> {run.name: run.verdict.status for run in nkat.runs()}
    """
    where = Path(folder or default_storage_path()).expanduser()
    if not where.is_dir():
        raise UserError(f"folder is {str(where)!r}; there is no such folder")
    found = Runs()
    for config in sorted(where.glob(f"*/{CONFIG_FILE}"), key=lambda path: path.stat().st_mtime):
        try:
            found.append(Run(config.parent.absolute()))
        except UserError as error:
            warnings.warn(str(error), stacklevel=2)
    return found


def compare(*runs: Run | str | os.PathLike[str], out: str | os.PathLike[str] = "comparison.html") -> Path:
    """Write the page `out`, which sets runs side by side as `nkat report A B` does, and return its path.

    Raises:
        UserError: fewer than two runs, or a folder or name that is none.

    Example:
        >>> nkat.compare("first", "second")
    """
    if len(runs) < 2:
        raise UserError(f"{len(runs)} runs were given; allowed: two or more")
    found = [run if isinstance(run, Run) else Run(run) for run in runs]
    return compare_page([run._run for run in found]).save(Path(out))
