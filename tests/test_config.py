import dataclasses
import json
import math
import re
import subprocess
import sys
import timeit
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nkat_ray.commands.train import TrainConfig
from nkat_ray.config import PRESETS, DataConfig, ModelConfig, RunConfig, TrialConfig, config_of_json, field_names
from nkat_ray.errors import UserError
from nkat_ray.fields import Range, field_types
from nkat_ray.metrics import lambda_notes
from nkat_ray.record.tables import plain
from nkat_ray.space import ROUND1_BEST, SPACES, Choice, Domain, Span

NAN, INF = math.nan, math.inf


def drawn_from(domain: Domain) -> st.SearchStrategy[Any]:
    if isinstance(domain, Choice):
        return st.sampled_from(domain.values)
    if domain.step is not None:
        return st.sampled_from(range(int(domain.low), int(domain.high) + 1, domain.step))
    return st.floats(domain.low, domain.high)


# --- ranges: (field, values refused, values at the ends that are allowed) ---------------------------------------------

MODEL_RANGES: list[tuple[str, list[Any], list[Any]]] = [
    ("conv_stem", ["", "big", None], ["off", "tiny", "small"]),
    ("stem_stride", [0, 1, 3, 8], [2, 4]),
    ("patch_size", [0, -2, 3, 16, 33, NAN], [1, 2, 4, 8]),
    ("embed_dim", [0, -384, 7, 385, 388, 2056, NAN], [8, 384, 2048]),
    ("depth", [0, -1, 49, NAN], [1, 48]),
    ("num_heads", [0, -8, 65, 7, NAN], [1, 64]),
    ("mlp_ratio", [0, 0.24, 16.1, NAN, INF], [0.25, 16]),
    ("temperature", [0, -0.65, 0.04, 10.1, NAN, INF], [0.05, 10]),
    ("top_k", [0, -1, NAN], [1, 10_000, None]),
    ("top_p", [0, -0.1, 1.01, NAN], [1e-9, 1, None]),
    ("nkat_strength", [-1e-9, 1.01, NAN, INF], [0, 1]),
    ("nkat_decay", [-0.1, 1.01, NAN], [0, 1]),
    ("color_norm", ["on", "", None], ["off", "layernorm", "residual"]),
    ("dropout_attn", [-0.1, 0.91, 1, NAN], [0, 0.9]),
    ("dropout_embed", [-0.1, 0.91, NAN], [0, 0.9]),
    ("drop_path", [-0.1, 0.91, NAN], [0, 0.9]),
]
TRIAL_RANGES: list[tuple[str, list[Any], list[Any]]] = [
    ("epochs", [0, -1, 10_001, NAN], [6, 10_000]),
    ("batch_size", [0, -128, 65_537, NAN], [1, 65_536]),
    ("optimizer", ["lion", "", None], ["adamw", "muon"]),
    ("lr", [0, -1e-4, 1.1, NAN, INF], [1e-12, 1]),
    ("warmup", [-1, 40, 41, NAN], [0, 39]),
    ("weight_decay", [-0.1, 1.1, NAN], [0, 1]),
    ("label_smoothing", [-0.1, 0.91, 1, NAN], [0, 0.9]),
    ("clip_grad", [0, -1, NAN, INF], [1e-6, 1e6, None]),
    ("ema", [0, 1, -0.5, 1.5, NAN], [1e-6, 0.999999, None]),
    ("mixup", [-0.1, 0.81, 1.1, NAN], [0, 0.8]),
    ("cutmix", [-0.1, 0.91, 1.1, NAN], [0, 0.9]),
    ("randaugment", [(0, 9), (15, 9), (2, -1), (2, 31), (NAN, 9), (2, NAN)], [(1, 0), (14, 30), None]),
    ("cutout", [0, -8, 33, NAN], [1, 32, None]),
    ("channel_shuffle", [-0.1, 1.1, NAN], [0, 1]),
    ("train_images", [0, 9, -100, NAN], [10, 10**9, None]),
    ("val_images", [0, 9, 30_001, NAN], [10, 30_000]),
]
RUN_RANGES: list[tuple[str, list[Any], list[Any]]] = [
    ("preset", ["", "tiny", "Quick"], ["quick", "laptop", "gpu", "round2"]),
    ("name", ["", ".", "..", "/tmp/run", "a/b", "a\\b", "../up", "a..b", "-rf", ".hidden", "a b", "a\n", "é",
              "a" * 101],
     ["a", "round2-20250601-120000", "A.b_c-9", "a" * 100, None]),
    ("storage_path", ["", " ", "a\0b", "\udce5"], ["./runs", "実験", "s3://bucket/runs"]),
    ("seed", [-1, 2**32, NAN], [0, 2**32 - 1]),
    ("gate", [0, 7, -0.6, 1.0001, NAN, INF], [1e-9, 0.29, 1]),
    ("lambda_model", ["", "optuna"], ["notes", "counted", "millions"]),
    ("space", [5], ["round2", "extended", "mine.toml"]),
    ("num_samples", [0, -1, 100_001, NAN], [1, 100_000]),
    ("sampler", ["", "TPE", "cmaes"], ["tpe", "random", "gp"]),
    ("warm_start", ["", " ", "a\0b", "\udce5"], ["round1", "runs/round1", None]),
    ("feedback", ["", "local", "on"], ["off", "global"]),
    ("log_to", ["", "neptune", "MLflow"], ["off", "mlflow", "wandb"]),
    ("scheduler", ["", "pbt", "off"], ["asha", "none"]),
    ("max_survivors", [0, -1, NAN], [1, 100_000, None]),
    ("max_concurrent", [0, -1, NAN], [1, None]),
    ("gpus_per_trial", [-0.1, 1.5, 2, NAN], [0, 0.125, 0.3, 1, None]),
    ("cpus_per_trial", [0, -1, NAN], [1, 64, None]),
    ("grace", [0, 41, NAN], [1, 40]),
    ("reduction", [0, 1, 17, NAN], [2, 16]),
    ("max_failures", [-1, 101, NAN], [0, 100]),
    ("max_failed", [0, -1, NAN], [1, 100_000, None]),
    ("checkpoint_epochs", [0, 1001, NAN], [1, 1000]),
    ("stage1_hours", [0, -1, NAN, INF], [0.001, 1000, None]),
    ("transfer", ["", "freeze"], ["finetune", "probe", "scratch"]),
    ("transfer_epochs", [0, 1001, NAN], [1, 1000]),
    ("transfer_lr", [0, -1, 1.1, NAN], [1e-9, 1]),
    ("transfer_images", [0, 9, NAN], [10, None]),
    ("test_images", [0, 9, NAN], [10, None]),
    ("datasets", [(), ("mnist",), ("cifar10", "cifar10")], [("cifar10",), ("mnist", "cifar10"), ("mine", "cifar10")]),
]  # fmt: skip
ALL_RANGES = (
    [(ModelConfig, *row) for row in MODEL_RANGES]
    + [(TrialConfig, *row) for row in TRIAL_RANGES]
    + [(RunConfig, *row) for row in RUN_RANGES]
)
REFUSED = [(config, name, value) for config, name, refused, _ in ALL_RANGES for value in refused]
ALLOWED = [(config, name, value) for config, name, _, allowed in ALL_RANGES for value in allowed]


@pytest.mark.parametrize(("config", "name", "value"), REFUSED)
def test_a_value_out_of_range_is_refused_by_name_and_value(config: type, name: str, value: Any) -> None:
    # num_heads that does not divide embed_dim is reported as embed_dim's fault, with the heads in the message
    with pytest.raises(ValueError, match=name) as caught:
        config(**{name: value})
    assert repr(value) in str(caught.value) or str(value) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("config", "name", "value"), ALLOWED)
def test_a_value_at_the_end_of_its_range_is_allowed(config: type, name: str, value: Any) -> None:
    assert getattr(config(**{name: value}), name) == value


def test_every_field_has_its_range_tested() -> None:
    tested = {(config, name) for config, name, _, _ in ALL_RANGES}
    free = {"split_heads", "data_dir", "data", "address", "resume", "dry_run", "verbose"}
    free |= {"json", "quiet"}
    for config, base in ((ModelConfig, None), (TrialConfig, ModelConfig), (RunConfig, TrialConfig)):
        own = set(field_names(config)) - (set(field_names(base)) if base else set()) - free
        assert own == {name for c, name in tested if c is config}


@pytest.mark.parametrize("seed", [-1, 2**32, NAN])
def test_train_config_refuses_a_seed(seed: float) -> None:
    with pytest.raises(ValueError, match="seed"):
        TrainConfig(seed=seed)  # type: ignore[arg-type]


# --- combinations -----------------------------------------------------------------------------------------------------


def test_an_embed_dim_that_8_heads_do_not_divide_names_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"embed_dim is 390; num_heads 8 must divide it; the nearest is 392"):
        ModelConfig(embed_dim=390)


def test_a_patch_that_does_not_divide_the_map_names_the_choices() -> None:
    with pytest.raises(ValueError, match=r"patch_size is 3; it must divide the map of 8x8 .* choose .* 1, 2, 4, 8"):
        ModelConfig(patch_size=3)
    with pytest.raises(ValueError, match="32x32"):
        ModelConfig(conv_stem="off", patch_size=7)  # the notes' own 7x7 patches


def test_split_heads_need_eight_heads() -> None:
    assert ModelConfig(split_heads=True).num_heads == 8
    with pytest.raises(ValueError, match="needs num_heads 8"):
        ModelConfig(split_heads=True, num_heads=4)


def test_mixup_and_cutmix_together_are_a_probability() -> None:
    assert TrialConfig(mixup=0.5, cutmix=0.5).mixup == 0.5
    with pytest.raises(ValueError, match=r"cutmix is 0\.51"):
        TrialConfig(mixup=0.5, cutmix=0.51)


@pytest.mark.parametrize(
    ("fields", "side", "tokens"),
    [
        ({}, 8, 16),
        ({"stem_stride": 2}, 16, 64),
        ({"conv_stem": "off"}, 32, 256),
        ({"conv_stem": "off", "patch_size": 4, "stem_stride": 2}, 32, 64),
        ({"conv_stem": "small", "patch_size": 4}, 8, 4),
        ({"conv_stem": "off", "patch_size": 32}, 32, 1),
    ],
)
def test_map_and_tokens(fields: dict[str, Any], side: int, tokens: int) -> None:
    config = ModelConfig(**fields)
    assert (config.map_size, config.tokens) == (side, tokens)


@settings(max_examples=60)
@given(st.data())
@pytest.mark.parametrize("space", SPACES)
def test_whatever_a_space_draws_is_a_valid_trial(space: str, data: st.DataObject) -> None:
    drawn = {name: data.draw(drawn_from(domain), label=name) for name, domain in SPACES[space].items()}
    config = TrialConfig(**drawn)
    assert (config.map_size // config.patch_size) ** 2 == config.tokens
    assert config.map_size % config.patch_size == 0


@settings(max_examples=25)
@given(st.data())
def test_whatever_the_widest_space_draws_can_be_built(data: st.DataObject) -> None:
    """At a narrow width and two blocks: the sizes meet the other parameters in nothing but the number of heads."""
    import torch

    from nkat_ray.model import create_nkat_vit

    drawn = {name: data.draw(drawn_from(domain), label=name) for name, domain in SPACES["extended"].items()}
    model = create_nkat_vit(TrialConfig(**{**drawn, "embed_dim": 16, "depth": 2}), num_classes=10)
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_round2_is_the_notes_space() -> None:
    space = SPACES["round2"]
    assert set(space) == {"patch_size", "conv_stem", "embed_dim", "depth", "temperature", "top_p"}
    assert {n: d.values for n, d in space.items() if isinstance(d, Choice)} == {
        "patch_size": (2, 4),
        "conv_stem": ("off", "tiny", "small"),
    }
    assert {n: (d.low, d.high, d.step) for n, d in space.items() if not isinstance(d, Choice)} == {
        "embed_dim": (384, 512, 64),
        "depth": (5, 9, 1),
        "temperature": (0.6, 1.0, None),
        "top_p": (0.80, 0.95, None),
    }
    assert space.items() <= SPACES["extended"].items()


def test_spaces_name_fields_of_a_trial() -> None:
    names = set(field_names(TrialConfig))
    assert set().union(*SPACES.values()) <= names
    assert set(ROUND1_BEST) <= names


def test_the_defaults_are_the_notes_baseline() -> None:
    baseline = TrialConfig()
    expected = dict(
        conv_stem="tiny", patch_size=2, embed_dim=384, depth=7, temperature=0.65, top_k=6, top_p=0.80,
        nkat_strength=0.0024, nkat_decay=0.99, dropout_attn=0.17, dropout_embed=0.08, mixup=0.1, cutmix=0.2,
        randaugment=(2, 9), cutout=8, lr=2e-4, epochs=40, warmup=5, ema=0.9995, clip_grad=1.0, color_norm="off",
        split_heads=False, channel_shuffle=0.0, weight_decay=0.05, label_smoothing=0.0, batch_size=128, val_images=5000,
        num_heads=8, mlp_ratio=4.0, stem_stride=4, train_images=None, drop_path=0.0, optimizer="adamw",
    )  # fmt: skip
    assert dataclasses.asdict(baseline) == expected


# --- presets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_valid_and_carry_their_name(preset: str) -> None:
    run = RunConfig.from_preset(preset)
    assert run.preset == preset
    assert {name: getattr(run, name) for name in PRESETS[preset]} == PRESETS[preset]


def test_round2_is_fifty_trials_of_forty_epochs_at_gate_060() -> None:
    run = RunConfig.from_preset("round2")
    assert run == RunConfig()
    assert (run.num_samples, run.epochs, run.gate, run.grace, run.reduction) == (50, 40, 0.60, 5, 3)
    assert run.space == "round2"


def test_laptop_keeps_the_notes_gate_and_has_the_lowest_lambda() -> None:
    run = RunConfig.from_preset("laptop")
    assert (run.space, run.gate, run.lambda_model, run.train_images) == ("laptop", 0.60, "notes", None)
    assert lambda_notes(run.conv_stem, run.embed_dim) == 20  # so that the gate asks for the least accuracy, 0.793


@pytest.mark.slow
def test_quick_reaches_what_it_promises(tmp_path: Path) -> None:
    """Run the README's first command on real images; a survivor is scored on all test images of the four datasets."""
    command = [sys.executable, "tune_round2.py", "--preset", "quick", "--name", "r", "--storage_path", str(tmp_path)]
    subprocess.run(command, check=True, cwd=Path(__file__).parents[1])
    summary = json.loads((tmp_path / "r" / "summary.json").read_text())
    assert 0 < len(summary["survivors"]) < summary["n_trials"] == 6  # the gate is between the trials
    rows = pq.read_table(tmp_path / "r" / "stage2.parquet").to_pylist()
    accuracy = {row["dataset"]: row["test_accuracy"] for row in rows if row["trial"] == summary["winner"]["trial"]}
    least = {"mnist": 0.95, "fashion_mnist": 0.80, "emnist_letters": 0.80, "cifar10": 0.50}
    assert {name: value for name, value in accuracy.items() if not value >= least[name]} == {}
    assert set(accuracy) == set(least)
    assert summary["winner"]["global_tpe"] > 0.53  # the notes' result before Round-2


def test_a_preset_can_be_overridden_and_is_checked_again() -> None:
    assert RunConfig.from_preset("quick", gate=0.5).gate == 0.5
    with pytest.raises(ValueError, match="warmup is 1"):
        RunConfig.from_preset("quick", epochs=1)  # the preset's warm-up no longer fits
    with pytest.raises(ValueError, match="preset is 'huge'; allowed: quick, laptop, gpu, round2"):
        RunConfig.from_preset("huge")


def test_trial_is_the_runs_own_trial_fields() -> None:
    run = RunConfig(lr=1e-3, embed_dim=64, depth=2)
    assert run.trial == TrialConfig(lr=1e-3, embed_dim=64, depth=2)


# --- the rest ---------------------------------------------------------------------------------------------------------


def test_configurations_are_frozen_and_keyword_only() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        TrialConfig().lr = 1.0  # type: ignore[misc]
    with pytest.raises(TypeError):
        ModelConfig("tiny")  # type: ignore[misc]


def test_every_field_has_a_doc() -> None:
    """The command line's help is made of the string below a field."""
    import ast
    import inspect

    for config in (ModelConfig, TrialConfig, DataConfig, TrainConfig, RunConfig):
        body = ast.parse(inspect.getsource(config)).body[0].body  # type: ignore[attr-defined]
        for this, following in zip(body, [*body[1:], None], strict=True):
            if isinstance(this, ast.AnnAssign):
                assert isinstance(following, ast.Expr), f"{config.__name__}.{ast.unparse(this.target)} has no doc"


def test_data_dir_defaults_to_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NKAT_DATA_DIR", "/somewhere")
    assert DataConfig().data_dir == Path("/somewhere")
    monkeypatch.setenv("NKAT_DATA_DIR", "")
    assert DataConfig().data_dir is None
    monkeypatch.delenv("NKAT_DATA_DIR")
    assert DataConfig().data_dir is None


def test_the_configuration_loads_neither_torch_nor_ray() -> None:
    code = "import sys, nkat_ray.config, nkat_ray.metrics; print({'torch', 'ray', 'optuna'} & set(sys.modules))"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "set()"


# --- any value at all -------------------------------------------------------------------------------------------------

ANYTHING = st.sampled_from(
    [None, True, False, 0, 1, 2, -1, 4, 8, 10, 10**400, -(10**400), 2**53, 2**53 + 1, 0.5, 2.0, 2.5, -0.0, 1e-320,
     1e300, NAN, INF, -INF, 1j, "", "off", "tiny", "quick", "cifar10", "local_tpe,lambda", "\0", "\ud800", "a\nb", "é",
     b"x", (), (2, 9), (2.5, 9), ("a", "b"), ("cifar10",), (1, 2, 3), [], [2, 9], {}, {"lr": 5},
     {"lr": Span(0.1, 0.2)}, set(), Path("x"), object(), int, np.float64(0.5), np.int64(4), np.nan, np.zeros(2)]
)  # fmt: skip
CONFIGS = (ModelConfig, TrialConfig, TrainConfig, RunConfig)


@settings(max_examples=150)
@given(st.sampled_from(CONFIGS), st.data())
def test_any_value_is_taken_or_refused_by_name(config: type, data: st.DataObject) -> None:
    names = data.draw(st.lists(st.sampled_from(field_names(config)), min_size=1, max_size=3), label="names")
    values = {name: data.draw(ANYTHING, label=name) for name in names}
    try:
        made = config(**values)
    except ValueError as error:
        refusal = str(error)
    else:
        same_after_json(made)
        return
    assert any(name in refusal for name in names), refusal
    assert any(repr(value) in refusal or str(value) in refusal for value in values.values()), refusal


def same_after_json(made: Any) -> None:
    """What a run, a training and a checkpoint keep of a configuration is that configuration."""
    assert type(made)(**vars(made)) == made
    assert dataclasses.replace(made) == made
    saved = json.loads(json.dumps(plain(dataclasses.asdict(made))))
    if isinstance(made, RunConfig | TrialConfig):
        assert config_of_json(type(made), saved) == made


@pytest.mark.parametrize(
    ("config", "name", "value", "said"),
    [
        (ModelConfig, "depth", 2.5, "depth is 2.5; allowed: a whole number"),
        (ModelConfig, "depth", None, "depth is None; allowed: a whole number"),
        (ModelConfig, "depth", "7", "depth is '7'; allowed: a whole number"),
        (ModelConfig, "depth", True, "depth is True; allowed: a whole number"),
        (ModelConfig, "stem_stride", 4.0, "stem_stride is 4.0; allowed: 2, 4"),
        (ModelConfig, "split_heads", "no", "split_heads is 'no'; allowed: True or False"),
        (ModelConfig, "top_k", 10**400, "top_k is 1000"),
        (
            TrialConfig,
            "randaugment",
            5,
            "randaugment is 5; allowed: (a whole number, 1..14; a whole number, 0..30), or off",
        ),
        (RunConfig, "preset", [], "preset is []; allowed: quick, laptop, gpu, round2"),
        (RunConfig, "space", [], "space is []; allowed: text"),
        (RunConfig, "storage_path", 5, "storage_path is 5; allowed: text"),
        (RunConfig, "datasets", ["cifar10"], "datasets is ['cifar10']; allowed: a tuple of text"),
        (RunConfig, "data_dir", "x", "data_dir is 'x'; allowed: a path, or None"),
        (RunConfig, "data_dir", Path("a\0b"), "it contains a NUL byte; allowed: a path, or None"),
    ],
)
def test_a_value_of_another_type_is_refused(config: type, name: str, value: Any, said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        config(**{name: value})


def test_every_number_of_a_configuration_has_a_range() -> None:
    for config in (TrainConfig, RunConfig):
        numbers = {name: kind for name, kind in field_types(config).items() if kind.core in (int, float)}
        assert [name for name, kind in numbers.items() if kind.bounds == Range()] == []


def test_an_error_line_states_the_range_of_the_field() -> None:
    with pytest.raises(UserError, match=r"^depth is 99; allowed: a whole number, 1\.\.48$"):
        ModelConfig(depth=99)
    with pytest.raises(UserError, match=r"^top_p is 0; allowed: a number, > 0 and <= 1, or off$"):
        ModelConfig(top_p=0)


def test_building_a_trial_is_cheap() -> None:
    """A search space may build thousands before a run starts; it took 115 us when each field was checked by hand."""
    values = vars(TrialConfig())
    assert min(timeit.repeat(lambda: TrialConfig(**values), number=200, repeat=20)) / 200 < 60e-6


@pytest.mark.parametrize(
    ("images", "limit", "epochs"),
    [
        (55_000, None, 6), (20_000, None, 6), (19_999, None, 7), (6_144, None, 20), (13, None, 9231), (1, None, 10_000),
        (6_144, 5_000, 6), (4_000, 5_000, 8), (2_000, 2_000, 6), (55_000, 30_000, 6),
    ],
)  # fmt: skip
def test_a_small_dataset_is_passed_through_more_often(images: int, limit: int | None, epochs: int) -> None:
    config = RunConfig.from_preset("laptop", transfer_images=limit)
    assert config.transfer_epochs == 6
    assert config.epochs_on(images) == epochs
