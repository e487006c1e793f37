"""What to do next: for every end of a run, commands that the real parser takes."""

import dataclasses
import math
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nkat_ray.commands import evaluate, explain, report, train, tune
from nkat_ray.config import TrialConfig
from nkat_ray.errors import FAULT, INTERRUPTED
from nkat_ray.metrics import accuracy_for
from nkat_ray.record import scoring
from nkat_ray.record.run_folder import RecordedRun, load_run
from nkat_ray.report.advice import (
    Step,
    diagnose,
    diagnoses_of,
    largest_modulation,
    limits_of,
    next_steps,
    train_command,
)

PROGRAMS = {"train": train, "evaluate": evaluate, "explain": explain, "report": report}


def check(steps: list[Step]) -> list[str]:
    """Parse each command with the command line's own parser, and return them."""
    for step in steps:
        assert step.text
        words = shlex.split(step.command)
        match words[:2]:
            case ["nkat", "data"] | []:
                pass
            case ["nkat", command]:
                PROGRAMS[command].PROGRAM.read(words[2:])
            case _:
                assert words[:2] == ["python", "tune_round2.py"]
                tune.PROGRAM.read(words[2:])
    return [step.command for step in steps]


def test_a_run_below_its_target_searches_where_the_target_is_possible(make_run: Callable[..., Any]) -> None:
    command = check(next_steps(load_run(make_run().folder)))[0]  # the winner's tiny stem would need more than 1
    typed = tune.PROGRAM.read(shlex.split(command)[2:])
    assert typed == {"preset": "laptop", "space": "round2", "conv_stem": "off", "embed_dim": 384}


@pytest.mark.parametrize(
    ("preset", "gpus", "step"),
    [
        ("quick", 0.0, "--preset laptop"),
        ("laptop", 0.0, "--preset laptop --warm_start"),  # the larger ones would take a CPU months
        ("quick", 0.5, "--preset gpu"),
        ("laptop", 0.5, "--preset gpu"),
        ("gpu", 0.5, "--preset round2"),
        ("round2", 0.5, "--preset round2 --warm_start"),
    ],
)
def test_where_no_design_can_reach_it_a_search_that_this_machine_can_run_is_next(
    preset: str, gpus: float, step: str, make_run: Callable[..., Any]
) -> None:
    run = load_run(make_run(preset=preset, emnist=0.5).folder)  # even without a stem CIFAR-10 would need 1.33
    run = dataclasses.replace(run, trials=[{**row, "gpus": gpus} for row in run.trials])
    (command,) = (line for line in check(next_steps(run)) if line.startswith("python tune_round2.py"))
    assert command.startswith(f"python tune_round2.py {step}")
    assert command.endswith(step) or "--warm_start" in step


@pytest.mark.parametrize("options", [{}, {"gate": 0.6}, {"gate": 1.0}, {"emnist": None}, {"running": True}])
def test_there_are_at_most_three_steps(make_run: Callable[..., Any], options: dict[str, Any]) -> None:
    run = load_run(make_run(**options).folder)
    run = dataclasses.replace(run, summary={**run.summary, "weights_kept": [5]})
    assert 1 <= len(next_steps(run)) <= 3
    check(next_steps(run))


def test_best_trials_can_be_evaluated_all_the_same(make_run: Callable[..., Any]) -> None:
    run = load_run(make_run(gate=0.60).folder)
    kept = dataclasses.replace(run, summary={**run.summary, "weights_kept": [5, 7]})
    step = next(step for step in next_steps(kept) if "evaluate" in step.command)
    assert evaluate.PROGRAM.read(shlex.split(step.command)[2:])["best"] == 2


def test_without_a_survivor_the_closest_trial_is_trained_longer(make_run: Callable[..., Any]) -> None:
    run = load_run(make_run(gate=0.60).folder)
    command = check(next_steps(run))[0]
    trained = train.read(shlex.split(command)[2:])
    assert (trained.epochs, trained.conv_stem, trained.seed) == (24, "small", 1005)
    impossible = load_run(make_run("impossible", gate=1.0).folder)
    assert "No accuracy passes the gate of 1.00" in next_steps(impossible)[0].text
    assert next_steps(run)[0].cost_s == pytest.approx(24 * 5.5)  # its epochs took 4.0 + 5 * 0.3 s
    nothing = dataclasses.replace(run, trials=[{**row, "best_local_tpe": None} for row in run.trials])
    assert "No trial has a score" in next_steps(nothing)[0].text


@pytest.mark.parametrize(("code", "said"), [(None, "in progress"), (INTERRUPTED, "interrupted"), (FAULT, "fault")])
def test_a_run_that_has_not_ended_can_be_continued(make_run: Callable[..., Any], code: int | None, said: str) -> None:
    run = load_run(make_run(running=True, storage_path="/data/my runs").folder)
    steps = next_steps(dataclasses.replace(run, summary={**run.summary, "exit_code": code}))
    assert said in steps[0].text
    typed = tune.PROGRAM.read(shlex.split(check(steps)[-1])[2:])
    assert typed == {"resume": True, "name": "fake-run", "storage_path": "/data/my runs"}


def changed(run: RecordedRun, **summary: Any) -> RecordedRun:
    return dataclasses.replace(run, summary={**run.summary, "verdict": "undecided", **summary})


def test_what_keeps_a_verdict_open_comes_first(make_run: Callable[..., Any]) -> None:
    run = load_run(make_run().folder)
    found = run.summary["data"]
    generated = changed(run, data={name: {**item, "source": "synthetic suite"} for name, item in found.items()})
    assert "generated" in next_steps(generated)[0].text
    missing = changed(run, data={**found, "mnist": {"source": None, "missing": "not found"}})
    assert "MNIST" in next_steps(missing)[0].text
    own = changed(run, data={"cifar10": found["cifar10"], "mine": found["mnist"]})
    assert "Fashion-MNIST" in next_steps(own)[0].text
    assert "--datasets mnist fashion_mnist emnist_letters cifar10" in check(next_steps(own))[0]
    assert "--official" in check(next_steps(changed(run)))[0]  # the interval holds the target: more seeds decide
    assert "--official" in check(next_steps(changed(run, verdict="reached")))[0]


@pytest.mark.parametrize(
    "config",
    [
        TrialConfig(),
        TrialConfig(conv_stem="small", embed_dim=512, depth=9, temperature=0.8123456789, top_p=0.91, split_heads=True),
        TrialConfig(top_k=None, top_p=None, randaugment=None, cutout=None, clip_grad=None, ema=None, train_images=4000),
        TrialConfig(randaugment=(3, 12), stem_stride=2, color_norm="residual", lr=1.7e-4),
    ],
)
def test_train_command_gives_the_configuration_back(config: TrialConfig, make_run: Callable[..., Any]) -> None:
    run = load_run(make_run(data_dir="/data/it's here").folder)
    words = shlex.split(train_command(vars(config), run, seed=17))
    assert words[:2] == ["nkat", "train"]
    parsed = train.read(words[2:])  # the command line's own parser
    assert {name: getattr(parsed, name) for name in vars(config)} == vars(config)
    assert parsed.seed == 17
    assert parsed.data_dir == Path("/data/it's here")


# --- what a step costs ------------------------------------------------------------------------------------------------


def faster(run: RecordedRun, factor: float) -> RecordedRun:
    times = ("epoch_s", "started_s")
    return dataclasses.replace(run, curves=[{**p, **{key: p[key] / factor for key in times}} for p in run.curves])


def test_costs_follow_the_runs_own_speed(make_run: Callable[..., Any]) -> None:
    run = load_run(make_run(gate=0.60).folder)
    for slow, fast in zip(next_steps(run), next_steps(faster(run, 2)), strict=True):
        assert slow.cost_s is not None
        assert fast.cost_s == pytest.approx(slow.cost_s / 2)
    official = changed(load_run(make_run("w").folder))
    assert "--official" in next_steps(official)[0].command
    assert next_steps(official)[0].cost_s > 12 * 4  # trainings of twelve epochs, side by side


def test_nothing_is_said_about_costs_without_an_epoch(make_run: Callable[..., Any]) -> None:
    run = dataclasses.replace(load_run(make_run(gate=0.60).folder), curves=[])
    assert [step.cost_s for step in next_steps(run)] == [None, None]


# --- what limits a run ------------------------------------------------------------------------------------------------


def test_losses_add_up_to_what_separates_the_winner_from_no_error(make_run: Callable[..., Any]) -> None:
    run = load_run(make_run().folder)
    limits = limits_of(run)
    now = scoring.result_scores(run.stage2, run.winner).global_tpe
    assert sum(loss.tpe for loss in limits.losses) == pytest.approx(1 / math.log10(1 + 20) - now)
    assert limits.losses[0].name == "lambda 22 instead of 20"
    assert limits.losses[0].tpe == pytest.approx(1 / math.log10(21) - 1 / math.log10(23))
    assert limits.losses[4].tpe == pytest.approx((1 - 0.6106) / 4 / math.log10(23), abs=2e-3)
    assert limits.gap.startswith("Trial 0 is 0.081 below Global TPE 0.70. A network without an error could have 0.756")
    assert limits.gap.index("CIFAR-10") < limits.gap.index("EMNIST") < limits.gap.index("MNIST.")


def test_with_three_datasets_there_is_no_waterfall(make_run: Callable[..., Any]) -> None:
    limits = limits_of(load_run(make_run(emnist=None).folder))
    assert (limits.gap, limits.losses) == ("", [])
    assert limits.measured == ["mnist", "fashion_mnist"]
    assert limits.others["emnist_letters"] == 0.945  # assumed


def test_the_reach_of_a_design(make_run: Callable[..., Any]) -> None:
    run = load_run(make_run().folder)
    assert limits_of(run).reach == (
        "With the design of trial 0 (tiny stem, width 384) Global TPE 0.70 is impossible: CIFAR-10 would need 1.058. "
        "Least is needed with no stem, width 384: 0.947."
    )
    good = [{**row, "test_accuracy": 0.99 if row["dataset"] != "cifar10" else 0.9} for row in run.stage2]
    better = limits_of(dataclasses.replace(run, stage2=good)).reach
    needed = 4 * accuracy_for(0.7, 22) - 3 * 0.99
    assert f"Global TPE 0.70: CIFAR-10 needs {needed:.3f} and has 0.900" in better
    worse = [{**row, "test_accuracy": 0.6 if row["dataset"] == "cifar10" else 0.99} for row in run.stage2]
    assert f"needs {needed:.3f} on CIFAR-10; it has 0.600" in limits_of(dataclasses.replace(run, stage2=worse)).reach
    bad = [{**row, "test_accuracy": 0.6} for row in run.stage2]
    assert limits_of(dataclasses.replace(run, stage2=bad)).reach.endswith("No design of this space can reach it.")


def test_without_a_winner_the_gap_is_that_to_the_gate(make_run: Callable[..., Any]) -> None:
    limits = limits_of(load_run(make_run(gate=0.60).folder))
    assert limits.gap == (
        "Trial 5 is closest to the gate, with an accuracy of 0.685. At its lambda of 27.00 the gate of 0.60 needs "
        "0.868, 0.183 more."
    )
    assert limits.measured == []


def test_a_run_without_a_score_is_not_explained(make_run: Callable[..., Any]) -> None:
    run = load_run(make_run(gate=0.60).folder)
    nothing = dataclasses.replace(run, curves=[], trials=[{**r, "best_local_tpe": None} for r in run.trials])
    limits = limits_of(nothing)
    assert (limits.gap, limits.reach, limits.losses, limits.diagnoses) == ("", "", [], [])
    assert limits.demands


def test_a_configuration_of_another_version_is_not_explained(make_run: Callable[..., Any]) -> None:
    run = load_run(make_run(gate=0.60).folder)
    other = dataclasses.replace(
        run, config={**run.config, "lambda_model": "later"}, trials=[{**r, "config/conv_stem": "?"} for r in run.trials]
    )
    limits = limits_of(other)
    assert (limits.demands, limits.diagnoses) == ([], [])


# --- one diagnosis per trial ------------------------------------------------------------------------------------------

FLAT = [0.30, 0.45, 0.50, 0.50, 0.50, 0.50, 0.50, 0.50]
MANY = dict(conv_stem="off", patch_size=4)  # 64 tokens


def of_curve(accuracies: list[float], *, trained: float | None = None, reason: str = "gate", **fields: Any) -> str:
    """The rule that matches a trial with this curve; empty where none does."""
    config = TrialConfig(epochs=len(accuracies) if reason != "asha" else 40, warmup=0, **{**MANY, **fields})
    row = {f"config/{name}": value for name, value in vars(config).items()}
    row |= {"trial": 3, "epochs": len(accuracies), "stop_reason": reason}
    curve = [
        {"epoch": n, "val_accuracy": accuracy, "train_accuracy": trained, "alpha": None, "beta": None}
        for n, accuracy in enumerate(accuracies, start=1)
    ]
    found = diagnose(row, curve, 0.8)
    return found.rule if found else ""


@pytest.mark.parametrize(
    ("curve", "fields", "rule"),
    [
        ([0.30, 0.40, 0.45, 0.48, 0.50, 0.52, 0.53, 0.54], {}, "still rising"),
        ([0.30, 0.40, 0.45, 0.48, 0.50, 0.529, 0.53, 0.535], {}, ""),  # by less than 0.01 in the last quarter
        ([0.30, 0.40, 0.45, 0.48, 0.50, 0.52, 0.55, 0.54], {}, ""),  # not at the last epoch
        ([0.30, 0.40, 0.50], {}, ""),  # too short to say
        ([0.30, 0.40, 0.45, 0.48], {"reason": "asha"}, ""),  # nobody knows its end
        (FLAT, {"trained": 0.61}, "overfits"),
        (FLAT, {"trained": 0.59}, "both low"),
        (FLAT, {"trained": math.nan}, ""),
        (FLAT, {"trained": 0.50, "reason": "asha"}, ""),
        ([0.79] * 8, {"trained": 0.81}, ""),  # training is not low
        (FLAT, {"trained": 0.50, "conv_stem": "tiny", "patch_size": 2}, "both low"),
        (FLAT, {"conv_stem": "tiny", "patch_size": 2}, "few tokens"),  # 16
        (FLAT, {"conv_stem": "tiny", "patch_size": 4, "reason": "asha"}, "few tokens"),  # 4
        (FLAT, {"top_k": 64}, "top_k without effect"),
        (FLAT, {"top_k": 63}, ""),
        (FLAT, {"top_k": None}, ""),
        ([math.nan] * 8, {}, ""),
        ([], {"reason": "asha"}, ""),
    ],
)
def test_the_rule_that_limits_a_trial(curve: list[float], fields: dict[str, Any], rule: str) -> None:
    assert of_curve(curve, **fields) == rule


def test_modulation_is_bounded_by_its_largest_block() -> None:
    config = TrialConfig(nkat_strength=0.002, nkat_decay=0.5)
    point = {"alpha": [0.1, -3.0], "beta": [0.05, 0.2]}
    assert largest_modulation(config, point) == pytest.approx(0.002 * 0.5 * 3.2)
    assert largest_modulation(config, {"alpha": None, "beta": None}) is None
    assert largest_modulation(config, {}) is None


@pytest.mark.parametrize(("alpha", "rule"), [(0.1, "modulation without effect"), (1.0, None)])
def test_a_modulation_without_effect_is_the_last_thing_said(alpha: float, rule: str | None) -> None:
    config = TrialConfig(conv_stem="off", patch_size=4, nkat_strength=0.0024)
    row = {f"config/{name}": value for name, value in vars(config).items()}
    row |= {"trial": 3, "epochs": 2, "stop_reason": "asha"}
    found = diagnose(row, [{"epoch": 1, "val_accuracy": 0.5, "alpha": [alpha], "beta": [0.05]}], 0.8)
    assert (found and found.rule) == rule


def test_only_limited_trials_are_diagnosed_each_once_and_the_winner_first(make_run: Callable[..., Any]) -> None:
    run = load_run(make_run().folder)
    trials = [one.trial for one in diagnoses_of(run, {"mnist": 0.99, "fashion_mnist": 0.9, "emnist_letters": 0.9})]
    assert trials[0] == run.winner
    assert len(trials) == len(set(trials))
    assert not {3, 6} & set(trials)  # ended by a fault
    reached = changed(run, verdict="reached")
    assert not {0, 5} & {one.trial for one in limits_of(reached).diagnoses}


@pytest.mark.parametrize(
    ("trained", "fields", "flag"),
    [
        (0.70, {"train_images": 4000}, ("train_images", None)),
        (0.50, {"train_images": 4000}, ("optimizer", "muon")),
        (None, {"train_images": 4000}, ("epochs", 24)),
    ],
)
def test_the_closest_trial_is_trained_as_its_diagnosis_says(
    make_run: Callable[..., Any], trained: float | None, fields: dict[str, Any], flag: tuple[str, Any]
) -> None:
    run = load_run(make_run(gate=0.60).folder)
    stuck = dataclasses.replace(
        run,
        trials=[{**row, **{f"config/{name}": value for name, value in fields.items()}} for row in run.trials],
        curves=[{**point, "val_accuracy": 0.5, "train_accuracy": trained} for point in run.curves],
    )
    step = next_steps(stuck)[0]
    assert getattr(train.read(shlex.split(step.command)[2:]), flag[0]) == flag[1]
    assert step.cost_s is not None
