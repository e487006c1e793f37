"""Whole runs on a simulated cluster of several nodes, real processes, something killed or full in the middle.

Everything that could be searched is typed, so that the trials differ in their seeds alone: whatever is lost on the way,
each must end with the curve and the scores of the undisturbed run.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from nkat_ray.config import RunConfig
from nkat_ray.report.terminal import Screen
from nkat_ray.space import space_of

pytestmark = pytest.mark.cluster

Find = Callable[[str], list[int]]

PATIENCE_S = 600.0
TRIALS, EPOCHS = 3, 5
STORE_BYTES = 100 * 2**20
TRAINING, TRANSFER, VAULT = "ray::ImplicitFunc", "ray::transfer_weights", "ray::Vault"  # titles of Ray's processes


@pytest.fixture(scope="module")
def cluster(ray_settings: None) -> Iterator[Any]:
    """A head without slots, on which this process, the driver, lives; tests add nodes."""
    import ray
    from ray.cluster_utils import Cluster

    there = Cluster(
        initialize_head=True,
        shutdown_at_exit=False,  # else each node sets signal handlers, which only the main thread may
        head_node_args={"num_cpus": 0, "object_store_memory": STORE_BYTES, "include_dashboard": False},
    )
    ray.init(address=there.address, log_to_driver=False, logging_level="ERROR")
    try:
        yield there
    finally:
        ray.shutdown()
        there.shutdown()


class Nodes:
    """Nodes of one slot each that come and go."""

    def __init__(self, cluster: Any) -> None:
        self._cluster, self._there = cluster, []

    def add(self) -> None:
        self._there.append(self._cluster.add_node(num_cpus=1, object_store_memory=STORE_BYTES))

    def kill(self) -> None:
        """As a spot instance goes: its processes are killed, nothing is said to anybody."""
        self._cluster.remove_node(self._there.pop(0), allow_graceful=False)


@pytest.fixture
def nodes(cluster: Any) -> Iterator[Nodes]:
    """Two of them, and as many at the end as are left."""
    two = Nodes(cluster)
    two.add()
    two.add()
    yield two
    while two._there:
        two.kill()


def config(folder: Path, **changes: Any) -> RunConfig:
    fields: dict[str, Any] = dict(
        preset="quick", name="r", storage_path=str(folder), data="synthetic", data_dir=None, space="quick",
        num_samples=TRIALS, gate=0.02, epochs=EPOCHS, grace=EPOCHS, warmup=0, embed_dim=16, num_heads=2, depth=1,
        randaugment=None, cutout=None, train_images=800, val_images=200, transfer_images=300, transfer_epochs=1,
        test_images=200,
    )  # fmt: skip
    return RunConfig(**{**fields, **changes})


def drive(run: RunConfig, capsys: Any = None) -> int:
    """The run in this process, from its first file to its report."""
    from nkat_ray.commands.tune import start

    return start(run, space_of(run, space_of(run).contents), Screen(quiet=True))


def events(folder: Path) -> list[dict[str, Any]]:
    path = folder / "r" / "journal.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def happened(folder: Path, kind: str, count: int = 1) -> Callable[[], bool]:
    return lambda: sum(event["event"] == kind for event in events(folder)) >= count


def noticed(folder: Path, text: str) -> bool:
    return any(event["event"] == "notice" and text in event["text"] for event in events(folder))


def wait_until(condition: Callable[[], Any]) -> Any:
    end = time.monotonic() + PATIENCE_S
    while not (value := condition()):
        assert time.monotonic() < end, "what was waited for did not come"
        time.sleep(0.02)
    return value


@contextlib.contextmanager
def meanwhile(action: Callable[[], None]) -> Iterator[None]:
    """Do something beside the block (a run needs the main thread, for its signals); its failure is the test's."""
    failed: list[BaseException] = []

    def guarded() -> None:
        try:
            action()
        except BaseException as error:
            failed.append(error)
            signal.raise_signal(signal.SIGINT)  # the run may wait for what does not come

    thread = threading.Thread(target=guarded)
    thread.start()
    yield
    thread.join(PATIENCE_S)
    assert not failed, failed
    assert not thread.is_alive()


def outcome(folder: Path) -> dict[str, Any]:
    """What a run found, without times, places and the order of things."""
    trials = pq.read_table(folder / "r" / "trials.parquet", columns=["trial", "stop_reason", "epochs", "passed_gate"])
    curves = pq.read_table(folder / "r" / "curves.parquet", columns=["trial", "epoch", "train_loss", "val_accuracy"])
    scores = ["trial", "dataset", "status", "val_accuracy", "test_accuracy"]
    stage2 = pq.read_table(folder / "r" / "stage2.parquet", columns=scores)
    return {
        "trials": trials.to_pylist(), "curves": curves.to_pylist(),
        "stage2": sorted(stage2.to_pylist(), key=lambda row: (row["trial"], row["dataset"])),
    }  # fmt: skip


def summary(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "r" / "summary.json").read_text())
    return found


@pytest.fixture(scope="module")
def whole(cluster: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the run finds when nothing happens to it."""
    folder, two = tmp_path_factory.mktemp("whole"), Nodes(cluster)
    two.add()
    two.add()
    assert drive(config(folder)) == 0
    two.kill()
    two.kill()
    found = outcome(folder)
    assert [row["epochs"] for row in found["trials"]] == [EPOCHS] * TRIALS
    assert all(row["passed_gate"] for row in found["trials"])
    assert len(found["stage2"]) == 4 * TRIALS
    return found


def test_a_worker_process_that_is_killed(whole: Any, nodes: Nodes, tmp_path: Path, own_processes: Find) -> None:
    def kill() -> None:
        wait_until(happened(tmp_path, "result", 2))
        os.kill(own_processes(TRAINING)[0], signal.SIGKILL)

    with meanwhile(kill):
        assert drive(config(tmp_path)) == 0
    assert outcome(tmp_path) == whole
    assert noticed(tmp_path, "is retried after an error")


def test_a_node_that_dies_in_stage_1(whole: Any, nodes: Nodes, tmp_path: Path) -> None:
    def kill() -> None:
        wait_until(happened(tmp_path, "result", 2))
        nodes.kill()

    with meanwhile(kill):
        assert drive(config(tmp_path)) == 0
    assert outcome(tmp_path) == whole
    assert noticed(tmp_path, "is retried after an error")


def test_a_node_that_dies_in_stage_2(whole: Any, nodes: Nodes, tmp_path: Path, own_processes: Find) -> None:
    def kill() -> None:
        wait_until(happened(tmp_path, "stage2", 2))
        wait_until(lambda: own_processes(TRANSFER))
        nodes.kill()

    with meanwhile(kill):
        assert drive(config(tmp_path)) == 0
    assert outcome(tmp_path) == whole


def test_the_vaults_process_that_is_killed(whole: Any, nodes: Nodes, tmp_path: Path, own_processes: Find) -> None:
    """The weights that it held are lost; those on disk are not."""

    def kill() -> None:
        wait_until(happened(tmp_path, "end"))
        for process in own_processes(VAULT):
            os.kill(process, signal.SIGKILL)

    with meanwhile(kill):
        assert drive(config(tmp_path)) == 0
    assert outcome(tmp_path) == whole
    assert noticed(tmp_path, "trial 0: its weights were not in the object store and were read from disk")


def test_an_object_store_that_is_full(whole: Any, nodes: Nodes, tmp_path: Path) -> None:
    """Full of what somebody reads at the moment, which can neither be thrown out nor spilled."""
    import ray

    pinned = [ray.get(ray.put(np.zeros(10 * 2**20, np.uint8))) for _ in range(STORE_BYTES // (10 * 2**20))]
    assert drive(config(tmp_path)) == 0
    assert outcome(tmp_path) == whole
    assert len(pinned) == 10


def test_a_node_that_joins_late_gets_trials(whole: Any, nodes: Nodes, tmp_path: Path) -> None:
    nodes.kill()

    def join() -> None:
        wait_until(happened(tmp_path, "result"))
        nodes.add()

    with meanwhile(join):
        assert drive(config(tmp_path, num_samples=5, epochs=30, grace=30)) == 0  # longer than a process takes to start
    assert [event["slots"] for event in events(tmp_path) if event["event"] == "slots"] == [1, 2]
    assert noticed(tmp_path, "the cluster has changed: 2 trials at a time, 1 before")
    rows = pq.read_table(tmp_path / "r" / "curves.parquet").to_pylist()
    spans = [(row["trial"], row["started_s"], row["started_s"] + row["epoch_s"]) for row in rows]
    assert any(a != b and max(s, t) < min(e, f) for a, s, e in spans for b, t, f in spans)  # two at a time
    assert [row["stop_reason"] for row in outcome(tmp_path)["trials"]] == ["finished"] * 5


def test_a_stage_2_whose_nodes_die_twice_counts_that_dataset_as_failed(
    nodes: Nodes, tmp_path: Path, own_processes: Find
) -> None:
    """One slot: each death hits one task, and of four tasks one is hit twice before long."""
    nodes.kill()
    deaths = 0

    def failed() -> bool:
        return any(event["event"] == "stage2" and event["row"]["status"] == "failed" for event in events(tmp_path))

    def kill() -> None:
        nonlocal deaths
        wait_until(happened(tmp_path, "stage1_done"))
        while not failed():
            wait_until(lambda: own_processes(TRANSFER) or failed())
            if not failed():
                nodes.kill()
                nodes.add()
                deaths += 1
                wait_until(lambda: not own_processes(TRANSFER))

    slow = {"transfer_images": None, "transfer_epochs": 3, "num_samples": 1, "epochs": 1, "grace": 1}
    with meanwhile(kill):
        assert drive(config(tmp_path, **slow)) == 0
    assert 2 <= deaths <= 5
    (lost,) = [row for row in outcome(tmp_path)["stage2"] if row["status"] == "failed"]
    winner = summary(tmp_path)["winner"]
    assert (winner["robustness"], winner["counted"]) == (0.75, 3)
    assert summary(tmp_path)["verdict"] == "undecided"
    assert lost["test_accuracy"] is None


# --- a full disk ------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder of 32 MB on a disk of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("this machine does not allow a file system to be mounted (mount -t tmpfs)")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def fill(folder: Path, *, leave: int) -> Path:
    """Fill the disk but for so many bytes."""
    filler, free = folder / "filler", os.statvfs(folder)
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:  # the run writes at the same time
        file.write(bytes(max(0, free.f_bavail * free.f_frsize - leave)))
    return filler


def test_a_disk_that_is_full_while_a_checkpoint_is_written(whole: Any, nodes: Nodes, small_disk: Path) -> None:
    """Room for the journal's lines, not for a checkpoint; somebody makes room before the trial has its last try."""

    def disturb() -> None:
        wait_until(happened(small_disk, "result", 2))
        filler = fill(small_disk, leave=40 * 2**10)
        wait_until(lambda: noticed(small_disk, "is retried after an error"))
        filler.unlink()

    with meanwhile(disturb):
        assert drive(config(small_disk)) == 0
    assert outcome(small_disk) == whole
    assert noticed(small_disk, "No space left on device")


# Reported in ray-project/ray#32481, ray-project/ray#23674
def test_a_disk_that_stays_full_ends_the_run_in_one_line_and_resume_goes_on(
    whole: Any, nodes: Nodes, small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from nkat_ray.commands.tune import resume
    from nkat_ray.record.saved import saved_config

    filler: list[Path] = []

    def disturb() -> None:
        wait_until(happened(small_disk, "end"))
        filler.append(fill(small_disk, leave=0))

    with meanwhile(disturb):
        assert drive(config(small_disk)) == 1
    said = capsys.readouterr().err
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, lines
    assert re.search(
        rf"no space left on the disk of {small_disk}.*: \d+ MB free, .*; make room, then --resume", lines[0]
    )
    assert "Traceback" not in said
    before = [event["trial"] for event in events(small_disk) if event["event"] == "end"]
    filler[0].unlink()
    assert resume(*saved_config(str(small_disk), "r"), Screen(quiet=True)) == 0
    assert outcome(small_disk) == whole
    ends = [event["trial"] for event in events(small_disk) if event["event"] == "end"]
    assert ends[: len(before)] == before
    assert sorted(ends) == list(range(TRIALS))
