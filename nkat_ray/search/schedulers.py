"""The schedulers of `--scheduler`: all of them judge by the trial's own epochs, none pauses a trial, none draws from an
unseeded generator, and all are rebuilt from the journal."""

from collections.abc import Callable, Iterable
from typing import Final

from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from nkat_ray.config import RunConfig
from nkat_ray.search.journal import TrialRecord
from nkat_ray.search.median import ResumableMedian
from nkat_ray.search.scheduler import ResumableASHA, brackets_of

VERDICTS: Final = {  # how an end is worded: "epoch 5: Local TPE 0.3000 ..."
    "asha": "is not among the rung's best",
    "hyperband": "is not among the best of its bracket's rung",
    "median": "leaves its best below the median of the others' means",
    "none": "was the last score",
}


def make_scheduler(run: RunConfig, earlier: Iterable[TrialRecord] = ()) -> TrialScheduler:
    """The scheduler that a run asks for, with what earlier drivers saw."""
    rungs = {"max_t": run.epochs, "grace_period": run.grace, "reduction_factor": run.reduction}
    makers: dict[str, Callable[[], TrialScheduler]] = {
        "asha": lambda: ResumableASHA(**rungs, earlier=earlier),
        "hyperband": lambda: ResumableASHA(**rungs, brackets=brackets_of(**rungs), seed=run.seed, earlier=earlier),
        "median": lambda: ResumableMedian(grace_period=run.grace, earlier=earlier),
        "none": FIFOScheduler,
    }
    return makers[run.scheduler]()
