"""Choose the Ray instance of a command, and check within 20 seconds that a Ray cluster answers at its address.

Ray itself retries an address for minutes, reports little about the cause, and may end the process.
"""

import http.client
import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from nkat_ray.errors import UserError

HEAD_MARKER: Final = "~/ray_bootstrap_config.yaml"  # `ray up` stores the cluster's configuration here on the head
CONNECT_S: Final = 4.0  # timeout of the connection
ANSWER_S: Final = 3.0  # timeout of the first answer
PING_S: Final = 12.0  # timeout of the process that asks a Ray cluster for its nodes
PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0"  # HTTP/2 with its first frame (RFC 9113)
TLS_ALERT: Final = 0x15  # first byte of a TLS server's answer to anything but TLS
DASHBOARD: Final = b"<title>Ray Dashboard</title>"
GRPC: Final = "a gRPC server"
LEAVE_OUT: Final = "or leave it out for a local instance"


@dataclass(frozen=True)
class Address:
    """The address of a Ray instance."""

    value: str  # `local`, `auto` or HOST:PORT
    source: str  # origin of the value, e.g. `--address`

    @property
    def phrase(self) -> str:
        """Description of the address, the first part of a run's first notice."""
        if self.value == "local":
            return "a local Ray instance of this run's own"
        if self.source.startswith("this head's"):
            return "the cluster of this head node (made by `ray up`)"
        return f"Ray at {self.value} ({self.source})"


def head_config() -> Path:
    """Return the path of the file that `ray up` leaves on a head node; the file may not exist."""
    return Path(os.path.expanduser(HEAD_MARKER))  # noqa: PTH111 (pathlib's raises an error without a home)


def choose_address(typed: str | None) -> Address:
    """Choose the address of Ray.

    The first that exists: what the user typed, $RAY_ADDRESS, the cluster with this machine as head, a local instance.

    Args:
        typed: value of --address, None without it.

    Raises:
        UserError: the address is a URL, or has no port.
    """
    marker = head_config()
    if typed is not None:
        address = Address(typed, "--address")
    elif os.environ.get("RAY_ADDRESS"):
        address = Address(os.environ["RAY_ADDRESS"], "$RAY_ADDRESS")
    elif marker.exists():
        address = Address("auto", f"this head's {marker}")
    else:
        address = Address("local", "no other was named")
    _refuse_form(address)
    return address


def _refuse_form(address: Address) -> None:
    if address.value in ("local", "auto"):
        return
    given = f"address is {address.value!r} ({address.source})"
    if address.value.startswith("ray://"):
        raise UserError(
            f"{given}; a Ray Client cannot drive a search; start it on the cluster, "
            "e.g. with `ray submit` or `ray job submit`"
        )
    if "://" in address.value:
        raise UserError(f"{given}; that is an address for jobs; give the cluster's HOST:PORT, {LEAVE_OUT}")
    host, _, port = address.value.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 2**16:
        raise UserError(f"{given}; allowed: HOST:PORT, `auto` or `local`")


def refuse_unreachable(address: Address) -> None:
    """Refuse an address unless a Ray cluster answers there with a node on this machine; takes at most 20 seconds.

    Raises:
        UserError: states the address, its origin, and what answers there.
    """
    if address.value == "local":
        return
    given, endpoint = f"address is {address.value!r} ({address.source})", address.value
    if address.value == "auto":
        endpoint, found_in = _running_cluster(given)
        given = f"{given}, which means {endpoint} ({found_in})"
    host, _, port = endpoint.rpartition(":")
    said = GRPC if os.environ.get("RAY_USE_TLS") == "1" else what_answers(host.strip("[]"), int(port))
    if said != GRPC:
        raise UserError(f"{given}; {said}; give the cluster's own address, {LEAVE_OUT}")
    if reason := _ping(endpoint, found=address.value == "auto"):
        raise UserError(f"{given}; {reason}")


def _running_cluster(given: str) -> tuple[str, str]:
    """Return the address that Ray uses for `auto`, and where Ray found it."""
    from ray._common.utils import get_ray_address_file
    from ray._private import services

    try:
        services.find_gcs_addresses.cache_clear()  # type: ignore[attr-defined]
        running, left = services.find_gcs_addresses(), services.find_bootstrap_address(None)
    except OSError as error:
        raise UserError(f"{given}; {error.filename} cannot be read ({error.strerror}); give HOST:PORT") from error
    if running and not (left and len(running) > 1):
        return next(iter(running)), "a Ray process of this machine"
    if not left:
        raise UserError(f"{given}; no Ray runs on this machine; start it with `ray start`, {LEAVE_OUT}")
    file = get_ray_address_file(None)
    if not left.rpartition(":")[2].isdigit():
        raise UserError(f"{given}; {file} contains {left[:40]!r}, not an address; remove the file, or give HOST:PORT")
    return left, f"left in {file}; `ray stop` resets it"


def what_answers(host: str, port: int) -> str:
    """Return what answers on a port: `a gRPC server`, as a Ray cluster is, else a phrase about it or the failure."""
    try:
        with socket.create_connection((host, port), timeout=CONNECT_S) as connection:
            connection.settimeout(ANSWER_S)
            connection.sendall(PREFACE)
            first = connection.recv(64)
    except TimeoutError:
        return f"nothing answers there within {CONNECT_S + ANSWER_S:.0f} s"
    except ConnectionResetError:
        first = b""
    except OSError as error:
        return f"nothing answers there ({error.strerror or error})"
    if len(first) >= 9 and first[3] == 4:  # a SETTINGS frame, the first one of every HTTP/2 server
        return GRPC
    return f"{_described(first, host, port)}, not a Ray cluster" if first else "a server closes the connection"


def _described(first: bytes, host: str, port: int) -> str:
    """Return a phrase that describes a server, from the first bytes of its answer."""
    if first.startswith(b"SSH-"):
        return "an ssh server answers there"
    if first.startswith((b"-ERR", b"-NOAUTH", b"-DENIED")):
        return "a Redis server answers there"
    if first[0] == TLS_ALERT:
        return "a TLS server answers there (Ray with TLS needs RAY_USE_TLS=1)"
    connection = http.client.HTTPConnection(host, port, timeout=ANSWER_S)
    try:
        connection.request("GET", "/")
        answer = connection.getresponse()
        server, body = answer.getheader("Server", "without a name"), answer.read(2000)
    except (OSError, http.client.HTTPException):
        return f"something answers {first[:20]!r} there"
    finally:
        connection.close()
    return "Ray's dashboard answers there" if DASHBOARD in body else f"a web server answers there ({server})"


def _ping(endpoint: str, *, found: bool) -> str | None:
    """Ask a Ray cluster for its nodes, in a separate process; return one line about a problem, None without one."""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    command = [sys.executable, "-m", "nkat_ray.cluster.ping", endpoint, "found" if found else "typed"]
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, encoding="utf-8", errors="replace", timeout=PING_S
        )
    except subprocess.TimeoutExpired:
        return f"{GRPC} answers there, but not as a Ray cluster does"
    if done.returncode == 0:
        return None
    lines = done.stdout.strip().splitlines()
    return lines[-1] if lines else f"{GRPC} answers there, but not as a Ray cluster does"
