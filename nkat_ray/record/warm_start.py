"""`--warm_start`: read an earlier run's trials for this run's sampler (docs/spec.md section 6.1).

This module unpickles nothing, does not write into the earlier run, and loads neither torch nor Ray.
"""

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nkat_ray.config import STAGE1_DATASET, RunConfig, TrialConfig, config_of_json, field_names
from nkat_ray.errors import UserError
from nkat_ray.files import CONFIG_FILE
from nkat_ray.metrics import EPOCH, LOCAL_TPE
from nkat_ray.record import scoring, tables
from nkat_ray.record.journal import TrialRecord, WarmTrial
from nkat_ray.record.run_folder import load_run
from nkat_ray.record.storage import find_run
from nkat_ray.space import Choice, Domain, contains


@dataclass(frozen=True, kw_only=True)
class Earlier:
    """The trials of an earlier run that fit this search, and one line about their number and the differences."""

    trials: list[WarmTrial]
    notice: str


def read_earlier(run: RunConfig, space: Mapping[str, Domain]) -> Earlier:
    """Read the trials of the run that `warm_start` names, as far as they are within the space.

    Raises:
        UserError: there is no such run, it is damaged, or its scores cannot be compared with this run's.
    """
    if run.warm_start is None:
        return Earlier(trials=[], notice="")
    folder = find_run(run.warm_start, run.storage_path)
    if folder is None:
        raise UserError(
            f"warm_start is {run.warm_start!r}; there is no such run in {run.storage_path} and no such folder; "
            f"`ls {run.storage_path}` shows what there is"
        )
    try:
        if (folder / CONFIG_FILE).is_file():
            tables.read_summary(folder / CONFIG_FILE, "fixed")
        recorded = load_run(folder)
    except UserError as error:
        raise UserError(f"warm_start is {run.warm_start!r}; it is not the folder of a run: {error}") from error
    before = config_of_json(RunConfig, recorded.config)
    if before.lambda_model != run.lambda_model:
        raise UserError(
            f"warm_start is {run.warm_start!r}; its scores are of lambda_model {before.lambda_model!r}, this run's of "
            f"{run.lambda_model!r}; choose the same --lambda_model"
        )
    curves: defaultdict[int, dict[int, tables.Row]] = defaultdict(dict)
    for point in recorded.curves:
        score = math.nan if point[LOCAL_TPE] is None else point[LOCAL_TPE]
        curves[point["trial"]][point[EPOCH]] = {EPOCH: point[EPOCH], LOCAL_TPE: score}
    trials, outside = [], 0
    for row in recorded.trials:
        record = TrialRecord(
            trial=row["trial"], params={name: row.get(tables.CONFIG_PREFIX + name) for name in space}, seed=row["seed"],
            study_number=-1, stop_reason=row["stop_reason"], curve=curves[row["trial"]],
        )  # fmt: skip
        if not record.ended or record.failed or not record.finite_rows():
            continue
        if not _fits(row, space):
            outside += 1
            continue
        score = record.best_score
        if run.feedback == "global":
            score = scoring.feedback_score(recorded.stage2, record.trial)
        if math.isfinite(score) or not record.passed(run.gate):
            trials.append(WarmTrial(name=f"{folder.name}/{record.trial}", record=record, score=score))
    total = len(recorded.trials)
    notice = (
        f"warm start: {len(trials)} of {total} trials of {folder.name} were taken; {outside} lie outside this search "
        f"space, {total - outside - len(trials)} had failed, had not ended, or lack a score"
        f"{_differences(before, run, space, recorded.config)}"
    )
    return Earlier(trials=trials, notice=notice)


def _fits(row: Mapping[str, Any], space: Mapping[str, Domain]) -> bool:
    """Return whether a trial's values are within the space; a trial of an earlier version may lack a parameter."""
    values = {name: row.get(tables.CONFIG_PREFIX + name, math.nan) for name in space}
    return all(
        (values[name] is not None or isinstance(domain, Choice)) and contains(domain, values[name])
        for name, domain in space.items()
    )


def _differences(before: RunConfig, run: RunConfig, space: Mapping[str, Domain], saved: Mapping[str, Any]) -> str:
    """Return the differences in settings that are not searched, as the end of a notice."""
    names = [name for name in field_names(TrialConfig) if name not in space]
    found = [f"{n} {getattr(before, n)}" for n in names if getattr(before, n) != getattr(run, n)]
    source = str((saved.get("found") or {}).get(STAGE1_DATASET, {}).get("source") or "")
    if source.startswith("synthetic") and run.data != "synthetic":
        found.append("generated images")
    return f"; it had {', '.join(found)}" if found else ""
