"""Compute scores, ranking and verdict from the rows of the tables (docs/spec.md section 2): pure functions.

A stage2 row is one survivor on one dataset (`tables.STAGE2_SCHEMA`). Validation scores decide the ranking; test scores
are reported. Verdict, ranking and survivors are computed once and written into the run's summary, which all other code
reads.
"""

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from nkat_ray.errors import FAULT, RESUMABLE
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

Row = Mapping[str, Any]
Rows = Iterable[Row]
Status = Literal["reached", "not reached", "undecided"]

METRIC_NAMES: Final = {"global_tpe": "Global TPE", "consistency": "Consistency", "robustness": "Robustness"}
EXTENDED: Final = "this run was extended"  # first words of the notice of such a run
AFTER_THE_FACT: Final = (
    "evaluated after the fact"  # first words of the notice about trials that had not passed the gate
)
DATASET_NAMES: Final = {
    "mnist": "MNIST",
    "fashion_mnist": "Fashion-MNIST",
    "emnist_letters": "EMNIST letters",
    "cifar10": "CIFAR-10",
}


@dataclass(frozen=True)
class Verdict:
    """Whether Round-2's targets are reached, and one sentence of explanation."""

    status: Status
    sentence: str


@dataclass(frozen=True)
class ScoreLine:
    """One line of the table metric | before | now | target | gap; `now` is NaN if no dataset counts."""

    metric: str
    before: float
    now: float
    target: float
    interval: tuple[float, float] | None
    counted: int
    """Number of datasets in `now`, 0..4; unless it is 4 no target is met, so that losing the worst is no advantage."""

    @property
    def gap(self) -> float:
        """`now` minus `target`: met if it is >= 0."""
        return self.now - self.target

    @property
    def state(self) -> Literal["met", "missed", "open"]:
        """Whether `now` has reached the target; open if `now` is NaN or fewer than four datasets count."""
        if math.isnan(self.now) or self.counted < len(STAGE2_DATASETS):
            return "open"
        return "met" if self.now >= self.target else "missed"


@dataclass(frozen=True)
class Miss:
    """The trial closest to the gate, and the accuracy that it needed."""

    trial: int
    accuracy: float
    needed: float  # accuracy that the gate needs with this lambda; above 1 if no accuracy suffices
    lambda_theory: float


def rows_by_dataset(rows: Rows, trial: int | None) -> dict[str, Row]:
    """Return one survivor's rows by dataset, including the user's own datasets."""
    return {row["dataset"]: row for row in rows if row["trial"] == trial}


def of_trial(rows: Rows, trial: int | None) -> dict[str, Row]:
    """Return one survivor's rows on the notes' four datasets, the only ones that enter a score; some may be missing."""
    return {name: row for name, row in rows_by_dataset(rows, trial).items() if name in STAGE2_DATASETS}


def datasets_of(summary: Mapping[str, Any]) -> list[str]:
    """List a run's datasets: the notes' in their order, then the user's own.

    Args:
        summary: keys of summary.json; without `data` the result is the notes' four.
    """
    asked = summary.get("data") or STAGE2_DATASETS
    return [name for name in STAGE2_DATASETS if name in asked] + [name for name in asked if name not in STAGE2_DATASETS]


def dataset_name(dataset: str) -> str:
    """Return a dataset's display name; one of the user's own keeps its name."""
    return DATASET_NAMES.get(dataset, dataset)


def stage2_status(row: Row) -> str:
    """Return a survivor's status on a dataset.

    Args:
        row: a row of stage2.parquet, empty if there is none yet.

    Returns:
        `ok`, `missing` (no data), `failed` (see the row's `error`), `at chance` (evaluated, but no better than
        guessing, so it does not count), `not tested` or `not evaluated`.
    """
    if not row:
        return "not evaluated"
    measured = [key for key in ("test_accuracy", "val_accuracy") if _present(row, key)]
    if row["status"] == "failed" and not all(_above_chance(row, key) for key in measured):
        return "at chance"
    if row["status"] == "ok" and "test_accuracy" not in measured:
        return "not tested"
    return str(row["status"])


def counts_on_validation(row: Row) -> bool:
    """Return whether a row counts in the ranking: its validation accuracy is above chance.

    A `failed` status does not matter here: it may result from the test, which follows the ranking.
    """
    return row["status"] != "missing" and _present(row, "val_tpe") and _above_chance(row, "val_accuracy")


def counts_on_test(row: Row) -> bool:
    """Return whether a row counts in the result: it was evaluated, and its test accuracy is above chance."""
    return row["status"] == "ok" and _present(row, "tpe") and _above_chance(row, "test_accuracy")


def datasets_counted(rows: Rows, trial: int | None) -> int:
    """Return the number of datasets that count in a survivor's result, 0..4."""
    return sum(counts_on_test(row) for row in of_trial(rows, trial).values())


def validation_scores(rows: Rows, trial: int) -> Stage2Scores:
    """Return a survivor's aggregates of validation scores (`val_tpe`), which decide the ranking."""
    counted = {name: row["val_tpe"] for name, row in of_trial(rows, trial).items() if counts_on_validation(row)}
    return stage2_scores({name: counted.get(name) for name in STAGE2_DATASETS})


def result_scores(rows: Rows, trial: int, column: str = "tpe") -> Stage2Scores:
    """Return a survivor's aggregates of test scores, which are the result.

    Args:
        column: "tpe" (the chosen lambda model), "tpe_notes", "tpe_counted" or "tpe_millions".
    """
    mine = of_trial(rows, trial)
    counted = {name: row[column] for name, row in mine.items() if counts_on_test(row) and _present(row, column)}
    return stage2_scores({name: counted.get(name) for name in STAGE2_DATASETS})


def global_tpe_by_model(rows: Rows, trial: int) -> dict[str, float]:
    """Return the Global TPE on test under each of the three lambda models; NaN if no dataset counts."""
    rows = list(rows)
    return {model: result_scores(rows, trial, f"tpe_{model}").global_tpe for model in LAMBDA_MODELS}


def feedback_score(rows: Rows, trial: int) -> float:
    """Return a survivor's value for the sampler (`--feedback global`): its validation Global TPE.

    A dataset at or below chance counts as 0, so that losing the worst is no advantage; a dataset that is missing (for
    all trials) is left out. The value is NaN if no dataset counts, or if an error of a worker left no accuracy, which
    says nothing about the trial.
    """
    found = [row for row in of_trial(rows, trial).values() if row["status"] != "missing"]
    if not all(_present(row, "val_accuracy") for row in found):
        return math.nan
    scores = [row["val_tpe"] if counts_on_validation(row) else 0.0 for row in found]
    return math.fsum(scores) / len(scores) if any(scores) else math.nan


def rank(rows: Rows, lambdas: Mapping[int, float]) -> list[int]:
    """Rank survivors, best first: datasets that count, validation Global TPE, lower lambda, lower number.

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
    """Return the 95 % interval of a survivor's Global TPE on test; None if no dataset counts.

    With TPE_d = accuracy_d / L, L = log10(1 + lambda), and Wilson bounds [l_d, u_d] of accuracy_d over independent test
    sets, the bounds of the sum follow from the distances of each bound to its estimate (MOVER: Zou & Donner 2008,
    Statistics in Medicine 27, 1693-1702), and k counted datasets make the mean:

        low = mean - sqrt(sum (accuracy_d - l_d)^2) / (k L),    high = mean + sqrt(sum (u_d - accuracy_d)^2) / (k L)

    The interval covers the sampling of test images, not the variation between seeds.
    """
    counted = [row for row in of_trial(rows, trial).values() if counts_on_test(row)]
    if not counted or not all(_present(row, "ci_low") and _present(row, "ci_high") for row in counted):
        return None
    mean = statistics.fmean(row["tpe"] for row in counted)
    below, above = zip(*(interval_distances(row) for row in counted), strict=True)
    return mean - math.hypot(*below) / len(counted), mean + math.hypot(*above) / len(counted)


def interval_distances(row: Row, column: str = "tpe") -> tuple[float, float]:
    """Return the distances of a row's value to the ends of its 95 % interval, (below, above), both >= 0.

    Args:
        row: a row of stage2.parquet with an accuracy above 0.
        column: "test_accuracy" or "tpe", whose distances are those of the accuracy times 1 / L.
    """
    scale = row[column] / row["test_accuracy"]
    return scale * (row["test_accuracy"] - row["ci_low"]), scale * (row["ci_high"] - row["test_accuracy"])


@dataclass(frozen=True)
class Official:
    """One design trained with several seeds: means over the seeds, and the verdict on them."""

    global_tpe: float
    interval: tuple[float, float]  # 95 %; infinite with one seed
    consistency: float
    robustness: float
    verdict: Verdict


def official(rows: Rows, seeds: Sequence[int]) -> Official:
    """Average scores over seeds and decide on the targets (the official recalculation, docs/spec.md section 6.4).

    The 95 % interval of the mean Global TPE combines two independent parts: the variation between seeds (Student's t
    over their Global TPEs), and the sampling of the test images, which all seeds share (the mean distance of
    `global_interval`'s bounds).

    Args:
        rows: stage2 rows with the number of the seed as `trial`.
    """
    rows, total = list(rows), len(STAGE2_DATASETS)
    scores = [result_scores(rows, seed) for seed in seeds]
    consistency = statistics.fmean(s.consistency for s in scores)
    robustness = statistics.fmean(s.robustness for s in scores)
    values = [s.global_tpe for s in scores]
    mean, spread = statistics.fmean(values), _student_half_width(values)
    bounds = [global_interval(rows, seed) for seed in seeds]
    known = [(value, bound) for value, bound in zip(values, bounds, strict=True) if bound is not None]
    below = math.fsum(value - low for value, (low, _) in known) / max(1, len(known))
    above = math.fsum(high - value for value, (_, high) in known) / max(1, len(known))
    low, high = mean - math.hypot(spread, below), mean + math.hypot(spread, above)
    figure = f"Global TPE {mean:.3f} over {len(seeds)} seeds (95 % interval {low:.3f} to {high:.3f})"
    fewest = min(datasets_counted(rows, seed) for seed in seeds)
    if fewest < total:
        decided = Verdict("undecided", f"Undecided: with one of the seeds only {fewest} of {total} datasets count.")
    else:
        decided = _against_targets(figure, mean, (low, high), consistency)
    return Official(mean, (low, high), consistency, robustness, decided)


def _student_half_width(values: Sequence[float]) -> float:
    """Return half the width of the 95 % interval of a mean; infinite for a single value."""
    if len(values) < 2:
        return math.inf
    from scipy.special import stdtrit  # imported here because it takes half a second

    quantile = stdtrit(len(values) - 1, 0.975)
    return float(quantile * statistics.stdev(values) / math.sqrt(len(values)))


def scorecard(rows: Rows, trial: int | None) -> list[ScoreLine]:
    """Return the table metric | before | now | target | gap of docs/spec.md section 1; NaN without a winner."""
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


def written_verdict(summary: Mapping[str, Any]) -> Verdict:
    """Return the verdict that is stated in a summary."""
    return Verdict(summary["verdict"], summary["verdict_sentence"])


def verdict_of(summary: Mapping[str, Any], rows: Rows) -> Verdict:
    """Decide whether the winner reaches Round-2's targets (docs/spec.md section 2).

    Undecided while the run is in progress, if fewer than four datasets count, if the 95 % interval of Global TPE
    contains the target, and if it is reached on generated images; not reached if no trial passed the gate, or if Global
    TPE or Consistency is below its target. Some keys of the summary may be missing.
    """
    rows, total = list(rows), len(STAGE2_DATASETS)
    if not summary.get("winner"):
        return _without_winner(summary)
    winner = summary["winner"]["trial"]
    counted = datasets_counted(rows, winner)
    if counted < total:
        return Verdict("undecided", f"Undecided: trial {winner} counts on only {counted} of {total} datasets.")
    scores = result_scores(rows, winner)
    low, high = global_interval(rows, winner) or (scores.global_tpe, scores.global_tpe)
    figure = f"trial {winner} has Global TPE {scores.global_tpe:.3f} (95 % interval {low:.3f} to {high:.3f})"
    decided = _against_targets(figure, scores.global_tpe, (low, high), scores.consistency)
    if decided.status == "reached" and (generated := synthetic_datasets(summary)):
        return Verdict(
            "undecided", f"Undecided: trial {winner} is at the target, but on generated {_names(generated)}."
        )
    return decided


def _against_targets(figure: str, global_tpe: float, interval: tuple[float, float], consistency: float) -> Verdict:
    """Decide from the scores on all four datasets; `figure` is the first part of the sentence."""
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


def _without_winner(summary: Mapping[str, Any]) -> Verdict:
    code, survivors = summary.get("exit_code"), len(summary.get("survivors") or ())
    if code in RESUMABLE and not (code == FAULT and survivors):
        return Verdict("undecided", "Undecided: the run has not ended and has no result yet.")
    if survivors:
        return Verdict("undecided", f"Undecided: {survivors} passed the gate, but Stage 2 has no result.")
    gate = summary.get("gate", NOTES_GATE)
    return Verdict("not reached", f"Not reached: no trial passed the gate (Local TPE {gate:.2f} on CIFAR-10).")


def nearest_miss(trials: Rows, gate: float) -> Miss | None:
    """Return the trial with the best Local TPE and the accuracy that it needed; None if no trial has a score."""
    scored = [row for row in trials if _present(row, "best_local_tpe") and _present(row, "lambda_theory")]
    if not scored:
        return None
    best = max(scored, key=lambda row: (row["best_local_tpe"], -row["trial"]))
    needed = accuracy_for(gate, best["lambda_theory"])
    return Miss(best["trial"], best["best_val_accuracy"], needed, best["lambda_theory"])


def dataset_targets(dataset: str) -> tuple[float | None, float | None]:
    """Return a dataset's target accuracy and target TPE; None for a dataset without targets in the notes."""
    return ACCURACY_TARGETS.get(dataset), TPE_TARGETS.get(dataset)


def synthetic_datasets(summary: Mapping[str, Any]) -> list[str]:
    """Return a run's datasets that were generated rather than real."""
    data = summary.get("data") or {}
    return [name for name, item in data.items() if str(item.get("source") or "").startswith("synthetic")]


def notices(summary: Mapping[str, Any]) -> list[str]:
    """Return the notices that must precede all scores: generated data, another gate, trials added or chosen later."""
    found = []
    if generated := synthetic_datasets(summary):
        which = "all datasets" if len(generated) == len(summary["data"]) else _names(generated)
        found.append(f"SYNTHETIC DATA: {which} generated, not real; their figures say nothing about the real ones")
    gate = summary.get("gate")
    if gate is not None and gate != NOTES_GATE:
        found.append(f"gate {gate:.2f} (preset {summary.get('preset')}; the notes' gate is {NOTES_GATE:.2f})")
    return found + [text for text in summary.get("notices") or () if text.startswith((EXTENDED, AFTER_THE_FACT))]


def _names(datasets: Iterable[str]) -> str:
    return ", ".join(dataset_name(name) for name in datasets)


def epochs_of(trials: Rows) -> int:
    """Return the total number of epochs of these trials."""
    return sum(row.get("epochs") or 0 for row in trials)


def stop_counts(trials: Rows) -> dict[str, int]:
    """Count ended trials by stop reason, the most frequent first."""
    counted = Counter(row["stop_reason"] for row in trials if row.get("stop_reason"))
    return dict(sorted(counted.items(), key=lambda item: (-item[1], item[0])))


def _present(row: Row, key: str) -> bool:
    value = row.get(key)
    return value is not None and math.isfinite(value)


def _above_chance(row: Row, key: str) -> bool:
    return _present(row, key) and counts(row[key], row["classes"])


def model_sentence(rows: Rows, winner: int, chosen: object) -> str:
    """State the winner's Global TPE under each lambda model."""
    shown = ", ".join(f"{model} {number(value)}" for model, value in global_tpe_by_model(rows, winner).items())
    return f"Global TPE by lambda model: {shown} (chosen: {chosen})"


def number(value: float | None, digits: int = 3) -> str:
    """Format a number with fixed digits; `-` for None and values that are not finite."""
    return "-" if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def setting(value: object) -> str:
    """Format a value of a configuration: `off` for None, four significant digits for floats."""
    return "off" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def duration(seconds: float) -> str:
    """Format seconds as m:ss or h:mm:ss."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
