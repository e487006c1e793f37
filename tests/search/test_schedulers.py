from typing import get_args

import pytest
from ray.tune.schedulers import FIFOScheduler

from nkat_ray.config import RunConfig, SchedulerName
from nkat_ray.search.journal import TrialRecord
from nkat_ray.search.median import ResumableMedian
from nkat_ray.search.scheduler import ResumableASHA
from nkat_ray.search.schedulers import VERDICTS, make_scheduler

EARLIER = [TrialRecord(0, {}, 0, 0, curve={e: {"epoch": e, "local_tpe": 0.5} for e in range(1, 41)})]


@pytest.mark.parametrize(
    ("name", "kind"),
    [("asha", ResumableASHA), ("hyperband", ResumableASHA), ("median", ResumableMedian), ("none", FIFOScheduler)],
)
def test_each_name_gives_its_scheduler_with_the_runs_own_figures(name: SchedulerName, kind: type) -> None:
    scheduler = make_scheduler(RunConfig(scheduler=name), EARLIER)
    assert type(scheduler) is kind
    if isinstance(scheduler, ResumableASHA):
        own = scheduler.bracket_of(0)
        assert len(scheduler._brackets) == {"asha": 1, "hyperband": 2}[name]
        assert sorted(scheduler.rungs()) == [5, 15]
        assert all(scores == {"trial-0": 0.5} for scores in scheduler.rungs(own).values())
    if isinstance(scheduler, ResumableMedian):
        assert scheduler._grace_period == 5
        assert len(scheduler._results["trial-0"]) == 40


def test_every_scheduler_has_words_for_its_ends() -> None:
    assert set(VERDICTS) == set(get_args(SchedulerName))
