"""The facts of a node: from tables and folders made here, and from the session's real instance."""

import socket
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nkat_ray.cluster import nodes
from nkat_ray.cluster.nodes import (
    NodeFacts,
    clock_skew_s,
    code_digest,
    dashboard_port,
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


@pytest.mark.parametrize(
    ("address", "status", "found"),
    [
        ("127.0.0.1", "LISTEN", ()),
        ("127.0.1.1", "LISTEN", ()),
        ("::1", "LISTEN", ()),
        ("::ffff:127.0.0.1", "LISTEN", ()),
        ("0.0.0.0", "LISTEN", ("0.0.0.0",)),
        ("10.0.0.5", "LISTEN", ("10.0.0.5",)),
        ("::", "LISTEN", ("::",)),
        ("10.0.0.5", "ESTABLISHED", ()),
    ],
)
def test_which_addresses_listen_on_a_port(
    address: str, status: str, found: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    import psutil

    rows = [SimpleNamespace(status=status, laddr=SimpleNamespace(ip=address, port=port)) for port in (8265, 8266)]
    monkeypatch.setattr(psutil, "net_connections", lambda kind: rows)
    assert open_addresses(8265) == found


def test_a_system_that_denies_the_list_of_ports_is_recognised(monkeypatch: pytest.MonkeyPatch) -> None:
    import psutil

    def refuse(kind: str) -> None:
        raise psutil.AccessDenied

    monkeypatch.setattr(psutil, "net_connections", refuse)
    assert open_addresses(8265) is None


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell")
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


def test_the_sessions_node_tells_its_facts(ray_local: Any, tmp_path: Path) -> None:
    before = time.time()
    (facts,) = node_facts(str(tmp_path / "runs"))
    assert facts.error is None
    assert facts.storage_error is None
    assert facts.skew_s < time.time() - before
    assert dict(facts.versions)["ray"] == ray_local.__version__
    session, scratch = facts.disks[1:]
    assert (facts.disks[0].path, scratch.path) == (str(tmp_path / "runs"), tempfile.gettempdir())
    assert "session_" in session.path
    assert all(0 < disk.free_bytes <= disk.total_bytes for disk in facts.disks)
    assert facts.gpus == ()
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
