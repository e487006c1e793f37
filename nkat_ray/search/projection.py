"""How high a trial can still come: an upper bound of its final score, learnt from the curves seen so far.

A trial's final score is the best of its curve. From epoch e to the end a finished curve *gained* the difference between
its best at the end and its best by epoch e. A trial whose best is b at epoch e is expected to end at b + the mean gain
of the finished curves, and at most at

    upper = b + max(largest gain that any curve has shown, mean + t * s * sqrt(1 + 1 / n))

with the mean and standard deviation s of the n finished curves' gains from epoch e, and Student's t at `CONFIDENCE` for
n - 1 degrees of freedom (the one-sided prediction interval of one more normal value). The first term guards against
tails that are heavier than normal: curves that were stopped count in it with what they gained before, so that it only
grows. The second guards against a few curves that happen to be alike.

What holds: where the gains of the next trial and of the finished curves are exchangeable, the first term alone is
passed with probability at most 1 / (n + 1) at any one epoch. What does not hold by itself: curves that ASHA stopped
never finish, so the gains are those of the better trials; gains may depend on the level of a curve; and a trial is
judged at every epoch, not once. docs/spec.md section 6.1 says what a replay of real curves measured.
"""

import functools
import math
import statistics
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np

MIN_FINISHED = 10  # finished curves below which nothing is said
CONFIDENCE = 0.999  # of the prediction interval, one-sided; high, because a trial is judged at every epoch


@dataclass(frozen=True)
class Projection:
    """Where a trial will end: expected and largest final score, from `finished` curves."""

    expected: float
    upper: float
    finished: int


class GateProjection:
    """Learns from every curve, projects any of them. A result costs time in the epochs, none in the trials.

    Args:
        max_epochs: the last epoch, >= 1.
        earlier: curves that an earlier driver saw, finished or not: a key and the finite scores by epoch (from 1). A
            trial that is continued goes on under its key.

    Raises:
        ValueError: max_epochs is out of range.
    """

    def __init__(self, *, max_epochs: int, earlier: Iterable[tuple[Hashable, Mapping[int, float]]] = ()) -> None:
        if max_epochs < 1:
            raise ValueError(f"max_epochs is {max_epochs}; allowed: >= 1")
        self.max_epochs = max_epochs
        self._best: dict[Hashable, np.ndarray] = {}  # best score by each epoch, NaN where it is not known
        self._finished: set[Hashable] = set()
        self._largest = np.zeros(max_epochs + 1)  # gain from each epoch on, of any curve
        self._count = np.zeros(max_epochs + 1, dtype=np.int64)  # of finished curves, with mean and squares (Welford)
        self._mean = np.zeros(max_epochs + 1)
        self._squares = np.zeros(max_epochs + 1)
        for key, curve in earlier:
            for epoch in sorted(curve):
                self.learn(key, epoch, curve[epoch])

    def learn(self, key: Hashable, epoch: int, score: float) -> None:
        """Take a finite score in. Twice the same changes nothing."""
        if not 1 <= epoch <= self.max_epochs:
            return
        curve = self._best.setdefault(key, np.full(self.max_epochs + 1, np.nan))
        best = float(np.fmax.reduce(curve[:epoch], initial=score))
        if curve[epoch] == best:
            return
        curve[epoch] = best
        np.fmax(self._largest[1:epoch], best - curve[1:epoch], out=self._largest[1:epoch])
        if epoch == self.max_epochs and key not in self._finished:
            self._finish(key, best - curve)

    def project(self, key: Hashable, epoch: int) -> Projection | None:
        """The projection from this epoch on; None at the last epoch, for an unknown curve, or too few finished ones."""
        if key not in self._best or not 1 <= epoch < self.max_epochs:
            return None
        best, count = float(self._best[key][epoch]), int(self._count[epoch])
        if count < MIN_FINISHED or math.isnan(best):
            return None
        mean = float(self._mean[epoch])
        deviation = math.sqrt(float(self._squares[epoch]) / (count - 1))
        predicted = mean + student_t(CONFIDENCE, count - 1) * deviation * math.sqrt(1 + 1 / count)
        return Projection(best + mean, best + max(float(self._largest[epoch]), predicted), count)

    def _finish(self, key: Hashable, gains: np.ndarray) -> None:
        self._finished.add(key)
        known = ~np.isnan(gains)
        self._count += known
        delta = np.where(known, gains - self._mean, 0.0)
        self._mean += delta / np.maximum(self._count, 1)
        self._squares += np.where(known, delta * (gains - self._mean), 0.0)


@functools.cache
def student_t(probability: float, degrees: int) -> float:
    """Quantile of Student's t, to 0.5 % from 9 degrees of freedom on (Abramowitz and Stegun 26.7.5)."""
    z = statistics.NormalDist().inv_cdf(probability)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / float(degrees) ** power for power, term in enumerate(terms, start=1))
