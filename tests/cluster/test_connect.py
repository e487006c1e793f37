from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from ray.exceptions import AuthenticationError

from nkat_ray.cluster import connect
from nkat_ray.cluster.connect import connected, nodes_to_come, nodes_without
from nkat_ray.cluster.gpus import GpuFacts
from nkat_ray.cluster.resources import Share, cluster_of, refuse_oversized, room, trial_share
from nkat_ray.config import RunConfig, TrialConfig
from nkat_ray.errors import UserError

ROOT = Path(__file__).parents[2]


def saved(folder: Path, config: dict[str, Any]) -> Path:
    path = folder / "ray_bootstrap_config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def config_of(**types: dict[str, Any]) -> dict[str, Any]:
    return {"max_workers": 3, "head_node_type": "head", "available_node_types": {"head": {"resources": {}}, **types}}


def resources(nodes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    assert all(node["Alive"] for node in nodes)
    return [node["Resources"] for node in nodes]


def test_nothing_comes_where_ray_up_left_nothing(tmp_path: Path) -> None:
    assert nodes_to_come(tmp_path / "absent.yaml") == []


def test_machines_of_ones_own_are_not_counted_before_they_have_joined(tmp_path: Path) -> None:
    assert nodes_to_come(saved(tmp_path, config_of(local={"resources": {}, "max_workers": 2}))) == []


@pytest.mark.parametrize(("own", "expected"), [({"max_workers": 2}, 2), ({"max_workers": 9}, 3), ({}, 3)])
def test_as_many_come_as_both_limits_allow(tmp_path: Path, own: dict[str, int], expected: int) -> None:
    worker = {"resources": {"CPU": 4, "GPU": 1}, **own}
    assert resources(nodes_to_come(saved(tmp_path, config_of(worker=worker)))) == [{"CPU": 4, "GPU": 1}] * expected


def test_the_shipped_cluster_packs_its_gpus_before_any_worker_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = saved(tmp_path, yaml.safe_load((ROOT / "cluster.yaml").read_text()))
    monkeypatch.setattr(connect, "head_config", lambda: config)
    head = {"Alive": True, "Resources": {"CPU": 0.0, "memory": 6.0e9, connect.HEAD_RESOURCE: 1.0}}
    early = {"Alive": True, "Resources": {"CPU": 4.0, "GPU": 1.0, "memory": 12.0e9}}  # a worker that is there already
    monkeypatch.setattr(connect.ray, "nodes", lambda: [head, early])
    there_will_be = cluster_of(connect.all_nodes(), {})
    assert (there_will_be.cpus, there_will_be.gpus, len(there_will_be.nodes)) == (32, 8.0, 9)
    assert trial_share(TrialConfig(), RunConfig(), there_will_be) == Share(cpus=4, gpus=1.0)  # 12 trials, 8 GPUs
    share = trial_share(TrialConfig(), RunConfig(num_samples=500), there_will_be)
    assert share == Share(cpus=1, gpus=0.125)  # the baseline, as if each GPU had 16 GiB
    assert room(RunConfig(num_samples=500), there_will_be).slots == 32
    refuse_oversized([share], there_will_be)
    with pytest.raises(UserError, match="the largest node has 4 CPU and 1 GPU"):
        refuse_oversized([Share(cpus=1, gpus=2.0)], there_will_be)


# --- the place to compute ---------------------------------------------------------------------------------------------


def test_a_place_that_cannot_work_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setenv("RAY_TMPDIR", "/proc/nowhere")
    with pytest.raises(UserError, match="needs a folder for its sockets"):
        connect.refuse_no_ray("local")
    with pytest.raises(UserError, match="nothing answers there"):
        connect.refuse_no_ray("127.0.0.1:1")
    assert list(tmp_path.iterdir()) == []


def test_an_instance_of_this_process_is_used_whatever_the_address_is(ray_local: Any) -> None:
    connect.refuse_no_ray("127.0.0.1:1")
    with connected("127.0.0.1:1") as where:
        assert where == "the Ray instance of this process"
    assert ray.is_initialized()


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ConnectionError("Failed to connect to Ray cluster at 127.0.0.1"), "Failed to connect"),
        (AuthenticationError("no token"), "no token"),
        (RuntimeError("Version mismatch: The cluster was started with:\n    Ray: 2.59.0\n"), "Ray: 2.59.0"),
    ],
)
def test_a_cluster_that_refuses_this_process_after_all_is_named(
    error: Exception, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    answering(monkeypatch, error)
    with (
        pytest.raises(UserError, match=rf"'127.0.0.1:6379' \(--address\); .*{said}") as caught,
        connected("127.0.0.1:6379"),
    ):
        pass
    assert "\n" not in str(caught.value)


def test_any_other_fault_of_ray_stays_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    answering(monkeypatch, RuntimeError("something inside of Ray"))
    with pytest.raises(RuntimeError, match="something inside"), connected("127.0.0.1:6379"):
        pass


def answering(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """A cluster that answers, and what Ray raises when this process wants to join it."""

    def init(**_: Any) -> None:
        raise error

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr(connect, "refuse_unreachable", lambda address: None)
    monkeypatch.setattr(ray, "init", init)


def test_a_slow_start_is_tried_again_and_the_folder_is_cleaned_up(monkeypatch: pytest.MonkeyPatch) -> None:
    tries: list[str] = []

    def init(**arguments: Any) -> None:
        tries.append(arguments["_temp_dir"])
        if len(tries) < 3:
            raise RuntimeError("The raylet timed out during startup")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "shutdown", lambda **_: None)
    monkeypatch.setattr(ray, "init", init)
    with connected("local"):
        assert Path(tries[0]).is_dir()
    assert len(tries) == 3
    assert len(set(tries)) == 1
    assert not Path(tries[0]).exists()


# --- what --dry_run describes -----------------------------------------------------------------------------------------


def test_a_plan_is_for_the_address_that_a_run_would_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with pytest.raises(UserError, match=r"'127.0.0.1:1' \(--address\); nothing answers there"):
        connect.planned_cluster("127.0.0.1:1")


def test_a_plan_for_this_machine_starts_nothing_and_tries_its_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    resources = {"CPU": 8.0, "GPU": 1.0, "memory": 2.0**33, "accelerator_type:T4": 1.0}
    node = {"Alive": True, "NodeID": "this", "NodeManagerHostname": "here", "Resources": resources}
    found = {"this": [GpuFacts(memory_bytes=15 * 2**30, processors=40)]}
    monkeypatch.setattr(connect, "this_machines_nodes", lambda: [node])
    monkeypatch.setattr(connect, "try_local_gpus", lambda nodes: found)
    assert connect.planned_cluster("local").kinds["T4"].memory_bytes == 15 * 2**30
    found["this"] = [GpuFacts(fault="too old")]
    with pytest.raises(UserError, match=r"node here: Ray offers 1 GPU that PyTorch cannot use \(too old\)"):
        connect.planned_cluster("local")
    assert connect.planned_cluster("local", 0.0).gpus == 1.0  # not tried, not used


def test_the_nodes_beside_this_one_are_asked_whether_they_see_the_folder(
    ray_local: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (own,) = ray_local.nodes()
    assert nodes_without(tmp_path / "absent") == []  # this one is where the file was made
    other = {**own, "NodeID": "0" * len(own["NodeID"]), "NodeManagerHostname": "other"}
    monkeypatch.setattr(connect.ray, "nodes", lambda: [own, other, {**other, "Alive": False}])
    monkeypatch.setattr(connect, "_answer", lambda reference: False)
    assert nodes_without(tmp_path) == ["other"]
