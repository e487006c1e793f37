"""A share of a machine, set up."""

from collections.abc import Iterator

import pytest
import torch

from nkat_ray.train.device import device_for


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("gpus", "cpus", "expected"), [(0.0, 2, 2), (0.5, 1, 1), (0.0, 0, 1)])
def test_without_cuda_the_device_is_the_cpu(
    monkeypatch: pytest.MonkeyPatch, gpus: float, cpus: int, expected: int
) -> None:
    """Ray may count GPUs that are not there."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device_for(gpus, cpus) == torch.device("cpu")
    assert torch.get_num_threads() == expected


@pytest.mark.parametrize(("gpus", "fraction"), [(0.25, 0.25), (1.0, 1.0), (2.0, 1.0)])
def test_a_share_of_a_gpu_limits_its_memory(monkeypatch: pytest.MonkeyPatch, gpus: float, fraction: float) -> None:
    limits: list[float] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", limits.append)
    assert device_for(gpus, 1) == torch.device("cuda")
    assert limits == [fraction]


def test_a_cpu_trial_beside_gpus_stays_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert device_for(0.0, 1) == torch.device("cpu")
