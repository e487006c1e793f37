"""`nkat doctor`: each check on invented nodes, both ways, then the command on the session's real instance."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from nkat_ray.commands import doctor as room
from nkat_ray.commands.doctor import Check, DoctorConfig, check_data, check_nodes, doctor
from nkat_ray.exit_codes import DONE, UNHEALTHY
from nkat_ray.search.nodes import NodeFacts

HEAD = NodeFacts(
    name="head", python="3.11.7", versions=(("ray", "2.60.0"), ("torch", "2.15.0")), disk_bytes=10**11,
    store_bytes=2**31, token=True,
)  # fmt: skip
WORKER = replace(HEAD, name="worker", ray_gpus=1.0, gpu_bytes=(24 * 2**30,))


def checks(*facts: NodeFacts, cluster: bool = True) -> dict[str, Check]:
    return {check.name: check for check in check_nodes(facts, "s3://bucket/runs", cluster=cluster)}


def test_equal_nodes_are_healthy() -> None:
    found = checks(HEAD, WORKER)
    assert [check for check in found.values() if not check.ok] == []
    assert found["GPUs"].detail == "1 x 24 GiB"
    assert found["packages"].detail == "ray 2.60.0, torch 2.15.0"


FAULTS: dict[str, tuple[str, dict[str, Any], str]] = {
    "other Python": ("Python", {"python": "3.12.1"}, "3.11.7 on head, 3.12.1 on worker"),
    "other torch": (
        "packages", {"versions": (("ray", "2.60.0"), ("torch", "2.9.0"))}, "torch: 2.15.0 on head, 2.9.0 on worker",
    ),
    "no torch": ("packages", {"versions": (("ray", "2.60.0"),)}, "torch: 2.15.0 on head, - on worker"),
    "GPU without a driver": ("GPUs", {"gpu_bytes": ()}, "worker: Ray hands out 1 GPU, the NVIDIA driver shows 0"),
    "torch without CUDA": ("GPUs", {"cuda": False}, "worker: has a GPU, but torch without CUDA"),
    "no storage": ("storage s3://bucket/runs", {"storage_error": "access denied"}, "worker: access denied"),
    "full disk": ("free disk", {"disk_bytes": 10**9}, "worker: 1.0 GB free, 5 GB needed"),
    "small store": ("object store", {"store_bytes": 2**27}, "worker: 0.12 GiB"),
    "clock": ("clocks", {"skew_s": 12.0}, "worker: off by 12.0 s"),
    "no token": ("token", {"token": False}, "worker: asks for no token"),
    "dashboard": ("dashboard", {"dashboard": ("0.0.0.0",)}, "worker: is open on 0.0.0.0"),
    "silent": ("nodes", {"error": "ModuleNotFoundError: nkat_ray"}, "worker: ModuleNotFoundError: nkat_ray"),
}  # fmt: skip


@pytest.mark.parametrize(("name", "changes", "said"), FAULTS.values(), ids=FAULTS.keys())
def test_one_node_that_differs_is_named_and_fails_that_check_alone(
    name: str, changes: dict[str, Any], said: str
) -> None:
    found = checks(HEAD, replace(WORKER, **changes))
    assert {check.name for check in found.values() if not check.ok} == {name}
    assert said in found[name].detail


def test_a_package_that_all_lack_is_a_fault() -> None:
    found = checks(replace(HEAD, versions=(("timm", "-"),)))
    assert not found["packages"].ok
    assert found["packages"].detail == "timm: missing"


def test_a_node_that_is_silent_is_compared_with_nobody() -> None:
    assert set(checks(replace(HEAD, error="gone"))) == {"nodes"}


def test_a_local_instance_needs_no_token() -> None:
    found = checks(replace(HEAD, token=False), cluster=False)
    assert found["token"].ok


# --- data -------------------------------------------------------------------------------------------------------------


def test_generated_data_are_always_there() -> None:
    assert check_data(DoctorConfig(data="synthetic")).ok


def test_a_folder_without_cifar10_is_a_fault(tmp_path: Path) -> None:
    check = check_data(DoctorConfig(data_dir=tmp_path))
    assert not check.ok
    assert "cifar10" in check.detail
    assert "--data_dir" in check.detail


def test_a_folder_that_is_not_there_is_a_fault(tmp_path: Path) -> None:
    assert not check_data(DoctorConfig(data_dir=tmp_path / "nowhere")).ok


def test_the_real_files_are_found(data_dir: Path) -> None:
    assert check_data(DoctorConfig(data_dir=data_dir)).ok


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def console() -> Console:
    return Console(width=200, record=True, quiet=False)


def test_the_sessions_instance_is_healthy(
    ray_local: Any, tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "LEAST_STORE_BYTES", 2**20)  # the tests' own store is small
    config = DoctorConfig(storage_path=str(tmp_path / "runs"), data="synthetic", address="local")
    assert doctor(config, console) == DONE
    assert "no fault found" in console.export_text()
    assert list(tmp_path.iterdir()) == []  # nothing is left behind


def test_two_nodes_that_differ_end_with_exit_code_5(
    ray_local: Any, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    two = [HEAD, replace(WORKER, python="3.12.1", token=False)]
    monkeypatch.setattr("nkat_ray.search.nodes.node_facts", lambda storage_path: two)
    assert doctor(DoctorConfig(data="synthetic", address="local"), console) == UNHEALTHY == 5
    text = console.export_text()
    assert "2 nodes" in text
    assert "2 of 11 checks failed" in text
    assert "nodes that start on demand were not checked" in text
