"""Store a training: its complete state, to continue it, and its best weights, to evaluate them.

Both files are written atomically. The state has a digest, so that a truncated file is detected; the weights are
safetensors whose header has the configuration that is needed to build the network. No file is unpickled.
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

from nkat_ray import __version__
from nkat_ray.config import TrialConfig, config_of_json, field_names
from nkat_ray.errors import UserError
from nkat_ray.files import write_atomically
from nkat_ray.model import NKATVisionTransformer, create_nkat_vit

STATE_FILE = "state.pt"
DIGEST_BYTES = hashlib.sha256().digest_size


class CheckpointError(RuntimeError):
    """A checkpoint that is missing, damaged or truncated."""


@dataclass(frozen=True, kw_only=True)
class Weights:
    """A trained network as tensors, with all that is needed to build it again: the input of Stage 2.

    `mean` and `std` are the normalisation's, one value per channel, 0..1; `val_accuracy` is a fraction, 0..1.
    """

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
        """Build the network with these weights, on the CPU, in evaluation mode."""
        model: NKATVisionTransformer = create_nkat_vit(
            self.config, num_classes=self.num_classes, grey=self.grey, mean=self.mean, std=self.std
        )
        model.load_state_dict(dict(self.tensors))
        model.eval()
        return model

    def to_bytes(self) -> bytes:
        """Serialise as safetensors; the other fields and the package's version go into the header as JSON."""
        header = {key: value for key, value in vars(self).items() if key not in ("tensors", "config")}
        header |= {"config": asdict(self.config), "version": __version__}
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.tensors.items()}
        return safetensors.torch.save(tensors, metadata={"nkat": json.dumps(header)})

    @classmethod
    def from_bytes(cls, data: bytes) -> "Weights":
        """Read what `to_bytes` wrote.

        Raises:
            CheckpointError: these are no NKAT weights, or they are truncated.
            UserError: another version wrote them, with fields that this one does not know.
        """
        try:
            size = int.from_bytes(data[:8], "little")
            header = json.loads(json.loads(data[8 : 8 + size])["__metadata__"]["nkat"])
            tensors = safetensors.torch.load(data)
            config, version = header.pop("config"), header.pop("version", "unknown")
            header |= {"mean": tuple(header["mean"]), "std": tuple(header["std"])}
            unknown = sorted(config.keys() - set(field_names(TrialConfig)))
            unknown += sorted(header.keys() - set(field_names(cls)))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, safetensors.SafetensorError) as error:
            raise CheckpointError(f"not NKAT weights, or truncated ({type(error).__name__}: {error})") from error
        if unknown:
            raise UserError(
                f"the weights were written by NKAT-Ray {version} and have fields that NKAT-Ray {__version__} does not "
                f"know: {', '.join(unknown)}; use the version that wrote them, or a newer one"
            )
        return cls(**header, config=config_of_json(TrialConfig, config), tensors=tensors)


def read_weights(path: Path) -> Weights:
    """Read a file of weights; nothing in it is executed.

    Raises:
        UserError: it is missing or damaged, or another version wrote it.
    """
    try:
        return Weights.from_bytes(path.read_bytes())
    except (CheckpointError, OSError, TypeError, ValueError) as error:
        raise UserError(f"{path} holds no readable model: {error}") from error


def save_state(folder: Path, state: Mapping[str, Any]) -> None:
    """Write a training's state into a folder, made if needed, so that a crash leaves the old one or the new one."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / STATE_FILE, state_bytes(state))


def state_bytes(state: Mapping[str, Any]) -> memoryview:
    """Serialise a training's state: its SHA-256, then what `torch.save` makes of it."""
    buffer = io.BytesIO(bytes(DIGEST_BYTES))
    buffer.seek(DIGEST_BYTES)
    torch.save(dict(state), buffer)
    data = buffer.getbuffer()
    data[:DIGEST_BYTES] = hashlib.sha256(data[DIGEST_BYTES:]).digest()
    return data


def load_state(folder: Path) -> dict[str, Any]:
    """Read a training's state.

    Raises:
        CheckpointError: the file is missing, damaged or truncated.
    """
    path = folder / STATE_FILE
    try:
        data = memoryview(path.read_bytes())
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing") from error
    if hashlib.sha256(data[DIGEST_BYTES:]).digest() != data[:DIGEST_BYTES]:
        raise CheckpointError(f"{path} is damaged or truncated: its SHA-256 is not the one that it begins with")
    state: dict[str, Any] = torch.load(io.BytesIO(data[DIGEST_BYTES:]), map_location="cpu", weights_only=True)
    return state


def first_whole_state(folders: Iterable[Path]) -> tuple[Path, dict[str, Any]] | None:
    """Return the first folder whose state is whole, with the state; None if there is none.

    Args:
        folders: newest first. A process that was killed while it wrote leaves a truncated state in the newest.
    """
    for folder in folders:
        try:
            return folder, load_state(folder)
        except CheckpointError:
            continue
    return None
