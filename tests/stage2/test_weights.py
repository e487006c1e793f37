from pathlib import Path
from typing import Any

from nkat_ray.files import WEIGHTS_FILE
from nkat_ray.search.vault import deposit, withdraw
from nkat_ray.stage2.weights import WeightSource, transferred_file, weights_on_disk


def test_weights_are_fetched_once_until_they_are_forgotten(
    ray_local: Any, vault: Any, payload: bytes, survivor: Any
) -> None:
    source = WeightSource(vault, print)
    deposit(vault, 3, 0.5, payload)
    first = source.get(survivor(3))
    deposit(vault, 3, 0.6, payload + b"better")
    assert source.get(survivor(3)) == first
    source.forget(survivor(3))
    assert ray_local.get(source.get(survivor(3))) == payload + b"better"
    source.release(survivor(3))
    assert withdraw(vault, 3) is None


def test_the_newest_whole_checkpoint_is_read(payload: bytes, tmp_path: Path) -> None:
    for name, data in (("cut", payload[:-9]), ("whole", payload)):
        (tmp_path / name).mkdir()
        (tmp_path / name / WEIGHTS_FILE).write_bytes(data)
    gone, cut, whole = (str(tmp_path / name) for name in ("gone", "cut", "whole"))
    assert weights_on_disk([gone, cut, f"file://{whole}"]) == payload
    assert weights_on_disk([gone, cut]) is None
    assert weights_on_disk([]) is None


def test_transferred_weights_are_named_after_trial_and_dataset(tmp_path: Path) -> None:
    assert transferred_file(tmp_path, 7, "mnist") == tmp_path / "stage2" / "trial_0007-mnist.safetensors"
