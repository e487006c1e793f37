"""GPUs that Ray counts and torch can or cannot use: there is none here, so torch and Ray are replaced."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nkat_ray.cluster import gpus as room
from nkat_ray.cluster.gpus import GpuFacts, ask_gpus, driver_gpus, driver_memory, known_gpus, mps_runs, try_gpu
from nkat_ray.cluster.resources import Gpu
from nkat_ray.errors import UserError

GB = 2**30


class FakeCuda:
    """As much of torch.cuda as is asked, on a card that is made up.

    Args:
        fault: raised where work begins.
        factor: what products are wrong by.
    """

    def __init__(self, fault: str | None = None, *, factor: int = 1) -> None:
        self.fault, self.factor = fault, factor

    def install(self, patch: pytest.MonkeyPatch) -> None:
        properties = SimpleNamespace(name="NVIDIA A100 MIG 1g.5gb", multi_processor_count=14)
        for name, value in {"get_device_properties": properties, "mem_get_info": (4 * GB, 5 * GB)}.items():
            patch.setattr(torch.cuda, name, lambda index, value=value: value)
        patch.setattr(torch.version, "cuda", "13.2")
        real = torch.ones

        def ones(*size: int, device: str) -> torch.Tensor:
            assert device == "cuda:0"
            if self.fault:
                raise RuntimeError(self.fault)
            return real(*size) * self.factor

        patch.setattr(torch, "ones", ones)


def test_a_card_that_computes_tells_its_name_memory_and_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeCuda().install(monkeypatch)
    assert try_gpu() == GpuFacts(name="NVIDIA A100 MIG 1g.5gb", memory_bytes=5 * GB, processors=14)


def test_a_card_that_computes_wrongly_is_at_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeCuda(factor=2).install(monkeypatch)
    assert "came out wrong" in str(try_gpu().fault)


@pytest.mark.parametrize(
    "said",
    ["CUDA error: CUDA-capable device(s) is/are busy or unavailable", "CUDA error: out of memory"],
)
def test_a_card_that_others_hold_is_busy_and_not_at_fault(said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    FakeCuda(said).install(monkeypatch)
    facts = try_gpu()
    assert (facts.busy, facts.fault, facts.memory_bytes) == (True, None, 5 * GB)


def test_a_reserved_card_that_tells_nothing_is_busy_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    def reserved(index: int) -> None:
        raise RuntimeError("CUDA error: CUDA-capable device(s) is/are busy or unavailable")

    FakeCuda("CUDA error: CUDA-capable device(s) is/are busy or unavailable").install(monkeypatch)
    monkeypatch.setattr(torch.cuda, "get_device_properties", reserved)
    assert try_gpu() == GpuFacts(busy=True)


def test_a_driver_that_is_too_old_is_named_with_the_build_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeCuda("The NVIDIA driver on your system is too old (found version 12020). Please update.").install(monkeypatch)
    install_nvml(monkeypatch, driver="535.104")
    fault = str(try_gpu().fault)
    for part in (f"PyTorch {torch.__version__}", "too old (found version 12020)", "(driver 535.104)"):
        assert part in fault


def test_a_rocm_build_is_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeCuda().install(monkeypatch)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", "7.1")
    assert try_gpu().fault is None


def test_apple_gpus_are_neither_used_nor_offered_to_a_local_instance(monkeypatch: pytest.MonkeyPatch) -> None:
    assert room.apple_gpus_unused() is None
    monkeypatch.setattr("platform.system", lambda: "Darwin")
    assert try_gpu().fault == "Apple GPUs are not used"
    assert room.apple_gpus_unused() == 0


# --- the driver -------------------------------------------------------------------------------------------------------


def install_nvml(
    patch: pytest.MonkeyPatch, *, driver: str = "580.65", cards: tuple[tuple[int, bool], ...] = ()
) -> None:
    """NVIDIA's library as Ray brings it, on a machine with such cards: memory, and whether it has MIG slices."""
    nvml = pytest.importorskip("ray._private.thirdparty.pynvml")

    def mode(card: int) -> tuple[int, int]:
        if card == 0:
            raise nvml.NVMLError(3)  # not supported
        return (int(cards[card][1]), 0)

    for name, value in {
        "nvmlInit": lambda: None, "nvmlShutdown": lambda: None, "nvmlSystemGetDriverVersion": lambda: driver,
        "nvmlDeviceGetCount": lambda: len(cards), "nvmlDeviceGetHandleByIndex": lambda index: index,
        "nvmlDeviceGetMemoryInfo": lambda card: SimpleNamespace(total=cards[card][0]), "nvmlDeviceGetMigMode": mode,
    }.items():  # fmt: skip
        patch.setattr(nvml, name, value)


def test_the_driver_tells_the_memory_of_whole_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    install_nvml(monkeypatch, cards=((10 * GB, False), (80 * GB, True), (24 * GB, False)))
    assert driver_memory() == (10 * GB, 24 * GB)
    assert driver_gpus() == 3


def test_a_machine_without_an_nvidia_driver_has_no_such_memory() -> None:
    assert driver_memory() == ()
    assert driver_gpus() == 0


def test_mps_is_seen_by_its_pipe(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(room.MPS_PIPE, str(tmp_path))
    assert not mps_runs()
    (tmp_path / "control").touch()
    assert mps_runs()


# --- on the nodes of a cluster ----------------------------------------------------------------------------------------


def node(name: str, gpus: float, kind: str = "", **changes: Any) -> dict[str, Any]:
    resources: dict[str, float] = {"CPU": 8.0, **({"GPU": gpus} if gpus else {})}
    resources |= {f"accelerator_type:{kind}": 1.0} if kind else {}
    return {"NodeID": name, "Alive": True, "NodeManagerHostname": name, "Resources": resources, **changes}


# Reported in hiyouga/LlamaFactory#1573, ultralytics/yolov3#517
def test_a_gpu_that_torch_cannot_use_is_an_error_that_says_where_why_and_what_to_do() -> None:
    found = {"a": [GpuFacts(memory_bytes=24 * GB)], "b": [GpuFacts(memory_bytes=24 * GB), GpuFacts(fault="too old")]}
    said = r"node b: Ray offers 2 GPU that PyTorch cannot use \(too old\).*--gpus_per_trial 0"
    with pytest.raises(UserError, match=said):
        known_gpus([node("a", 1), node("b", 2)], found)


def test_a_busy_gpu_is_no_error_and_its_memory_is_the_drivers_or_assumed() -> None:
    nodes = [node("a", 1, "A10G"), node("b", 1, "T4"), node("c", 0)]
    found = {"a": [GpuFacts(memory_bytes=24 * GB, busy=True)], "b": [GpuFacts(busy=True)]}
    assert known_gpus(nodes, found) == {
        "A10G": Gpu(kind="A10G", memory_bytes=24 * GB),
        "T4": Gpu(kind="T4", assumed=True),
    }


def test_the_smallest_gpu_of_a_kind_stands_for_it() -> None:
    found = {
        "a": [GpuFacts(memory_bytes=80 * GB, processors=132)], "b": [GpuFacts(memory_bytes=40 * GB, processors=108)],
    }  # fmt: skip
    expected = Gpu(kind="H", memory_bytes=40 * GB, processors=108)
    assert known_gpus([node("a", 1, "H"), node("b", 1, "H")], found) == {"H": expected}


def test_the_sessions_instance_has_no_gpus_to_ask(ray_local: Any) -> None:
    assert ask_gpus(ray_local.nodes()) == {}


@pytest.mark.cluster
def test_every_gpu_is_tested_in_a_task_with_a_share_of_it_and_a_busy_one_is_recognised(ray_settings: None) -> None:
    """Ray hands out GPUs that are not there: torch cannot use them, unless somebody holds them."""
    import ray
    from ray.cluster_utils import Cluster

    there = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "num_gpus": 2, "object_store_memory": 10**8})
    ray.init(address=there.address, log_to_driver=False, logging_level="ERROR")
    try:
        (facts,) = ask_gpus(ray.nodes()).values()
        assert len(facts) == 2
        assert all("PyTorch" in str(gpu.fault) for gpu in facts)

        @ray.remote(num_gpus=2)
        class Holder:
            def ready(self) -> bool:
                return True

        holder = Holder.remote()
        assert ray.get(holder.ready.remote())
        (facts,) = ask_gpus(ray.nodes()).values()
        assert [(gpu.busy, gpu.fault) for gpu in facts] == [(True, None)]
    finally:
        ray.shutdown()
        there.shutdown()


def test_this_machine_is_described_as_ray_would_describe_it(ray_local: Any) -> None:
    (mine,) = room.this_machines_nodes()
    (rays,) = ray_local.nodes()
    assert {"CPU", "memory", "object_store_memory"} <= set(mine["Resources"]) <= set(rays["Resources"]) | {"GPU"}
    assert room.try_local_gpus([mine]) == {}


def test_gpus_of_this_machine_are_tried_without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeCuda().install(monkeypatch)
    (facts,) = room.try_local_gpus([node("this", 1)])["this"]
    assert facts.memory_bytes == 5 * GB
