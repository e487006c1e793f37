"""Compute how much of the differences between trials one parameter explains, at equal epochs.

Trials that were stopped early have no final score, and the few that have one are the best, so comparing only those
says little. After the first epochs nearly every trial has a score, so all trials are compared there.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from nkat_ray.metrics import EPOCH, LOCAL_TPE
from nkat_ray.record.tables import CONFIG_PREFIX

LEAST_TRIALS: Final = 20  # below that every interval is as wide as the scale
LEAST_SHARE: Final = 0.9  # of the trials with an epoch that must have a score at the epoch of the comparison
MOST_GROUPS: Final = 5  # a parameter with more values is cut into thirds

Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Effect:
    """The share of the variance between trials that one parameter alone explains, 0..1, and its 95 % interval."""

    name: str
    share: float
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """All trials after the same epoch."""

    epoch: int
    scores: Mapping[int, float]  # Local TPE after that epoch by trial number
    effects: Sequence[Effect]  # of the parameters that varied, largest first


def compare_trials(trials: Rows, curves: Rows, parameters: Sequence[str]) -> Comparison | None:
    """Compare all trials after the latest epoch for which nearly all of them have a score.

    Returns:
        The comparison; None where fewer than `LEAST_TRIALS` trials have a score after the same epoch.
    """
    epoch, scores = equal_epoch(curves)
    if len(scores) < LEAST_TRIALS:
        return None
    rows = [row for row in trials if row["trial"] in scores]
    effects = []
    for name in parameters:
        groups = grouped([(row.get(CONFIG_PREFIX + name), scores[row["trial"]]) for row in rows])
        if len(groups) > 1:
            effects.append(Effect(name, *explained(groups)))
    return Comparison(epoch, scores, sorted(effects, key=lambda effect: -effect.share))


def equal_epoch(curves: Rows) -> tuple[int, dict[int, float]]:
    """Return the last epoch at which at least `LEAST_SHARE` of the trials have a finite Local TPE, and the scores."""
    by_epoch: dict[int, dict[int, float]] = {}
    for row in curves:
        if row[LOCAL_TPE] is not None and math.isfinite(row[LOCAL_TPE]):
            by_epoch.setdefault(row[EPOCH], {})[row["trial"]] = row[LOCAL_TPE]
    known = len({row["trial"] for row in curves})
    shared = {epoch: scores for epoch, scores in by_epoch.items() if len(scores) >= LEAST_SHARE * known}
    return max(shared.items(), default=(0, {}))


def grouped(points: Sequence[tuple[Any, float]]) -> list[list[float]]:
    """Group the scores of (value, score) pairs by value, or by thirds of the ranked values if there are many."""
    values = {str(value) for value, _ in points}
    if len(values) <= MOST_GROUPS:
        return [[score for value, score in points if str(value) == own] for own in sorted(values)]
    ranked = [score for _, score in sorted(points, key=lambda point: (point[0] is not None, point[0] or 0))]
    cuts = [round(len(ranked) * part / 3) for part in range(4)]
    return [ranked[start:end] for start, end in itertools.pairwise(cuts)]


def explained(groups: Sequence[Sequence[float]]) -> tuple[float, float, float]:
    """Return the share of the variance that lies between groups (epsilon squared), and its 95 % interval, all in 0..1.

    Epsilon squared (Kelley 1935) is the share that a one-way analysis of variance gives, without its upward bias. The
    interval comes from the noncentral F distribution (Smithson 2003, Confidence Intervals, chapter 5).

    Args:
        groups: scores by group; at least two groups, and more scores than groups.
    """
    from scipy.special import ncfdtrinc  # imported here because it takes half a second

    scores = [score for group in groups for score in group]
    n, mean = len(scores), math.fsum(scores) / len(scores)
    total = math.fsum((score - mean) ** 2 for score in scores)
    between = math.fsum(len(group) * (math.fsum(group) / len(group) - mean) ** 2 for group in groups)
    inside = total - between
    if total <= 0 or inside <= 1e-12 * total:  # all scores are equal, or each group's are
        return (0.0, 0.0, 1.0) if total <= 0 else (1.0, 1.0, 1.0)
    above, below = len(groups) - 1, n - len(groups)
    ratio = (between / above) / (inside / below)
    bounds = [float(ncfdtrinc(above, below, level, ratio)) for level in (0.975, 0.025)]
    low, high = (bound / (bound + n) if math.isfinite(bound) and bound > 0 else 0.0 for bound in bounds)
    return min(1.0, max(0.0, 1 - (n - 1) / below * inside / total)), low, high
