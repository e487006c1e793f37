"""What is kept of a training: its whole state (to continue) and its best weights (to evaluate).

Both are written atomically. The state carries a digest, so that one cut short on disk is found out; the weights are
safetensors with the configuration that rebuilds them in the header. Nothing is unpickled.
"""

import hashlib
import io
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from nkat_ray.config import TrialConfig
from nkat_ray.files import write_atomically
from nkat_ray.model import NKATVisionTransformer, create_nkat_vit

STATE_FILE = "state.pt"
DIGEST_BYTES = hashlib.sha256().digest_size


class CheckpointError(RuntimeError):
    """A checkpoint that is not whole."""


@dataclass(frozen=True, kw_only=True)
class Weights:
    """A trained network as bytes, and what is needed to rebuild it. What the vault holds and Stage 2 reads."""

    config: TrialConfig
    dataset: str
    num_classes: int
    grey: bool
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    epoch: int
    val_accuracy: float
    seed: int
    tensors: Mapping[str, torch.Tensor]

    def build(self) -> NKATVisionTransformer:
        """The network with these weights, on the CPU, in evaluation mode."""
        model: NKATVisionTransformer = create_nkat_vit(
            self.config, num_classes=self.num_classes, grey=self.grey, mean=self.mean, std=self.std
        )
        model.load_state_dict(dict(self.tensors))
        model.eval()
        return model

    def to_bytes(self) -> bytes:
        """Safetensors, with everything else as JSON in the header."""
        header = {key: value for key, value in vars(self).items() if key not in ("tensors", "config")}
        header["config"] = asdict(self.config)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.tensors.items()}
        return safetensors.torch.save(tensors, metadata={"nkat": json.dumps(header)})

    @classmethod
    def from_bytes(cls, data: bytes) -> "Weights":
        """The inverse of `to_bytes`.

        Raises:
            CheckpointError: not such a file, or cut short.
        """
        try:
            size = int.from_bytes(data[:8], "little")
            header = json.loads(json.loads(data[8 : 8 + size])["__metadata__"]["nkat"])
            tensors = safetensors.torch.load(data)
        except (ValueError, KeyError, safetensors.SafetensorError) as error:
            raise CheckpointError(f"not NKAT weights, or cut short ({type(error).__name__}: {error})") from error
        header["config"] = config_from_json(header["config"])
        return cls(**{**header, "mean": tuple(header["mean"]), "std": tuple(header["std"])}, tensors=tensors)


def config_from_json(fields: Mapping[str, Any]) -> TrialConfig:
    """A TrialConfig from JSON, which knows no tuples."""
    values: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in fields.items()}
    return TrialConfig(**values)


def save_state(folder: Path, state: Mapping[str, Any]) -> None:
    """Write a training's state into a folder: one file, its digest first, so that one renaming replaces all of it."""
    folder.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO(bytes(DIGEST_BYTES))
    buffer.seek(DIGEST_BYTES)
    torch.save(dict(state), buffer)
    data = buffer.getbuffer()
    data[:DIGEST_BYTES] = hashlib.sha256(data[DIGEST_BYTES:]).digest()
    write_atomically(folder / STATE_FILE, data)


def load_state(folder: Path) -> dict[str, Any]:
    """Read a training's state.

    Raises:
        CheckpointError: the file is missing, or is not the one that was written.
    """
    path = folder / STATE_FILE
    try:
        data = memoryview(path.read_bytes())
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing") from error
    if hashlib.sha256(data[DIGEST_BYTES:]).digest() != data[:DIGEST_BYTES]:
        raise CheckpointError(f"{path} is damaged or cut short: its SHA-256 is not the one that it begins with")
    state: dict[str, Any] = torch.load(io.BytesIO(data[DIGEST_BYTES:]), map_location="cpu", weights_only=True)
    return state


def first_whole_state(folders: Iterable[Path]) -> tuple[Path, dict[str, Any]] | None:
    """The first folder, newest first, whose state is whole, with the state; None if there is none."""
    for folder in folders:
        try:
            return folder, load_state(folder)
        except CheckpointError:
            continue  # cut short while it was written: the one before it is used
    return None
