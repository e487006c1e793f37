"""`--warm_start`: what an earlier run's trials can teach this run's sampler.

Read from that run's Parquet tables and Optuna's journal file; nothing is unpickled, nothing is written there, and
neither torch nor Ray is loaded.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from nkat_ray.config import STAGE1_DATASET, Choice, Domain, RunConfig, TrialConfig, field_names
from nkat_ray.files import CONFIG_FILE, CURVES_FILE, STAGE2_FILE, STUDY_FILE, TRIALS_FILE
from nkat_ray.metrics import EPOCH, LAMBDA_THEORY, LOCAL_TPE
from nkat_ray.prepare import UsageError, config_of_json
from nkat_ray.report import results, tables
from nkat_ray.search.journal import TrialRecord, WarmTrial
from nkat_ray.search.space import contains
from nkat_ray.search.storage import is_uri, run_storage

NEEDED: Final = (CONFIG_FILE, TRIALS_FILE, CURVES_FILE, STUDY_FILE)


@dataclass(frozen=True, kw_only=True)
class Earlier:
    """An earlier run's trials that fit this search, and one line on how many did and what was different then."""

    trials: list[WarmTrial]
    notice: str


def read_earlier(run: RunConfig, space: Mapping[str, Domain]) -> Earlier:
    """The trials of the run that `warm_start` names, as far as they lie within the space; empty without one.

    Raises:
        UsageError: no such run, a folder that is no run's, or one whose scores are not comparable.
    """
    if run.warm_start is None:
        return Earlier(trials=[], notice="")
    folder = _folder(run.warm_start, run.storage_path)
    saved = tables.read_summary(folder / CONFIG_FILE)
    before = config_of_json(saved)
    if before.lambda_model != run.lambda_model:
        raise UsageError(
            f"warm_start is {run.warm_start!r}; its scores are of lambda_model {before.lambda_model!r}, this run's of "
            f"{run.lambda_model!r}; choose the same --lambda_model"
        )
    rows = {row["trial"]: row for row in tables.read_trials(folder / TRIALS_FILE)}
    told = [trial for trial in _told(folder / STUDY_FILE) if trial in rows]
    fitting = [trial for trial in told if _fits(rows[trial], space)]
    curves: defaultdict[int, list[tables.Row]] = defaultdict(list)
    for row in tables.read_curves(folder / CURVES_FILE):
        curves[row["trial"]].append(row)
    stage2 = _stage2(folder)
    trials = []
    for trial in fitting:
        record = _record(rows[trial], curves[trial], space)
        best = record.best_row()
        score = None if best is None else best[LOCAL_TPE]
        if run.feedback == "global":
            score = results.feedback_score(stage2, trial)
        if best is not None and score is not None and (math.isfinite(score) or not record.passed(run.gate)):
            trials.append(WarmTrial(name=f"{folder.name}/{trial}", record=record, score=score))
    outside = len(told) - len(fitting)
    notice = (
        f"warm start: {len(trials)} of {len(rows)} trials of {folder.name} were taken; {outside} lie outside this "
        f"search space, {len(rows) - outside - len(trials)} had failed, had not ended, or lack a score"
        f"{_differences(before, run, space, saved)}"
    )
    return Earlier(trials=trials, notice=notice)


def _folder(name: str, storage_path: str) -> Path:
    """The folder of a run, by name or path."""
    by_path = Path(name).expanduser()
    if "/" not in name:
        storage = run_storage(storage_path, name)
        if storage.remote is not None and storage.exists():
            storage.pull()
        folder = storage.local if storage.local.is_dir() or not by_path.is_dir() else by_path
    else:
        folder = by_path
    if is_uri(name) or not folder.is_dir():
        raise UsageError(
            f"warm_start is {name!r}; there is no such run in {storage_path} and no such folder; "
            f"`ls {storage_path}` shows what there is"
        )
    missing = [file for file in NEEDED if not (folder / file).is_file()]
    if missing or "fixed" not in tables.read_summary(folder / CONFIG_FILE):
        raise UsageError(
            f"warm_start is {name!r}; {folder} is not the folder of a run ({', '.join(missing) or CONFIG_FILE} "
            f"{'is missing' if missing else 'is not one of a run'}); name one that holds {', '.join(NEEDED)}"
        )
    return folder.absolute()


def _told(path: Path) -> list[int]:
    """Numbers of the run's own trials of whose end its study was told, and that did not fail."""
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    storage = JournalStorage(JournalFileBackend(str(path)))
    states = (optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED)
    studies = [storage.get_all_trials(study._study_id, False, states) for study in storage.get_all_studies()]
    return sorted({trial.user_attrs["trial"] for study in studies for trial in study if "trial" in trial.user_attrs})


def _fits(row: Mapping[str, Any], space: Mapping[str, Domain]) -> bool:
    def fits(name: str, domain: Domain) -> bool:
        key = tables.CONFIG_PREFIX + name
        return key in row and (row[key] is not None or isinstance(domain, Choice)) and contains(domain, row[key])

    return all(fits(name, domain) for name, domain in space.items())


def _record(row: Mapping[str, Any], curve: Iterable[Mapping[str, Any]], space: Mapping[str, Domain]) -> TrialRecord:
    scores = {point[EPOCH]: math.nan if point[LOCAL_TPE] is None else point[LOCAL_TPE] for point in curve}
    return TrialRecord(
        trial=row["trial"], params={name: row[tables.CONFIG_PREFIX + name] for name in space}, seed=row["seed"],
        study_number=-1, stop_reason=row["stop_reason"],
        curve={e: {EPOCH: e, LOCAL_TPE: score, LAMBDA_THEORY: row[LAMBDA_THEORY]} for e, score in scores.items()},
    )  # fmt: skip


def _stage2(folder: Path) -> list[dict[str, Any]]:
    path = folder / STAGE2_FILE
    return tables.read_stage2(path) if path.is_file() else []


def _differences(before: RunConfig, run: RunConfig, space: Mapping[str, Domain], saved: Mapping[str, Any]) -> str:
    """What was not searched and differs: those trials were of another kind, which the reader should know."""
    names = [name for name in field_names(TrialConfig) if name not in space]
    found = [f"{n} {getattr(before, n)}" for n in names if getattr(before, n) != getattr(run, n)]
    source = str((saved.get("found") or {}).get(STAGE1_DATASET, {}).get("source") or "")
    if source.startswith("synthetic") and run.data != "synthetic":
        found.append("generated images")
    return f"; it had {', '.join(found)}" if found else ""
