"""`nkat doctor`: each check on invented nodes, both ways, then the command on the session's real instance."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nkat_ray.cli import tune
from nkat_ray.cluster.gpus import GpuFacts
from nkat_ray.cluster.nodes import Disk, NodeFacts
from nkat_ray.commands import doctor as room
from nkat_ray.commands.doctor import Check, DoctorConfig, check_data, check_nodes, doctor
from nkat_ray.errors import BAD_INPUT, DONE, UNHEALTHY, UserError
from nkat_ray.report.terminal import Screen

GIB = 2**30


def disk(purpose: str = "storage", *, free: float = 1e11, total: float = 1e12) -> Disk:
    return Disk(purpose=purpose, path=f"/{purpose}", free_bytes=int(free), total_bytes=int(total))


HEAD = NodeFacts(
    name="head", python="3.11.7", versions=(("ray", "2.60.0"), ("torch", "2.15.0")), store_bytes=2 * GIB, token=True,
    disks=(disk(), disk("Ray's spilled objects"), disk("checkpoints")), shared_memory_bytes=8 * GIB,
)  # fmt: skip
A10G = GpuFacts(name="A10G", memory_bytes=24 * GIB)
WORKER = replace(HEAD, name="worker", ray_gpus=1.0, gpus=(A10G,), driver_gpus=1)


def checks(*facts: NodeFacts, cluster: bool = True) -> dict[str, Check]:
    return {check.name: check for check in check_nodes(facts, "s3://bucket/runs", cluster=cluster)}


def test_equal_nodes_are_healthy() -> None:
    found = checks(HEAD, WORKER)
    assert [check for check in found.values() if not check.ok] == []
    assert found["GPUs"].detail == "1 x A10G, 24 GiB"
    assert found["packages"].detail == "ray 2.60.0, torch 2.15.0"


FAULTS: dict[str, tuple[str, dict[str, Any], str]] = {
    "other Python": ("Python", {"python": "3.12.1"}, "3.11.7 on head, 3.12.1 on worker"),
    "other torch": (
        "packages", {"versions": (("ray", "2.60.0"), ("torch", "2.9.0"))}, "torch: 2.15.0 on head, 2.9.0 on worker",
    ),
    "no torch": ("packages", {"versions": (("ray", "2.60.0"),)}, "torch: 2.15.0 on head, - on worker"),
    "GPU that torch cannot use": ("GPUs", {"gpus": (A10G, GpuFacts(fault="too old"))}, "worker: 1 GPU: too old"),
    "no storage": ("storage s3://bucket/runs", {"storage_error": "access denied"}, "worker: access denied"),
    "full disk": ("free disk", {"disks": (disk(free=2e5),)}, "worker: /storage (storage) has 0.0 GB free, 5 GB needed"),
    "disk that Ray calls full": (
        "free disk", {"disks": (disk("Ray's logs", free=2e10),)}, "worker: /Ray's logs (Ray's logs) has 20.0 GB free",
    ),
    "full scratch": ("free disk", {"disks": (disk("checkpoints", free=1e8),)}, "0.1 GB free, 1 GB needed"),
    "small store": ("object store", {"store_bytes": 2**27}, "worker: 0.12 GiB"),
    "clock": ("clocks", {"skew_s": 12.0}, "worker: off by 12.0 s"),
    "no token": ("token", {"token": False}, "worker: demands no token"),
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


def test_a_node_without_an_answer_is_left_out_of_comparisons() -> None:
    assert set(checks(replace(HEAD, error="gone"))) == {"nodes"}


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        (replace(WORKER, gpus=(replace(A10G, busy=True),) * 2), "2 x A10G, 24 GiB, busy"),
        (replace(WORKER, gpus=(GpuFacts(name="A100 MIG 1g.5gb", memory_bytes=5 * GIB),)), "1 x A100 MIG 1g.5gb, 5 GiB"),
        (replace(WORKER, gpus=()), "not tried"),  # --gpus_per_trial 0
        (replace(HEAD, driver_gpus=2), "none: trials run on CPU cores (Ray offers none of the driver's on head"),
        (HEAD, "none: trials run on CPU cores"),
    ],
)
def test_what_is_no_fault_of_a_gpu_is_said(facts: NodeFacts, said: str) -> None:
    check = checks(facts)["GPUs"]
    assert check.ok
    assert said in check.detail


def test_the_multi_process_service_is_reported_where_there_are_gpus() -> None:
    assert "MPS" not in checks(HEAD)
    assert checks(replace(WORKER, mps=True))["MPS"] == Check("MPS", True, "on")
    off = checks(WORKER)["MPS"]
    assert off.ok
    assert "off on worker: trials that share a GPU take turns" in off.detail


# Reported in ray-project/ray#14616
def test_a_small_shared_memory_is_said_and_is_no_fault() -> None:
    check = checks(replace(HEAD, shared_memory_bytes=64 * 2**20))["object store"]
    assert check.ok
    assert "head: /dev/shm has 0.062 GiB, so Ray keeps objects in files" in check.detail
    assert "--shm-size" in check.detail


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
def console() -> Screen:
    return Screen(width=200, record=True)


def test_the_sessions_instance_is_healthy(
    ray_local: Any, tmp_path: Path, console: Screen, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "LEAST_STORE_BYTES", 2**20)  # the tests' own store is small
    config = DoctorConfig(storage_path=str(tmp_path / "runs"), data="synthetic", address="local")
    assert doctor(config, console) == DONE
    assert "no fault found" in console.export_text()
    assert list(tmp_path.iterdir()) == []  # nothing is left behind


def test_two_nodes_that_differ_end_with_exit_code_5(
    ray_local: Any, console: Screen, monkeypatch: pytest.MonkeyPatch
) -> None:
    two = [HEAD, replace(WORKER, python="3.12.1", token=False)]
    monkeypatch.setattr("nkat_ray.cluster.nodes.node_facts", lambda storage_path, with_gpus: two)
    assert doctor(DoctorConfig(data="synthetic", address="local"), console) == UNHEALTHY == 5
    text = console.export_text()
    assert "2 nodes" in text
    assert "2 of 12 checks failed" in text
    assert "nodes that start on demand were not checked" in text


# Reported in macarooni-man/auto-mcs#171, DIRACGrid/DIRAC#1629
def test_a_full_storage_path_is_a_fault_whatever_else_is_free(
    ray_local: Any, tmp_path: Path, console: Screen, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = tmp_path / "full"
    full.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(full)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this machine does not allow a file system to be mounted (mount -t tmpfs)")
    try:
        config = DoctorConfig(storage_path=str(full / "runs"), data="synthetic", address="local")
        assert doctor(config, console) == UNHEALTHY
    finally:
        subprocess.run(["umount", "--lazy", str(full)], check=True)
    assert "(storage) has 0.0 GB free, 5" in " ".join(re.sub("[│\\s]+", " ", console.export_text()).split())


# --- where Ray does not start -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "value", "address", "said"),
    [
        ("RAY_TMPDIR", "/proc/nowhere", "local", "a local Ray instance needs a folder for its sockets"),
        ("RAY_ADDRESS", "127.0.0.1:1", None, "address is '127.0.0.1:1' ($RAY_ADDRESS); nothing answers there"),
    ],
)
def test_why_there_is_no_ray_is_one_fault_among_the_checks(
    setting: str, value: str, address: str | None, said: str, tmp_path: Path, console: Screen,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setenv(setting, value)
    config = DoctorConfig(storage_path=str(tmp_path / "runs"), data="synthetic", address=address)
    assert doctor(config, console) == UNHEALTHY
    text = " ".join(console.export_text().replace("│", "").split())
    assert said in text
    assert "generated" in text  # the rest was checked all the same
    assert "1 of 3 checks failed" in text
    assert list(tmp_path.iterdir()) == []


def test_a_storage_path_that_cannot_be_written_is_found_without_ray(
    console: Screen, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setenv("RAY_TMPDIR", "/proc/nowhere")
    assert doctor(DoctorConfig(storage_path="/proc/runs", data="synthetic", address="local"), console) == UNHEALTHY
    assert "2 of 3 checks failed" in console.export_text()


@pytest.mark.parametrize(
    ("setting", "value"),
    [("RAY_TMPDIR", "/proc/nowhere"), ("RAY_TMPDIR", "/" + "x" * 60), ("RAY_ADDRESS", "127.0.0.1:1")],
)
def test_json_says_of_ray_what_a_run_would_say(
    setting: str, value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setenv(setting, value)
    flags = ["--storage_path", str(tmp_path / "runs"), "--data", "synthetic"]
    flags += ["--address", "local"] if setting == "RAY_TMPDIR" else []
    assert tune(["--preset", "quick", *flags]) == BAD_INPUT
    refusal = capsys.readouterr().err.strip().removeprefix("error: ")
    assert room.main([*flags, "--json"]) == UNHEALTHY
    told = json.loads(capsys.readouterr().out)
    assert told["faults"] == 1
    assert told["checks"][0] == {"name": "Ray", "ok": False, "detail": refusal}
    assert [check["name"] for check in told["checks"]] == ["Ray", "driver", "data"]
    assert list(tmp_path.iterdir()) == []


def test_an_empty_storage_path_is_refused_as_by_a_run() -> None:
    with pytest.raises(UserError, match="storage_path is ''; it is empty; allowed: text with a path"):
        room.main(["--storage_path", ""])


ODD_MACHINE = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs -o ro tmpfs /tmp/ray && exec "$@"', "sh"]


# Reported in open-mmlab/mim#240, ray-project/ray#7945, ray-project/ray#4593
@pytest.mark.cluster
def test_a_machine_that_lacks_what_ray_takes_for_granted_is_judged_as_a_run_would_find_it(tmp_path: Path) -> None:
    """No home to write, a temporary folder of a hundred characters, /tmp/ray of another user: Ray runs all the same."""
    deep = tmp_path / ("x" * 100)
    deep.mkdir()
    Path("/tmp/ray").mkdir(exist_ok=True)
    if subprocess.run([*ODD_MACHINE, "true"], capture_output=True).returncode:
        pytest.skip("this user may not mount a folder of its own over /tmp/ray")
    given = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_AUTH", "RAY_ADDRESS"))}
    done = subprocess.run(
        [*ODD_MACHINE, Path(sys.executable).with_name("nkat"), "doctor", "--storage_path", tmp_path / "runs",
         "--data", "synthetic", "--gpus_per_trial", "0", "--json"],
        env={**given, "HOME": "/proc", "TMPDIR": str(deep)}, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode in (DONE, UNHEALTHY), done.stderr
    told = json.loads(done.stdout)
    assert told["ray"] == "a local Ray instance of this run's own: 1 node"
    checks = {check["name"]: check for check in told["checks"]}
    assert "Ray" not in checks
    assert checks[f"storage {tmp_path / 'runs'}"]["ok"]
    assert checks["nodes"]["ok"]
    assert not (tmp_path / "runs").exists()
