"""From Stage 2's rows to scores, ranking and verdict (docs/spec.md section 2): pure functions on the tables' rows.

A row is one survivor on one dataset (`tables.STAGE2_SCHEMA`). Validation figures decide the ranking; test figures are
what is reported.
"""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from nkat_ray.exit_codes import FAULT, RESUMABLE
from nkat_ray.metrics import (
    ACCURACY_TARGETS,
    BEFORE,
    GLOBAL_TARGETS,
    LAMBDA_MODELS,
    NOTES_GATE,
    STAGE2_DATASETS,
    TPE_TARGETS,
    Stage2Scores,
    accuracy_for,
    counts,
    stage2_scores,
)

Rows = Iterable[Mapping[str, Any]]
Status = Literal["reached", "not reached", "undecided"]

METRIC_NAMES: Final = {"global_tpe": "Global TPE", "consistency": "Consistency", "robustness": "Robustness"}
DATASET_NAMES: Final = {
    "mnist": "MNIST",
    "fashion_mnist": "Fashion-MNIST",
    "emnist_letters": "EMNIST letters",
    "cifar10": "CIFAR-10",
}


@dataclass(frozen=True)
class Verdict:
    """Whether Round-2's target is reached, and one sentence that says why."""

    status: Status
    sentence: str


@dataclass(frozen=True)
class ScoreLine:
    """One line of the table metric | before | now | target | gap. `now` is NaN where nothing counts."""

    metric: str
    before: float
    now: float
    target: float
    interval: tuple[float, float] | None
    counted: int
    """Datasets behind `now`; with fewer than all of them nothing is met, so that losing the worst is no gain."""

    @property
    def gap(self) -> float:
        """Now - target: >= 0 is met."""
        return self.now - self.target

    @property
    def state(self) -> Literal["met", "missed", "open"]:
        """Whether now has reached the target; open without a figure or with fewer than four datasets."""
        if math.isnan(self.now) or self.counted < len(STAGE2_DATASETS):
            return "open"
        return "met" if self.now >= self.target else "missed"


@dataclass(frozen=True)
class Miss:
    """The trial that came closest to the gate, and what it lacked."""

    trial: int
    accuracy: float
    needed: float  # may exceed 1: then no accuracy passes the gate at this lambda
    lambda_theory: float


def of_trial(rows: Rows, trial: int) -> dict[str, Mapping[str, Any]]:
    """One survivor's rows by dataset: the notes' four, of which some may be absent."""
    return {row["dataset"]: row for row in rows if row["trial"] == trial and row["dataset"] in STAGE2_DATASETS}


def counts_on_validation(row: Mapping[str, Any]) -> bool:
    """Whether a row counts in the ranking: validation above chance.

    A `failed` status does not matter here: it may come from the test images, which are read after the ranking.
    """
    return row["status"] != "missing" and _present(row, "val_tpe") and _above_chance(row, "val_accuracy")


def counts_on_test(row: Mapping[str, Any]) -> bool:
    """Whether a row counts in the result: evaluated, and the test accuracy is above chance."""
    return row["status"] == "ok" and _present(row, "tpe") and _above_chance(row, "test_accuracy")


def validation_scores(rows: Rows, trial: int) -> Stage2Scores:
    """A survivor's aggregates from validation scores (`val_tpe`): these decide the ranking."""
    mine = of_trial(rows, trial)
    return _scores({name: row["val_tpe"] for name, row in mine.items() if counts_on_validation(row)})


def result_scores(rows: Rows, trial: int, column: str = "tpe") -> Stage2Scores:
    """A survivor's aggregates from test scores: these are the result.

    Args:
        rows: stage2 rows.
        trial: the survivor.
        column: "tpe" (the chosen lambda model), "tpe_notes", "tpe_counted" or "tpe_millions".
    """
    mine = of_trial(rows, trial)
    return _scores({name: row[column] for name, row in mine.items() if counts_on_test(row) and _present(row, column)})


def global_tpe_by_model(rows: Rows, trial: int) -> dict[str, float]:
    """Global TPE on test under each of the three lambda models; NaN where nothing counts."""
    rows = list(rows)
    return {model: result_scores(rows, trial, f"tpe_{model}").global_tpe for model in LAMBDA_MODELS}


def feedback_score(rows: Rows, trial: int) -> float:
    """What Optuna is told of a survivor (`--feedback global`): its validation Global TPE.

    A dataset at or below chance counts 0, so that losing the worst is no gain; one that is missing, for all trials
    alike, is left out. NaN where nothing counts, or where a worker's fault left no accuracy: that says nothing of the
    trial.
    """
    found = [row for row in of_trial(rows, trial).values() if row["status"] != "missing"]
    if not all(_present(row, "val_accuracy") for row in found):
        return math.nan
    scores = [row["val_tpe"] if counts_on_validation(row) else 0.0 for row in found]
    return math.fsum(scores) / len(scores) if any(scores) else math.nan


def rank(rows: Rows, lambdas: Mapping[int, float]) -> list[int]:
    """Survivors, best first: datasets that count, then validation Global TPE, then lower lambda, then lower number.

    Args:
        rows: stage2 rows; only validation figures are read.
        lambdas: lambda_theory of each survivor (the chosen model).
    """
    rows = list(rows)

    def key(trial: int) -> tuple[float, float, float, int]:
        scores = validation_scores(rows, trial)
        tpe = -math.inf if math.isnan(scores.global_tpe) else scores.global_tpe
        return -scores.robustness, -tpe, lambdas.get(trial, math.inf), trial

    return sorted({row["trial"] for row in rows}, key=key)


def global_interval(rows: Rows, trial: int) -> tuple[float, float] | None:
    """95 % interval of a survivor's Global TPE on test, from the datasets' Wilson intervals; None where nothing counts.

    With TPE_d = accuracy_d / L, L = log10(1 + lambda), and Wilson bounds [l_d, u_d] of accuracy_d over independent test
    sets, the bounds of the sum follow from the distances of each bound to its estimate (MOVER: Zou & Donner 2008,
    Statistics in Medicine 27, 1693-1702), and k counted datasets make the mean:

        low = mean - sqrt(sum (accuracy_d - l_d)^2) / (k L),    high = mean + sqrt(sum (u_d - accuracy_d)^2) / (k L)

    It covers the choice of test images, not the spread between seeds.
    """
    counted = [row for row in of_trial(rows, trial).values() if counts_on_test(row)]
    if not counted or not all(_present(row, "ci_low") and _present(row, "ci_high") for row in counted):
        return None
    mean = math.fsum(row["tpe"] for row in counted) / len(counted)
    scale = [row["tpe"] / row["test_accuracy"] for row in counted]  # 1 / L; above chance, so never 0 / 0
    below = math.hypot(*(s * (row["test_accuracy"] - row["ci_low"]) for s, row in zip(scale, counted, strict=True)))
    above = math.hypot(*(s * (row["ci_high"] - row["test_accuracy"]) for s, row in zip(scale, counted, strict=True)))
    return mean - below / len(counted), mean + above / len(counted)


@dataclass(frozen=True)
class Official:
    """One design trained with several seeds: means over the seeds, and the verdict on them."""

    global_tpe: float
    interval: tuple[float, float]  # 95 %; infinite with one seed
    consistency: float
    robustness: float
    verdict: Verdict


def official(rows: Rows, seeds: Sequence[int]) -> Official:
    """The official recalculation (docs/spec.md section 6.4): is the target reached, whatever the seed?

    The 95 % interval of the mean Global TPE has two parts, taken as independent: the spread between the seeds
    (Student's t over their Global TPEs) and the choice of the test images, which all seeds share (the mean distance of
    `global_interval`'s bounds).

    Args:
        rows: stage2 rows whose `trial` is the number of a seed.
        seeds: those numbers.
    """
    rows, total = list(rows), len(STAGE2_DATASETS)
    scores = [result_scores(rows, seed) for seed in seeds]
    consistency = math.fsum(s.consistency for s in scores) / len(scores)
    robustness = math.fsum(s.robustness for s in scores) / len(scores)
    values = [s.global_tpe for s in scores]
    mean = math.fsum(values) / len(values)
    bounds = [global_interval(rows, seed) for seed in seeds]
    spread = _student_half_width(values)
    known = [(value, bound) for value, bound in zip(values, bounds, strict=True) if bound is not None]
    below = math.fsum(value - low for value, (low, _) in known) / max(1, len(known))
    above = math.fsum(high - value for value, (_, high) in known) / max(1, len(known))
    low, high = mean - math.hypot(spread, below), mean + math.hypot(spread, above)
    figure = f"Global TPE {mean:.3f} over {len(seeds)} seeds (95 % interval {low:.3f} to {high:.3f})"
    fewest = min(datasets_counted(rows, seed) for seed in seeds)
    if fewest < total:
        found = Verdict("undecided", f"Undecided: with one of the seeds only {fewest} of {total} datasets count.")
    else:
        found = _against_targets(figure, mean, (low, high), consistency)
    return Official(mean, (low, high), consistency, robustness, found)


def _student_half_width(values: Sequence[float]) -> float:
    """Half the 95 % interval of a mean; infinite with one value, which says nothing of the spread."""
    if len(values) < 2:
        return math.inf
    from scipy.special import stdtrit  # half a second to import, which no other report needs

    quantile = stdtrit(len(values) - 1, 0.975)
    return float(quantile * statistics.stdev(values) / math.sqrt(len(values)))


def scorecard(rows: Rows, trial: int | None) -> list[ScoreLine]:
    """The table metric | before | now | target | gap of docs/spec.md section 1; all NaN and 0 without a winner."""
    rows = list(rows)
    scores = Stage2Scores(math.nan, math.nan, 0.0) if trial is None else result_scores(rows, trial)
    interval = None if trial is None else global_interval(rows, trial)
    return [
        ScoreLine(
            metric=metric,
            before=BEFORE[metric],
            now=getattr(scores, metric),
            target=GLOBAL_TARGETS[metric],
            interval=interval if metric == "global_tpe" else None,
            counted=datasets_counted(rows, trial),
        )
        for metric in METRIC_NAMES
    ]


def datasets_counted(rows: Rows, trial: int | None) -> int:
    """The k of "k of 4": datasets that count in a survivor's result."""
    return 0 if trial is None else sum(counts_on_test(row) for row in of_trial(rows, trial).values())


def verdict(
    rows: Rows, winner: int | None, *, finished: bool = True, gate: float = NOTES_GATE, survivors: int = 0
) -> Verdict:
    """Whether the winner reaches Round-2's targets.

    Undecided while the run goes on, with fewer than four datasets, and while the 95 % interval of Global TPE holds the
    target; not reached when nothing passed the gate, or when Global TPE or Consistency lies below its target.

    Args:
        rows: stage2 rows.
        winner: the best survivor's number, or None.
        finished: whether the run has ended.
        gate: Local TPE that a trial had to reach, for the sentence.
        survivors: trials that passed it; only looked at where there is no winner.
    """
    rows = list(rows)
    if winner is None:
        return _without_winner(finished=finished, gate=gate, survivors=survivors)
    total = len(STAGE2_DATASETS)
    scores, interval, counted = (
        result_scores(rows, winner),
        global_interval(rows, winner),
        datasets_counted(rows, winner),
    )
    if counted < total:
        return Verdict("undecided", f"Undecided: trial {winner} counts on only {counted} of {total} datasets.")
    low, high = interval or (scores.global_tpe, scores.global_tpe)
    figure = f"trial {winner} has Global TPE {scores.global_tpe:.3f} (95 % interval {low:.3f} to {high:.3f})"
    return _against_targets(figure, scores.global_tpe, (low, high), scores.consistency)


def _against_targets(figure: str, global_tpe: float, interval: tuple[float, float], consistency: float) -> Verdict:
    """What figures on all four datasets say; `figure` is how the sentence begins."""
    target, (low, high), needed = GLOBAL_TARGETS["global_tpe"], interval, GLOBAL_TARGETS["consistency"]
    if low < target <= high:
        return Verdict("undecided", f"Undecided: {figure}, not distinct from the target {target:.2f}.")
    if global_tpe < target:
        return Verdict("not reached", f"Not reached: {figure}, below the target {target:.2f}.")
    if consistency < needed:
        return Verdict(
            "not reached", f"Not reached: {figure}, but Consistency {consistency:.3f} is below {needed:.2f}."
        )
    return Verdict("reached", f"Reached: {figure}, at or above the target {target:.2f}.")


def _without_winner(*, finished: bool, gate: float, survivors: int) -> Verdict:
    if not finished:
        return Verdict("undecided", "Undecided: the run has not ended and has no result yet.")
    if survivors:
        return Verdict("undecided", f"Undecided: {survivors} passed the gate, but Stage 2 has no result.")
    return Verdict("not reached", f"Not reached: no trial passed the gate (Local TPE {gate:.2f} on CIFAR-10).")


def verdict_of(summary: Mapping[str, Any], rows: Rows) -> Verdict:
    """The verdict of a run from its summary and Stage 2 rows; generated images cannot reach a target."""
    winner = summary["winner"]["trial"] if summary.get("winner") else None
    survivors = len(summary.get("survivors") or ())
    found = verdict(
        rows,
        winner,
        finished=summary.get("exit_code") not in RESUMABLE or (summary["exit_code"] == FAULT and survivors > 0),
        gate=summary.get("gate", NOTES_GATE),
        survivors=survivors,
    )
    if found.status == "reached" and (generated := synthetic_datasets(summary)):
        return Verdict(
            "undecided", f"Undecided: trial {winner} is at the target, but on generated {_names(generated)}."
        )
    return found


def nearest_miss(trials: Rows, gate: float) -> Miss | None:
    """The trial with the best Local TPE and the accuracy that the gate asks for at its lambda; None without a score."""
    scored = [row for row in trials if _present(row, "best_local_tpe") and _present(row, "lambda_theory")]
    if not scored:
        return None
    best = max(scored, key=lambda row: (row["best_local_tpe"], -row["trial"]))
    needed = accuracy_for(gate, best["lambda_theory"])
    return Miss(best["trial"], best["best_val_accuracy"], needed, best["lambda_theory"])


def dataset_targets(dataset: str) -> tuple[float | None, float | None]:
    """Target accuracy and target TPE of a dataset; None for one that the notes do not name."""
    return ACCURACY_TARGETS.get(dataset), TPE_TARGETS.get(dataset)


def synthetic_datasets(summary: Mapping[str, Any]) -> list[str]:
    """Datasets of a run that were generated rather than real."""
    data = summary.get("data") or {}
    return [name for name, item in data.items() if str(item.get("source") or "").startswith("synthetic")]


def notices(summary: Mapping[str, Any]) -> list[str]:
    """What a reader must know before any figure: generated data, another gate than the notes'."""
    found = []
    if generated := synthetic_datasets(summary):
        which = "all datasets" if len(generated) == len(summary["data"]) else _names(generated)
        found.append(f"SYNTHETIC DATA: {which} generated, not real; their figures say nothing about the real ones")
    gate = summary.get("gate")
    if gate is not None and gate != NOTES_GATE:
        found.append(f"gate {gate:.2f} (preset {summary.get('preset')}; the notes' gate is {NOTES_GATE:.2f})")
    return found


def _names(datasets: Iterable[str]) -> str:
    return ", ".join(DATASET_NAMES.get(name, name) for name in datasets)


def epochs_of(trials: Iterable[Mapping[str, Any]]) -> int:
    """Epochs of these trials together."""
    return sum(row.get("epochs") or 0 for row in trials)


def stop_counts(trials: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Ended trials by stop reason, most frequent first."""
    found: dict[str, int] = {}
    for row in trials:
        if row.get("stop_reason"):
            found[row["stop_reason"]] = found.get(row["stop_reason"], 0) + 1
    return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))


def _scores(tpes: Mapping[str, float]) -> Stage2Scores:
    return stage2_scores({name: tpes.get(name) for name in STAGE2_DATASETS})


def _present(row: Mapping[str, Any], key: str) -> bool:
    value = row.get(key)
    return value is not None and math.isfinite(value)


def _above_chance(row: Mapping[str, Any], key: str) -> bool:
    return _present(row, key) and counts(row[key], row["classes"])


def model_sentence(rows: Rows, winner: int, chosen: object) -> str:
    """Global TPE of the winner under each lambda model."""
    shown = ", ".join(f"{model} {number(value)}" for model, value in global_tpe_by_model(rows, winner).items())
    return f"Global TPE by lambda model: {shown} (chosen: {chosen})"


def number(value: float | None, digits: int = 3) -> str:
    """A figure with fixed digits, or - where there is none."""
    return "-" if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def duration(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss."""
    whole = max(0, round(seconds))
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
