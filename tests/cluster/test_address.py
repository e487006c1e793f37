"""Which Ray is used and what answers at an address: servers of all kinds that are not Ray clusters, and none."""

import contextlib
import http.server
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nkat_ray.cluster import address as room
from nkat_ray.cluster.address import Address, choose_address, refuse_unreachable, what_answers
from nkat_ray.errors import UserError

LIMIT_S = 20.0
SETTINGS_FRAME = b"\0\0\0\4\0\0\0\0\0"  # with which every HTTP/2 server begins, a gRPC server too


@pytest.fixture(autouse=True)
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No address in the environment, nothing in the home."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_ADDRESS", "RAY_USE_TLS"):
        monkeypatch.delenv(name, raising=False)


@contextlib.contextmanager
def serving(answer: Callable[[socket.socket], None]) -> Iterator[int]:
    """A server on the loopback that does one thing with every connection; yields its port."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        kept = []

        def serve() -> None:
            with contextlib.suppress(OSError):  # it is closed at the end
                while True:
                    connection, _ = server.accept()
                    kept.append(connection)
                    answer(connection)

        threading.Thread(target=serve, daemon=True).start()
        yield server.getsockname()[1]
        for connection in kept:
            connection.close()


@contextlib.contextmanager
def web(page: bytes) -> Iterator[int]:
    """A web server with one page; yields its port."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(page)

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


# --- which one --------------------------------------------------------------------------------------------------------


def test_what_was_typed_goes_before_the_environment_and_that_before_the_heads_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert choose_address(None).value == "local"
    (tmp_path / "ray_bootstrap_config.yaml").touch()
    head = choose_address(None)
    assert (head.value, head.source) == ("auto", f"this head's {tmp_path}/ray_bootstrap_config.yaml")
    assert head.phrase == "the cluster of this head node (made by `ray up`)"
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert choose_address(None) == Address("10.0.0.1:6379", "$RAY_ADDRESS")
    assert choose_address("local") == Address("local", "--address")
    assert choose_address("10.0.0.2:6379").phrase == "Ray at 10.0.0.2:6379 (--address)"


def test_without_a_home_there_is_no_heads_file(monkeypatch: pytest.MonkeyPatch) -> None:
    import pwd

    def nobody(*_: Any) -> None:
        raise KeyError("no such user")

    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    assert choose_address(None).value == "local"


# Reported in ray-project/ray#41158, ray-project/ray#46733
@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("ray://head:10001", "a Ray Client cannot drive a search"),
        ("http://127.0.0.1:8265", "that is an address for jobs"),  # what `ray job` takes from RAY_ADDRESS
        ("head", "allowed: HOST:PORT"),
        ("head:", "allowed: HOST:PORT"),
        (":6379", "allowed: HOST:PORT"),
        ("head:port", "allowed: HOST:PORT"),
        ("head:99999", "allowed: HOST:PORT"),
    ],
)
def test_an_address_of_another_form_is_refused_with_who_named_it(
    given: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=rf"address is '{given}' \(--address\); {said}"):
        choose_address(given)
    monkeypatch.setenv("RAY_ADDRESS", given)
    with pytest.raises(UserError, match=rf"address is '{given}' \(\$RAY_ADDRESS\); {said}"):
        choose_address(None)


# --- what answers there -----------------------------------------------------------------------------------------------

ANSWERS: dict[str, tuple[Callable[[socket.socket], None], str]] = {
    "ssh": (lambda s: s.sendall(b"SSH-2.0-OpenSSH_9.2\r\n"), "an ssh server answers there"),
    "redis": (lambda s: s.sendall(b"-ERR unknown command\r\n"), "a Redis server answers there"),
    "tls": (lambda s: s.sendall(b"\x15\x03\x01\x00\x02\x02\x46"), "a TLS server answers there"),
    "other": (lambda s: s.sendall(b"220 mail ready\r\n"), r"something answers b'220 mail ready\\r\\n' there"),
    "closing": (lambda s: s.close(), "a server closes the connection"),
    "silent": (lambda s: None, "nothing answers there within"),
}


# Reported in ray-project/ray#21631
@pytest.mark.parametrize(("answer", "said"), ANSWERS.values(), ids=ANSWERS.keys())
def test_what_answers_instead_of_ray_is_named(
    answer: Callable[[socket.socket], None], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "ANSWER_S", 0.5)
    with serving(answer) as port, pytest.raises(UserError, match=rf"{port}' \(--address\); {said}"):
        refuse_unreachable(Address(f"127.0.0.1:{port}", "--address"))


def test_a_web_server_is_distinguished_from_rays_dashboard() -> None:
    with web(b"<html>hello</html>") as port:
        assert "a web server answers there (BaseHTTP" in what_answers("127.0.0.1", port)
    with web(b"<html><title>Ray Dashboard</title></html>") as port:
        assert what_answers("127.0.0.1", port) == "Ray's dashboard answers there, not a Ray cluster"


def test_a_closed_port_and_an_unknown_host_are_named() -> None:
    port = _free_port()
    assert what_answers("127.0.0.1", port) == "nothing answers there (Connection refused)"
    assert "nothing answers there" in what_answers("no-such-host.invalid", 6379)


@pytest.fixture(scope="module")
def python_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of `python -m http.server`."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    command = [sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1"]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=tmp_path_factory.mktemp("www")
    )
    try:
        while "nothing" in what_answers("127.0.0.1", port):
            time.sleep(0.1)
        yield f"127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


# Reported in ray-project/ray#46863, ray-project/ray#15780
@pytest.mark.parametrize("flags", [[], ["--dry_run"]], ids=["run", "plan"])
@pytest.mark.parametrize("source", ["--address", "$RAY_ADDRESS", "this head's"])
def test_pythons_own_web_server_ends_a_run_within_the_limit_and_nothing_is_written(
    flags: list[str], source: str, python_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """The whole command; once there was no end to it."""
    from nkat_ray.cli import tune

    monkeypatch.setattr("ray.is_initialized", lambda: False)
    typed = ["--address", python_server] if source == "--address" else []
    if source == "$RAY_ADDRESS":
        monkeypatch.setenv("RAY_ADDRESS", python_server)
    elif source == "this head's":
        (tmp_path / "ray_bootstrap_config.yaml").touch()
        monkeypatch.setattr(room, "_running_cluster", lambda given: (python_server, "left in a file"))
    storage = tmp_path / "runs"
    begun = time.monotonic()
    code = tune(["--preset", "quick", "--data", "synthetic", "--storage_path", str(storage), *typed, *flags])
    assert time.monotonic() - begun < LIMIT_S
    out, err = capsys.readouterr()
    assert (code, err.count("\n")) == (2, 1)
    assert f"({source}" in err
    assert python_server in err
    assert "a web server answers there (SimpleHTTP" in err
    assert "Traceback" not in out
    assert not storage.exists()


def test_a_grpc_server_that_is_no_ray_cluster_is_refused_within_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "PING_S", 4.0)
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)  # which Ray sets where it has run in this process
    begun = time.monotonic()
    with (
        serving(lambda s: s.sendall(SETTINGS_FRAME)) as port,
        pytest.raises(UserError, match="a gRPC server answers there, but not as a Ray cluster does"),
    ):
        refuse_unreachable(Address(f"127.0.0.1:{port}", "--address"))
    assert time.monotonic() - begun < LIMIT_S


def test_the_limits_together_keep_to_twenty_seconds() -> None:
    assert room.CONNECT_S + room.ANSWER_S + room.PING_S < LIMIT_S


# --- auto -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def left_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file in which `ray start` leaves the address, on a machine where no Ray runs."""
    from ray._private import services

    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.setattr(services, "_find_address_from_flag", lambda flag: set())
    (tmp_path / "ray").mkdir()
    return tmp_path / "ray" / "ray_current_cluster"


def test_auto_without_any_ray_is_refused(left_over: Path) -> None:
    with pytest.raises(UserError, match=r"'auto' \(--address\); no Ray runs on this machine; start it"):
        refuse_unreachable(Address("auto", "--address"))


# Reported in ray-project/ray#27666
def test_a_file_that_a_reboot_left_behind_is_named_with_the_address_in_it(left_over: Path) -> None:
    port = _free_port()
    left_over.write_text(f"127.0.0.1:{port}")
    said = rf"'auto' \(--address\), which means 127.0.0.1:{port} \(left in {left_over}; `ray stop` resets it\); nothing"
    with pytest.raises(UserError, match=said):
        refuse_unreachable(Address("auto", "--address"))


def test_a_file_that_holds_no_address_is_named(left_over: Path) -> None:
    left_over.write_text("garbage")
    with pytest.raises(UserError, match=f"{left_over} contains 'garbage', not an address"):
        refuse_unreachable(Address("auto", "--address"))


# --- real clusters ----------------------------------------------------------------------------------------------------


@pytest.mark.cluster
def test_real_clusters_let_their_own_machine_in_and_say_what_is_wrong_else(tmp_path_factory: Any) -> None:
    """A head with a token: its own address, its other ports, no token, another token, another machine."""
    folder = tmp_path_factory.mktemp("r")
    ports = {name: _free_port() for name in ("port", "dashboard-port", "node-manager-port", "ray-client-server-port")}

    own = {
        **os.environ, "HOME": str(folder), "RAY_TMPDIR": "/tmp", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "a" * 64,
        "RAY_USAGE_STATS_ENABLED": "0",
    }  # fmt: skip
    flags = [f"--{name}={port}" for name, port in ports.items()]
    head = subprocess.Popen(
        [sys.executable, "-c", "from ray.scripts.scripts import main; main()", "start", "--head", "--block",
         "--num-cpus=1", "--object-store-memory=100000000", "--dashboard-host=127.0.0.1",
         "--min-worker-port=0", "--max-worker-port=0", f"--temp-dir={folder}", *flags],
        env=own, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip

    def said(port: int, *prefix: str, **environment: str) -> str:
        code = (
            "from nkat_ray.cluster.address import Address, refuse_unreachable\n"
            f"try: refuse_unreachable(Address('127.0.0.1:{port}', '--address'))\n"
            "except Exception as error: print(type(error).__name__, error)\n"
        )
        return subprocess.run(
            [*prefix, sys.executable, "-c", code],
            env={**own, **environment},
            capture_output=True,
            text=True,
            timeout=40,
        ).stdout

    try:
        end = time.monotonic() + 60
        while said(ports["port"]):
            assert time.monotonic() < end
            time.sleep(1)
        assert "UserError" in said(ports["dashboard-port"])
        assert "Ray's dashboard answers there" in said(ports["dashboard-port"])
        for other in ("node-manager-port", "ray-client-server-port"):
            assert "no Ray cluster answers there" in said(ports[other])
        refused = said(ports["port"], RAY_AUTH_TOKEN="b" * 64)
        assert "Authentication token is missing or incorrect" in refused
        assert "RAY_AUTH_MODE must be token" in refused
        assert "Ray refused this process" in said(ports["port"], RAY_AUTH_MODE="disabled")
        apart = ["unshare", "--pid", "--fork", "--mount-proc"]
        if subprocess.run([*apart, "true"], capture_output=True).returncode == 0:
            assert "this machine is not one of its nodes" in said(ports["port"], *apart)
    finally:
        head.terminate()
        head.wait(60)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])
