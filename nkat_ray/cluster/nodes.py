"""Collect facts about each node of the connected Ray instance, for `nkat doctor`."""

import hashlib
import importlib.metadata
import platform
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pyarrow.fs
import ray
from ray.exceptions import RayError

from nkat_ray.cluster.gpus import GpuFacts, ask_gpus, driver_gpus, mps_runs, on_node
from nkat_ray.errors import one_line
from nkat_ray.files import nearest_existing
from nkat_ray.record.storage import is_uri

PACKAGES: Final = ("nkat-ray", "torch", "torchvision", "timm", "ray", "optuna", "numpy", "pyarrow", "safetensors")
ANSWER_S: Final = 120.0  # timeout of a node's answer
SHARED_MEMORY: Final = Path("/dev/shm")
MARKER: Final = "marker"


@dataclass(frozen=True, kw_only=True)
class Disk:
    """One file system that a run on a node writes to."""

    purpose: str  # contents that a run writes there
    path: str
    free_bytes: int
    total_bytes: int  # size of the file system


@dataclass(frozen=True, kw_only=True)
class NodeFacts:
    """Facts about one node, or the error that prevented its answer."""

    name: str  # host name, as Ray reports it
    error: str | None = None  # error of the node; the other attributes are then empty. None if it answered
    python: str = ""  # version of Python
    # package and version (`-` if it is missing), and a digest of this package's own code
    versions: tuple[tuple[str, str], ...] = ()
    ray_gpus: float = 0.0  # number of GPUs that Ray offers
    gpus: tuple[GpuFacts, ...] = ()  # test results of these GPUs; empty if they were not tested
    driver_gpus: int = 0  # number of GPUs that the NVIDIA driver reports
    mps: bool = False
    disks: tuple[Disk, ...] = ()  # file systems that a run writes to
    store_bytes: int = 0
    # size of /dev/shm, which contains the store if it fits; None without /dev/shm
    shared_memory_bytes: int | None = None
    skew_s: float = 0.0  # least difference of the node's clock from this process's, in seconds
    token: bool = False  # whether its processes require the cluster's token
    # addresses, except loopback, on which the dashboard's port is open; None if unknown
    dashboard: tuple[str, ...] | None = ()
    # why the node cannot use the storage path; None if it reads this process's file and writes one
    storage_error: str | None = None


def node_facts(storage_path: str, *, with_gpus: bool = True) -> list[NodeFacts]:
    """Collect the facts of every living node of the connected Ray instance; the storage path is left unchanged."""
    nodes = [node for node in ray.nodes() if node["Alive"]]
    port = dashboard_port(ray._private.worker.get_dashboard_url())
    gpus = ask_gpus(nodes) if with_gpus else {}
    with _probe_folder(storage_path) as probe:
        asked = [_on(node, _facts, node["NodeID"], probe, port) for node in nodes]
        facts = [
            _answer(node, reference, gpus.get(node["NodeID"], []))
            for node, reference in zip(nodes, asked, strict=True)
        ]  # fmt: skip
        written = _files(probe)
    return [_with_writing(found, node["NodeID"], written) for found, node in zip(facts, nodes, strict=True)]


def _on(node: Mapping[str, Any], function: Any, *arguments: Any) -> Any:
    task = ray.remote(num_cpus=0, max_retries=0)(function).options(scheduling_strategy=on_node(node))
    return task.remote(*arguments)


def _answer(node: Mapping[str, Any], reference: Any, gpus: Sequence[GpuFacts]) -> NodeFacts:
    """Combine a node's own facts with those from Ray and from comparing its clock with this process's."""
    name, resources = node["NodeManagerHostname"], node["Resources"]
    try:
        found = ray.get(reference, timeout=ANSWER_S)
        before = time.time()
        there = ray.get(_on(node, _clock), timeout=ANSWER_S)
    except RayError as error:
        cause = getattr(error, "cause", None) or error
        return NodeFacts(name=name, error=f"{type(cause).__name__}: {one_line(cause)}")
    return NodeFacts(
        name=name,
        ray_gpus=resources.get("GPU", 0.0),
        gpus=tuple(gpus),
        store_bytes=int(resources.get("object_store_memory", 0)),
        skew_s=clock_skew_s(before, there, time.time()),
        **found,
    )


def clock_skew_s(before: float, there: float, after: float) -> float:
    """Return the least possible difference of two clocks in seconds; `there` was read between the other two."""
    return max(0.0, before - there, there - after)


def _with_writing(facts: NodeFacts, node_id: str, written: Sequence[str]) -> NodeFacts:
    """Add a storage error if this process does not see the file that the node wrote."""
    if facts.error or facts.storage_error or node_id in written:
        return facts
    return NodeFacts(**{**vars(facts), "storage_error": "what it writes there is not seen here: not the same place"})


# --- on the node ------------------------------------------------------------------------------------------------------


def _facts(node_id: str, probe: str, port: int | None) -> dict[str, Any]:
    return {
        "python": platform.python_version(),
        "versions": versions(),
        "driver_gpus": driver_gpus(),
        "mps": mps_runs(),
        "disks": disks(probe.rpartition("/")[0], _session_folder()),
        "shared_memory_bytes": shutil.disk_usage(SHARED_MEMORY).total if SHARED_MEMORY.exists() else None,
        "token": _demands_token(),
        "dashboard": open_addresses(port) if port else (),
        "storage_error": try_storage(probe, node_id),
    }


def _session_folder() -> str:
    """Return Ray's folder for this node's logs and spilled objects."""
    node: Any = ray._private.worker._global_node
    return str(node.get_session_dir_path())


def _clock() -> float:
    return time.time()


def versions() -> tuple[tuple[str, str], ...]:
    """Return the versions of the packages that results depend on, and a digest of this package's code."""
    found = []
    for package in PACKAGES:
        try:
            found.append((package, importlib.metadata.version(package)))
        except importlib.metadata.PackageNotFoundError:
            found.append((package, "-"))
    return (*found, ("nkat_ray's code", code_digest(Path(__file__).parents[1])))


def code_digest(folder: Path) -> str:
    """Return the first digits of the SHA-256 over a package's Python files, names included."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(f"{path.relative_to(folder).as_posix()}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def disks(storage: str, session: str) -> tuple[Disk, ...]:
    """Measure the file systems that a run writes to on this machine."""
    places = {"storage": storage, "Ray's logs and spilled objects": session, "checkpoints": tempfile.gettempdir()}
    return tuple(_disk(purpose, Path(path)) for purpose, path in places.items() if not is_uri(path))


def _disk(purpose: str, path: Path) -> Disk:
    place = nearest_existing(path)
    usage = shutil.disk_usage(place)
    return Disk(purpose=purpose, path=str(place), free_bytes=usage.free, total_bytes=usage.total)


def _demands_token() -> bool:
    from ray._private.authentication.authentication_utils import is_token_auth_enabled

    return bool(is_token_auth_enabled())


def dashboard_port(url: str | None) -> int | None:
    """Return the port in `host:port`; None without a dashboard."""
    return int(url.rsplit(":", 1)[1]) if url and ":" in url else None


def open_addresses(port: int) -> tuple[str, ...] | None:
    """List local addresses, except loopback, that listen on a TCP port; None if the system denies the list."""
    import psutil  # type: ignore[import-untyped, unused-ignore]  # a dependency of Ray

    try:
        connections = psutil.net_connections("tcp")
    except psutil.AccessDenied:  # on a Mac only root has access
        return None
    listening = [c.laddr.ip for c in connections if c.status == "LISTEN" and c.laddr.port == port]
    return tuple(ip for ip in listening if not ip.removeprefix("::ffff:").startswith("127.") and ip != "::1")


# --- the storage path -------------------------------------------------------------------------------------------------


@contextmanager
def _probe_folder(storage_path: str) -> Iterator[str]:
    """Create a folder with one file in the storage path, for the duration of a check."""
    path = storage_path.rstrip("/") if is_uri(storage_path) else str(Path(storage_path).expanduser().absolute())
    probe = f"{path}/.doctor-{uuid.uuid4().hex[:12]}"
    filesystem, inside = _filesystem(probe)
    new = not is_uri(path) and not Path(path).exists()
    try:
        filesystem.create_dir(inside, recursive=True)
        with filesystem.open_output_stream(f"{inside}/{MARKER}") as stream:
            stream.write(probe.encode())
    except OSError:  # try_storage reports it, on this node too
        yield probe
        return
    try:
        yield probe
    finally:
        filesystem.delete_dir(inside)
        if new:
            Path(path).rmdir()


def try_storage(probe: str, name: str) -> str | None:
    """Read the marker in a probe folder and write a file beside it; return the error, None without one."""
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
