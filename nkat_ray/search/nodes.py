"""What each node of the connected Ray instance is like: the facts that `nkat doctor` judges."""

import hashlib
import importlib.metadata
import platform
import shutil
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.fs
import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from nkat_ray.search.storage import is_uri

PACKAGES = ("nkat-ray", "torch", "torchvision", "timm", "ray", "optuna", "numpy", "pyarrow", "safetensors")
ANSWER_S = 120.0  # a node that has not answered by then is at fault
LISTENING = "0A"  # state of a socket in /proc/net/tcp
MARKER = "marker"


@dataclass(frozen=True, kw_only=True)
class NodeFacts:
    """One node, or why it said nothing."""

    name: str
    """Its host name, as Ray has it."""
    error: str | None = None
    """What went wrong when it was asked; the rest is then empty."""
    python: str = ""
    versions: tuple[tuple[str, str], ...] = ()
    """Package and version (`-` where it is missing), and a digest of this package's own code."""
    ray_gpus: float = 0.0
    """GPUs that Ray hands out there."""
    gpu_bytes: tuple[int, ...] = ()
    """Memory of each GPU that the driver shows."""
    cuda: bool = True
    """Whether torch was built for CUDA; asked only where there are GPUs."""
    disk_bytes: int = 0
    """Free on the disk of Ray's temporary folder."""
    store_bytes: int = 0
    """Size of its object store."""
    skew_s: float = 0.0
    """How far its clock is off this one's, at least."""
    token: bool = False
    """Whether its processes ask for the cluster's token."""
    dashboard: tuple[str, ...] = ()
    """Addresses other than its own loopback on which the dashboard's port is open."""
    storage_error: str | None = None
    """Why it cannot use the storage path; None where it sees this process's file there and has written one."""


def node_facts(storage_path: str) -> list[NodeFacts]:
    """Ask every live node of the connected Ray instance; the storage path is left as it was found."""
    nodes = [node for node in ray.nodes() if node["Alive"]]
    port = dashboard_port(ray._private.worker.get_dashboard_url())
    with _probe_folder(storage_path) as probe:
        asked = [_on(node, _facts, node["NodeID"], probe, port) for node in nodes]
        facts = [_answer(node, reference) for node, reference in zip(nodes, asked, strict=True)]
        written = _files(probe)
    return [_with_writing(found, node["NodeID"], written) for found, node in zip(facts, nodes, strict=True)]


def _on(node: dict[str, Any], function: Any, *arguments: Any) -> Any:
    strategy = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
    return ray.remote(num_cpus=0, max_retries=0)(function).options(scheduling_strategy=strategy).remote(*arguments)


def _answer(node: dict[str, Any], reference: Any) -> NodeFacts:
    """A node's facts with what only Ray, or only two clocks together, can tell."""
    name, resources = node["NodeManagerHostname"], node["Resources"]
    try:
        found = ray.get(reference, timeout=ANSWER_S)
        before = time.time()
        there = ray.get(_on(node, _clock), timeout=ANSWER_S)
    except RayError as error:
        cause = getattr(error, "cause", None) or error
        return NodeFacts(name=name, error=" ".join(f"{type(cause).__name__}: {cause}".split())[:300])
    return NodeFacts(
        name=name,
        ray_gpus=resources.get("GPU", 0.0),
        store_bytes=int(resources.get("object_store_memory", 0)),
        skew_s=clock_skew_s(before, there, time.time()),
        **found,
    )


def clock_skew_s(before: float, there: float, after: float) -> float:
    """Least difference of two clocks, when the other one was read between two readings of this one, in seconds."""
    return max(0.0, before - there, there - after)


def _with_writing(facts: NodeFacts, node_id: str, written: Sequence[str]) -> NodeFacts:
    """A node that wrote a file which this process does not see has written elsewhere."""
    if facts.error or facts.storage_error or node_id in written:
        return facts
    return NodeFacts(**{**vars(facts), "storage_error": "what it writes there is not seen here: not the same place"})


# --- on the node ------------------------------------------------------------------------------------------------------


def _facts(node_id: str, probe: str, port: int | None) -> dict[str, Any]:
    gpu_bytes = gpu_memory()
    return {
        "python": platform.python_version(),
        "versions": versions(),
        "gpu_bytes": gpu_bytes,
        "cuda": not gpu_bytes or _torch_has_cuda(),
        "disk_bytes": shutil.disk_usage(tempfile.gettempdir()).free,
        "token": _asks_for_token(),
        "dashboard": open_addresses(port) if port else (),
        "storage_error": try_storage(probe, node_id),
    }


def _clock() -> float:
    return time.time()


def versions() -> tuple[tuple[str, str], ...]:
    """Versions of the packages that a result depends on, and a digest of this package's code."""
    found = []
    for package in PACKAGES:
        try:
            found.append((package, importlib.metadata.version(package)))
        except importlib.metadata.PackageNotFoundError:
            found.append((package, "-"))
    return (*found, ("nkat_ray's code", code_digest(Path(__file__).parents[1])))


def code_digest(folder: Path) -> str:
    """First digits of the SHA-256 over a package's Python files, names included."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(f"{path.relative_to(folder).as_posix()}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def gpu_memory() -> tuple[int, ...]:
    """Memory of each GPU in bytes, asked of the driver: a process without a share of a GPU sees none through torch."""
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return ()
    return tuple(int(line) * 2**20 for line in done.stdout.split() if line.isdigit())


def _torch_has_cuda() -> bool:
    import torch

    return torch.version.cuda is not None


def _asks_for_token() -> bool:
    from ray._private.authentication.authentication_utils import is_token_auth_enabled

    return bool(is_token_auth_enabled())


def dashboard_port(url: str | None) -> int | None:
    """The port in `host:port`; None where there is no dashboard."""
    return int(url.rsplit(":", 1)[1]) if url and ":" in url else None


def open_addresses(
    port: int, tables: Sequence[Path] = (Path("/proc/net/tcp"), Path("/proc/net/tcp6"))
) -> tuple[str, ...]:
    """Local addresses, the loopback's aside, that listen on a port (Linux's tables of sockets)."""
    rows = [line.split() for table in tables if table.exists() for line in table.read_text().splitlines()[1:]]
    local = [row[1].split(":") for row in rows if row[3] == LISTENING]
    return tuple(_address(host) for host, number in local if int(number, 16) == port and not _loopback(host))


def _loopback(host: str) -> bool:
    """Hexadecimal as in /proc/net/tcp, 32-bit words in the machine's (little-endian) order."""
    return (
        host.endswith("7F") if len(host) == 8 else host in (f"{'0' * 24}01000000",) or host.endswith("FFFF00000100007F")
    )


def _address(host: str) -> str:
    if len(host) == 8:
        return ".".join(str(byte) for byte in bytes.fromhex(host)[::-1])
    return "::" if set(host) == {"0"} else host


# --- the storage path -------------------------------------------------------------------------------------------------


@contextmanager
def _probe_folder(storage_path: str) -> Iterator[str]:
    """A folder in the storage path with one file in it, for the time of a check."""
    path = storage_path.rstrip("/") if is_uri(storage_path) else str(Path(storage_path).expanduser().absolute())
    probe = f"{path}/.doctor-{uuid.uuid4().hex[:12]}"
    filesystem, inside = _filesystem(probe)
    new = not is_uri(path) and not Path(path).exists()
    try:
        filesystem.create_dir(inside, recursive=True)
        with filesystem.open_output_stream(f"{inside}/{MARKER}") as stream:
            stream.write(probe.encode())
    except OSError:  # try_storage will say so, for this node too
        yield probe
        return
    try:
        yield probe
    finally:
        filesystem.delete_dir(inside)
        if new:
            Path(path).rmdir()


def try_storage(probe: str, name: str) -> str | None:
    """Read the marker in a probe folder and write a file beside it; returns what went wrong."""
    filesystem, inside = _filesystem(probe)
    try:
        with filesystem.open_input_stream(f"{inside}/{MARKER}") as stream:
            if stream.read() != probe.encode():
                return "another file is there: not the same place"
        with filesystem.open_output_stream(f"{inside}/{name}") as stream:
            stream.write(b"written")
    except OSError as error:
        return " ".join(str(error).split())[:300]
    return None


def _files(probe: str) -> list[str]:
    filesystem, inside = _filesystem(probe)
    found = filesystem.get_file_info(pyarrow.fs.FileSelector(inside, allow_not_found=True))
    return [info.base_name for info in found]


def _filesystem(probe: str) -> tuple[Any, str]:
    if is_uri(probe):
        filesystem, inside = pyarrow.fs.FileSystem.from_uri(probe)
        return filesystem, inside
    return pyarrow.fs.LocalFileSystem(), probe
