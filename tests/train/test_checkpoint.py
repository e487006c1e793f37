import dataclasses
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from nkat_ray.config import TrialConfig
from nkat_ray.errors import UserError
from nkat_ray.model import create_nkat_vit
from nkat_ray.train import checkpoint as checkpoint_module
from nkat_ray.train.checkpoint import (
    STATE_FILE,
    CheckpointError,
    Weights,
    first_whole_state,
    load_state,
    save_state,
)

CONFIG = TrialConfig(embed_dim=16, num_heads=2, depth=1, top_k=None, randaugment=(1, 5), color_norm="residual")
STATE: dict[str, Any] = {
    "epoch": 3, "model": {"w": torch.arange(6.0).view(2, 3)}, "ema": None, "random": torch.get_rng_state(), "best": 0.5,
}  # fmt: skip


def weights(**fields: Any) -> Weights:
    torch.manual_seed(0)
    model = create_nkat_vit(CONFIG, num_classes=7, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    for buffer in model.buffers():  # BatchNorm's statistics are part of the weights
        if buffer.dtype == torch.float32:
            buffer.uniform_(0.5, 1.5)
    given: dict[str, Any] = dict(
        config=CONFIG, dataset="cifar10", num_classes=7, grey=False, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), epoch=3,
        val_accuracy=0.1 + 0.2, seed=2**32 - 1, tensors=model.state_dict(),
    )  # fmt: skip
    return Weights(**{**given, **fields})


def same_bits(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and one.numpy().tobytes() == other.numpy().tobytes()


# --- weights ----------------------------------------------------------------------------------------------------------


def test_weights_come_back_bit_for_bit_with_everything_about_them() -> None:
    before = weights()
    after = Weights.from_bytes(before.to_bytes())
    assert set(after.tensors) == set(before.tensors)
    assert all(same_bits(after.tensors[name], tensor) for name, tensor in before.tensors.items())
    for field in dataclasses.fields(Weights):
        if field.name != "tensors":
            assert getattr(after, field.name) == getattr(before, field.name)
    assert after.to_bytes() == before.to_bytes()


def test_special_numbers_come_back_too() -> None:
    odd = torch.tensor([float("nan"), float("inf"), -0.0, 1e-45, torch.finfo(torch.float32).max])
    after = Weights.from_bytes(weights(tensors={"odd": odd}).to_bytes())
    assert same_bits(after.tensors["odd"], odd)


def test_the_network_is_rebuilt_from_the_bytes_alone() -> None:
    before = weights()
    model = Weights.from_bytes(before.to_bytes()).build()
    assert not model.training
    assert all(same_bits(tensor, before.tensors[name]) for name, tensor in model.state_dict().items())
    images = torch.randn(4, 3, 32, 32)
    assert torch.equal(model(images), before.build()(images))
    assert model.pretrained_cfg["mean"] == (0.1, 0.2, 0.3)
    assert model(images).shape == (4, 7)


def test_a_grey_network_is_rebuilt_grey() -> None:
    assert Weights.from_bytes(weights(grey=True).to_bytes()).build().grey
    assert not Weights.from_bytes(weights().to_bytes()).build().grey


def test_weights_are_a_safetensors_file_with_the_configuration_in_its_header(tmp_path: Path) -> None:
    data = weights().to_bytes()
    (tmp_path / "w.safetensors").write_bytes(data)
    with safetensors.safe_open(tmp_path / "w.safetensors", "pt") as file:
        header = json.loads(file.metadata()["nkat"])
    assert header["config"] == json.loads(json.dumps(dataclasses.asdict(CONFIG)))
    assert header["dataset"] == "cifar10"


def test_nothing_is_unpickled(monkeypatch: pytest.MonkeyPatch) -> None:
    data = weights().to_bytes()

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("unpickled")

    monkeypatch.setattr(pickle, "Unpickler", refuse)
    monkeypatch.setattr(pickle, "loads", refuse)
    monkeypatch.setattr(torch, "load", refuse)
    Weights.from_bytes(data).build()


@pytest.mark.parametrize("share", [0.0, 0.001, 0.01, 0.3, 0.9, 0.999])
def test_weights_that_were_cut_short_are_refused(share: float) -> None:
    data = weights().to_bytes()
    with pytest.raises(CheckpointError, match="truncated"):
        Weights.from_bytes(data[: int(share * len(data))])


@pytest.mark.parametrize("cut", [1, 7, 8, 9, 100])
def test_weights_that_lack_their_last_bytes_are_refused(cut: int) -> None:
    with pytest.raises(CheckpointError):
        Weights.from_bytes(weights().to_bytes()[:-cut])


@pytest.mark.parametrize(
    "data",
    [b"PK\x03\x04 a zip file", b"\xff" * 100, safetensors.torch.save({"a": torch.zeros(2)}), pickle.dumps({"a": 1})],
)
def test_what_are_not_nkat_weights_are_refused(data: bytes) -> None:
    with pytest.raises(CheckpointError, match="not NKAT weights"):
        Weights.from_bytes(data)


def rewritten(change: Callable[[dict[str, Any]], object]) -> bytes:
    """Weights whose header was changed, as another version would have written it."""
    header = json.loads(safetensors_header(weights().to_bytes())["nkat"])
    change(header)
    return safetensors.torch.save(dict(weights().tensors), metadata={"nkat": json.dumps(header)})


def safetensors_header(data: bytes) -> dict[str, str]:
    size = int.from_bytes(data[:8], "little")
    metadata: dict[str, str] = json.loads(data[8 : 8 + size])["__metadata__"]
    return metadata


def test_weights_of_a_newer_version_are_refused_with_their_unknown_fields_and_both_versions() -> None:
    def newer(header: dict[str, Any]) -> None:
        header["config"] |= {"rotary": True, "experts": 4}
        header |= {"licence": "MIT", "version": "7.1"}

    with pytest.raises(
        UserError, match=r"NKAT-Ray 7\.1 .* NKAT-Ray \d+\.\d+\.\d+ does not know: experts, rotary, licence;"
    ):
        Weights.from_bytes(rewritten(newer))


@pytest.mark.parametrize("fields", [{"config": [1]}, {"config": None}, {"mean": 0.5}, {"std": None}])
def test_a_header_of_another_shape_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="not NKAT weights"):
        Weights.from_bytes(rewritten(lambda header: header.update(fields)))


def test_weights_of_an_older_version_take_the_defaults_of_newer_fields() -> None:
    """Neither a version nor every field: the earliest weights had neither."""

    def older(header: dict[str, Any]) -> None:
        del header["version"], header["config"]["channel_shuffle"]

    assert Weights.from_bytes(rewritten(older)).config == dataclasses.replace(CONFIG, channel_shuffle=0.0)


@pytest.mark.parametrize("config", [CONFIG, TrialConfig(), TrialConfig(randaugment=None, ema=None, cutout=None)])
def test_a_configuration_survives_the_header(config: TrialConfig) -> None:
    assert Weights.from_bytes(weights(config=config).to_bytes()).config == config


# --- a training's state -----------------------------------------------------------------------------------------------


def test_a_state_comes_back(tmp_path: Path) -> None:
    save_state(tmp_path / "new" / "folder", STATE)
    after = load_state(tmp_path / "new" / "folder")
    assert after.keys() == STATE.keys()
    assert (after["epoch"], after["ema"], after["best"]) == (3, None, 0.5)
    assert same_bits(after["model"]["w"], STATE["model"]["w"])
    assert torch.equal(after["random"], STATE["random"])


def test_a_state_cut_short_at_any_byte_is_found_out(tmp_path: Path) -> None:
    save_state(tmp_path, {"x": torch.arange(4)})
    for path in tmp_path.iterdir():
        data = path.read_bytes()
        for size in range(len(data)):
            path.write_bytes(data[:size])
            with pytest.raises(CheckpointError):
                load_state(tmp_path)
        path.write_bytes(data)
    assert load_state(tmp_path)["x"].tolist() == [0, 1, 2, 3]


def test_a_state_with_a_flipped_byte_is_found_out(tmp_path: Path) -> None:
    save_state(tmp_path, {"x": torch.arange(4)})
    for path in tmp_path.iterdir():
        data = path.read_bytes()
        for place in range(0, len(data), 3):
            path.write_bytes(data[:place] + bytes([data[place] ^ 0xFF]) + data[place + 1 :])
            with pytest.raises(CheckpointError):
                load_state(tmp_path)
        path.write_bytes(data)


def test_a_missing_file_is_found_out(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"state\.pt is missing"):
        load_state(tmp_path)


def test_a_state_that_would_run_code_is_refused(tmp_path: Path) -> None:
    """Whoever can write the file can write its digest: nothing but tensors and plain values is read."""

    class Bomb:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "exploded"),)

    save_state(tmp_path, {"x": Bomb()})
    with pytest.raises((pickle.UnpicklingError, CheckpointError)):
        load_state(tmp_path)
    assert not (tmp_path / "exploded").exists()


def test_the_first_whole_state_is_used(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("newest", "middle", "oldest")]
    for number, folder in enumerate(folders):
        save_state(folder, {"number": number})
    assert first_whole_state(folders) == (folders[0], {"number": 0})
    (folders[0] / STATE_FILE).write_bytes((folders[0] / STATE_FILE).read_bytes()[:-1])
    assert first_whole_state([tmp_path / "gone", *folders]) == (folders[1], {"number": 1})
    for folder in folders:
        (folder / STATE_FILE).unlink()
    assert first_whole_state(folders) is None
    assert first_whole_state([]) is None


def test_a_newer_state_replaces_an_older_one_in_its_folder(tmp_path: Path) -> None:
    for number in range(3):
        save_state(tmp_path, {"number": number})
    assert load_state(tmp_path) == {"number": 2}


# --- atomic writes ----------------------------------------------------------------------------------------------------


def full_disk(*_: Any, **__: Any) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("failing", [1, 2, 3])
def test_a_state_whose_writing_fails_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    """Whichever of the renamings it is at which the disk is full or the process is killed."""
    save_state(tmp_path, {"number": 1})
    calls = [0]
    replace = os.replace

    def fail_once(*arguments: Any) -> None:
        calls[0] += 1
        if calls[0] == failing:
            full_disk()
        replace(*arguments)

    monkeypatch.setattr(os, "replace", fail_once)
    try:
        save_state(tmp_path, {"number": 2})
    except OSError:
        assert load_state(tmp_path) == {"number": 1}
    else:
        assert calls[0] < failing
        assert load_state(tmp_path) == {"number": 2}


def test_a_state_that_does_not_fit_leaves_the_old_one_and_no_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_state(tmp_path, {"number": 1})
    files = sorted(p.name for p in tmp_path.iterdir())
    monkeypatch.setattr(checkpoint_module.torch, "save", full_disk)
    with pytest.raises(OSError, match="No space"):
        save_state(tmp_path, {"number": 2})
    assert load_state(tmp_path) == {"number": 1}
    assert sorted(p.name for p in tmp_path.iterdir()) == files
