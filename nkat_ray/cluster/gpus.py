"""Test before a run that torch can use the GPUs that Ray offers, in tasks that reserve them.

Ray counts GPUs without torch. A GPU that torch cannot use is an error: its trials would run on the CPU.
"""

import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from nkat_ray.cluster.resources import Gpu, alive_resources, gpu_kind
from nkat_ray.errors import UserError, one_line

ANSWER_S: Final = 60.0  # timeout of a test, which imports torch first
MORE_THAN_HALF: Final = 0.51  # share of a GPU that at most one task can have
MPS_PIPE: Final = "CUDA_MPS_PIPE_DIRECTORY"


@dataclass(frozen=True, kw_only=True)
class GpuFacts:
    """The result of testing one GPU."""

    name: str = ""  # torch's name for it, which also identifies a MIG slice
    memory_bytes: int = 0  # 0 if unknown
    processors: int = 0  # number of streaming multiprocessors; 0 if unknown
    fault: str | None = None  # why torch cannot use it; None if torch can, or if it is busy
    busy: bool = False  # whether another process uses it, so that torch could not be tested


def try_gpu(index: int = 0) -> GpuFacts:
    """Test a GPU of this process with a small computation, and describe it."""
    import torch

    from nkat_ray.train.device import BUSY, gpu_fault

    fault = gpu_fault(index)
    if fault is not None and fault != BUSY:
        with _nvml() as nvml:
            driver = f" (driver {nvml.nvmlSystemGetDriverVersion()})" if nvml else ""
        return GpuFacts(fault=fault + driver)
    try:
        properties, (_, total) = torch.cuda.get_device_properties(index), torch.cuda.mem_get_info(index)
    except RuntimeError:  # a GPU in exclusive use has no properties to read
        return GpuFacts(busy=True)
    return GpuFacts(
        name=properties.name, memory_bytes=total, processors=properties.multi_processor_count, busy=fault == BUSY
    )


@contextmanager
def _nvml() -> Iterator[Any]:
    """Provide NVIDIA's management library, which Ray bundles; None without an NVIDIA driver."""
    import ray._private.thirdparty.pynvml as nvml

    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        yield None
        return
    try:
        yield nvml
    finally:
        nvml.nvmlShutdown()


def driver_gpus() -> int:
    """Return the number of GPUs that the NVIDIA driver of this machine reports; 0 without a driver."""
    with _nvml() as nvml:
        return nvml.nvmlDeviceGetCount() if nvml else 0


def driver_memory() -> tuple[int, ...]:
    """Return the memory of each GPU of this machine in bytes, as the NVIDIA driver reports it.

    GPUs with MIG slices are left out, because the driver reports the memory of the whole card.
    """
    with _nvml() as nvml:
        handles = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())] if nvml else []
        whole = [handle for handle in handles if not _has_slices(nvml, handle)]
        return tuple(int(nvml.nvmlDeviceGetMemoryInfo(handle).total) for handle in whole)


def _has_slices(nvml: Any, handle: Any) -> bool:
    try:
        return bool(nvml.nvmlDeviceGetMigMode(handle)[0])
    except nvml.NVMLError:  # a card without MIG
        return False


def mps_runs() -> bool:
    """Return whether NVIDIA's multi-process service runs on this machine, which its control pipe shows."""
    return Path(os.environ.get(MPS_PIPE, "/tmp/nvidia-mps"), "control").exists()


def ask_gpus(nodes: Sequence[Mapping[str, Any]]) -> dict[str, list[GpuFacts]]:
    """Test all GPUs that Ray offers, and return the results by node id; one occupied for a minute counts as busy."""
    with_gpus = [node for node in nodes if node["Alive"] and node["Resources"].get("GPU")]
    free = ray._private.state.available_resources_per_node()
    asked = {node["NodeID"]: _tries(node, free.get(node["NodeID"], {}).get("GPU", 0.0)) for node in with_gpus}
    pending = [reference for references in asked.values() for reference in references]
    answered, late = ray.wait(pending, num_returns=len(pending), timeout=ANSWER_S) if pending else ([], [])
    for reference in late:
        ray.cancel(reference, force=True)
    in_time = set(answered)
    return {
        node["NodeID"]: [_answer(reference) for reference in asked[node["NodeID"]] if reference in in_time]
        or _busy(node)
        for node in with_gpus
    }


def _tries(node: Mapping[str, Any], free: float) -> list[Any]:
    """Submit one test per GPU of a node; none if all GPUs are occupied."""
    gpus = node["Resources"]["GPU"]
    share = MORE_THAN_HALF if gpus >= 1 else gpus
    task = ray.remote(num_cpus=0, num_gpus=share, max_retries=0)(try_gpu).options(scheduling_strategy=on_node(node))
    return [task.remote() for _ in range(max(1, int(gpus)))] if free >= share else []


def _answer(reference: Any) -> GpuFacts:
    try:
        facts: GpuFacts = ray.get(reference)
    except RayError as error:
        return GpuFacts(fault=one_line(getattr(error, "cause", None) or error))
    return facts


def _busy(node: Mapping[str, Any]) -> list[GpuFacts]:
    """Describe a node's busy GPUs, whose memory the driver still reports."""
    task = ray.remote(num_cpus=0, max_retries=0)(driver_memory).options(scheduling_strategy=on_node(node))
    try:
        sizes = ray.get(task.remote(), timeout=ANSWER_S)
    except RayError:
        sizes = ()
    return [GpuFacts(memory_bytes=size, busy=True) for size in sizes] or [GpuFacts(busy=True)]


def on_node(node: Mapping[str, Any]) -> NodeAffinitySchedulingStrategy:
    """Return the strategy that runs a task on one node only."""
    return NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)


def known_gpus(nodes: Sequence[Mapping[str, Any]], found: Mapping[str, Sequence[GpuFacts]]) -> dict[str, Gpu]:
    """Describe each kind of GPU by its smallest one.

    Args:
        found: id of a node -> results of its GPUs.

    Raises:
        UserError: torch cannot use a GPU that Ray offers; states the node, the cause and a remedy.
    """
    kinds: dict[str, list[GpuFacts]] = {}
    for node in nodes:
        facts = found.get(node["NodeID"], ())
        for gpu in facts:
            if gpu.fault:
                raise UserError(
                    f"node {node['NodeManagerHostname']}: Ray offers {node['Resources']['GPU']:g} GPU that PyTorch "
                    f"cannot use ({gpu.fault}); fix that, or train on CPUs with --gpus_per_trial 0"
                )
        if facts:
            kinds.setdefault(gpu_kind(node["Resources"]), []).extend(facts)
    return {kind: _smallest(kind, facts) for kind, facts in kinds.items()}


def _smallest(kind: str, facts: Sequence[GpuFacts]) -> Gpu:
    sizes = [gpu.memory_bytes for gpu in facts if gpu.memory_bytes]
    processors = min((gpu.processors for gpu in facts if gpu.processors), default=0)
    if not sizes:
        return Gpu(kind=kind, processors=processors, assumed=True)
    return Gpu(kind=kind, memory_bytes=min(sizes), processors=processors)


def this_machines_nodes() -> list[dict[str, Any]]:
    """Describe this machine as `ray.nodes()` would if a local instance were running, without starting one."""
    from ray._private.resource_and_label_spec import ResourceAndLabelSpec

    resources = ResourceAndLabelSpec(num_gpus=apple_gpus_unused()).resolve(is_head=True).to_resource_dict()
    return [{"Alive": True, "NodeID": "this", "NodeManagerHostname": platform.node(), "Resources": resources}]


def apple_gpus_unused() -> int | None:
    """Return the number of GPUs for `ray.init`: 0 on a Mac, else None, so that Ray counts them."""
    return 0 if platform.system() == "Darwin" else None


def try_local_gpus(nodes: Sequence[Mapping[str, Any]]) -> dict[str, list[GpuFacts]]:
    """Test the GPUs of `this_machines_nodes` in this process, without Ray."""
    (resources,) = alive_resources(nodes)
    gpus = int(resources.get("GPU", 0))
    return {"this": [try_gpu(index) for index in range(gpus)]} if gpus else {}
