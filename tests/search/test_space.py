import math
from typing import Any

import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from nkat_ray.config import PRESETS, ROUND1_BEST, SPACES, Choice, RunConfig, Span, TrialConfig
from nkat_ray.search.space import (
    baseline_point,
    clip,
    contains,
    distribution,
    domains,
    refuse_impossible,
    round1_point,
    trial_config,
)

QUICK, ROUND2 = RunConfig.from_preset("quick"), RunConfig()


def test_domains_are_the_space_without_what_the_user_typed() -> None:
    assert domains(ROUND2) == SPACES["round2"]
    assert set(domains(ROUND2, ["depth", "lr"])) == set(SPACES["round2"]) - {"depth"}
    assert domains(ROUND2, list(SPACES["round2"])) == {}


@pytest.mark.parametrize(
    ("domain", "expected"),
    [
        (Choice(("off", None, 4, True)), CategoricalDistribution(("off", None, 4, True))),
        (Span(384, 512, step=64), IntDistribution(384, 512, step=64)),
        (Span(0.6, 1.0), FloatDistribution(0.6, 1.0)),
        (Span(2e-4, 2e-3, log=True), FloatDistribution(2e-4, 2e-3, log=True)),
    ],
)
def test_distributions(domain: Any, expected: Any) -> None:
    assert distribution(domain) == expected


@pytest.mark.parametrize("space", SPACES)
def test_whatever_optuna_draws_is_contained_and_valid(space: str) -> None:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    domain_of = SPACES[space]
    run = RunConfig(space=space)  # type: ignore[arg-type]
    for _ in range(40):
        params = study.ask({name: distribution(domain) for name, domain in domain_of.items()}).params
        assert all(contains(domain_of[name], value) for name, value in params.items())
        assert trial_config(run, params) == TrialConfig(**params)


@pytest.mark.parametrize(
    ("domain", "value", "expected"),
    [
        (Choice((2, 4)), 2, True),
        (Choice((2, 4)), 3, False),
        (Choice((False, True)), 1, False),  # 1 == True in Python; a choice means the value itself
        (Choice((4, None)), None, True),
        (Span(384, 512, step=64), 448, True),
        (Span(384, 512, step=64), 400, False),
        (Span(384, 512, step=64), 512, True),
        (Span(384, 512, step=64), 576, False),
        (Span(0.6, 1.0), 0.6, True),
        (Span(0.6, 1.0), 1.0, True),
        (Span(0.6, 1.0), 0.5999, False),
        (Span(0.6, 1.0), math.nan, False),
    ],
)
def test_contains(domain: Any, value: Any, expected: bool) -> None:
    assert contains(domain, value) is expected


@given(st.floats(-1e6, 1e6), st.sampled_from([Span(384, 512, step=64), Span(5, 9, step=1), Span(0.6, 1.0)]))
def test_clip_gives_the_nearest_that_is_contained(value: float, span: Span) -> None:
    clipped = clip(span, value)
    assert contains(span, clipped)
    if span.step is None:
        assert abs(clipped - value) == min(abs(value - span.low), abs(value - span.high)) or clipped == value
    else:
        allowed = range(int(span.low), int(span.high) + 1, span.step)
        assert isinstance(clipped, int)
        assert abs(clipped - value) == min(abs(n - value) for n in allowed)


def test_clip_leaves_a_choice_alone() -> None:
    assert clip(Choice((2, 4)), 3) == 3


# --- the two trials that every run begins with ------------------------------------------------------------------------


def test_the_first_trial_is_the_notes_baseline() -> None:
    assert baseline_point(ROUND2, domains(ROUND2)) == {
        "patch_size": 2, "conv_stem": "tiny", "embed_dim": 384, "depth": 7, "temperature": 0.65, "top_p": 0.80,
    }  # fmt: skip
    assert trial_config(ROUND2, baseline_point(ROUND2, domains(ROUND2))) == TrialConfig()


def test_the_second_trial_is_round1s_best_projected_and_says_where_it_bent() -> None:
    point, notes = round1_point(ROUND2, domains(ROUND2))
    assert point == {
        "patch_size": 4, "conv_stem": "off", "embed_dim": 384, "depth": 5, "temperature": 0.6, "top_p": 0.80,
    }  # fmt: skip
    assert notes[:2] == ["temperature 0.547 -> 0.6", "top_p 0.755 -> 0.8"]
    assert notes[2].startswith("not searched, so the baseline's: ")
    assert {"lr", "label_smoothing", "nkat_decay"} <= set(notes[2].split(": ")[1].split(", "))


def test_round1_uses_its_own_values_where_the_space_has_the_parameter() -> None:
    run = RunConfig(space="extended")
    point, notes = round1_point(run, domains(run))
    for name in ("lr", "nkat_strength", "dropout_attn", "dropout_embed", "top_k", "conv_stem", "depth"):
        assert point[name] == ROUND1_BEST[name]
    assert point["mixup"] == run.mixup  # Round-1 says nothing of it
    assert notes[2] == "not searched, so the baseline's: nkat_decay, label_smoothing"


def test_in_quick_both_first_trials_take_the_presets_sizes() -> None:
    space = domains(QUICK)
    baseline, (round1, notes) = baseline_point(QUICK, space), round1_point(QUICK, space)
    assert (baseline["embed_dim"], baseline["depth"]) == (round1["embed_dim"], round1["depth"]) == (64, 2)
    assert round1["conv_stem"] == baseline["conv_stem"]  # `off` is not in this space
    assert f"conv_stem off -> {baseline['conv_stem']}" in notes


def test_round1_outside_the_bounds_is_clipped_with_a_note() -> None:
    point, notes = round1_point(ROUND2, {"temperature": Span(0.7, 1.0), "depth": Span(6, 9, step=1)})
    assert point == {"temperature": 0.7, "depth": 6}
    assert notes[:2] == ["temperature 0.547 -> 0.7", "depth 5 -> 6"]


def test_what_the_user_typed_is_in_neither_point() -> None:
    space = domains(ROUND2, ["depth", "top_p"])
    assert not {"depth", "top_p"} & (set(baseline_point(ROUND2, space)) | set(round1_point(ROUND2, space)[0]))


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("space", SPACES)
def test_both_first_trials_lie_in_the_space_and_are_valid(preset: str, space: str) -> None:
    run = RunConfig.from_preset(preset, space=space)
    domain_of = domains(run)
    for point in (baseline_point(run, domain_of), round1_point(run, domain_of)[0]):
        assert set(point) == set(domain_of)
        assert all(contains(domain_of[name], value) for name, value in point.items())
        trial_config(run, point)


# --- trials -----------------------------------------------------------------------------------------------------------


def test_trial_config_takes_the_proposal_over_the_run_and_ignores_what_is_no_field() -> None:
    run = RunConfig(lr=1e-3, depth=6)
    config = trial_config(run, {"depth": 9, "trial": 3, "seed": 1, "resume_from": []})
    assert config == TrialConfig(lr=1e-3, depth=9)


def test_trial_config_refuses_the_impossible() -> None:
    with pytest.raises(ValueError, match="patch_size"):
        trial_config(ROUND2, {"patch_size": 3})


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_possible(preset: str) -> None:
    refuse_impossible(RunConfig.from_preset(preset), ())


@pytest.mark.parametrize(
    ("run", "fixed"),
    [
        (RunConfig(conv_stem="off", patch_size=32), ["patch_size"]),  # the space may draw a stem: a map of 8x8
        (RunConfig(conv_stem="off", patch_size=16), ["patch_size"]),
        (RunConfig(space="extended", cutmix=0.2, mixup=0.8), ["mixup"]),  # the space may draw cutmix 0.5
        (RunConfig(space="extended", num_heads=4, top_k=None), ["top_k"]),  # the space may draw split heads
        (RunConfig(num_heads=12), []),  # 12 divides 384, not 448
    ],
)
def test_what_the_user_fixed_and_the_space_cannot_go_with_is_refused_before_any_work(
    run: RunConfig, fixed: Any
) -> None:
    with pytest.raises(ValueError, match=r"patch_size|mixup|split_heads|embed_dim"):
        refuse_impossible(run, fixed)


def test_a_fixed_pair_that_fits_is_not_refused() -> None:
    refuse_impossible(RunConfig(conv_stem="off", patch_size=32), ["conv_stem", "patch_size"])
