"""Compute the resources of each trial, and the number of trials that run at the same time.

A trial gets one CPU core, or a share of a GPU with enough memory and no more multiprocessors than it keeps busy. There
are few distinct shares, because Ray reuses a worker process only for trials with equal requests.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Final

from nkat_ray.config import RunConfig, TrialConfig
from nkat_ray.cost import GIB, GPU_CONTEXT_BYTES, cpu_bytes, peak_bytes
from nkat_ray.errors import UserError
from nkat_ray.record.journal import RunState

GPU_SHARES: Final = (1 / 8, 1 / 4, 1 / 2, 1.0)
ASSUMED_GPU_BYTES: Final = 16 * GIB  # for workers that start on demand and cannot be tested yet
MEMORY_FRACTION: Final = 0.9  # fraction of a node's memory for all its trials; the rest is for Ray and the data
BASELINE_ELEMENTS: Final = 128 * 16 * 384  # elements per layer in the baseline's batch
BASELINE_PROCESSORS: Final = 33  # streaming multiprocessors that the baseline keeps busy (estimate)
LEARNING_FRACTION: Final = 1 / 4  # largest fraction of all trials that run at once: the sampler learns from ended ones
KIND_PREFIX: Final = "accelerator_type:"  # prefix of Ray's resource for the kind of a node's GPUs
KIND_REQUEST: Final = 0.001  # amount of that resource, enough to keep a trial on nodes that have it


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One kind of GPU."""

    kind: str = ""  # Ray's name for it, e.g. `A10G`; empty if Ray has none
    memory_bytes: int = ASSUMED_GPU_BYTES  # memory of one GPU, or of one MIG slice
    processors: int = 0  # number of streaming multiprocessors; 0 if unknown
    assumed: bool = False  # whether the memory is assumed rather than known


@dataclass(frozen=True, kw_only=True)
class Node:
    """The resources of one node."""

    cpus: int
    # memory for tasks, without the object store; None for a node that has not started yet
    memory_bytes: int | None = None
    gpus: float = 0.0  # number of GPUs that Ray offers
    gpu: Gpu | None = None  # kind of the GPUs; None without GPUs


@dataclass(frozen=True)
class Cluster:
    """The nodes of a cluster, including those that may still start."""

    nodes: tuple[Node, ...]

    @property
    def cpus(self) -> int:
        """Number of cores of all nodes."""
        return sum(node.cpus for node in self.nodes)

    @property
    def gpus(self) -> float:
        """Number of GPUs of all nodes."""
        return sum(node.gpus for node in self.nodes)

    @property
    def kinds(self) -> dict[str, Gpu]:
        """Name -> kind of GPU; of GPUs with the same name, the one with the least memory."""
        found: dict[str, Gpu] = {}
        for gpu in (node.gpu for node in self.nodes if node.gpu is not None):
            known = found.get(gpu.kind, gpu)
            found[gpu.kind] = min(known, gpu, key=attrgetter("memory_bytes"))
        return found


@dataclass(frozen=True, kw_only=True)
class Share:
    """The resources that one trial, or one task of Stage 2, requests from a node."""

    cpus: int  # number of cores, >= 1
    gpus: float  # share of one GPU, 0..1
    memory_bytes: int = 0  # memory of the node; 0 for no request
    kind: str = ""  # kind of GPU, if the cluster has several; empty for any

    @property
    def bundle(self) -> dict[str, float]:
        """The request in the form of Ray's placement groups."""
        request: dict[str, float] = {"CPU": self.cpus, "GPU": self.gpus, "memory": self.memory_bytes}
        request |= {f"{KIND_PREFIX}{self.kind}": KIND_REQUEST} if self.kind else {}
        return {name: amount for name, amount in request.items() if amount}

    @property
    def options(self) -> dict[str, Any]:
        """The request in the form of `ray.remote`."""
        return {
            "num_cpus": self.cpus,
            "num_gpus": self.gpus,
            "memory": self.memory_bytes or None,
            "resources": {f"{KIND_PREFIX}{self.kind}": KIND_REQUEST} if self.kind else {},
        }


@dataclass(frozen=True)
class Room:
    """The number of trials of a search that run at the same time, with notices about that number."""

    slots: int
    notices: tuple[str, ...] = ()


def gpu_share(config: TrialConfig, gpu: Gpu) -> float:
    """Choose the smallest share of 1/8, 1/4, 1/2 and 1 with enough memory and multiprocessors for a trial.

    The memory must suffice for a training step and the process's CUDA context; if no share has enough, the result is 1
    and batches are split. The multiprocessors limit the number of trials, because without NVIDIA's multi-process
    service the kernels of different trials take turns: more trials than keep the GPU busy only wait for each other, but
    one can train while another starts. The estimate from tokens, width and batch gives four baseline trials on an H100
    and two on an A10G.
    """
    needed = peak_bytes(config) + GPU_CONTEXT_BYTES
    least = max(needed / gpu.memory_bytes, _busy_fraction(config, gpu))
    return _rounded_up(least)


def _busy_fraction(config: TrialConfig, gpu: Gpu) -> float:
    """Return the fraction of a GPU that one trial keeps busy; 0 if the number of multiprocessors is unknown."""
    elements = config.batch_size * config.tokens * config.embed_dim
    return BASELINE_PROCESSORS * elements / BASELINE_ELEMENTS / gpu.processors if gpu.processors else 0.0


def _rounded_up(least: float) -> float:
    """Return the smallest share >= `least`; 1 if there is none."""
    return next((share for share in GPU_SHARES if share >= least), 1.0)


def trial_share(config: TrialConfig, run: RunConfig, cluster: Cluster, *, kind: str = "") -> Share:
    """Compute the resources of a trial: the numbers that the user typed, else numbers that suit the cluster.

    Args:
        kind: kind of GPU for the trial; if empty, the share fits on each kind.
    """
    if not on_gpus(run, cluster):
        cpus = run.cpus_per_trial or 1  # one core per trial: many small trainings beat one on many cores
        return Share(cpus=cpus, gpus=0.0, memory_bytes=_memory_request(config, cluster, cpus))
    nodes = [node for node in cluster.nodes if node.gpu is not None and kind in ("", node.gpu.kind)]
    gpus = run.gpus_per_trial
    if gpus is None:
        spread = _rounded_up(min(1.0, cluster.gpus / wanted(run, cluster)))  # few trials use all GPUs
        gpus = max(spread, *(gpu_share(config, node.gpu) for node in nodes if node.gpu is not None))
    cpus_per_gpu = min((node.cpus / node.gpus for node in nodes), default=1.0)
    pinned = kind if len(cluster.kinds) > 1 else ""
    return Share(cpus=run.cpus_per_trial or max(1, math.floor(cpus_per_gpu * gpus)), gpus=gpus, kind=pinned)


def on_gpus(run: RunConfig, cluster: Cluster) -> bool:
    """Return whether the trials of a search train on GPUs."""
    return bool(cluster.gpus) if run.gpus_per_trial is None else run.gpus_per_trial > 0


def wanted(run: RunConfig, cluster: Cluster) -> int:
    """Return the number of trials that a search would run at the same time on a cluster without limits, >= 1.

    On GPUs that is at most a quarter of its trials, because the sampler learns only from trials that have ended.
    """
    most = run.num_samples if run.max_concurrent is None else min(run.num_samples, run.max_concurrent)
    if on_gpus(run, cluster) and run.max_concurrent is None and run.sampler != "random":
        most = min(most, math.floor(run.num_samples * LEARNING_FRACTION))
    return max(1, most)


def room(run: RunConfig, cluster: Cluster, configs: Sequence[TrialConfig] = ()) -> Room:
    """Compute the number of trials that run at the same time, >= 1, with notices about limits that are not obvious.

    On CPUs, cores and memory of each node limit the number; on GPUs, the number of shares of the baseline's size. It
    never exceeds `wanted`.

    Args:
        configs: corners of the search space, the largest of which must fit; the baseline if empty.
    """
    gpus = on_gpus(run, cluster)
    fit = Room(sum(_fit_on_gpus(run, cluster).values())) if gpus else _fit_on_cpus(run, cluster, configs)
    most = wanted(run, cluster)
    number = max(1, min(fit.slots, most))
    notices = list(fit.notices) if fit.slots < most else []
    if gpus and run.max_concurrent is None and most < min(fit.slots, run.num_samples):
        notices.append(
            f"{number} trials at a time although {fit.slots} would fit: more than a quarter of the {run.num_samples} "
            "trials at once would teach the sampler nothing; --max_concurrent allows more"
        )
    if gpus and run.gpus_per_trial is None and any(gpu.assumed for gpu in cluster.kinds.values()):
        notices.append(
            f"the memory of the GPUs is unknown; {ASSUMED_GPU_BYTES / GIB:.0f} GiB are assumed; "
            "set --gpus_per_trial if that is wrong"
        )
    return Room(number, tuple(notices))


def _fit_on_cpus(run: RunConfig, cluster: Cluster, configs: Sequence[TrialConfig]) -> Room:
    largest = max(configs or [run.trial], key=cpu_bytes)
    share = trial_share(largest, run, cluster)
    by_cores = [node.cpus // share.cpus for node in cluster.nodes]
    by_memory = [_fit_in_memory(largest, node) for node in cluster.nodes]
    fit = sum(
        cores if memory is None else min(cores, memory) for cores, memory in zip(by_cores, by_memory, strict=True)
    )
    if fit >= sum(by_cores):
        return Room(fit)
    needed = f"about {trial_memory(largest) / GIB:.1f} GiB"
    if fit == 0:
        most = max(node.memory_bytes or 0 for node in cluster.nodes if node.cpus >= share.cpus)
        text = (
            f"one trial at a time, and the largest may run out of memory: it needs {needed}, a node has "
            f"{most / GIB:.1f} GiB; choose a smaller space or --batch_size"
        )
    else:
        text = (
            f"memory, not the {sum(by_cores)} cores, limits the trials at a time (the largest needs {needed}); "
            f"--cpus_per_trial {sum(by_cores) * share.cpus // fit} uses all cores"
        )
    return Room(fit, (text,))


def _fit_in_memory(config: TrialConfig, node: Node) -> int | None:
    """Return the number of trials that fit into a node's memory; None if its memory is unknown."""
    if node.memory_bytes is None:
        return None
    return int(node.memory_bytes * MEMORY_FRACTION // trial_memory(config))


def _fit_on_gpus(run: RunConfig, cluster: Cluster) -> dict[str, int]:
    """Return kind of GPU -> number of shares of the baseline's size that fit."""
    fit = dict.fromkeys(cluster.kinds, 0)
    for node in cluster.nodes:
        if node.gpu is not None:
            share = trial_share(run.trial, run, cluster, kind=node.gpu.kind)
            fit[node.gpu.kind] += min(_shares(node.gpus, share.gpus), node.cpus // share.cpus)
    return fit


def _shares(gpus: float, share: float) -> int:
    """Return the number of shares that fit on a number of GPUs, where no share spans two GPUs."""
    per_gpu = math.floor(1 / share)
    return math.floor(gpus) * per_gpu if gpus >= 1 else math.floor(gpus / share)


def trial_memory(config: TrialConfig) -> int:
    """Estimate a trial's memory on a CPU in bytes, rounded up to quarters of a power of two (1, 1.25, ... 4, 5, ...).

    The rounding gives few distinct requests, so that Ray can reuse processes.
    """
    needed = cpu_bytes(config)
    quarter = 1 << (needed.bit_length() - 3)
    return -(-needed // quarter) * quarter


def _memory_request(config: TrialConfig, cluster: Cluster, cpus: int) -> int:
    """Return the memory request of a trial on CPUs, at most that of the largest node; 0 if a node's is unknown."""
    known = [node.memory_bytes for node in cluster.nodes if node.cpus >= cpus]
    if not known or None in known:
        return 0  # Ray would never start a node for such a request, since nodes that may start list no memory
    return min(trial_memory(config), max(int((memory or 0) * MEMORY_FRACTION) for memory in known))


class Kinds:
    """Choose the kind of GPU of each trial of a search: if there are several, the one with the most free slots."""

    def __init__(self, run: RunConfig, cluster: Cluster, state: RunState) -> None:
        self._run, self._cluster, self._state = run, cluster, state
        self._chosen: dict[int, str] = {}

    def choose(self, trial: int) -> str:
        """Choose the kind of GPU of a trial that is about to start; empty unless there are several."""
        records = self._state.trials
        busy = Counter(kind for other, kind in self._chosen.items() if other not in records or not records[other].ended)
        self._chosen[trial] = choose_kind(self._run, self._cluster, busy)
        return self._chosen[trial]


def choose_kind(run: RunConfig, cluster: Cluster, busy: Mapping[str, int]) -> str:
    """Choose the kind of GPU for the next trial: the one with the largest fraction of its slots free.

    Args:
        busy: kind -> number of trials that are running on it.

    Returns:
        A kind; an empty string unless there are several.
    """
    if len(cluster.kinds) < 2 or not on_gpus(run, cluster):
        return ""
    fit = _fit_on_gpus(run, cluster)

    def taken(kind: str) -> float:
        return busy.get(kind, 0) / fit[kind] if fit[kind] else math.inf

    return min(fit, key=taken)


def refuse_oversized(shares: Iterable[Share], cluster: Cluster) -> None:
    """Refuse a trial that no node has room for, now or later; Ray would wait forever without a message.

    Raises:
        UserError: states what the trial needs and the resources of the largest node.
    """
    cpus, gpus = (max(getattr(node, kind) for node in cluster.nodes) for kind in ("cpus", "gpus"))
    for share in shares:
        if not any(node.cpus >= share.cpus and node.gpus >= share.gpus for node in cluster.nodes):
            raise UserError(
                f"a trial needs {share.cpus} CPU and {share.gpus:g} GPU; the largest node has {cpus:g} CPU and "
                f"{gpus:g} GPU; choose a smaller --cpus_per_trial or --gpus_per_trial"
            )


def cluster_of(nodes: Sequence[Mapping[str, Any]], gpus: Mapping[str, Gpu]) -> Cluster:
    """Describe the cluster.

    Args:
        gpus: name -> known kind of GPU; the memory of other kinds is assumed.
    """
    return Cluster(tuple(_node_of(resources, gpus) for resources in alive_resources(nodes)))


def _node_of(resources: Mapping[str, Any], gpus: Mapping[str, Gpu]) -> Node:
    return Node(
        cpus=int(resources.get("CPU", 0)),
        memory_bytes=int(resources["memory"]) if "memory" in resources else None,
        gpus=resources.get("GPU", 0.0),
        gpu=_gpu_of(gpu_kind(resources), gpus) if resources.get("GPU") else None,
    )


def _gpu_of(kind: str, gpus: Mapping[str, Gpu]) -> Gpu:
    """Return a kind of GPU; a nameless one, of a node that has not started, is the known one if there is only one."""
    if not kind and len(gpus) == 1:
        return next(iter(gpus.values()))
    return gpus.get(kind, Gpu(kind=kind, assumed=True))


def gpu_kind(resources: Mapping[str, Any]) -> str:
    """Return Ray's name for the GPUs of a node, e.g. `A10G`; empty if there is none."""
    return next((name.removeprefix(KIND_PREFIX) for name in resources if name.startswith(KIND_PREFIX)), "")


def alive_resources(nodes: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the resources of the nodes that are alive."""
    return [node["Resources"] for node in nodes if node["Alive"]]
