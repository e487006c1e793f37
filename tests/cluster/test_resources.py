"""Shares, slots and memory: what trials ask for on machines and clusters that are made up here."""

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nkat_ray.cluster.resources import (
    ASSUMED_GPU_BYTES,
    GPU_SHARES,
    MEMORY_FRACTION,
    Cluster,
    Gpu,
    Kinds,
    Node,
    Share,
    choose_kind,
    cluster_of,
    gpu_share,
    refuse_oversized,
    room,
    trial_memory,
    trial_share,
)
from nkat_ray.config import RunConfig, TrialConfig
from nkat_ray.cost import GPU_CONTEXT_BYTES, cpu_bytes, peak_bytes
from nkat_ray.errors import UserError
from nkat_ray.record.journal import RunState, TrialRecord
from nkat_ray.space import corner_configs, space_of

GB = 2**30
H100 = Gpu(kind="H100", memory_bytes=80 * GB, processors=132)
A10G = Gpu(kind="A10G", memory_bytes=24 * GB, processors=80)
PLAIN = Gpu(memory_bytes=16 * GB)


def cluster(cpus: int = 8, gpus: float = 0, gpu: Gpu = PLAIN, memory: int | None = None) -> Cluster:
    """One node."""
    return Cluster((Node(cpus=cpus, memory_bytes=memory, gpus=gpus, gpu=gpu if gpus else None),))


def config(**fields: Any) -> TrialConfig:
    return dataclasses.replace(TrialConfig(), **fields)


@st.composite
def trial_configs(draw: st.DrawFn) -> TrialConfig:
    return TrialConfig(
        conv_stem=draw(st.sampled_from(("off", "tiny", "small"))), patch_size=draw(st.sampled_from((2, 4, 8))),
        embed_dim=8 * draw(st.integers(1, 256)), depth=draw(st.integers(1, 48)),
        batch_size=draw(st.sampled_from((1, 32, 128, 4096))), stem_stride=draw(st.sampled_from((2, 4))),
    )  # fmt: skip


# --- GPU shares -------------------------------------------------------------------------------------------------------


@given(trial_configs(), st.integers(GB // 4, 200 * GB))
def test_a_share_is_the_smallest_of_four_that_holds_the_trial(trial: TrialConfig, gpu_bytes: int) -> None:
    share = gpu_share(trial, Gpu(memory_bytes=gpu_bytes))
    needed = peak_bytes(trial) + GPU_CONTEXT_BYTES
    assert share in (1 / 8, 1 / 4, 1 / 2, 1.0)
    assert share * gpu_bytes >= needed or share == 1.0
    assert share == 1 / 8 or share / 2 * gpu_bytes < needed


@given(trial_configs(), st.integers(GB, 100 * GB), st.integers(1, 150), st.integers(1, 4))
def test_shares_are_monotone(trial: TrialConfig, gpu_bytes: int, processors: int, factor: int) -> None:
    gpu = Gpu(memory_bytes=gpu_bytes, processors=processors)
    faster = Gpu(memory_bytes=gpu_bytes * factor, processors=processors * factor)
    assert gpu_share(trial, faster) <= gpu_share(trial, gpu)
    larger = dataclasses.replace(trial, batch_size=2 * trial.batch_size)
    assert gpu_share(larger, gpu) >= gpu_share(trial, gpu)


@pytest.mark.parametrize(
    ("gpu", "fields", "at_a_time"),
    [
        (H100, {}, 4),
        (A10G, {}, 2),
        (Gpu(memory_bytes=10 * GB, processors=68), {}, 2),  # RTX 3080
        (H100, {"conv_stem": "off", "patch_size": 4}, 1),  # 64 tokens
        (A10G, {"conv_stem": "off", "patch_size": 4}, 1),
        (H100, {"embed_dim": 64, "batch_size": 64}, 8),
    ],
)
def test_as_many_trials_share_a_gpu_as_keep_it_busy(gpu: Gpu, fields: dict[str, Any], at_a_time: int) -> None:
    assert gpu_share(config(**fields), gpu) == 1 / at_a_time


@pytest.mark.parametrize(("trials", "share"), [(1, 1.0), (2, 1.0), (4, 1.0), (5, 1.0), (8, 1 / 2), (16, 1 / 4)])
def test_few_trials_use_all_gpus(trials: int, share: float) -> None:
    four = cluster(cpus=64, gpus=4, gpu=H100)
    assert trial_share(TrialConfig(), RunConfig(max_concurrent=trials), four).gpus == share


# --- what a trial asks for --------------------------------------------------------------------------------------------


def test_without_gpus_a_trial_takes_one_core() -> None:
    assert trial_share(TrialConfig(), RunConfig(), cluster(cpus=64)) == Share(cpus=1, gpus=0.0)


def test_with_gpus_a_trial_takes_its_part_of_the_cores() -> None:
    share = trial_share(TrialConfig(), RunConfig(), cluster(cpus=32, gpus=2, gpu=H100))
    assert share.gpus in GPU_SHARES
    assert share.cpus == max(1, int(16 * share.gpus))


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ({"gpus_per_trial": 0.3}, Share(cpus=4, gpus=0.3)),
        ({"gpus_per_trial": 0.0}, Share(cpus=1, gpus=0.0)),
        ({"gpus_per_trial": 1.0, "cpus_per_trial": 3}, Share(cpus=3, gpus=1.0)),
    ],
)
def test_what_the_user_typed_is_asked_for(typed: dict[str, Any], expected: Share) -> None:
    assert trial_share(TrialConfig(), RunConfig(**typed), cluster(cpus=32, gpus=2)) == expected


def test_a_share_fits_the_gpu_node_with_the_fewest_cores() -> None:
    uneven = Cluster((Node(cpus=92, gpus=3, gpu=PLAIN), Node(cpus=4, gpus=1, gpu=PLAIN)))
    assert trial_share(TrialConfig(), RunConfig(gpus_per_trial=1.0), uneven) == Share(cpus=4, gpus=1.0)


def test_a_share_is_the_same_request_for_tune_and_for_a_task() -> None:
    share = Share(cpus=2, gpus=0.5, memory_bytes=GB, kind="A10G")
    assert share.bundle == {"CPU": 2, "GPU": 0.5, "memory": GB, "accelerator_type:A10G": 0.001}
    assert share.options == {
        "num_cpus": 2, "num_gpus": 0.5, "memory": GB, "resources": {"accelerator_type:A10G": 0.001},
    }  # fmt: skip
    assert Share(cpus=1, gpus=0.0).bundle == {"CPU": 1}


NODES = [
    {"Alive": True, "Resources": {"CPU": 8.0, "GPU": 1.0}},
    {"Alive": True, "Resources": {"CPU": 32.0}},
    {"Alive": False, "Resources": {"CPU": 99.0, "GPU": 9.0}},
]
UNEVEN = cluster_of(NODES, {})


@pytest.mark.parametrize("share", [Share(cpus=8, gpus=1.0), Share(cpus=32, gpus=0.0), Share(cpus=1, gpus=0.125)])
def test_a_request_that_one_node_can_meet_is_not_refused(share: Share) -> None:
    refuse_oversized([share], UNEVEN)


@pytest.mark.parametrize("share", [Share(cpus=9, gpus=1.0), Share(cpus=33, gpus=0.0), Share(cpus=1, gpus=2.0)])
def test_a_request_that_no_single_node_can_meet_is_refused(share: Share) -> None:
    with pytest.raises(UserError, match=r"the largest node has 32 CPU and 1 GPU; choose a smaller --cpus_per_trial"):
        refuse_oversized([share], UNEVEN)


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
        (RunConfig(gpus_per_trial=0.3, cpus_per_trial=1), cluster(cpus=8, gpus=2), 6),  # no share crosses two GPUs
        (RunConfig(gpus_per_trial=1.0), cluster(cpus=8, gpus=0), 1),
        (RunConfig(gpus_per_trial=0.0), cluster(cpus=8, gpus=2), 8),
        (RunConfig(), cluster(cpus=64, gpus=1, gpu=H100), 4),
        (RunConfig(), Cluster((Node(cpus=64), Node(cpus=4, gpus=1, gpu=A10G))), 2),  # cores without a GPU do not help
    ],
)
def test_slots(run: RunConfig, there_is: Cluster, expected: int) -> None:
    assert room(run, there_is).slots == expected


# --- a sampler learns from trials that have ended ---------------------------------------------------------------------

EIGHT = cluster(cpus=64, gpus=8, gpu=H100)


def test_on_gpus_at_most_a_quarter_of_the_trials_run_at_a_time_and_a_notice_says_so() -> None:
    there = room(RunConfig(num_samples=16), EIGHT)
    assert there.slots == 4
    (notice,) = there.notices
    for part in ("4 trials at a time although 8 would fit", "a quarter of the 16 trials", "--max_concurrent"):
        assert part in notice


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        (RunConfig(num_samples=16, sampler="random"), 16),  # it learns nothing anyway
        (RunConfig(num_samples=16, max_concurrent=16), 16),  # typed
        (RunConfig(num_samples=200), 32),
        (RunConfig(num_samples=3), 1),
    ],
)
def test_that_limit_is_for_samplers_that_learn_and_for_default_numbers(run: RunConfig, expected: int) -> None:
    assert room(run, EIGHT).slots == expected


def test_cores_know_no_such_limit() -> None:
    assert room(RunConfig(num_samples=4), cluster(cpus=8)) == room(RunConfig(num_samples=4), cluster(cpus=4))


# --- memory on a CPU --------------------------------------------------------------------------------------------------

ROUND2 = RunConfig(num_samples=12)
CORNERS = corner_configs(ROUND2, space_of(ROUND2, {}).domains)


# Reported in ray-project/ray#23109
@pytest.mark.parametrize("memory", [4 * GB, 8 * GB, 12 * GB, 64 * GB, 256 * GB])
def test_the_largest_configuration_fits_as_often_as_there_are_slots(memory: int) -> None:
    there = room(ROUND2, cluster(cpus=8, memory=memory), CORNERS)
    largest = max(trial_memory(corner) for corner in CORNERS)
    assert there.slots == 1 or there.slots * largest <= MEMORY_FRACTION * memory
    assert there.slots == 8 or (there.slots + 1) * largest > MEMORY_FRACTION * memory
    assert bool(there.notices) == (there.slots < 8)


def test_a_notice_says_that_memory_and_not_the_cores_bounds_the_trials() -> None:
    (notice,) = room(ROUND2, cluster(cpus=8, memory=12 * GB), CORNERS).notices
    assert "memory, not the 8 cores, limits the trials at a time (the largest needs about 5.0 GiB)" in notice
    assert "--cpus_per_trial 4 uses all cores" in notice
    (notice,) = room(ROUND2, cluster(cpus=8, memory=2 * GB), CORNERS).notices
    assert "it needs about 5.0 GiB, a node has 2.0 GiB" in notice
    one = dataclasses.replace(ROUND2, max_concurrent=1)
    assert room(one, cluster(cpus=8, memory=6 * GB), CORNERS).notices == ()


def test_memory_is_counted_node_by_node() -> None:
    small, large = Node(cpus=8, memory_bytes=8 * GB), Node(cpus=8, memory_bytes=24 * GB)
    assert [room(ROUND2, Cluster(nodes), CORNERS).slots for nodes in ((small,), (large,), (small, large))] == [1, 4, 5]


@given(trial_configs(), st.integers(GB // 2, 64 * GB))
def test_a_trial_asks_for_its_memory_and_never_for_more_than_a_node_has(trial: TrialConfig, memory: int) -> None:
    asked = trial_share(trial, RunConfig(), cluster(memory=memory)).memory_bytes
    assert asked == min(trial_memory(trial), int(MEMORY_FRACTION * memory))
    assert cpu_bytes(trial) <= trial_memory(trial) <= 1.25 * cpu_bytes(trial)


def test_where_a_nodes_memory_is_unknown_none_is_asked_for() -> None:
    """A node that may still start offers none: Ray would never start it for a trial that asks for some."""
    mixed = Cluster((Node(cpus=8, memory_bytes=8 * GB), Node(cpus=8)))
    assert trial_share(TrialConfig(), RunConfig(), mixed).memory_bytes == 0
    head = Cluster((Node(cpus=0), Node(cpus=8, memory_bytes=8 * GB)))
    assert trial_share(TrialConfig(), RunConfig(), head).memory_bytes > 0


# --- the cluster ------------------------------------------------------------------------------------------------------


def test_cluster_of_counts_living_nodes() -> None:
    nodes: list[dict[str, Any]] = [
        {"Alive": True, "Resources": {"CPU": 8.0, "GPU": 2.0, "memory": 5.0e9, "accelerator_type:A10G": 1.0}},
        {"Alive": True, "Resources": {"CPU": 4.0, "memory": 3.0e9}},
        {"Alive": False, "Resources": {"CPU": 99.0, "GPU": 9.0, "memory": 1.0}},
    ]
    found = cluster_of(nodes, {"A10G": A10G})
    assert found == Cluster((
        Node(cpus=8, memory_bytes=5_000_000_000, gpus=2.0, gpu=A10G), Node(cpus=4, memory_bytes=3_000_000_000),
    ))  # fmt: skip
    assert (found.cpus, found.gpus, found.kinds) == (12, 2.0, {"A10G": A10G})


def test_the_unknown_memory_of_a_gpu_is_assumed_with_a_notice() -> None:
    nodes = [{"Alive": True, "Resources": {"CPU": 4, "GPU": 1}}]
    unknown = cluster_of(nodes, {})
    assert unknown.kinds[""] == Gpu(memory_bytes=ASSUMED_GPU_BYTES, assumed=True)
    assert "16 GiB are assumed" in " ".join(room(RunConfig(), unknown).notices)
    assert "assumed" not in " ".join(room(RunConfig(gpus_per_trial=0.5), unknown).notices)


def test_a_node_that_has_not_started_has_the_only_kind_of_gpu_that_is_known() -> None:
    nodes = [
        {"Alive": True, "Resources": {"CPU": 4, "GPU": 1, "accelerator_type:A10G": 1}},
        {"Alive": True, "Resources": {"CPU": 4, "GPU": 1}},
    ]
    assert cluster_of(nodes, {"A10G": A10G}).kinds == {"A10G": A10G}


# --- several kinds of GPU ---------------------------------------------------------------------------------------------

MIXED = Cluster((Node(cpus=16, gpus=1, gpu=H100), Node(cpus=8, gpus=1, gpu=A10G)))


def test_each_kind_gets_its_own_share_and_the_trial_stays_on_it() -> None:
    h100, a10g = (trial_share(TrialConfig(), RunConfig(), MIXED, kind=kind) for kind in ("H100", "A10G"))
    assert (h100.gpus, h100.kind, a10g.gpus, a10g.kind) == (1 / 4, "H100", 1 / 2, "A10G")
    anywhere = trial_share(TrialConfig(), RunConfig(), MIXED)
    assert (anywhere.gpus, anywhere.kind) == (1 / 2, "")  # fits on each
    assert room(RunConfig(), MIXED).slots == 6


def test_the_next_trial_goes_where_most_room_is() -> None:
    state = RunState()
    kinds, chosen = Kinds(RunConfig(), MIXED, state), []
    for number in range(6):
        chosen.append(kinds.choose(number))
        state.trials[number] = TrialRecord(number, {}, seed=0, study_number=number)
    assert sorted(chosen) == ["A10G"] * 2 + ["H100"] * 4
    state.trials[chosen.index("A10G")].stop_reason = "finished"
    assert kinds.choose(6) == "A10G"


def test_where_there_is_one_kind_no_trial_is_bound_to_it() -> None:
    assert choose_kind(RunConfig(), EIGHT, {}) == ""
    assert trial_share(TrialConfig(), RunConfig(), EIGHT, kind="H100").kind == ""
