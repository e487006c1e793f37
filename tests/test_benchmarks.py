"""Check that the benchmarks still fit the package, and what the two that train from end to end compute."""

import ast
import importlib
import importlib.util
import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from nkat_ray.metrics import STAGE2_DATASETS

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"


def exists(module: str, name: str) -> bool:
    """Return whether a module has a name, or a submodule of that name."""
    return hasattr(importlib.import_module(module), name) or importlib.util.find_spec(f"{module}.{name}") is not None


@pytest.mark.parametrize("script", sorted(FOLDER.rglob("*.py")), ids=lambda path: path.name)
def test_the_names_that_a_benchmark_imports_exist(script: Path) -> None:
    imports = [node for node in ast.walk(ast.parse(script.read_text())) if isinstance(node, ast.ImportFrom)]
    names = [(node.module or "", alias.name) for node in imports for alias in node.names]
    assert [name for name in names if name[0].startswith("nkat_ray") and not exists(*name)] == []


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module


def test_a_step_of_the_journey_trains_only_what_it_changes(benchmark, tmp_path: Path, monkeypatch) -> None:
    journey = benchmark("journey")
    trained = []

    def train(training: Any, _: Any) -> dict[str, Any]:
        trained.append((training.dataset, training.grey, training.config.conv_stem, training.config.train_images))
        return {"test_accuracy": [0.2, 0.5], "n_test": 20, "cpu_s": 2.0}

    monkeypatch.setattr(journey, "trained", train)
    monkeypatch.setattr(journey, "STEPS", {name: journey.STEPS[name] for name in ("start", "colour", "no stem")})
    args = journey.Args(
        data="synthetic", seeds=(0,), images=100, results=tmp_path / "r.jsonl", chart=tmp_path / "c.svg"
    )
    journey.main(args)
    assert [row[0] for row in trained] == [*STAGE2_DATASETS, "cifar10", *STAGE2_DATASETS]  # colour is CIFAR-10's alone
    assert [row[:3] for row in trained if row[1]] == [("cifar10", True, "small")]
    assert all(row[2:] == ("off", 100) for row in trained[-4:])
    journey.main(args)
    assert len(trained) == 9  # nothing is trained twice
    start, _, last = journey.scored({name: journey.opened(name, args) for name in STAGE2_DATASETS}, args)
    assert (start.cpu_s, start.global_tpe, start.published) == (
        8.0, pytest.approx(0.5 / math.log10(25)), pytest.approx(0.5 / math.log10(21)),
    )  # fmt: skip
    assert last.global_tpe == last.published == start.published
    assert "8 s" in args.chart.read_text()


def test_the_journey_starts_from_grey_images_of_28_pixels(benchmark) -> None:
    red = np.zeros((2, 3, 32, 32), np.uint8)
    red[:, 0] = 255
    grey = benchmark("journey").in_grey(red)
    assert grey.shape == (2, 1, 28, 28)
    assert (grey == 76).all()  # 0.299 of 255


def test_seconds_to_an_accuracy_are_interpolated_between_epochs(benchmark) -> None:
    seconds_to = benchmark("time_to_accuracy").seconds_to
    row = {"val_accuracy": [0.4, 0.6, 0.65], "cpu_s": [10.0, 20.0, 30.0]}
    assert seconds_to(0.5, row) == pytest.approx(15)
    assert seconds_to(0.6, row) == pytest.approx(20)
    assert seconds_to(0.7, row) == math.inf


def test_a_ratio_of_times_is_a_geometric_mean_with_an_interval(benchmark) -> None:
    ratio = benchmark("time_to_accuracy").ratio
    mean, low, high = ratio([(10, 20), (10, 40), (10, 80)])
    assert mean == pytest.approx(4)
    assert low * high == pytest.approx(16)
    assert low == pytest.approx(4 * math.exp(-4.3027 * math.log(2) / math.sqrt(3)), rel=1e-3)
    assert math.isnan(ratio([(10, 20), (10, math.inf)])[0])


def test_the_rate_of_adamw_is_the_fastest_to_the_aim_else_the_most_accurate(benchmark) -> None:
    best = benchmark("time_to_accuracy").best_adamw
    slow = {"loop": "AdamW 0.001", "seed": 0, "val_accuracy": [0.5, 0.7], "cpu_s": [10.0, 20.0]}
    missed = {"loop": "AdamW 0.002", "seed": 0, "val_accuracy": [0.5, 0.59], "cpu_s": [1.0, 2.0]}
    worse = {"loop": "AdamW 0.004", "seed": 0, "val_accuracy": [0.4, 0.45], "cpu_s": [1.0, 2.0]}
    ours = {"loop": "ours", "seed": 0, "val_accuracy": [0.8], "cpu_s": [1.0]}
    assert best([ours, missed, worse, slow], 0) == "AdamW 0.001"
    assert best([ours, worse, missed], 0) == "AdamW 0.002"


@pytest.mark.slow
def test_every_loop_trains_and_timms_muon_is_timms_own(benchmark, tmp_path: Path) -> None:
    from timm.optim import muon

    script = benchmark("time_to_accuracy")
    args = script.Args(
        data="synthetic", seeds=(0, 1), epochs=2, train_images=200, val_images=50, results=tmp_path / "r.jsonl"
    )
    script.main(args)
    done = [(row["loop"], row["seed"]) for row in script.rows(args.results)]
    assert done[:5] == [("ours", 0), *((f"AdamW {rate:g}", 0) for rate in script.ADAMW_RATES), ("ours", 1)]
    assert done[-2:] == [("Muon", 0), ("Muon", 1)]
    assert muon.zeropower_via_newtonschulz is script.TIMMS_NEWTON_SCHULZ
