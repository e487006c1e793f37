import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from ray.exceptions import AuthenticationError

from nkat_ray.config import RunConfig, TrialConfig
from nkat_ray.search import cluster
from nkat_ray.search.cluster import connected, nodes_to_come
from nkat_ray.search.resources import Share, cluster_of, slots, trial_share

ROOT = Path(__file__).parents[2]
REFUSED = "Failed to connect to Ray cluster at 127.0.0.1"  # all that Ray raises for a wrong token or none
TOKENLESS = "Token authentication is enabled but no authentication token was found. Ensure that the token is available."


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
    monkeypatch.setattr(cluster, "HEAD_MARKER", saved(tmp_path, yaml.safe_load((ROOT / "cluster.yaml").read_text())))
    head = {"Alive": True, "Resources": {"CPU": 0.0, "memory": 6.0e9, cluster.HEAD_RESOURCE: 1.0}}
    early = {"Alive": True, "Resources": {"CPU": 4.0, "GPU": 1.0, "memory": 12.0e9}}  # a worker that is there already
    monkeypatch.setattr(cluster.ray, "nodes", lambda: [head, early])
    there_will_be = cluster_of(cluster.all_nodes(), gpu_bytes=None)
    assert (there_will_be.cpus, there_will_be.gpus, there_will_be.nodes) == (32, 8.0, 9)
    share = trial_share(TrialConfig(), RunConfig(), there_will_be)
    assert share == Share(cpus=1, gpus=0.125)  # the baseline, as if each GPU had 16 GiB
    assert slots(RunConfig(), there_will_be) == 32
    cluster.refuse_infeasible([share])
    with pytest.raises(ValueError, match="the largest node has 4 CPU and 1 GPU"):
        cluster.refuse_infeasible([Share(cpus=1, gpus=2.0)])


# --- a cluster that does not take this process in ---------------------------------------------------------------------


@pytest.fixture
def listening() -> Iterator[str]:
    """Address of somebody who listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.parametrize(
    ("error", "reason"),
    [(ConnectionError(REFUSED), REFUSED), (AuthenticationError(TOKENLESS), "no authentication token was found)")],
)
def test_a_cluster_that_asks_for_a_token_is_named_with_what_to_do(
    error: Exception, reason: str, listening: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse(monkeypatch, error)
    with pytest.raises(ConnectionError) as caught, connected(listening):
        pass
    for part in (listening, reason, "RAY_AUTH_MODE must be token", "~/.ray/auth_token"):
        assert part in str(caught.value)
    assert "Ensure" not in str(caught.value)


def test_where_there_is_no_cluster_nothing_is_said_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(monkeypatch, ConnectionError("Could not find any running Ray instance."))
    with (
        pytest.raises(ConnectionError, match=r"^Could not find any running Ray instance\.$"),
        connected("auto"),
    ):
        pass


def refuse(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """Let Ray raise that at the next attempt to connect."""

    def init(**_: Any) -> None:
        raise error

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
