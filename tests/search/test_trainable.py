import math
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ray import tune

from nkat_ray.config import TrialConfig
from nkat_ray.files import WEIGHTS_FILE
from nkat_ray.metrics import lambda_notes
from nkat_ray.model.capture import nkat_scalars
from nkat_ray.search import trainable
from nkat_ray.search.recorder import ROW_KEYS
from nkat_ray.search.trainable import gpu_memory_warning, train_trial
from nkat_ray.train.checkpoint import STATE_FILE, Weights, load_state
from nkat_ray.train.loop import Trainer

TIMES = ("epoch_s", "started_s", "images_per_s", "pid")  # of a row: everything else is the same in a repeated training


class Stopped(Exception):
    pass


class FakeTune:
    """What a trial asks of Tune, in this process: reports are kept, checkpoints copied as Tune stores them."""

    Checkpoint = tune.Checkpoint

    def __init__(self, folder: Path, *, stop_after: int | None = None, current: Path | None = None) -> None:
        self.folder, self.stop_after, self.current = folder, stop_after, current
        self.rows: list[dict[str, Any]] = []
        self.checkpoints: list[Path | None] = []
        self.resources: dict[str, float] = {"CPU": 1}

    def get_context(self) -> Any:
        return SimpleNamespace(get_trial_resources=lambda: SimpleNamespace(required_resources=self.resources))

    def get_checkpoint(self) -> Any:
        return None if self.current is None else tune.Checkpoint(str(self.current))

    def report(self, row: dict[str, Any], checkpoint: Any = None) -> None:
        self.rows.append(row)
        stored = None
        if checkpoint is not None:
            stored = self.folder / f"checkpoint_{row['epoch']:06d}"
            shutil.copytree(checkpoint.path, stored, dirs_exist_ok=True)
        self.checkpoints.append(stored)
        if len(self.rows) == self.stop_after:
            raise Stopped


@pytest.fixture
def deposits(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, float, bytes]]:
    """What went to the vault."""
    made: list[tuple[int, float, bytes]] = []
    monkeypatch.setattr(trainable, "deposit", lambda _vault, *rest: made.append(rest) or True)
    return made


@pytest.fixture
def train(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_run: Callable[..., Any], tiny_data: Any, deposits: list[Any]
) -> Callable[..., FakeTune]:
    """Runs one trial of three epochs; options of FakeTune, `run` (changes), `resume_from`, `seconds_left`, `seed`."""

    def go(
        name: str = "trial", *, run: dict[str, Any] | None = None, resume_from: tuple[Path, ...] = (), seed: int = 1,
        seconds_left: float | None = None, **options: Any,
    ) -> FakeTune:  # fmt: skip
        fake = FakeTune(tmp_path / name, **options)
        monkeypatch.setattr(trainable, "tune", fake)
        params = {
            "trial": 4, "seed": seed, "resume_from": [str(path) for path in resume_from], "temperature": 0.8,
            "seconds_left": seconds_left,
        }  # fmt: skip
        config = tiny_run(**{"epochs": 3, "dropout_attn": 0.1, "cutout": 8, **(run or {})})
        try:
            train_trial(params, run=config, data=tiny_data, vault=None)  # type: ignore[arg-type]
        except Stopped:
            assert options["stop_after"] is not None
        return fake

    return go


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[float]], None]:
    """Replaces the validation accuracy by given values, epoch by epoch."""

    def script(values: list[float]) -> None:
        monkeypatch.setattr(Trainer, "accuracy", lambda self, _images: values[self.epoch])

    return script


def timeless(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key not in TIMES}


def cut_short(checkpoint: Path) -> None:
    path = checkpoint / STATE_FILE
    path.write_bytes(path.read_bytes()[:-100])


# --- reports ----------------------------------------------------------------------------------------------------------


def test_every_epoch_is_reported_with_a_checkpoint(train: Callable[..., FakeTune]) -> None:
    fake = train()
    assert [row["epoch"] for row in fake.rows] == [1, 2, 3]
    assert all(set(ROW_KEYS) <= set(row) for row in fake.rows)
    for path in fake.checkpoints:
        assert path is not None
        assert load_state(path)["best"] == max(
            row["local_tpe"] for row in fake.rows[: load_state(path)["trainer"]["epoch"]]
        )


def test_the_score_is_tpe_under_the_runs_lambda(train: Callable[..., FakeTune], scripted: Any) -> None:
    scripted([0.5, 0.5, 0.5])
    for model, lam in (("notes", lambda_notes("tiny", 16)), ("counted", 4.0)):
        (row, *_) = train(model, run={"lambda_model": model}).rows
        assert row["lambda_theory"] == lam
        assert row["local_tpe"] == pytest.approx(0.5 / math.log10(1 + lam))
    assert row["nkat_parameters"] == 4


def test_the_nkat_scalars_of_the_scored_weights_are_reported(train: Callable[..., FakeTune]) -> None:
    whole = train(run={"depth": 2, "lr": 0.05})
    names = [f"nkat/{name}/block_{n}" for name in ("alpha", "beta", "attention_gain", "mlp_gain") for n in range(2)]
    for row, folder in zip(whole.rows, whole.checkpoints, strict=True):
        weights = Weights.from_bytes((folder / WEIGHTS_FILE).read_bytes())
        assert [key for key in row if key.startswith("nkat/")] == names
        if weights.epoch == row["epoch"]:
            found = nkat_scalars(weights.build())
            assert [row[name] for name in names] == [
                value for name in ("alpha", "beta", "attention_gain", "mlp_gain") for value in found[name]
            ]
    assert len({row["nkat/alpha/block_0"] for row in whole.rows}) == 3  # they are learnt


def test_the_proposed_values_are_used(train: Callable[..., FakeTune]) -> None:
    fake = train()
    assert fake.checkpoints[0] is not None
    weights = Weights.from_bytes((fake.checkpoints[0] / WEIGHTS_FILE).read_bytes())
    assert (weights.config.temperature, weights.config.depth) == (0.8, 1)
    assert (weights.seed, weights.dataset, weights.grey, weights.num_classes) == (1, "cifar10", False, 10)


def test_the_seed_decides_whatever_ran_in_the_process_before(train: Callable[..., FakeTune]) -> None:
    torch.manual_seed(123)
    one = train("one")
    torch.rand(7)
    assert [timeless(row) for row in train("two").rows] == [timeless(row) for row in one.rows]
    assert [timeless(row) for row in train("three", seed=2).rows] != [timeless(row) for row in one.rows]


def test_when_the_time_is_used_up_it_ends_and_says_so(train: Callable[..., FakeTune]) -> None:
    (row,) = train(seconds_left=0.0).rows
    assert (row["stop_reason"], row["stop_detail"]) == ("budget", "epoch 0: Stage 1's time is up")
    assert "local_tpe" not in row


def test_only_a_survivor_states_at_its_last_epoch_that_it_has_finished(
    train: Callable[..., FakeTune], scripted: Any
) -> None:
    scripted([0.5, 0.9, 0.6])
    assert [row.get("stop_reason") for row in train(run={"gate": 0.6}).rows] == [None, None, "finished"]
    assert [row.get("stop_reason") for row in train("b", run={"gate": 0.99}).rows][:3] == [None] * 3


def test_a_trial_whose_checkpoint_is_of_its_last_epoch_has_nothing_to_train_and_says_how_it_ended(
    train: Callable[..., FakeTune],
) -> None:
    before = train("before")
    for gate, reason in ((0.01, "finished"), (0.99, "gate")):
        (row,) = train(f"after-{reason}", run={"gate": gate}, resume_from=(before.checkpoints[2],)).rows
        assert row["stop_reason"] == reason
        assert row["stop_detail"].startswith("epoch 3: Local TPE 0.")


# --- best weights -----------------------------------------------------------------------------------------------------


def test_the_vault_gets_what_passes_the_gate_and_only_what_is_better(
    train: Callable[..., FakeTune], scripted: Any, deposits: list[Any]
) -> None:
    lam = lambda_notes("tiny", 16)
    scripted([0.5, 0.7, 0.6, 0.7, 0.9])
    fake = train(run={"epochs": 5, "gate": 0.51})
    assert [(trial, score) for trial, score, _ in deposits] == [
        (4, pytest.approx(0.7 / math.log10(1 + lam))),
        (4, pytest.approx(0.9 / math.log10(1 + lam))),
    ]
    assert [Weights.from_bytes(payload).epoch for _, _, payload in deposits] == [2, 5]
    best = [Weights.from_bytes((path / WEIGHTS_FILE).read_bytes()).epoch for path in fake.checkpoints if path]
    assert best == [1, 2, 2, 2, 5]  # each checkpoint holds the best so far
    assert [row["best_local_tpe"] for row in fake.rows] == [
        pytest.approx(accuracy / math.log10(1 + lam)) for accuracy in (0.5, 0.7, 0.7, 0.7, 0.9)
    ]


def test_a_vault_that_is_gone_is_noticed_and_ends_nothing(
    train: Callable[..., FakeTune], scripted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted([0.5, 0.7, 0.6])
    monkeypatch.setattr(trainable, "deposit", lambda *_: False)
    rows = train(run={"gate": 0.51}).rows
    assert [row["notices"] for row in rows] == [[], ["the vault is gone: the weights are kept on disk only"], []]


def test_below_the_gate_nothing_goes_to_the_vault(
    train: Callable[..., FakeTune], scripted: Any, deposits: list[Any]
) -> None:
    scripted([0.5, 0.6, 0.7])
    train(run={"gate": 0.6})
    assert deposits == []


def test_the_threshold_exactly_reached_goes_to_the_vault(
    train: Callable[..., FakeTune], scripted: Any, deposits: list[Any]
) -> None:
    scripted([0.3, 0.5, 0.5])
    train(run={"gate": 0.5 / math.log10(1 + lambda_notes("tiny", 16))})
    assert len(deposits) == 1


def test_a_loss_that_is_not_finite_is_reported_as_nan_without_a_checkpoint(
    train: Callable[..., FakeTune], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Trainer._backward

    def breaks(self: Trainer, *arguments: Any) -> Any:
        return whole(self, *arguments) if self.epoch < 1 else (torch.tensor(math.nan), torch.tensor(0))

    monkeypatch.setattr(Trainer, "_backward", breaks)
    fake = train()
    assert [row["epoch"] for row in fake.rows] == [1, 2]
    assert math.isnan(fake.rows[1]["local_tpe"])
    assert math.isnan(fake.rows[1]["val_accuracy"])
    assert fake.rows[1]["best_local_tpe"] == fake.rows[0]["local_tpe"]
    assert fake.checkpoints[0] is not None
    assert fake.checkpoints[1] is None
    assert all(t.isfinite().all() for t in load_state(fake.checkpoints[0])["trainer"]["model"].values())


def test_a_trial_that_was_never_finite_has_no_best(train: Callable[..., FakeTune], monkeypatch: Any) -> None:
    monkeypatch.setattr(Trainer, "_backward", lambda *_: (torch.tensor(math.inf), torch.tensor(0)))
    (row,) = train().rows
    assert math.isnan(row["best_local_tpe"])


# --- continuation -----------------------------------------------------------------------------------------------------


@pytest.fixture
def whole(train: Callable[..., FakeTune]) -> FakeTune:
    """A trial that was never interrupted."""
    return train("whole")


@pytest.mark.parametrize("epochs", [1, 2])
def test_a_trial_of_an_earlier_driver_goes_on_bit_for_bit(
    train: Callable[..., FakeTune], whole: FakeTune, epochs: int
) -> None:
    first = train("first", stop_after=epochs)
    torch.manual_seed(99)  # another process, another random state
    second = train("second", resume_from=tuple(reversed([path for path in first.checkpoints if path])))
    assert [timeless(r) for r in first.rows + second.rows] == [timeless(r) for r in whole.rows]
    one, other = (fake.checkpoints[-1] for fake in (second, whole))
    assert one is not None
    assert other is not None
    assert (one / WEIGHTS_FILE).read_bytes() == (other / WEIGHTS_FILE).read_bytes()
    assert load_state(one)["best"] == load_state(other)["best"]


def test_after_a_fault_it_goes_on_from_tunes_checkpoint(train: Callable[..., FakeTune], whole: FakeTune) -> None:
    first = train("first", stop_after=2)
    second = train("second", current=first.checkpoints[1])
    assert [timeless(row) for row in second.rows] == [timeless(row) for row in whole.rows[2:]]


def test_tunes_checkpoint_is_newer_than_an_earlier_drivers(train: Callable[..., FakeTune], whole: FakeTune) -> None:
    first = train("first", stop_after=2)
    assert first.checkpoints[0] is not None
    second = train("second", current=first.checkpoints[1], resume_from=(first.checkpoints[0],))
    assert [row["epoch"] for row in second.rows] == [3]


def test_where_the_newest_is_cut_short_the_one_before_is_used(train: Callable[..., FakeTune], whole: FakeTune) -> None:
    """Tune passes only the newest on; the one before lies beside it."""
    first = train("first", stop_after=2)
    before, newest = first.checkpoints
    assert newest is not None
    assert before is not None
    cut_short(newest)
    for options in ({"current": newest}, {"resume_from": (newest, before)}):
        second = train(f"second-{len(str(options))}", **options)
        assert [timeless(row) for row in second.rows] == [timeless(row) for row in whole.rows[1:]]


def test_without_an_intact_checkpoint_it_starts_again(
    train: Callable[..., FakeTune], whole: FakeTune, tmp_path: Path
) -> None:
    first = train("first", stop_after=1)
    assert first.checkpoints[0] is not None
    cut_short(first.checkpoints[0])
    second = train("second", current=first.checkpoints[0], resume_from=(first.checkpoints[0], tmp_path / "gone"))
    said = [row.pop("notices") for row in second.rows]
    assert "starts again" in said[0][0]
    for row in whole.rows:
        row.pop("notices", None)
    assert [timeless(row) for row in second.rows] == [timeless(row) for row in whole.rows]


def test_the_best_so_far_is_carried_over(train: Callable[..., FakeTune], scripted: Any, deposits: list[Any]) -> None:
    scripted([0.8, 0.9, 0.6, 0.7])
    first = train("first", stop_after=2, run={"epochs": 4, "gate": 0.5})
    assert len(deposits) == 2
    assert first.checkpoints[1] is not None
    second = train("second", resume_from=(first.checkpoints[1],), run={"epochs": 4, "gate": 0.5})
    assert len(deposits) == 2  # nothing better came
    assert [row["best_local_tpe"] for row in second.rows] == [first.rows[1]["local_tpe"]] * 2
    assert second.checkpoints[-1] is not None
    assert Weights.from_bytes((second.checkpoints[-1] / WEIGHTS_FILE).read_bytes()).epoch == 2


def test_fewer_checkpoints_keep_the_last_epoch_and_every_survivors_better_weights(
    train: Callable[..., FakeTune], scripted: Any
) -> None:
    scripted([0.1, 0.2, 0.9, 0.8, 0.95, 0.3, 0.4])
    fake = train(run={"epochs": 7, "checkpoint_epochs": 4, "gate": 0.5})
    kept = [epoch for epoch, path in enumerate(fake.checkpoints, 1) if path is not None]
    assert kept == [3, 4, 5, 7]
    last = fake.checkpoints[-1]
    assert last is not None
    assert Weights.from_bytes((last / WEIGHTS_FILE).read_bytes()).epoch == 5


# --- its share of the machine -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gpus", "free", "said"),
    [
        (0.5, 1.0, None),
        (0.001, 1.0, "its share is 0.1 GiB"),  # the trial needs more than it asked for
        (0.5, 0.001, "0.1 GiB are free"),  # others hold the GPU's memory
        (2.0, 1.0, None),
    ],
)
def test_the_gpu_itself_is_asked_whether_a_trial_fits(
    monkeypatch: pytest.MonkeyPatch, gpus: float, free: float, said: str | None
) -> None:
    total = 80 * 2**30
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (int(free * total), total))
    warning = gpu_memory_warning(TrialConfig(), gpus)
    assert warning is None if said is None else said in str(warning)


def test_the_cache_of_an_earlier_trial_in_this_process_counts_as_free(monkeypatch: pytest.MonkeyPatch) -> None:
    total = 80 * 2**30
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (0, total))
    assert "0.0 GiB are free" in str(gpu_memory_warning(TrialConfig(), 0.5))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: total // 2)
    assert gpu_memory_warning(TrialConfig(), 0.5) is None
