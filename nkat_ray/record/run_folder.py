"""Read a run's folder, for the report.

A finished run is read from its tables and summary.json. A run that is in progress or was interrupted is read from its
journal, because its tables are snapshots that may be out of date.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nkat_ray.config import RunConfig, config_of_json
from nkat_ray.errors import RESUMABLE, UserError
from nkat_ray.files import CONFIG_FILE, CURVES_FILE, JOURNAL_FILE, STAGE2_FILE, SUMMARY_FILE, TRIALS_FILE
from nkat_ray.record import scoring, tables
from nkat_ray.record.journal import read_state
from nkat_ray.record.rows import curve_rows, stage2_rows, trial_rows
from nkat_ray.record.scoring import Verdict
from nkat_ray.record.summary import summarise
from nkat_ray.space import Domain, space_of_json

Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class RecordedRun:
    """The record of one run so far."""

    folder: Path
    config: Mapping[str, Any]  # config.json
    summary: Mapping[str, Any]  # keys of summary.json; `exit_code` is None while the run is in progress
    trials: Rows  # rows of trials.parquet
    curves: Rows  # rows of curves.parquet
    stage2: Rows  # rows of stage2.parquet

    @property
    def name(self) -> str:
        """The run's name."""
        return str(self.config.get("name") or self.folder.name)

    @property
    def gate(self) -> float:
        """Local TPE that a trial had to reach."""
        return float(self.summary["gate"])

    @property
    def winner(self) -> int | None:
        """Number of the best survivor; None before the end of Stage 2."""
        winner = self.summary["winner"]
        return winner["trial"] if winner else None

    @property
    def verdict(self) -> Verdict:
        """Verdict on the targets, as stated in the summary."""
        return scoring.written_verdict(self.summary)

    @property
    def survivors(self) -> list[int]:
        """Numbers of the trials that passed the gate, as the summary lists them."""
        return list(self.summary["survivors"])

    @property
    def ranking(self) -> list[int]:
        """Ranked survivors, best first; computed if the summary lacks them (version 0.1.0)."""
        if "ranking" in self.summary:
            return list(self.summary["ranking"])
        return scoring.rank(self.stage2, {row["trial"]: row["lambda_theory"] for row in self.trials})

    @property
    def datasets(self) -> list[str]:
        """Names of Stage 2's datasets."""
        return scoring.datasets_of(self.summary)

    @property
    def ended(self) -> bool:
        """Whether the run has finished; False after an interruption."""
        return self.summary["exit_code"] not in RESUMABLE

    @property
    def searched(self) -> dict[str, Domain]:
        """Searched parameters and their domains, without those that the user fixed."""
        return space_of_json(self.config).domains


def load_run(folder: Path, summary: Mapping[str, Any] | None = None) -> RecordedRun:
    """Read a run's folder.

    Args:
        summary: keys of summary.json, if the tables are written but that file is not.

    Raises:
        UserError: the folder is not a run's, or one of its files is missing or damaged.
    """
    if not (folder / CONFIG_FILE).is_file():
        raise UserError(f"run is {str(folder)!r}; that folder contains no run ({CONFIG_FILE} is missing)")
    config = tables.read_summary(folder / CONFIG_FILE)
    file = folder / SUMMARY_FILE
    if summary is None and file.is_file():
        summary = tables.read_summary(file, *tables.SUMMARY_KEYS, "verdict_sentence")
    if summary is None or summary["exit_code"] in RESUMABLE:
        return _from_journal(folder, config, None if summary is None else summary["exit_code"])
    for name in (TRIALS_FILE, CURVES_FILE, STAGE2_FILE):
        if not (folder / name).is_file():
            raise UserError(f"run is {str(folder)!r}; its {name} is missing; copy the folder again")
    trials, curves = tables.read_rows(folder / TRIALS_FILE), tables.read_rows(folder / CURVES_FILE)
    return RecordedRun(folder, config, summary, trials, curves, tables.read_rows(folder / STAGE2_FILE))


def _from_journal(folder: Path, config: Mapping[str, Any], code: int | None) -> RecordedRun:
    if not (folder / JOURNAL_FILE).is_file():
        raise UserError(f"run is {str(folder)!r}; its {JOURNAL_FILE} is missing; copy the folder again")
    state, run = read_state(folder), config_of_json(RunConfig, config)
    summary = summarise(run, state, config.get("found", {}), code)
    return RecordedRun(folder, config, summary, trial_rows(state, run), curve_rows(state), stage2_rows(state))
