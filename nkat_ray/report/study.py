"""The Optuna study in a run's journal: what mattered."""

import math
from pathlib import Path
from typing import Any


def load_study(journal: Path) -> Any:
    """The Optuna study in a run's journal, or None where it holds none yet. Nothing is unpickled or written."""
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    storage = JournalStorage(JournalFileBackend(str(journal)))
    names = optuna.get_all_study_names(storage)
    return optuna.load_study(study_name=names[-1], storage=storage) if names else None


def study_importances(study: Any) -> tuple[dict[str, float], int, dict[str, list[tuple[Any, float, bool]]]]:
    """Importances, the number of completed trials, and each parameter's points (value, objective, complete).

    Of a study with two objectives the points show the first, Local TPE; the importances are those for both. An earlier
    run's trials (`--warm_start`) are no points, since the page shows this run's, but they count in the importances.
    """
    import optuna

    points: dict[str, list[tuple[Any, float, bool]]] = {}
    complete = 0
    for trial in study.get_trials(deepcopy=False):
        if "warm_start" in trial.user_attrs:
            continue
        done = trial.state == optuna.trial.TrialState.COMPLETE
        score = (
            trial.values[0]
            if done
            else trial.intermediate_values.get(trial.last_step)
            if trial.last_step is not None
            else None
        )
        if score is None or not math.isfinite(score):
            continue
        complete += done
        for name, value in trial.params.items():
            points.setdefault(name, []).append((value, score, done))
    if complete < 2:
        return {}, complete, points
    try:
        return optuna.importance.get_param_importances(study), complete, points
    except (ValueError, RuntimeError):  # Optuna refuses a study in which nothing varies
        return {}, complete, points
