"""Where a run computes: finding, starting and describing the Ray instance."""

import contextlib
import functools
import logging
import os
import socket
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import ray
import yaml
from ray.exceptions import AuthenticationError, NodeDiedError, TaskUnschedulableError, WorkerCrashedError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from nkat_ray.search.resources import Cluster, Share, cluster_of, refuse_oversized

HEAD_MARKER = Path("~/ray_bootstrap_config.yaml")  # `ray up` leaves its configuration on the head under this name
HEAD_RESOURCE = "node:__internal_head__"  # Ray gives it to the head alone
GONE = (NodeDiedError, TaskUnschedulableError, WorkerCrashedError)  # what Ray says of a node that has just died
CONNECT_S = 5.0
LOCAL_STARTS = 3  # on a busy machine the first may be too slow
GPU_PROBE_S = 60.0  # a worker imports torch to say how much memory its GPU has


def choose_address(address: str | None) -> tuple[str, str]:
    """The address to connect to, and one phrase for people on why.

    In this order: what the user typed, $RAY_ADDRESS, the cluster whose head this machine is, a local instance.

    Raises:
        ValueError: a Ray Client address: searcher and journal live in the driver, and the driver must be on the
            cluster.
    """
    for given in (address, os.environ.get("RAY_ADDRESS")):
        if (given or "").startswith("ray://"):
            raise ValueError(
                f"address is {given!r}; a Ray Client cannot drive a search; start it on the cluster, "
                "e.g. with `ray submit` or `ray job submit`"
            )
    if address is not None:
        return address, f"Ray at {address} (--address)" if address != "local" else "a local Ray instance (--address)"
    if os.environ.get("RAY_ADDRESS"):
        return os.environ["RAY_ADDRESS"], f"Ray at {os.environ['RAY_ADDRESS']} ($RAY_ADDRESS)"
    if HEAD_MARKER.expanduser().exists():
        return "auto", "the cluster of this head node (made by `ray up`)"
    return "local", "a local Ray instance of this run's own"


@contextlib.contextmanager
def connected(address: str | None, *, verbose: bool = False) -> Iterator[str]:
    """Connect to Ray, or start it, for the time of a run; yields the phrase for people.

    An instance that this process is already connected to is used and left running.

    Args:
        address: as the user typed it; None chooses (`choose_address`).
        verbose: let Ray's own output through.

    Raises:
        ConnectionError: there is no cluster at the address, or it does not take this process in.
    """
    address, phrase = choose_address(address)
    if ray.is_initialized():
        yield "the Ray instance of this process"
        return
    if not verbose:
        for name in ("ray", "ray.tune", "ray.data", "ray.train"):
            logging.getLogger(name).setLevel(logging.ERROR)
    _refuse_silence(address)
    for tries_left in reversed(range(LOCAL_STARTS if address == "local" else 1)):
        try:
            _init(address, verbose=verbose)
            break
        except (AuthenticationError, ConnectionError) as error:
            raise _refused(address, error) from error
        except Exception as error:  # Ray raises nothing narrower, and gives a local raylet 30 s to start
            if tries_left == 0 or "timed out during startup" not in str(error):
                raise
            ray.shutdown()
    try:
        yield phrase
    finally:
        ray.shutdown()


def _init(address: str, *, verbose: bool) -> None:
    with _without_ray_address():
        ray.init(
            address=address,
            include_dashboard=False if address == "local" else None,
            log_to_driver=verbose,
            logging_level=logging.INFO if verbose else logging.ERROR,
            configure_logging=True,
        )


def _refused(address: str, error: Exception) -> ConnectionError:
    """What Ray says of a cluster that it could not join, and of the token, which it only names in its log."""
    if not isinstance(error, AuthenticationError) and "Failed to connect to Ray cluster" not in str(error):
        return ConnectionError(str(error))
    advice = "where the cluster asks for a token, RAY_AUTH_MODE must be token and ~/.ray/auth_token the cluster's own"
    reason = str(error).strip().split(". ")[0]  # the rest is about clusters in general
    return ConnectionError(f"address is {address!r}; Ray did not let this process in ({reason}); {advice}")


def _refuse_silence(address: str) -> None:
    """Ray tries an address for minutes; a port that nobody listens on is known at once.

    Raises:
        ConnectionError: nobody answers there.
    """
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdigit():
        return  # `auto`, `local`
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_S).close()
    except OSError as error:
        advice = "check --address, or leave it out for a local instance"
        raise ConnectionError(f"address is {address!r}; no Ray cluster answers there ({error}); {advice}") from error


@contextlib.contextmanager
def _without_ray_address() -> Iterator[None]:
    """An explicit `local` must not be overruled by the environment."""
    saved = os.environ.pop("RAY_ADDRESS", None)
    try:
        yield
    finally:
        if saved is not None:
            os.environ["RAY_ADDRESS"] = saved


def all_nodes() -> list[dict[str, Any]]:
    """The nodes as `ray.nodes()` has them; on a cluster that grows on demand, as they will be once it has grown."""
    nodes: list[dict[str, Any]] = ray.nodes()
    coming = nodes_to_come(HEAD_MARKER.expanduser())
    return [node for node in nodes if HEAD_RESOURCE in node["Resources"]] + coming if coming else nodes


@functools.cache  # asked every other second, and YAML is slow; a driver never sees its cluster's file change
def nodes_to_come(config_file: Path) -> list[dict[str, Any]]:
    """Every worker that the cluster's autoscaler may start, as `ray.nodes()` would have it.

    A search begins before there is any: what its trials ask for must not follow from the head alone. Empty where the
    workers' resources are not configured: machines of one's own, which join by themselves.

    Args:
        config_file: what `ray up` left on the head.
    """
    if not config_file.exists():
        return []
    config = yaml.safe_load(config_file.read_text())
    most, types = config.get("max_workers", 0), config.get("available_node_types") or {}
    workers = [
        {"Alive": True, "Resources": dict(kind["resources"])}
        for name, kind in types.items()
        if name != config.get("head_node_type") and kind.get("resources")
        for _ in range(kind.get("max_workers", most))
    ]
    return workers[:most]


def live_cluster(before: Cluster) -> Cluster:
    """What the cluster has now; a GPU's memory is taken from before."""
    return cluster_of(all_nodes(), gpu_bytes=before.gpu_bytes)


def describe_cluster() -> Cluster:
    """What the connected Ray instance has, or will have; a GPU's memory is asked on a node that has one."""
    gpus = ray.cluster_resources().get("GPU", 0)
    asked = [ray.remote(num_cpus=0, num_gpus=0.01)(_gpu_bytes).remote()] if gpus else []
    answered, _ = ray.wait(asked, timeout=GPU_PROBE_S) if asked else ([], [])  # others may hold every GPU
    gpu_bytes = ray.get(answered[0]) if answered else None
    return cluster_of(all_nodes(), gpu_bytes=gpu_bytes)


def _gpu_bytes() -> int | None:
    import torch

    return int(torch.cuda.mem_get_info()[1]) if torch.cuda.is_available() else None


def refuse_infeasible(shares: Iterable[Share]) -> None:
    """Refuse a request that no node can meet, nor one that may still come.

    Raises:
        ValueError: says what was asked for and what the largest node has.
    """
    nodes = all_nodes()
    for share in set(shares):
        refuse_oversized(share, nodes)


def nodes_without(path: Path) -> list[str]:
    """Names of the nodes that do not see a file: a storage path that is not shared shows here.

    A node that is gone by the time it is asked says nothing: Ray lists it for some seconds more.
    """
    check = ray.remote(num_cpus=0)(os.path.exists)
    nodes = [node for node in ray.nodes() if node["Alive"]]
    strategies = [NodeAffinitySchedulingStrategy(node["NodeID"], soft=False) for node in nodes]
    asked = [check.options(scheduling_strategy=s).remote(str(path)) for s in strategies]
    return [
        node["NodeManagerHostname"] for node, ref in zip(nodes, asked, strict=True) if _answer(ref) is False
    ]  # fmt: skip


def _answer(reference: Any) -> Any:
    """What a node answered; None from one that is gone. Any other fault is raised."""
    try:
        return ray.get(reference)
    except GONE:
        return None
