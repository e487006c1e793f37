import math
import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.tune.schedulers import TrialScheduler

from nkat_ray.search.journal import TrialRecord
from nkat_ray.search.median import ResumableMedian

STOP, CONTINUE = TrialScheduler.STOP, TrialScheduler.CONTINUE
NAN = math.nan


class FakeTrial:
    """What the rule looks at."""

    def __init__(self, number: int) -> None:
        self.config, self.trial_id = {"trial": number}, f"id{number}"


def result(epoch: int, score: Any) -> dict[str, Any]:
    return {"epoch": epoch, "local_tpe": score}


def record(number: int, scores: list[float], **fields: Any) -> TrialRecord:
    curve = {epoch: result(epoch, score) for epoch, score in enumerate(scores, start=1)}
    return TrialRecord(number, {}, 0, number, curve=curve, **fields)


def by_definition(seen: dict[int, list[float]], number: int, epoch: int, *, grace: int) -> str:
    """The rule in its own words: the best so far against the median of the others' means from grace to this epoch."""
    if epoch < grace:
        return CONTINUE
    others = [s for n, s in seen.items() if n != number and len(s) >= epoch]
    if len(others) < 3:
        return CONTINUE
    median = np.median([np.mean(s[grace - 1 : epoch]) for s in others])
    return STOP if max(seen[number]) < median else CONTINUE


@given(st.integers(0, 2**32), st.integers(1, 4), st.floats(0, 1))
def test_it_decides_by_the_rule_also_after_a_restart(seed: int, grace: int, when: float) -> None:
    generator = random.Random(seed)
    curves = [[generator.random() for _ in range(6)] for _ in range(12)]
    seen: dict[int, list[float]] = {}
    rule, trials = ResumableMedian(grace_period=grace), {}
    moves = [generator.randrange(12) for _ in range(60)]
    stopped: set[int] = set()
    for step, number in enumerate(moves):
        if step == int(when * len(moves)):  # a new driver: the journal's curves alone
            records = [record(n, s) for n, s in seen.items()]
            generator.shuffle(records)
            rule, trials = ResumableMedian(grace_period=grace, earlier=records), {}
        scores = seen.setdefault(number, [])
        if number in stopped or len(scores) == 6:
            continue
        if number not in trials:
            trials[number] = FakeTrial(number)
            rule.on_trial_add(None, trials[number])  # type: ignore[arg-type]
        scores.append(curves[number][len(scores)])
        decision = rule.on_trial_result(None, trials[number], result(len(scores), scores[-1]))  # type: ignore[arg-type]
        assert decision == by_definition(seen, number, len(scores), grace=grace)
        if decision == STOP:
            stopped.add(number)


def live(rule: ResumableMedian, number: int, *scores: Any, first: int = 1) -> list[str]:
    trial = FakeTrial(number)
    rule.on_trial_add(None, trial)  # type: ignore[arg-type]
    said = []
    for epoch, score in enumerate(scores, start=first):
        said.append(rule.on_trial_result(None, trial, result(epoch, score)))  # type: ignore[arg-type]
    return said


def others(*scores: float) -> list[TrialRecord]:
    return [record(n, [score, score], stop_reason="finished") for n, score in enumerate(scores)]


def test_a_tie_goes_on_and_less_stops() -> None:
    assert live(ResumableMedian(grace_period=1, earlier=others(0.1, 0.5, 0.9)), 3, 0.5) == [CONTINUE]
    assert live(ResumableMedian(grace_period=1, earlier=others(0.1, 0.5, 0.9)), 3, 0.4999) == [STOP]


def test_nobody_stops_before_grace_or_with_too_few_others() -> None:
    assert live(ResumableMedian(grace_period=3, earlier=others(0.9, 0.9, 0.9)), 3, 0.1, 0.1) == [CONTINUE, CONTINUE]
    assert live(ResumableMedian(grace_period=1, earlier=others(0.9, 0.9)), 3, 0.1) == [CONTINUE]


@pytest.mark.parametrize("score", [NAN, math.inf, -math.inf, None])
def test_a_score_that_is_not_finite_is_passed_over(score: Any) -> None:
    rule = ResumableMedian(grace_period=1, earlier=[*others(0.1, 0.5, 0.9), record(8, [NAN, NAN])])
    assert live(rule, 3, score, 0.4) == [CONTINUE, STOP]
    rule.on_trial_complete(None, FakeTrial(4), result(1, score))  # type: ignore[arg-type]
    assert live(rule, 5, 0.5) == [CONTINUE]


def test_an_epoch_again_after_a_fault_counts_once() -> None:
    rule = ResumableMedian(grace_period=1, earlier=others(0.2, 0.4, 0.6))
    trial = FakeTrial(3)
    rule.on_trial_add(None, trial)  # type: ignore[arg-type]
    for epoch in (1, 2, 1, 2):
        rule.on_trial_result(None, trial, result(epoch, 0.9))  # type: ignore[arg-type]
    rule.on_trial_complete(None, trial, result(2, 0.9))  # type: ignore[arg-type]
    assert len(rule._results[trial]) == 2


@pytest.mark.parametrize(("name", "value"), [("grace_period", 0), ("min_samples", 0)])
def test_values_out_of_range(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{name} is 0; allowed: >= 1"):
        ResumableMedian(**{"grace_period": 1, name: value})
