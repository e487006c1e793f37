import math
import random
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, TrialScheduler

from nkat_ray.config import RunConfig
from nkat_ray.record.journal import TrialRecord
from nkat_ray.search.scheduler import ResumableASHA, make_scheduler

STOP, CONTINUE = TrialScheduler.STOP, TrialScheduler.CONTINUE
NAN = math.nan


@dataclass
class FakeTrial:
    """What a scheduler looks at."""

    trial_id: str
    config: dict[str, Any]


def fake(number: int, driver: int = 0) -> FakeTrial:
    return FakeTrial(f"driver{driver}_{number:05d}", {"trial": number})


def result(epoch: int, score: Any) -> dict[str, Any]:
    return {"epoch": epoch, "local_tpe": score}


@dataclass
class Search:
    """Random curves of many trials, reported in a random order, as Tune would call a scheduler."""

    scheduler: Any
    max_t: int
    trials: dict[int, FakeTrial] = field(default_factory=dict)
    records: dict[int, TrialRecord] = field(default_factory=dict)
    decisions: list[tuple[int, int, str]] = field(default_factory=list)

    def add(self, number: int, driver: int = 0) -> None:
        self.trials[number] = fake(number, driver)
        self.records.setdefault(number, TrialRecord(number, {}, 0, number))
        self.scheduler.on_trial_add(None, self.trials[number])

    def report(self, number: int, score: float) -> str:
        record = self.records[number]
        epoch = len(record.curve) + 1
        record.curve[epoch] = result(epoch, score)
        decision = self.scheduler.on_trial_result(None, self.trials[number], result(epoch, score))
        if decision == STOP:
            self.scheduler.on_trial_complete(None, self.trials[number], result(epoch, score))
            record.stop_reason = "asha"
        self.decisions.append((number, epoch, decision))
        return str(decision)

    def play(self, curves: list[list[float]], moves: list[int]) -> None:
        """Each move reports the next epoch of one of the trials that still run; the pool is refilled as it empties."""
        for move in moves:
            while len(self.running()) < 4 and len(self.records) < len(curves):
                self.add(len(self.records))
            running = self.running()
            if not running:
                return
            number = running[move % len(running)]
            self.report(number, curves[number][len(self.records[number].curve)])

    def running(self) -> list[int]:
        return [n for n, r in sorted(self.records.items()) if not r.ended]


def brute_force(
    curves: list[list[float]], order: list[tuple[int, int]], *, grace: int, rf: int, max_t: int
) -> list[str]:
    """ASHA in its own words: at a rung, a trial goes on if it is at least the quantile 1 - 1/rf of those before it."""
    milestones = [m for m in (grace * rf**k for k in range(20)) if m <= max_t]
    before: dict[int, list[float]] = {m: [] for m in milestones}
    said = []
    for number, epoch in order:
        score = curves[number][epoch - 1]
        others = before.get(epoch)
        stop = epoch >= max_t
        if others is not None and not stop:
            stop = bool(others) and score < np.quantile(others, 1 - 1 / rf)
        if others is not None:
            others.append(score)
        said.append(STOP if stop else CONTINUE)
    return said


@st.composite
def searches(draw: st.DrawFn) -> tuple[dict[str, int], list[list[float]], list[int]]:
    max_t = draw(st.integers(1, 30))
    settings = {
        "max_t": max_t,
        "grace_period": draw(st.integers(1, max_t)),
        "reduction_factor": draw(st.integers(2, 5)),
    }
    generator = random.Random(draw(st.integers(0, 2**32)))
    levels = draw(st.sampled_from([3, 1000]))  # few levels: many ties
    trials = draw(st.integers(1, 25))
    curves = [[generator.randrange(levels) / levels for _ in range(max_t)] for _ in range(trials)]
    return settings, curves, [generator.randrange(10**6) for _ in range(trials * max_t)]


@given(searches())
def test_decisions_equal_rays_own_scheduler(search: tuple[Any, ...]) -> None:
    settings, curves, moves = search
    rays = AsyncHyperBandScheduler(time_attr="epoch", metric="local_tpe", mode="max", brackets=1, **settings)
    ours, theirs = Search(ResumableASHA(**settings), settings["max_t"]), Search(rays, settings["max_t"])
    ours.play(curves, moves)
    theirs.play(curves, moves)
    assert ours.decisions == theirs.decisions
    assert ours.scheduler.rungs() == dict(rays._brackets[0]._rungs)


@given(searches())
def test_decisions_equal_a_brute_force_asha(search: tuple[Any, ...]) -> None:
    settings, curves, moves = search
    ours = Search(ResumableASHA(**settings), settings["max_t"])
    ours.play(curves, moves)
    expected = brute_force(
        curves, [(number, epoch) for number, epoch, _ in ours.decisions],
        grace=settings["grace_period"], rf=settings["reduction_factor"], max_t=settings["max_t"],
    )  # fmt: skip
    assert [decision for _, _, decision in ours.decisions] == expected


@given(searches(), st.floats(0, 1))
def test_after_a_restart_it_decides_as_if_there_had_been_none(search: tuple[Any, ...], when: float) -> None:
    """The new driver has the journal's records alone, and a new id for each trial that it continues."""
    settings, curves, moves = search
    kill = int(when * len(moves))
    whole = Search(ResumableASHA(**settings), settings["max_t"])
    whole.play(curves, moves)
    first = Search(ResumableASHA(**settings), settings["max_t"])
    first.play(curves, moves[:kill])
    records = list(first.records.values())
    random.Random(0).shuffle(records)
    second = Search(ResumableASHA(**settings, earlier=records), settings["max_t"], records=first.records)
    for number in first.running():
        second.add(number, driver=1)
    assert by_number(second.scheduler, second.trials) == by_number(first.scheduler, first.trials)
    second.play(curves, moves[kill:])
    assert first.decisions + second.decisions == whole.decisions
    assert by_number(second.scheduler, second.trials) == by_number(whole.scheduler, whole.trials)


def by_number(scheduler: ResumableASHA, trials: dict[int, FakeTrial]) -> dict[float, dict[int, float]]:
    """Rungs under the trial's number, whichever driver's id they stand under."""
    numbers = {trial.trial_id: number for number, trial in trials.items()}
    numbers |= {f"trial-{number}": number for number in range(100)}
    return {m: {numbers[key]: score for key, score in scores.items()} for m, scores in scheduler.rungs().items()}


def test_rungs_of_round2() -> None:
    scheduler = ResumableASHA(max_t=40, grace_period=5, reduction_factor=3)
    assert sorted(scheduler.rungs()) == [5, 15]  # 45 lies beyond the last epoch


def record(number: int, scores: list[float], **fields: Any) -> TrialRecord:
    curve = {epoch: result(epoch, score) for epoch, score in enumerate(scores, start=1)}
    return TrialRecord(number, {}, 0, number, curve=curve, **fields)


def test_a_continued_trial_is_not_judged_twice_at_a_rung() -> None:
    earlier = [record(0, [0.1]), *(record(n, [0.9], stop_reason="finished") for n in range(1, 6))]
    scheduler = ResumableASHA(max_t=9, grace_period=1, reduction_factor=3, earlier=earlier)
    trial = fake(0, driver=1)
    scheduler.on_trial_add(None, trial)  # type: ignore[arg-type]
    assert scheduler.rungs()[1][trial.trial_id] == 0.1
    assert len(scheduler.rungs()[1]) == 6
    for again in (1, 2):  # epoch 1 repeated after a fault, then the next
        assert scheduler.on_trial_result(None, trial, result(again, 0.1)) == CONTINUE  # type: ignore[arg-type]
    assert scheduler.on_trial_result(None, trial, result(3, 0.1)) == CONTINUE  # type: ignore[arg-type]  # first at rung 3


def test_the_results_of_ended_trials_judge_the_new_ones() -> None:
    earlier = [record(n, [0.9], stop_reason="asha") for n in range(3)]
    scheduler = ResumableASHA(max_t=9, grace_period=1, reduction_factor=3, earlier=earlier)
    good, bad = fake(3), fake(4)
    for trial in (good, bad):
        scheduler.on_trial_add(None, trial)  # type: ignore[arg-type]
    assert scheduler.on_trial_result(None, good, result(1, 0.9)) == CONTINUE  # type: ignore[arg-type]  # a tie goes on
    assert scheduler.on_trial_result(None, bad, result(1, 0.8999)) == STOP  # type: ignore[arg-type]


@pytest.mark.parametrize("score", [NAN, math.inf, -math.inf, None])
def test_a_score_that_is_not_finite_never_enters_a_rung(score: Any) -> None:
    scheduler = ResumableASHA(max_t=9, grace_period=1, reduction_factor=3)
    trial = fake(0)
    scheduler.on_trial_add(None, trial)  # type: ignore[arg-type]
    assert scheduler.on_trial_result(None, trial, result(1, score)) == CONTINUE  # type: ignore[arg-type]
    scheduler.on_trial_complete(None, trial, result(1, score))  # type: ignore[arg-type]
    assert not any(scheduler.rungs().values())


def test_a_result_without_a_score_is_passed_over() -> None:
    scheduler = ResumableASHA(max_t=9, grace_period=1, reduction_factor=3)
    trial = fake(0)
    scheduler.on_trial_add(None, trial)  # type: ignore[arg-type]
    assert scheduler.on_trial_result(None, trial, {"done": True}) == CONTINUE  # type: ignore[arg-type]
    scheduler.on_trial_complete(None, trial, {"done": True})  # type: ignore[arg-type]
    assert not any(scheduler.rungs().values())


def test_nan_of_an_earlier_driver_never_enters_a_rung() -> None:
    scheduler = ResumableASHA(
        max_t=9, grace_period=1, reduction_factor=3, earlier=[record(0, [NAN]), record(1, [0.5, NAN, NAN])]
    )
    assert scheduler.rungs() == {1: {"trial-1": 0.5}, 3: {}, 9: {}}


def test_a_trial_whose_first_epoch_lies_beyond_a_rung_is_recorded_there_as_ray_would() -> None:
    late = TrialRecord(0, {}, 0, 0, curve={2: result(2, 0.5)})
    recalled = ResumableASHA(max_t=9, grace_period=1, reduction_factor=3, earlier=[late])
    live = ResumableASHA(max_t=9, grace_period=1, reduction_factor=3)
    live.on_trial_add(None, fake(0))  # type: ignore[arg-type]
    live.on_trial_result(None, fake(0), result(2, 0.5))  # type: ignore[arg-type]
    assert [list(scores.values()) for scores in recalled.rungs().values()] == [[], [], [0.5]]
    assert [list(scores.values()) for scores in live.rungs().values()] == [[], [], [0.5]]


def test_a_trial_that_the_gate_stopped_counts_in_its_rung() -> None:
    """Tune calls on_trial_complete for it, and never on_trial_result."""
    scheduler = ResumableASHA(max_t=9, grace_period=1, reduction_factor=3)
    trial = fake(0)
    scheduler.on_trial_add(None, trial)  # type: ignore[arg-type]
    scheduler.on_trial_complete(None, trial, result(1, 0.7))  # type: ignore[arg-type]
    assert scheduler.rungs()[1] == {trial.trial_id: 0.7}


@pytest.mark.parametrize("earlier", [[], [TrialRecord(0, {}, 0, 0)], [record(0, [0.5, 0.6], stop_reason="error")]])
def test_trials_without_or_with_few_epochs_are_recalled_as_far_as_they_came(earlier: list[TrialRecord]) -> None:
    scheduler = ResumableASHA(max_t=9, grace_period=2, reduction_factor=2, earlier=earlier)
    expected = {"trial-0": 0.6} if earlier and earlier[0].curve else {}
    assert scheduler.rungs() == {2: expected, 4: {}, 8: {}}


# --- ranges ----------------------------------------------------------------------------------------------------------


def test_values_at_the_ends_are_allowed() -> None:
    assert list(ResumableASHA(max_t=4, grace_period=4, reduction_factor=2).rungs()) == [4]
    assert sorted(ResumableASHA(max_t=4, grace_period=1, reduction_factor=2).rungs()) == [1, 2, 4]


def test_the_last_score_of_a_finished_trial_counts_in_its_rung_if_it_is_finite() -> None:
    scheduler = ResumableASHA(max_t=27, grace_period=1, reduction_factor=3)
    for number, score in ((0, 0.4), (1, NAN)):
        trial = fake(number)
        scheduler.on_trial_add(None, trial)  # type: ignore[arg-type]
        scheduler.on_trial_complete(None, trial, result(3, score))  # type: ignore[arg-type]
    assert scheduler.rungs()[3] == {"driver0_00000": 0.4}


def test_the_flag_chooses_the_scheduler() -> None:
    asha = make_scheduler(RunConfig(epochs=27, grace=3, reduction=3), [record(0, [0.5] * 3, stop_reason="asha")])
    assert isinstance(asha, ResumableASHA)
    assert asha.rungs() == {3: {"trial-0": 0.5}, 9: {}, 27: {}}
    assert type(make_scheduler(RunConfig(scheduler="none"))) is FIFOScheduler
