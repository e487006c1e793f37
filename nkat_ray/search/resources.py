"""What a trial asks of the cluster: a share of a GPU that its memory fits into, or CPU cores.

Few distinct shares are handed out, because Ray reuses a worker process only between trials with equal requests.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nkat_ray.config import IMAGE_SIZE, RunConfig, TrialConfig

GPU_SHARES = (1 / 8, 1 / 4, 1 / 2, 1.0)
GPU_OVERHEAD_BYTES = 700 * 2**20  # CUDA context and kernels of one process
ASSUMED_GPU_BYTES = 16 * 2**30  # where no GPU can be asked yet: workers that start on demand
CPU_MEMORY_FRACTION = 0.6  # of a node's memory for the trials together; the rest is Ray's and the data's
STATE_COPIES = 6  # weights, gradients, two moments, the average and one temporary
MLP_AND_ATTENTION_COPIES = 16  # activations of width embed_dim that a block keeps for the backward pass
SCORE_COPIES = 8  # score-shaped tensors (heads x tokens x tokens) that a block keeps
FLOPS_PER_PARAMETER_AND_TOKEN = 6  # forward 2, backward 4


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """What Ray says it has."""

    cpus: int
    gpus: float
    nodes: int
    memory_bytes: int  # of the smallest node
    gpu_bytes: int  # of one GPU; ASSUMED_GPU_BYTES where none could be asked
    cpus_a_gpu: float | None = None  # of the GPU node with the fewest: a share must fit on each; None: on average


@dataclass(frozen=True, kw_only=True)
class Share:
    """What one trial gets."""

    cpus: int
    gpus: float


def parameter_estimate(config: TrialConfig) -> int:
    """Parameters of the network without building it: blocks and embeddings, biases and stem left out (within
    10 % in the search spaces)."""
    block = (4 + 2 * config.mlp_ratio) * config.embed_dim**2
    return int(config.depth * block + config.tokens * config.embed_dim)


def epoch_flops(config: TrialConfig, images: int) -> float:
    """Floating-point operations of one training epoch: 6 x parameters x tokens x images."""
    return FLOPS_PER_PARAMETER_AND_TOKEN * parameter_estimate(config) * config.tokens * float(images)


def activation_bytes(config: TrialConfig, *, bytes_each: int) -> int:
    """Memory that one image's activations take until the backward pass."""
    tokens, width = config.tokens, config.embed_dim
    block = MLP_AND_ATTENTION_COPIES * tokens * width + SCORE_COPIES * config.num_heads * tokens**2
    stem = 8 * 64 * (IMAGE_SIZE // 2) ** 2
    return bytes_each * (config.depth * block + stem)


def peak_bytes(config: TrialConfig, *, bytes_each: int = 4) -> int:
    """Estimated peak memory of a training step: state and the activations of one batch (float32 unless said)."""
    state = 4 * STATE_COPIES * parameter_estimate(config)
    return state + config.batch_size * activation_bytes(config, bytes_each=bytes_each)


def gpu_share(config: TrialConfig, gpu_bytes: int) -> float:
    """The smallest of 1/8, 1/4, 1/2, 1 whose memory holds the trial; 1 when none does (the batch is then halved)."""
    needed = peak_bytes(config) + GPU_OVERHEAD_BYTES
    return next((share for share in GPU_SHARES if share * gpu_bytes >= needed), 1.0)


def trial_share(config: TrialConfig, run: RunConfig, cluster: Cluster) -> Share:
    """What a trial asks for: the numbers the user typed, else by the cluster."""
    gpus = run.gpus_per_trial
    if gpus is None:
        gpus = gpu_share(config, cluster.gpu_bytes) if cluster.gpus > 0 else 0.0
    if run.cpus_per_trial is not None:
        return Share(cpus=run.cpus_per_trial, gpus=gpus)
    if gpus == 0:
        return Share(cpus=1, gpus=0.0)  # one core a trial: many small trainings beat one on many cores
    cpus_a_gpu = cluster.cpus_a_gpu or cluster.cpus / max(cluster.gpus, 1)
    return Share(cpus=max(1, math.floor(cpus_a_gpu * min(gpus, 1))), gpus=gpus)


def slots(run: RunConfig, cluster: Cluster) -> int:
    """Trials that fit at a time (by the baseline's share), at most what the user allows; at least 1."""
    share = trial_share(run.trial, run, cluster)
    fit = cluster.cpus // share.cpus
    if share.gpus:
        fit = min(fit, math.floor(cluster.gpus / share.gpus))
    fit = min(fit, run.num_samples)
    return max(1, fit if run.max_concurrent is None else min(fit, run.max_concurrent))


def refuse_oversized(share: Share, nodes: Sequence[Mapping[str, Any]]) -> None:
    """Refuse a request that no node can ever meet: Ray would wait for it in silence.

    Raises:
        ValueError: says what was asked for and what the largest node has.
    """
    alive = _alive(nodes)
    if any(node.get("CPU", 0) >= share.cpus and node.get("GPU", 0) >= share.gpus for node in alive):
        return
    cpus, gpus = (max(node.get(kind, 0) for node in alive) for kind in ("CPU", "GPU"))
    raise ValueError(
        f"a trial asks for {share.cpus} CPU and {share.gpus:g} GPU; the largest node has {cpus:g} CPU and {gpus:g} "
        "GPU; choose a smaller --cpus_per_trial or --gpus_per_trial"
    )


def cpu_micro_batch(config: TrialConfig, *, memory_bytes: int) -> int:
    """Images at a time so that a CPU training fits into its part of the memory: at most the batch, at least 1."""
    state = 4 * STATE_COPIES * parameter_estimate(config)
    fit = (memory_bytes - state) // activation_bytes(config, bytes_each=4)
    return int(min(config.batch_size, max(1, fit)))


def cluster_of(nodes: Sequence[Mapping[str, Any]], *, gpu_bytes: int | None) -> Cluster:
    """The cluster from `ray.nodes()`; `gpu_bytes` None where no GPU could be asked."""
    alive = _alive(nodes)
    return Cluster(
        cpus=int(sum(resources.get("CPU", 0) for resources in alive)),
        gpus=sum(resources.get("GPU", 0) for resources in alive),
        nodes=len(alive),
        memory_bytes=int(min((r["memory"] for r in alive if "memory" in r), default=0)),  # unknown of nodes to come
        gpu_bytes=gpu_bytes or ASSUMED_GPU_BYTES,
        cpus_a_gpu=min((node.get("CPU", 0) / node["GPU"] for node in alive if node.get("GPU")), default=None),
    )


def _alive(nodes: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Resources of the nodes that are alive."""
    return [node["Resources"] for node in nodes if node["Alive"]]
