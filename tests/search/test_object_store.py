"""What lies in the Ray object store: the images, one copy a node; the weights, also where the store is small."""

import contextlib
import dataclasses
import statistics
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nkat_ray.cluster.resources import Cluster, Node
from nkat_ray.record.journal import Journal
from nkat_ray.record.observer import Observer
from nkat_ray.record.run import Run
from nkat_ray.record.storage import RunStorage
from nkat_ray.search.stage1 import Stage1
from nkat_ray.search.vault import deposit, open_vault, withdraw
from nkat_ray.space import space_of

pytestmark = pytest.mark.cluster

STORE_BYTES = 400 * 2**20
IMAGES = 60_000  # 184 MB: CIFAR-10 as a whole
TRIALS = 4
TRAINING = "ray::ImplicitFunc"  # how Ray titles a process that trains


@pytest.fixture(scope="module")
def store(ray_settings: None) -> Iterator[Any]:
    """A Ray instance with room for the images once, not twice; yields the module."""
    import ray

    ray.init(
        address="local", num_cpus=TRIALS, include_dashboard=False, log_to_driver=False, logging_level="ERROR",
        object_store_memory=STORE_BYTES,
    )  # fmt: skip
    try:
        yield ray
    finally:
        ray.shutdown()


class Gauge:
    """Private memory of the processes that train, while one measures."""

    def __init__(self, find: Callable[[str], list[int]]) -> None:
        self._find = find
        self._seen: dict[int, list[int]] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> "Gauge":
        self._earlier = set(self._find(TRAINING))  # a search's last process may outlive it by a moment
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(0.1):
            for process in set(self._find(TRAINING)) - self._earlier:
                with contextlib.suppress(OSError):  # it has just ended
                    self._seen.setdefault(process, []).append(private_bytes(process))

    def bytes_each(self) -> float:
        """Of a process towards its end, when everything is loaded; the mean over the processes."""
        return statistics.mean(max(seen[len(seen) // 2 :]) for seen in self._seen.values())

    @property
    def processes(self) -> int:
        return len(self._seen)


def private_bytes(process: int) -> int:
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))


@pytest.fixture
def train(
    store: Any, own_processes: Any, tiny_run: Callable[..., Any], tiny_fixed: Any, tiny_data: Any, tmp_path: Path
) -> Any:
    """Trains trials on 160 of so many images, some at a time; returns the gauge."""

    def run_trials(images: int, at_a_time: int) -> Gauge:
        selection = tiny_data.selection
        many = np.zeros((images, 3, 32, 32), np.uint8)
        many[:200] = selection.images[:200]
        labels = np.zeros(images, np.int64)
        labels[:200] = selection.labels[:200]
        data = dataclasses.replace(tiny_data, selection=dataclasses.replace(selection, images=many, labels=labels))
        run = tiny_run(num_samples=at_a_time, max_concurrent=at_a_time, epochs=30, grace=30, gate=1.0)
        folder = tmp_path / uuid.uuid4().hex
        folder.mkdir()
        journal = Journal(folder)
        journal.write("run")
        with Gauge(own_processes) as gauge:
            context = Run(
                config=run, domains=space_of(run, tiny_fixed).domains, datasets={}, journal=journal,
                storage=RunStorage(folder, None),
            )  # fmt: skip
            cluster = Cluster((Node(cpus=TRIALS),))
            Stage1(context, data, cluster=cluster, vault=open_vault(folder.name), observer=Observer()).run()
        journal.close()
        assert gauge.processes == at_a_time
        return gauge

    return run_trials


def test_the_images_are_there_once_a_node_however_many_trials_read_them(store: Any, train: Any) -> None:
    few, one, four = train(200, 1), train(IMAGES, 1), train(IMAGES, TRIALS)
    tenth = IMAGES * 3 * 32 * 32 / 10
    assert one.bytes_each() - few.bytes_each() <= tenth  # a process has no copy of its own
    assert four.bytes_each() - one.bytes_each() <= tenth


def test_weights_that_do_not_fit_are_spilled_and_read_back(store: Any) -> None:
    """Survivors' weights, twice the store."""
    vault, size = open_vault(f"spill-{uuid.uuid4().hex}"), 50 * 2**20
    marks = range(2 * STORE_BYTES // size)
    for trial in marks:
        assert deposit(vault, trial, 0.7, bytes([trial]) * size)
    for trial in marks:
        reference = withdraw(vault, trial)
        assert reference is not None
        payload = store.get(reference)
        assert (len(payload), payload[0], payload[-1]) == (size, trial, trial)
    store.kill(vault)
