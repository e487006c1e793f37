"""Search spaces: what a run searches, what a file may say, and the first two trials."""

import dataclasses
import json
import math
import random
import time
from pathlib import Path
from typing import Any

import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from nkat_ray.cli import tune
from nkat_ray.commands.tune import read
from nkat_ray.config import PRESETS, RunConfig, TrialConfig, config_of_json, field_names
from nkat_ray.errors import UserError
from nkat_ray.record.tables import plain
from nkat_ray.space import (
    ROUND1_BEST,
    SPACES,
    Choice,
    Domain,
    Span,
    baseline_point,
    clip,
    contains,
    corner_configs,
    distribution,
    read_space,
    refuse_impossible,
    round1_point,
    searchable,
    space_of,
    space_of_json,
    trial_config,
)

QUICK, ROUND2 = RunConfig.from_preset("quick"), RunConfig()


def test_domains_are_the_space_without_what_the_user_typed() -> None:
    assert space_of(ROUND2).domains == SPACES["round2"]
    assert set(space_of(ROUND2, ["depth", "lr"]).domains) == set(SPACES["round2"]) - {"depth"}
    assert space_of(ROUND2, list(SPACES["round2"])).domains == {}


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
    run = RunConfig(space=space)
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
    assert baseline_point(ROUND2, space_of(ROUND2).domains) == {
        "patch_size": 2, "conv_stem": "tiny", "embed_dim": 384, "depth": 7, "temperature": 0.65, "top_p": 0.80,
    }  # fmt: skip
    assert trial_config(ROUND2, baseline_point(ROUND2, space_of(ROUND2).domains)) == TrialConfig()


def test_the_second_trial_is_round1s_best_projected_and_says_where_it_bent() -> None:
    point, notes = round1_point(ROUND2, space_of(ROUND2).domains)
    assert point == {
        "patch_size": 4, "conv_stem": "off", "embed_dim": 384, "depth": 5, "temperature": 0.6, "top_p": 0.80,
    }  # fmt: skip
    assert notes[:2] == ["temperature 0.547 -> 0.6", "top_p 0.755 -> 0.8"]
    assert notes[2].startswith("not searched, so the baseline's: ")
    assert {"lr", "label_smoothing", "nkat_decay"} <= set(notes[2].split(": ")[1].split(", "))


def test_round1_uses_its_own_values_where_the_space_has_the_parameter() -> None:
    run = RunConfig(space="extended")
    point, notes = round1_point(run, space_of(run).domains)
    for name in ("lr", "nkat_strength", "dropout_attn", "dropout_embed", "top_k", "conv_stem", "depth"):
        assert point[name] == ROUND1_BEST[name]
    assert point["mixup"] == run.mixup  # Round-1 says nothing of it
    assert notes[2] == "not searched, so the baseline's: nkat_decay"


def test_in_quick_both_first_trials_take_the_presets_sizes() -> None:
    space = space_of(QUICK).domains
    baseline, (round1, notes) = baseline_point(QUICK, space), round1_point(QUICK, space)
    assert (baseline["embed_dim"], baseline["depth"]) == (round1["embed_dim"], round1["depth"]) == (64, 2)
    assert (baseline["lr"], round1["lr"]) == (QUICK.lr, 5e-4)
    assert f"lr {ROUND1_BEST['lr']} -> 0.0005" in notes


def test_round1_outside_the_bounds_is_clipped_with_a_note() -> None:
    point, notes = round1_point(ROUND2, {"temperature": Span(0.7, 1.0), "depth": Span(6, 9, step=1)})
    assert point == {"temperature": 0.7, "depth": 6}
    assert notes[:2] == ["temperature 0.547 -> 0.7", "depth 5 -> 6"]


def test_what_the_user_typed_is_in_neither_point() -> None:
    space = space_of(ROUND2, ["depth", "top_p"]).domains
    assert not {"depth", "top_p"} & (set(baseline_point(ROUND2, space)) | set(round1_point(ROUND2, space)[0]))


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("space", SPACES)
def test_both_first_trials_lie_in_the_space_and_are_valid(preset: str, space: str) -> None:
    run = RunConfig.from_preset(preset, space=space)
    domain_of = space_of(run).domains
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
    run = RunConfig.from_preset(preset)
    refuse_impossible(run, space_of(run).domains)


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
        refuse_impossible(run, space_of(run, fixed).domains)


def test_a_fixed_pair_that_fits_is_not_refused() -> None:
    run = RunConfig(conv_stem="off", patch_size=32)
    refuse_impossible(run, space_of(run, ["conv_stem", "patch_size"]).domains)


def test_three_values_that_fit_in_pairs_alone_are_refused() -> None:
    """A patch of 16 needs a map of 16 pixels: no stem, or a stem of stride 2, but not a stem of stride 4."""
    run = RunConfig(conv_stem="off", stem_stride=2, patch_size=16)
    with pytest.raises(UserError, match="patch_size is 16"):
        refuse_impossible(run, {"conv_stem": Choice(("off", "tiny")), "stem_stride": Choice((2, 4))})


def test_a_wide_space_is_checked_at_once() -> None:
    space: dict[str, Domain] = {
        "embed_dim": Span(8, 2048, step=8), "depth": Span(1, 48, step=1), "num_heads": Choice((1, 2, 4, 8)),
        "batch_size": Span(1, 65_536, step=1), "top_k": Span(1, 64, step=1), "cutout": Span(1, 32, step=1),
        "warmup": Span(0, 39, step=1),
    }  # fmt: skip
    clock = time.monotonic()
    refuse_impossible(ROUND2, space)
    corners = corner_configs(ROUND2, space)
    assert time.monotonic() - clock < 2  # 33 s when every pair of values was tried
    assert {corner.depth for corner in corners} == {1, 48}
    assert {corner.batch_size for corner in corners} == {1, 65_536}


COUPLED_DOMAINS: dict[str, st.SearchStrategy[Any]] = {
    "conv_stem": st.sampled_from([("off",), ("tiny",), ("off", "small")]).map(Choice),
    "stem_stride": st.sampled_from([(2,), (4,), (2, 4)]).map(Choice),
    "patch_size": st.sampled_from([Choice((1, 2)), Choice((4, 16)), Span(1, 3, step=1), Span(2, 8, step=2)]),
    "embed_dim": st.sampled_from([Span(64, 128, step=32), Span(8, 2048, step=4), Span(96, 2016, step=24)]),
    "num_heads": st.sampled_from([Choice((1, 2)), Choice((8, 12)), Span(2, 8, step=2), Span(4, 8, step=4)]),
    "split_heads": st.sampled_from([(False,), (False, True)]).map(Choice),
    "mixup": st.sampled_from([Span(0.0, 0.5), Span(0.4, 0.8)]),
    "cutmix": st.sampled_from([Span(0.0, 0.5), Span(0.4, 0.8)]),
}


@settings(max_examples=150)
@given(st.fixed_dictionaries({}, optional=COUPLED_DOMAINS), st.randoms(use_true_random=False))
def test_a_space_that_is_not_refused_draws_no_impossible_trial(space: dict[str, Domain], random: random.Random) -> None:
    def draw(domain: Domain) -> Any:
        if isinstance(domain, Choice):
            return random.choice(domain.values)
        if domain.step:
            return random.randrange(int(domain.low), int(domain.high) + 1, domain.step)
        return random.uniform(domain.low, domain.high)

    run = RunConfig(conv_stem="off", patch_size=2)
    try:
        refuse_impossible(run, space)
    except UserError:
        return
    for _ in range(50):
        trial_config(run, {name: draw(domain) for name, domain in space.items()})


# --- files ------------------------------------------------------------------------------------------------------------

EVERYTHING = """
conv_stem = ["off", "tiny"]        # a list: one of these
stem_stride = [4, 2]
depth = { low = 2, high = 6 }      # whole numbers: the step is 1
embed_dim = { low = 64, high = 128, step = 32 }
lr = { low = 1e-4, high = 1e-2, log = true }
temperature = { low = 1, high = 2 }
top_k = [4, "off"]
top_p = { low = 0.5, high = 1.0 }
clip_grad = ["off", 1, 0.5]
split_heads = [true, false]
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.toml"
    path.write_text(EVERYTHING)
    return path


def test_lists_and_bounds_become_domains(file: Path) -> None:
    space = read_space(file)
    assert space == {
        "conv_stem": Choice(("off", "tiny")),
        "stem_stride": Choice((4, 2)),
        "depth": Span(2, 6, step=1),
        "embed_dim": Span(64, 128, step=32),
        "lr": Span(1e-4, 1e-2, log=True),
        "temperature": Span(1.0, 2.0),
        "top_k": Choice((4, None)),
        "top_p": Span(0.5, 1.0),
        "clip_grad": Choice((None, 1.0, 0.5)),
        "split_heads": Choice((True, False)),
    }
    drawn = {name: distribution(domain) for name, domain in space.items()}
    assert drawn["embed_dim"] == IntDistribution(64, 128, step=32)
    assert drawn["lr"] == FloatDistribution(1e-4, 1e-2, log=True)
    assert drawn["top_k"] == CategoricalDistribution((4, None))


@pytest.mark.parametrize("name", SPACES)
def test_every_space_of_the_package_can_be_written_as_a_file(name: str, tmp_path: Path) -> None:
    def said(value: object) -> str:
        return '"off"' if value is None else json.dumps(value)

    lines = []
    for key, domain in SPACES[name].items():
        if isinstance(domain, Choice):
            lines.append(f"{key} = [{', '.join(map(said, domain.values))}]")
        else:
            more = f", step = {domain.step}" if domain.step else f", log = {said(domain.log)}"
            lines.append(f"{key} = {{ low = {domain.low}, high = {domain.high}{more} }}")
    path = tmp_path / "copy.toml"
    path.write_text("\n".join(lines))
    assert space_of(RunConfig(space=str(path))).domains == SPACES[name]


BAD = {
    "no such file": (None, "cannot be read"),
    "no TOML": ("depth = = 3", "no TOML"),
    "no text": (b"\xff\xfe", "no TOML"),
    "empty": ("# nothing", "names no parameter"),
    "unknown": ("dept = [3]", "did you mean depth"),
    "far from all": ("xyzzy = [3]", "allowed: conv_stem"),
    "epochs": ("epochs = [3, 4]", "'epochs' cannot be searched"),
    "the images": ("val_images = [300, 400]", "cannot be searched"),
    "a single value": ("depth = 3", "give a list of values"),
    "no value": ("depth = []", "at least one value"),
    "twice the same": ("depth = [3, 3]", "each once"),
    "another type": ("depth = [3, 4.0]", "4.0 is not allowed; allowed: a whole number, 1..48"),
    "truth for a number": ("depth = [true]", "is not allowed; allowed: a whole number, 1..48"),
    "off where it cannot be": ('depth = ["off"]', "'off' is not allowed; allowed: a whole number, 1..48"),
    "no such stem": ('conv_stem = ["huge"]', "allowed: off, tiny, small"),
    "no such stride": ("stem_stride = [3]", "allowed: 2, 4"),
    "bounds of words": ("conv_stem = { low = 1, high = 2 }", "no bounds"),
    "bounds of a literal": ("stem_stride = { low = 2, high = 4 }", "no bounds"),
    "bounds of truth": ("split_heads = { low = 0, high = 1 }", "no bounds"),
    "one bound": ("depth = { low = 2 }", "low and high"),
    "another key": ("depth = { low = 2, high = 4, log = true }", "low and high, and step"),
    "a step for a fraction": ("top_p = { low = 0.5, high = 1.0, step = 1 }", "low and high, and log"),
    "upside down": ("depth = { low = 4, high = 2 }", "low must be below high"),
    "nan": ("top_p = { low = nan, high = 1.0 }", "nan is not allowed; allowed: a number, > 0 and <= 1"),
    "infinite": ("lr = { low = 0.1, high = inf }", "inf is not allowed"),
    "out of range": ("depth = [3, 99]", "99 is not allowed; allowed: a whole number, 1..48"),
    "off as a bound": ('top_k = { low = "off", high = 8 }', "low and high are numbers"),
    "a log from zero": ("mixup = { low = 0.0, high = 0.1, log = true }", "low > 0"),
    "a step that does not divide": ("depth = { low = 2, high = 5, step = 2 }", "step must divide"),
    "no step": ("depth = { low = 2, high = 5, step = 0 }", "step must divide"),
}


@pytest.mark.parametrize(("text", "said"), BAD.values(), ids=BAD.keys())
def test_bad_files_are_one_line(text: str | bytes | None, said: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match="space") as caught:
        space_of(RunConfig(space=str(path)))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_space_that_is_neither_known_nor_a_file_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"space is 'round3'; allowed: round2, extended, laptop, gpu, quick, or a file NAME\.toml"
    ):
        space_of(RunConfig(space="round3"))


def test_the_command_line_takes_a_file_and_refuses_it_before_anything_is_written(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, space = read(["--space", str(file), "--depth", "3", "--preset", "quick"])
    assert run.depth == 3
    assert space.fixed == ("depth",)
    assert space.contents == read_space(file)
    assert set(space.domains) == set(space.contents) - {"depth"}
    file.write_text("depth = { low = 2, high = 600, step = 299 }")  # the model has no such depth
    before = sorted(tmp_path.iterdir())
    assert tune(["--space", str(file), "--storage_path", str(tmp_path), "--preset", "quick"]) == 2
    error = capsys.readouterr().err
    assert "600 is not allowed; allowed: a whole number, 1..48" in error
    assert error.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before


def test_a_configuration_opens_no_file(tmp_path: Path) -> None:
    assert RunConfig(space=str(tmp_path / "none.toml")).space.endswith("none.toml")


def test_a_run_keeps_its_space_whatever_becomes_of_the_file(file: Path) -> None:
    run = RunConfig.from_preset("quick", space=str(file))
    space = space_of(run, ["depth"])
    saved = json.loads(json.dumps({**plain(dataclasses.asdict(run)), **space.to_json()}))
    file.unlink()
    assert config_of_json(RunConfig, saved) == run
    assert space_of_json(saved) == space


@pytest.mark.parametrize("name", SPACES)
def test_a_built_in_space_is_kept_by_its_name(name: str) -> None:
    space = space_of(RunConfig(space=name), ["depth"])
    saved = {"space": name, **space.to_json()}
    assert saved["own_space"] is None
    assert space_of_json(saved) == space


@pytest.mark.parametrize(
    "saved",
    [
        {}, {"space": "round3"}, {"space": "x.toml", "own_space": {"lr": 5}}, {"space": "x.toml", "own_space": [1]},
        {"space": "x.toml", "own_space": {"lr": {"low": 1, "width": 2}}}, {"space": "round2", "fixed": None},
    ],
)  # fmt: skip
def test_what_no_run_has_written_is_refused(saved: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="space is"):
        space_of_json(saved)


def test_the_first_two_trials_lie_in_a_space_that_has_neither(tmp_path: Path) -> None:
    path = tmp_path / "far.toml"
    path.write_text('conv_stem = ["small"]\ndepth = { low = 12, high = 14 }\ntop_k = { low = 2, high = 3 }\nlr = [0.5]')
    run = RunConfig(space=str(path), top_k=None)
    space = space_of(run).domains
    refuse_impossible(run, space)
    for point in (baseline_point(run, space), round1_point(run, space)[0]):
        assert all(contains(space[name], value) for name, value in point.items())
    assert baseline_point(run, space) == {"conv_stem": "small", "depth": 12, "top_k": 2, "lr": 0.5}


def test_what_may_be_searched_is_of_the_trial() -> None:
    assert set(searchable()) < set(field_names(TrialConfig))
    assert set().union(*SPACES.values()) <= set(searchable())
