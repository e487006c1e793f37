"""`--dry_run`: a plan that a person reads, whose figures follow from the configuration."""

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from nkat_ray.cli import tune
from nkat_ray.cluster.resources import Cluster, Node
from nkat_ray.commands import plan
from nkat_ray.commands.tune import read
from nkat_ray.config import EXPECTED, PRESETS, RunConfig, TrialConfig
from nkat_ray.cost import epoch_flops, least_epochs, stored_parameters
from nkat_ray.errors import UserError
from nkat_ray.report.wording import spoken_time
from nkat_ray.space import corner_configs, space_of

MACHINE = Cluster((Node(cpus=4, memory_bytes=8 * 2**30),))


@pytest.fixture(autouse=True)
def quick_probe(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """Nothing is measured, and nothing is in the cache."""
    monkeypatch.setattr(plan, "measured_flops_per_s", lambda config, on_gpu: 2e10)
    monkeypatch.setattr("nkat_ray.cluster.connect.planned_cluster", lambda address, gpus: MACHINE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("NKAT_DATA_DIR", raising=False)
    monkeypatch.chdir(tmp_path)


# Reported in mlfoundations/open_lm#154
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("flags", [[], ["--space", "extended", "--depth", "6", "--num_heads", "8"]])
def test_a_plan_is_twenty_lines(
    preset: str, flags: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    if preset == "quick":
        flags = flags[4:]
    assert tune(["--preset", preset, "--dry_run", *flags]) == 0
    lines = capsys.readouterr().out.strip().splitlines()
    assert len(lines) <= 20
    for name in ("trials", "at a time", "memory", "gate", "Stage 1", "Stage 2", "disk", "downloads"):
        assert any(line.startswith(name) for line in lines), name


def test_the_plan_says_what_differs_from_the_preset(capsys: pytest.CaptureFixture[str]) -> None:
    tune(["--preset", "quick", "--dry_run", "--gate", "0.5", "--seed", "3", "--depth", "3", "--top_k", "off", "--json"])
    told = json.loads(capsys.readouterr().out)["plan"]
    assert told["not as preset"] == "top_k off, seed 3, gate 0.5"
    assert told["fixed"] == "depth 3"
    tune(["--preset", "quick", "--dry_run", "--json"])
    assert "not as preset" not in json.loads(capsys.readouterr().out)["plan"]


@pytest.mark.parametrize("preset", PRESETS)
def test_the_plan_says_what_the_preset_is_expected_to_reach(preset: str, capsys: pytest.CaptureFixture[str]) -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    row = next(line for line in readme.splitlines() if line.startswith(f"| `{preset}`"))
    tune(["--preset", preset, "--dry_run", "--json", "--storage_path", "elsewhere"])
    said = json.loads(capsys.readouterr().out)["plan"]["expected"]
    assert said == EXPECTED[preset]
    assert row.endswith(f"| {said} |")
    tune(["--preset", preset, "--dry_run", "--json", "--seed", "3"])
    assert "expected" not in json.loads(capsys.readouterr().out)["plan"]


@pytest.mark.parametrize("preset", PRESETS)
def test_what_verbose_shows_can_be_typed(preset: str, capsys: pytest.CaptureFixture[str]) -> None:
    """It printed `off` for `auto`, which the parser refuses."""
    words = ["--preset", preset, "--dry_run", "--verbose", "--split_heads", "--num_heads", "8"]
    run, _ = read(words)
    assert tune([*words, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["plan"]
    typed = [part for name in vars(run) if plan._is_typed(run, name) for part in plan.typed_flag(run, name)]
    assert "auto" in typed
    assert read([word for part in typed for word in part.split()])[0] == run


def test_nothing_but_the_plan_is_shown_without_verbose(capsys: pytest.CaptureFixture[str]) -> None:
    tune(["--preset", "quick", "--dry_run"])
    assert "--mlp_ratio" not in capsys.readouterr().out
    tune(["--preset", "quick", "--dry_run", "--verbose"])
    out = capsys.readouterr().out
    assert "--mlp_ratio" in out
    assert "trial 1 (Round-1's best)" in out


@pytest.mark.parametrize(
    ("fields", "epochs"),
    [
        ({}, 5 + 10 / 3 + 25 / 9),  # rungs at 5 and 15 of 40 epochs
        ({"scheduler": "none"}, 40),
        ({"grace": 40}, 40),
        ({"epochs": 10, "warmup": 2, "grace": 3, "reduction": 3}, 3 + 6 / 3 + 1 / 9),
    ],
)
def test_early_stopping_at_every_rung_is_the_least(fields: dict[str, Any], epochs: float) -> None:
    assert least_epochs(RunConfig(**fields)) == pytest.approx(epochs)


def test_stage_1_takes_between_all_stopped_early_and_all_in_full() -> None:
    run = RunConfig(num_samples=10)
    configs = [TrialConfig()]
    epoch_s = epoch_flops(configs[0], 45_000) / 1e12
    text = plan.stage1_time(run, configs, cluster=MACHINE, at_a_time=4, speed=1e12, images=45_000)
    low_s = plan.START_S + 10 / 4 * least_epochs(run) * epoch_s
    high_s = plan.START_S + 3 * 40 * epoch_s * plan.SLOWER
    assert text == f"{spoken_time(low_s)} to {spoken_time(high_s)}"


def test_a_limit_on_stage_1_is_shown_with_the_share_that_it_leaves() -> None:
    run = RunConfig(num_samples=10, stage1_hours=0.5)
    configs = corner_configs(run, space_of(run).domains)
    text = plan.stage1_time(run, configs, cluster=MACHINE, at_a_time=4, speed=2e10, images=45_000)
    found = re.fullmatch(
        r"30 min at most \(--stage1_hours\): (\S+) to (\S+) % of the (\S+ \S+ to \S+ \S+) that all .*", text
    )
    assert found, text
    assert 0 < float(found[1]) < float(found[2]) <= 100
    long = plan.stage1_time(
        RunConfig(num_samples=10, stage1_hours=1e6), configs, cluster=MACHINE, at_a_time=4, speed=2e10, images=45_000
    )
    assert long == found[3]


def test_the_gate_is_an_accuracy_by_stem_and_width() -> None:
    run = RunConfig()
    rows = plan.gate_rows(run, space_of(run))
    assert rows["  no stem"].startswith("0.793 at width 384, ")
    assert rows["  tiny stem"].startswith("0.817 at width 384, ")
    assert rows["  small stem"].startswith("0.839 at width 384, ")
    counted = RunConfig(lambda_model="counted")
    rows = plan.gate_rows(counted, space_of(counted))
    assert rows["  no stem"].startswith(f"{0.6 * math.log10(21):.3f} to {0.6 * math.log10(37):.3f} at width 384")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (8, "8 s"), (89, "89 s"), (120, "2 min"), (3000, "50 min"), (5400, "1.5 h"), (180_000, "50 h"),
        (28_812_473, "333 days"),
    ],
)  # fmt: skip
def test_a_time_is_spoken_in_one_unit(seconds: float, text: str) -> None:
    assert spoken_time(seconds) == text


def test_downloads_are_listed(tmp_path: Any) -> None:
    assert plan.downloads(RunConfig(data="synthetic")).startswith("none")
    assert plan.downloads(RunConfig()) == "mnist, fashion_mnist, emnist_letters, cifar10 (once; then kept in the cache)"
    told = plan.downloads(RunConfig(data_dir=tmp_path))
    assert told.startswith(f"none; missing in {tmp_path}: mnist")
    assert "refused" in told


def test_the_speed_is_measured_with_the_network_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.undo()
    threads = torch.get_num_threads()
    config = TrialConfig(embed_dim=16, num_heads=2, depth=1)
    monkeypatch.setattr(plan, "PROBE_S", 0.05)
    assert 1e6 < plan.measured_flops_per_s(config, on_gpu=False) < 1e15
    assert torch.get_num_threads() == threads


def test_the_speed_is_that_of_a_network_of_mean_cost(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Round-2's mean costs five times the baseline, on which a GPU idles."""
    probed = []
    monkeypatch.setattr(plan, "measured_flops_per_s", lambda config, on_gpu: probed.append(config) or 1e12)
    assert tune(["--preset", "round2", "--dry_run"]) == 0
    (config,) = probed
    assert 4 < epoch_flops(config, 1) / epoch_flops(TrialConfig(), 1) < 6.5
    assert config.tokens == 64


def test_a_gpus_speed_is_measured_as_a_trial_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a training's own steps, in whole batches and in bfloat16; it validates a single image."""
    import torch
    from pretend_cuda import pretend_cuda

    from nkat_ray.model import NKATVisionTransformer

    monkeypatch.undo()
    seen, forward = [], NKATVisionTransformer.forward

    def watched(self: Any, images: Any) -> Any:
        seen.append((images.device.type, len(images), torch.is_autocast_enabled("cuda")))
        return forward(self, images)

    monkeypatch.setattr(NKATVisionTransformer, "forward", watched)
    with pretend_cuda():
        assert plan.measured_flops_per_s(TrialConfig(embed_dim=16, depth=1, batch_size=40), on_gpu=True) > 0
    assert set(seen) == {("cuda", 40, True), ("cuda", 1, True)}
    assert len([images for _, images, _ in seen if images == 40]) >= plan.PROBE_EPOCHS * plan.PROBE_STEPS


def test_the_probe_of_a_gpu_takes_no_larger_batches_than_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch of 65,536 would take gigabytes; and no rate is so high that the probe's loss is not finite."""
    from pretend_cuda import pretend_cuda

    monkeypatch.undo()
    monkeypatch.setattr(plan, "PROBE_BATCH", 4)
    config = TrialConfig(embed_dim=16, depth=1, batch_size=65_536, optimizer="muon", lr=1.0)
    with pretend_cuda():
        assert 0 < plan.measured_flops_per_s(config, on_gpu=True) < math.inf


def test_a_busy_gpu_ends_a_plan_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def busy(*_: Any) -> None:
        raise RuntimeError("CUDA error: out of memory\nDevice-side assertions were explicitly omitted.")

    monkeypatch.undo()
    monkeypatch.setattr("nkat_ray.train.session.training_data", busy)
    with pytest.raises(UserError, match=r"could not be measured \(CUDA error: out of memory\).*--gpus_per_trial 0"):
        plan.measured_flops_per_s(TrialConfig(embed_dim=16, num_heads=2, depth=1), on_gpu=True)


def test_a_file_where_the_runs_should_be_is_refused_as_by_a_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It was planned, with the free space of the disk."""
    (tmp_path / "notes.txt").touch()
    place = str(tmp_path / "notes.txt" / "runs")
    assert tune(["--preset", "quick", "--data", "synthetic", "--dry_run", "--storage_path", place]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: storage_path is {place!r}; {tmp_path / 'notes.txt'} is no folder")
    assert said.count("\n") == 1


# Reported in embeddings-benchmark/mteb#17, stanford-crfm/helm#289
@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--datasets", "cifar10", "mnsit"], "datasets has 'mnsit'; not in "),
        (["--datasets", "cifar10", "mnsit", "--data", "synthetic"], "datasets has 'mnsit'; the synthetic suite has "),
        (["--datasets", "cifar10", "mnsit", "--data_dir", "."], "datasets has 'mnsit'; not in .; did you mean mnist?"),
        (["--datasets", "cifar10", ""], "datasets has ''; dataset name is ''"),
        (["--data_dir", "cut"], "cut/cifar10-train.parquet cannot be read as Parquet"),
        (["--cpus_per_trial", "5"], "a trial needs 5 CPU and 0 GPU; the largest node has 4 CPU"),
    ],
)
def test_what_a_run_would_refuse_is_not_planned(
    flags: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "cut").mkdir()
    for split in ("train", "test"):
        (tmp_path / "cut" / f"cifar10-{split}.parquet").write_bytes(b"PAR1")
    assert tune(["--preset", "quick", "--dry_run", *flags]) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"error: {said}")
    assert told.count("\n") == 1


# Reported in mlfoundations/open_lm#154
def test_the_disk_holds_checkpoints_stage_2_and_the_pages(tmp_path: Path) -> None:
    """test_tune.py compares the figure with the folder of a run."""
    run = RunConfig(num_samples=10, storage_path=str(tmp_path))
    configs = [TrialConfig(embed_dim=64), TrialConfig(embed_dim=384)]
    parameters = stored_parameters(configs[1])  # of the larger one
    checkpoints, weights = 2 * 10 + 3, 4 * 10 + 2  # two a survivor, one being written by each; datasets, and best/
    total = parameters * (20 * checkpoints + 4 * weights) + 8e6 + 10 * 1e5
    found = re.fullmatch(r"at most (\S+) GB below (\S+); (\S+) GB are free", plan.disk(run, configs, at_a_time=3))
    assert found
    assert (float(found[1]), found[2]) == (pytest.approx(total / 1e9, rel=0.05), str(tmp_path))
    assert float(found[3]) == pytest.approx(shutil.disk_usage(tmp_path).free / 1e9, rel=0.1)
    bucket = plan.disk(RunConfig(storage_path="s3://bucket/runs"), configs, at_a_time=3)
    assert bucket.endswith(" GB below s3://bucket/runs")  # whose free space nobody knows
