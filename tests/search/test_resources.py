import dataclasses
import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nkat_ray.config import RunConfig, TrialConfig
from nkat_ray.search.resources import (
    GPU_OVERHEAD_BYTES,
    GPU_SHARES,
    Cluster,
    Share,
    activation_bytes,
    cluster_of,
    cpu_micro_batch,
    epoch_flops,
    gpu_share,
    parameter_estimate,
    peak_bytes,
    refuse_oversized,
    slots,
    trial_share,
)

GB = 2**30


def cluster(cpus: int = 8, gpus: float = 0, gpu_bytes: int = 16 * GB) -> Cluster:
    return Cluster(cpus=cpus, gpus=gpus, nodes=1, memory_bytes=32 * GB, gpu_bytes=gpu_bytes)


def config(**fields: Any) -> TrialConfig:
    return dataclasses.replace(TrialConfig(), **fields)


@st.composite
def trial_configs(draw: st.DrawFn) -> TrialConfig:
    return TrialConfig(
        conv_stem=draw(st.sampled_from(("off", "tiny", "small"))), patch_size=draw(st.sampled_from((2, 4, 8))),
        embed_dim=8 * draw(st.integers(1, 256)), depth=draw(st.integers(1, 48)),
        batch_size=draw(st.sampled_from((1, 32, 128, 4096))), stem_stride=draw(st.sampled_from((2, 4))),
    )  # fmt: skip


# --- estimates --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"embed_dim": 512, "depth": 9, "conv_stem": "off"},
        {"embed_dim": 512, "depth": 5, "conv_stem": "small", "patch_size": 4},
        {"embed_dim": 384, "depth": 5, "conv_stem": "small"},
    ],
)
def test_parameters_are_estimated_within_ten_percent_of_the_built_model(fields: dict[str, Any]) -> None:
    from nkat_ray.model import count_parameters, create_nkat_vit

    built = count_parameters(create_nkat_vit(config(**fields), num_classes=10))
    assert parameter_estimate(config(**fields)) == pytest.approx(built, rel=0.1)


def test_flops_are_six_a_parameter_token_and_image() -> None:
    assert epoch_flops(TrialConfig(), 45_000) == 6 * parameter_estimate(TrialConfig()) * 16 * 45_000


@given(trial_configs())
def test_peak_memory_grows_with_everything_that_costs_memory(base: TrialConfig) -> None:
    more = [dataclasses.replace(base, batch_size=base.batch_size + 1)]
    if base.depth < 48:
        more.append(dataclasses.replace(base, depth=base.depth + 1))
    if base.embed_dim < 2048:
        more.append(dataclasses.replace(base, embed_dim=base.embed_dim + 8))
    assert all(peak_bytes(larger) > peak_bytes(base) for larger in more)


# --- GPU shares -------------------------------------------------------------------------------------------------------


@given(trial_configs(), st.integers(GB // 4, 200 * GB))
def test_a_share_is_the_smallest_of_four_that_holds_the_trial(trial: TrialConfig, gpu_bytes: int) -> None:
    share = gpu_share(trial, gpu_bytes)
    needed = peak_bytes(trial) + GPU_OVERHEAD_BYTES
    assert share in (1 / 8, 1 / 4, 1 / 2, 1.0)
    assert share * gpu_bytes >= needed or share == 1.0
    assert share == 1 / 8 or share / 2 * gpu_bytes < needed


@given(trial_configs(), st.integers(GB, 100 * GB), st.floats(1, 4))
def test_shares_are_monotone(trial: TrialConfig, gpu_bytes: int, factor: float) -> None:
    assert gpu_share(trial, int(gpu_bytes * factor)) <= gpu_share(trial, gpu_bytes)
    larger = dataclasses.replace(trial, batch_size=2 * trial.batch_size)
    assert gpu_share(larger, gpu_bytes) >= gpu_share(trial, gpu_bytes)


def test_every_trial_of_round2_shares_a_gpu_of_80_gigabytes() -> None:
    """Whole GPUs for a model of 12 million parameters would waste most of one."""
    for stem, patch, depth in itertools.product(("off", "tiny", "small"), (2, 4), (5, 9)):
        assert gpu_share(config(conv_stem=stem, patch_size=patch, embed_dim=512, depth=depth), 80 * GB) <= 1 / 2


# --- what a trial asks for --------------------------------------------------------------------------------------------


def test_without_gpus_a_trial_takes_one_core() -> None:
    assert trial_share(TrialConfig(), RunConfig(), cluster(cpus=64)) == Share(cpus=1, gpus=0.0)


def test_with_gpus_a_trial_takes_its_part_of_the_cores() -> None:
    share = trial_share(TrialConfig(), RunConfig(), cluster(cpus=32, gpus=2, gpu_bytes=80 * GB))
    assert share.gpus in GPU_SHARES
    assert share.cpus == max(1, int(16 * share.gpus))


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ({"gpus_per_trial": 0.3}, Share(cpus=4, gpus=0.3)),
        ({"gpus_per_trial": 0.0}, Share(cpus=1, gpus=0.0)),
        ({"gpus_per_trial": 1.0, "cpus_per_trial": 3}, Share(cpus=3, gpus=1.0)),
        ({"gpus_per_trial": 2.0}, Share(cpus=16, gpus=2.0)),
    ],
)
def test_what_the_user_typed_is_asked_for(typed: dict[str, Any], expected: Share) -> None:
    assert trial_share(TrialConfig(), RunConfig(**typed), cluster(cpus=32, gpus=2)) == expected


def test_a_share_fits_the_gpu_node_with_the_fewest_cores() -> None:
    uneven = dataclasses.replace(cluster(cpus=96, gpus=4), cpus_a_gpu=4.0)
    assert trial_share(TrialConfig(), RunConfig(gpus_per_trial=1.0), uneven) == Share(cpus=4, gpus=1.0)


NODES = [
    {"Alive": True, "Resources": {"CPU": 8.0, "GPU": 1.0}},
    {"Alive": True, "Resources": {"CPU": 32.0}},
    {"Alive": False, "Resources": {"CPU": 99.0, "GPU": 9.0}},
]


@pytest.mark.parametrize("share", [Share(cpus=8, gpus=1.0), Share(cpus=32, gpus=0.0), Share(cpus=1, gpus=0.125)])
def test_a_request_that_one_node_can_meet_is_not_refused(share: Share) -> None:
    refuse_oversized(share, NODES)


@pytest.mark.parametrize("share", [Share(cpus=9, gpus=1.0), Share(cpus=33, gpus=0.0), Share(cpus=1, gpus=2.0)])
def test_a_request_that_no_single_node_can_meet_is_refused(share: Share) -> None:
    with pytest.raises(ValueError, match=r"the largest node has 32 CPU and 1 GPU; choose a smaller --cpus_per_trial"):
        refuse_oversized(share, NODES)


def test_few_cores_beside_many_gpus_still_give_each_trial_one() -> None:
    assert trial_share(TrialConfig(), RunConfig(), cluster(cpus=4, gpus=8)).cpus == 1


@pytest.mark.parametrize(
    ("run", "there_is", "expected"),
    [
        (RunConfig(), cluster(cpus=8), 8),
        (RunConfig(num_samples=3), cluster(cpus=8), 3),
        (RunConfig(max_concurrent=2), cluster(cpus=8), 2),
        (RunConfig(max_concurrent=20), cluster(cpus=8), 8),
        (RunConfig(cpus_per_trial=3), cluster(cpus=8), 2),
        (RunConfig(cpus_per_trial=9), cluster(cpus=8), 1),
        (RunConfig(gpus_per_trial=0.5, cpus_per_trial=1), cluster(cpus=8, gpus=2), 4),
        (RunConfig(gpus_per_trial=0.5, cpus_per_trial=3), cluster(cpus=8, gpus=2), 2),
        (RunConfig(gpus_per_trial=1.0), cluster(cpus=8, gpus=0), 1),
    ],
)
def test_slots(run: RunConfig, there_is: Cluster, expected: int) -> None:
    assert slots(run, there_is) == expected


# --- memory on a CPU --------------------------------------------------------------------------------------------------


@given(trial_configs(), st.integers(0, 64 * GB))
def test_the_micro_batch_is_the_largest_within_memory(trial: TrialConfig, memory_bytes: int) -> None:
    micro = cpu_micro_batch(trial, memory_bytes=memory_bytes)
    assert 1 <= micro <= trial.batch_size
    each = activation_bytes(trial, bytes_each=4)
    state = peak_bytes(trial) - trial.batch_size * each
    assert micro == 1 or state + micro * each <= memory_bytes
    assert micro == trial.batch_size or state + (micro + 1) * each > memory_bytes


# --- the cluster ------------------------------------------------------------------------------------------------------


def test_cluster_of_counts_living_nodes_and_takes_the_smallest_memory() -> None:
    nodes: list[dict[str, Any]] = [
        {"Alive": True, "Resources": {"CPU": 8.0, "GPU": 2.0, "memory": 5.0e9}},
        {"Alive": True, "Resources": {"CPU": 4.0, "memory": 3.0e9}},
        {"Alive": False, "Resources": {"CPU": 99.0, "GPU": 9.0, "memory": 1.0}},
    ]
    expected = Cluster(cpus=12, gpus=2.0, nodes=2, memory_bytes=3_000_000_000, gpu_bytes=24 * GB, cpus_a_gpu=4.0)
    assert cluster_of(nodes, gpu_bytes=24 * GB) == expected
    assert cluster_of(nodes, gpu_bytes=None).gpu_bytes == 16 * GB


def test_the_memory_of_nodes_that_have_not_come_is_unknown_and_does_not_count() -> None:
    nodes: list[dict[str, Any]] = [
        {"Alive": True, "Resources": {"CPU": 0.0, "memory": 3.0e9}}, {"Alive": True, "Resources": {"CPU": 4, "GPU": 1}}
    ]  # fmt: skip
    assert cluster_of(nodes, gpu_bytes=None).memory_bytes == 3_000_000_000
    assert cluster_of(nodes[1:], gpu_bytes=None).memory_bytes == 0
