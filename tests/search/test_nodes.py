"""The facts of a node: from tables and folders made here, and from the session's real instance."""

import socket
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from nkat_ray.search import nodes
from nkat_ray.search.nodes import (
    NodeFacts,
    clock_skew_s,
    code_digest,
    dashboard_port,
    gpu_memory,
    node_facts,
    open_addresses,
    try_storage,
    versions,
)


def test_a_clock_read_in_between_is_not_off() -> None:
    assert clock_skew_s(10.0, 10.5, 11.0) == 0.0
    assert clock_skew_s(10.0, 7.0, 11.0) == 3.0  # behind
    assert clock_skew_s(10.0, 15.0, 11.0) == 4.0  # ahead


@pytest.mark.parametrize(("url", "port"), [("127.0.0.1:8265", 8265), ("", None), (None, None)])
def test_the_port_of_the_dashboard(url: str | None, port: int | None) -> None:
    assert dashboard_port(url) == port


HEADING = "  sl  local_address rem_address   st\n"


@pytest.mark.parametrize(
    ("address", "state", "found"),
    [
        ("0100007F:2049", "0A", ()),
        ("00000000:2049", "0A", ("0.0.0.0",)),
        ("0500000A:2049", "0A", ("10.0.0.5",)),
        ("00000000:204A", "0A", ()),  # another port
        ("0500000A:2049", "01", ()),  # a connection, not a listener
        (f"{'0' * 32}:2049", "0A", ("::",)),
        (f"{'0' * 24}01000000:2049", "0A", ()),  # ::1
        ("0000000000000000FFFF00000100007F:2049", "0A", ()),  # 127.0.0.1 in IPv6's clothes
    ],
)
def test_who_listens_on_a_port(address: str, state: str, found: tuple[str, ...], tmp_path: Path) -> None:
    table = tmp_path / "tcp"
    table.write_text(f"{HEADING}   0: {address} 00000000:0000 {state}\n")
    assert open_addresses(0x2049, [table, tmp_path / "absent"]) == found


@pytest.mark.skipif(sys.platform != "linux", reason="/proc/net is Linux's")
@pytest.mark.parametrize(("host", "found"), [("127.0.0.1", ()), ("0.0.0.0", ("0.0.0.0",))])
def test_a_real_listener_is_seen(host: str, found: tuple[str, ...]) -> None:
    with socket.create_server((host, 0)) as server:
        assert open_addresses(server.getsockname()[1]) == found


def test_a_node_that_sees_another_place_says_so(tmp_path: Path) -> None:
    probe = tmp_path / "probe"
    assert "No such file" in str(try_storage(str(probe), "a"))
    probe.mkdir()
    (probe / nodes.MARKER).write_text("of another folder")
    assert "not the same place" in str(try_storage(str(probe), "a"))
    (probe / nodes.MARKER).write_text(str(probe))
    assert try_storage(str(probe), "a") is None
    assert (probe / "a").exists()


def test_a_file_that_never_arrives_here_is_a_fault() -> None:
    facts = NodeFacts(name="worker")
    assert nodes._with_writing(facts, "id", ["id"]) == facts
    assert "not the same place" in str(nodes._with_writing(facts, "id", []).storage_error)


def test_any_change_of_code_changes_its_digest(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x = 1")
    digests = [code_digest(tmp_path)]
    (tmp_path / "a.py").write_text("x = 2")
    digests.append(code_digest(tmp_path))
    (tmp_path / "a.py").rename(tmp_path / "b.py")
    digests.append(code_digest(tmp_path))
    assert len(set(digests)) == 3


def test_a_package_that_is_missing_has_no_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes, "PACKAGES", ("ray", "never-published"))
    found = dict(versions())
    assert found["never-published"] == "-"
    assert found["ray"][0].isdigit()


def test_the_gpus_are_asked_of_the_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu_memory() == ()
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 24564\necho 81559\n")
    program.chmod(0o755)
    assert gpu_memory() == (24564 * 2**20, 81559 * 2**20)


def test_the_sessions_node_tells_its_facts(ray_local: Any, tmp_path: Path) -> None:
    before = time.time()
    (facts,) = node_facts(str(tmp_path / "runs"))
    assert facts.error is None
    assert facts.storage_error is None
    assert facts.skew_s < time.time() - before
    assert dict(facts.versions)["ray"] == ray_local.__version__
    assert facts.disk_bytes > 0
    assert facts.store_bytes > 0
    assert not (tmp_path / "runs").exists()


def test_a_node_that_cannot_answer_is_reported(ray_local: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes, "_facts", _broken)
    (facts,) = node_facts(str(tmp_path))
    assert "ModuleNotFoundError: No module named 'nkat_ray'" in str(facts.error)


def _broken(*_: Any) -> None:
    raise ModuleNotFoundError("No module named 'nkat_ray'")


def test_a_storage_path_that_cannot_be_written_is_reported(ray_local: Any, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (facts,) = node_facts(str(tmp_path / "file"))
    assert facts.storage_error
