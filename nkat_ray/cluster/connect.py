"""Connect to Ray or start it, and describe its nodes."""

import contextlib
import functools
import importlib
import logging
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import ray
import yaml
from ray.exceptions import AuthenticationError, NodeDiedError, TaskUnschedulableError, WorkerCrashedError

from nkat_ray.cluster.address import Address, choose_address, head_config, refuse_unreachable
from nkat_ray.cluster.gpus import apple_gpus_unused, ask_gpus, known_gpus, on_node, this_machines_nodes, try_local_gpus
from nkat_ray.cluster.local import ensure_token, own_folder, place_for_ray
from nkat_ray.cluster.resources import Cluster, cluster_of
from nkat_ray.errors import UserError, one_line

HEAD_RESOURCE: Final = "node:__internal_head__"  # a resource that only the head has
GONE: Final = (NodeDiedError, TaskUnschedulableError, WorkerCrashedError)  # Ray's errors for a node that has just died
LOCAL_STARTS: Final = 3  # attempts: on a busy machine the first one may be too slow
SLOW_START: Final = "timed out during startup"  # part of Ray's message in that case
OTHER_VERSION: Final = "Version mismatch"  # part of Ray's message about a cluster with another Ray or Python


def refuse_no_ray(address: str | None) -> None:
    """Refuse an address where a run cannot connect to Ray, before anything is written; takes at most 20 seconds.

    Args:
        address: as typed; None for the default (`choose_address`).

    Raises:
        UserError: no Ray cluster answers at the address, or no local instance can start here.
    """
    if ray.is_initialized():
        return
    chosen = choose_address(address)
    if chosen.value == "local":
        place_for_ray()
    else:
        refuse_unreachable(chosen)


@contextlib.contextmanager
def connected(address: str | None, *, verbose: bool = False) -> Iterator[str]:
    """Connect to Ray, or start it, for the duration of a run; yield a description of the instance.

    If this process is already connected, that instance is used and left running.

    Args:
        address: as typed; None for the default (`choose_address`).

    Raises:
        UserError: no Ray cluster answers at the address, it refuses this process, or no local one can start here.
    """
    if ray.is_initialized():
        yield "the Ray instance of this process"
        return
    chosen = choose_address(address)
    if not verbose:
        for name in ("ray", "ray.tune", "ray.data", "ray.train"):
            logging.getLogger(name).setLevel(logging.ERROR)
    with contextlib.ExitStack() as stack:
        if chosen.value == "local":
            folder = stack.enter_context(own_folder())
            threading.Thread(target=_load_ahead).start()
            stack.callback(ray.shutdown, wait_for_processes=True)  # its processes write into the folder
            _start(folder, verbose=verbose)
        else:
            refuse_unreachable(chosen)
            stack.callback(ray.shutdown)
            _join(chosen, verbose=verbose)
        yield chosen.phrase


def _load_ahead() -> None:
    """Load the networks' libraries while Ray starts its processes, for which this process would only wait."""
    with contextlib.suppress(Exception):  # whoever needs them next gets the error, where it is handled
        importlib.import_module("nkat_ray.model")


def _start(folder: Path, *, verbose: bool) -> None:
    """Start a local instance in a folder."""
    ensure_token()
    for tries_left in reversed(range(LOCAL_STARTS)):
        try:
            _init(
                "local", verbose=verbose, _temp_dir=str(folder), num_gpus=apple_gpus_unused(), include_dashboard=False
            )  # fmt: skip
            return
        except Exception as error:  # Ray raises no narrower type; it gives a local raylet 30 s to start
            if tries_left == 0 or SLOW_START not in str(error):
                raise
            ray.shutdown(wait_for_processes=True)


def _join(address: Address, *, verbose: bool) -> None:
    """Connect to a cluster that has answered; raise a UserError if it refuses this process."""
    try:
        _init(address.value, verbose=verbose)
    except (AuthenticationError, ConnectionError) as error:
        raise UserError(f"address is {address.value!r} ({address.source}); {one_line(error)}") from error
    except RuntimeError as error:
        if OTHER_VERSION not in str(error):
            raise
        said = " ".join(str(error).split())
        raise UserError(f"address is {address.value!r} ({address.source}); {said}") from error


def _init(address: str, *, verbose: bool, **arguments: Any) -> None:
    with _without_ray_address():
        ray.init(
            address=address,
            log_to_driver=verbose,
            logging_level=logging.INFO if verbose else logging.ERROR,
            configure_logging=True,
            **arguments,
        )


@contextlib.contextmanager
def _without_ray_address() -> Iterator[None]:
    """Hide $RAY_ADDRESS, which would override an explicit address."""
    saved = os.environ.pop("RAY_ADDRESS", None)
    try:
        yield
    finally:
        if saved is not None:
            os.environ["RAY_ADDRESS"] = saved


def all_nodes() -> list[dict[str, Any]]:
    """List the nodes as `ray.nodes()` does; of a cluster that grows on demand, as if all nodes were started."""
    nodes: list[dict[str, Any]] = ray.nodes()
    coming = nodes_to_come(head_config())
    return [node for node in nodes if HEAD_RESOURCE in node["Resources"]] + coming if coming else nodes


@functools.cache  # called every two seconds; the file does not change while a driver runs
def nodes_to_come(config_file: Path) -> list[dict[str, Any]]:
    """List every worker that the autoscaler may start, as `ray.nodes()` would, from what `ray up` left on the head.

    A search starts before its workers exist, so the resources of trials must not be derived from the head only. The
    list is empty if the file does not state the workers' resources, as for machines of your own.
    """
    if not config_file.exists():
        return []
    config = yaml.safe_load(config_file.read_text(encoding="utf-8"))
    most, types = config.get("max_workers", 0), config.get("available_node_types") or {}
    workers = [
        {"Alive": True, "Resources": dict(kind["resources"])}
        for name, kind in types.items()
        if name != config.get("head_node_type") and kind.get("resources")
        for _ in range(kind.get("max_workers", most))
    ]
    return workers[:most]


def live_cluster(before: Cluster) -> Cluster:
    """Describe the cluster as it is now, with the kinds of GPU that an earlier description has."""
    return cluster_of(all_nodes(), before.kinds)


def describe_cluster(gpus_per_trial: float | None = None) -> Cluster:
    """Describe the nodes that the connected Ray instance has, or will have.

    Args:
        gpus_per_trial: as typed. Unless it is 0, every GPU is tested.

    Raises:
        UserError: torch cannot use a GPU that Ray offers.
    """
    nodes = all_nodes()
    found = {} if gpus_per_trial == 0 else ask_gpus(ray.nodes())
    return cluster_of(nodes, known_gpus(ray.nodes(), found))


def planned_cluster(address: str | None, gpus_per_trial: float | None = None) -> Cluster:
    """Describe the cluster that a run with these flags would use, without starting an instance.

    Raises:
        UserError: there is no cluster at the address, or torch cannot use a GPU.
    """
    if choose_address(address).value != "local":
        with connected(address):
            return describe_cluster(gpus_per_trial)
    nodes = this_machines_nodes()
    found = {} if gpus_per_trial == 0 else try_local_gpus(nodes)
    return cluster_of(nodes, known_gpus(nodes, found))


def nodes_without(path: Path) -> list[str]:
    """Return the host names of other nodes where a file of this one does not exist: its folder is not shared.

    A node that died a moment ago is left out, although Ray still lists it for some seconds.
    """
    check = ray.remote(num_cpus=0)(os.path.exists)
    here = ray.get_runtime_context().get_node_id()
    nodes = [node for node in ray.nodes() if node["Alive"] and node["NodeID"] != here]
    asked = [check.options(scheduling_strategy=on_node(node)).remote(str(path)) for node in nodes]
    return [
        node["NodeManagerHostname"] for node, ref in zip(nodes, asked, strict=True) if _answer(ref) is False
    ]  # fmt: skip


def _answer(reference: Any) -> Any:
    """Return a node's answer, None if the node has died; raise any other error."""
    try:
        return ray.get(reference)
    except GONE:
        return None
