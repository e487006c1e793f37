"""What is counted of a run, and what is estimated from it."""

from dataclasses import replace
from typing import Any

import pytest

from nkat_ray.config import STAGE1_DATASET, RunConfig
from nkat_ray.data import Dataset, Missing
from nkat_ray.report.tally import Evaluations, Trials, survivor_cost


def dataset(name: str) -> Dataset:
    return Dataset(
        name=name, class_names=tuple("abcdefghij"), grey=False, flip=True, source="made up", digest="sha256:0",
        verified=True, sizes={"train": 50_000, "test": 10_000}, reader=None,  # type: ignore[arg-type]
    )  # fmt: skip


def test_trials_to_come_train_as_long_as_the_ended_ones_did() -> None:
    trials = Trials(epochs=12, total=5)
    assert trials.epochs_left() == 5 * 12
    trials.end(0, {"epochs": 3, "stop_reason": "asha"})
    trials.end(1, {"epochs": 9, "stop_reason": "gate"})
    trials.epoch(2, {"epoch": 8})
    assert trials.epochs_left() == 2 * 6 + 0  # the running one may end at any time
    trials.start(3, "tiny p2 384x7")
    assert trials.epochs_left() == 6 + 0 + 6


def test_survivors_to_come_are_expected_at_the_rate_so_far() -> None:
    trials = Trials(epochs=12, total=9)
    assert trials.expected_survivors() == 3.0  # a third, before anything is known
    for trial in range(5):
        trials.end(trial, {"stop_reason": "gate", "passed_gate": trial < 3, "best_local_tpe": trial / 10})
    assert trials.expected_survivors() == 3 + 4 * (3 + 1) / (5 + 3)
    assert trials.summary() == "gate 5  survivors 3  best Local TPE 0.400 (trial 4)"


def test_what_an_earlier_driver_did_has_cost_nothing() -> None:
    stage2 = Evaluations([0, 1], [STAGE1_DATASET, "mnist"], began=0.0)
    whole = 2 * (1.0 + 0.1 + 0.1 + 0.1)  # per survivor a transfer, and three scorings
    assert (stage2.total, stage2.done, stage2.cost_left()) == (8, 0, pytest.approx(whole))
    row: dict[str, Any] = {"trial": 0, "dataset": "mnist", "status": "ok"}
    stage2.add(row, earlier=True)
    assert (stage2.done, stage2.cost_done, stage2.cost_left()) == (1, 0.0, pytest.approx(whole - 1.0))
    stage2.add(row)
    assert (stage2.cost_done, stage2.is_finished(0)) == (0.1, False)


def test_stage2_costs_epochs_of_stage1_by_the_images_that_it_trains_on() -> None:
    config = RunConfig.from_preset(
        "quick", name="r", epochs=4, train_images=4000, transfer_images=2000, transfer_epochs=2
    )
    datasets = {name: dataset(name) for name in (STAGE1_DATASET, "mnist", "leaves")}
    assert survivor_cost(config, datasets) == 2.0  # two transfers of two epochs with half the images
    assert survivor_cost(config, {**datasets, "mnist": Missing("mnist", "not found")}) == 1.0
    assert survivor_cost(config, {}) == 0.0
    scratch = replace(config, transfer="scratch")
    assert survivor_cost(scratch, datasets) == 4.0  # as many epochs as Stage 1
