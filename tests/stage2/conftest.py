"""A tiny network, four small datasets of tinted noise, and runs that have them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nkat_ray.cluster.resources import Cluster, Node, Share
from nkat_ray.config import RunConfig, TrialConfig
from nkat_ray.data import DataError, Dataset, Missing, Split
from nkat_ray.metrics import STAGE2_DATASETS
from nkat_ray.record.journal import Journal
from nkat_ray.record.observer import Observer
from nkat_ray.record.run import Run
from nkat_ray.record.storage import RunStorage
from nkat_ray.stage2 import testing, validation
from nkat_ray.stage2.survivor import Survivor
from nkat_ray.stage2.tasks import Tasks
from nkat_ray.train.checkpoint import Weights

TINY = TrialConfig(
    embed_dim=16, num_heads=2, depth=1, batch_size=32, epochs=2, warmup=1, lr=2e-3, ema=0.9, mixup=0.0, cutmix=0.0,
    randaugment=None, cutout=None,
)  # fmt: skip


@dataclass(frozen=True)
class ArrayReader:
    """120 images to train on and 60 to test on, made anew at each load; `broken` cannot be decoded."""

    make: Callable[..., tuple[np.ndarray, np.ndarray]]
    channels: int
    broken: bool = False

    def load(self, split: str, rows: Any = None) -> Split:
        if self.broken:
            raise DataError("row 3 is damaged")
        images, labels = self.make(120 if split == "train" else 60, channels=self.channels, seed=len(split))
        rows = np.arange(len(labels)) if rows is None else rows
        return Split(images[rows], labels[rows])

    def labels(self, split: str) -> Any:
        return np.arange(120 if split == "train" else 60, dtype=np.int64) % 10


@pytest.fixture(scope="session")
def datasets(tinted: Callable[..., Any]) -> dict[str, Dataset]:
    def one(name: str) -> Dataset:
        grey = name != "cifar10"
        return Dataset(
            name=name, class_names=tuple("abcdefghij"), grey=grey, flip=False, source="test", digest="", verified=True,
            sizes={"train": 120, "test": 60}, reader=ArrayReader(tinted, 1 if grey else 3),
        )  # fmt: skip

    return {name: one(name) for name in STAGE2_DATASETS}


@pytest.fixture(scope="session")
def payload() -> bytes:
    """A network's weights as a trial deposits them; not trained."""
    import torch

    from nkat_ray.model import create_nkat_vit

    torch.manual_seed(0)
    model = create_nkat_vit(TINY, num_classes=10)
    return Weights(
        config=TINY, dataset="cifar10", num_classes=10, grey=False, mean=(0.5,) * 3, std=(0.2,) * 3, epoch=1,
        val_accuracy=0.5, seed=0, tensors=model.state_dict(),
    ).to_bytes()  # fmt: skip


@pytest.fixture(scope="session")
def survivor() -> Callable[..., Survivor]:
    """Makes a survivor of the tiny design."""

    def make(trial: int = 0, *, checkpoints: tuple[str, ...] = ()) -> Survivor:
        return Survivor(
            trial=trial, epoch=1, checkpoints=checkpoints, conv_stem="tiny", embed_dim=16, nkat_parameters=4,
            parameters=1000, share=Share(cpus=1, gpus=0.0),
        )  # fmt: skip

    return make


@pytest.fixture(scope="session")
def cluster() -> Cluster:
    return Cluster((Node(cpus=2),))


@pytest.fixture(scope="session")
def make_run(datasets: Mapping[str, Dataset]) -> Callable[..., Run]:
    """Makes a run in a folder, or opens the one that is there, as a new driver does; options are the run's."""

    def make(folder: Path, found: Mapping[str, Dataset | Missing] = datasets, **changes: Any) -> Run:
        folder.mkdir(exist_ok=True)
        journal = Journal(folder)
        journal.write("run")
        fields: dict[str, Any] = dict(
            preset="quick", name="r", val_images=20, transfer_epochs=1, transfer_images=60, test_images=40,
            batch_size=32, embed_dim=16, num_heads=2, depth=1, gate=0.1,
        )  # fmt: skip
        config = RunConfig(**{**fields, **changes})
        return Run(config=config, domains={}, datasets=found, storage=RunStorage(folder, None), journal=journal)

    return make


class Heard(Observer):
    """Keeps what a run says."""

    def __init__(self) -> None:
        self.rows: list[Any] = []
        self.notices: list[str] = []
        self.starts: list[tuple[Any, ...]] = []
        self.ticks = 0

    def on_stage2_start(self, survivors: Any, datasets: Any, done: Any) -> None:
        self.starts.append((survivors, datasets, list(done)))

    def on_stage2_row(self, row: Any) -> None:
        self.rows.append(row)

    def on_tick(self) -> None:
        self.ticks += 1

    def on_notice(self, text: str) -> None:
        self.notices.append(text)


@pytest.fixture
def heard() -> Heard:
    return Heard()


@pytest.fixture
def sent(ray_local: Any, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Runs tasks in this process as they are sent out, without workers; returns the names of their functions."""
    names: list[str] = []

    class InThisProcess(Tasks[Any]):
        def send(self, subject: Any, function: Callable[..., Any], *arguments: Any, share: Share) -> None:
            names.append(function.__name__)
            values = [ray_local.get(a) if isinstance(a, ray_local.ObjectRef) else a for a in arguments]
            self._subjects[ray_local.put(function(*values, share))] = subject

    class AnyTasks:
        def __class_getitem__(cls, _: Any) -> type:
            return InThisProcess

        def __new__(cls) -> Any:
            return InThisProcess()

    for module in (validation, testing):
        monkeypatch.setattr(module, "Tasks", AnyTasks)
    return names
