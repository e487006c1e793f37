"""Find the survivors' weights, as bytes of safetensors: in the vault, in checkpoints, and below `stage2/`."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.tune import Checkpoint

from nkat_ray.files import STAGE2_FOLDER, WEIGHTS_FILE
from nkat_ray.search.vault import release, withdraw
from nkat_ray.stage2.survivor import Survivor
from nkat_ray.train.checkpoint import CheckpointError, Weights


def transferred_file(folder: Path, trial: int, dataset: str) -> Path:
    """Return the file of a survivor's weights for a dataset; the validation writes it, the test reads it."""
    return folder / STAGE2_FOLDER / f"trial_{trial:04d}-{dataset}.safetensors"


def weights_on_disk(checkpoints: Sequence[str]) -> bytes | None:
    """Return the weights of the first checkpoint that is intact; None if there is none.

    Args:
        checkpoints: paths or URIs, newest first.
    """
    for path in checkpoints:
        try:
            with Checkpoint(path).as_directory() as folder:
                payload = (Path(folder) / WEIGHTS_FILE).read_bytes()
            Weights.from_bytes(payload)
            return payload
        except (FileNotFoundError, CheckpointError):
            continue  # removed, or truncated while it was written: use the one before it
    return None


class WeightSource:
    """Fetch survivors' weights by reference, each once: from the vault, else from disk with a notice."""

    def __init__(self, vault: ActorHandle[Any], notice: Callable[[str], None]) -> None:
        self._vault, self._notice = vault, notice
        self._references: dict[int, ray.ObjectRef[bytes] | None] = {}

    def get(self, survivor: Survivor) -> "ray.ObjectRef[bytes] | None":
        """Return a reference to a survivor's weights; None if neither the vault nor the disk has them."""
        if survivor.trial not in self._references:
            reference = withdraw(self._vault, survivor.trial)
            self._references[survivor.trial] = self.from_disk(survivor) if reference is None else reference
        return self._references[survivor.trial]

    def from_disk(self, survivor: Survivor) -> "ray.ObjectRef[bytes] | None":
        """Read a survivor's weights from disk into the object store; return the reference, None without weights."""
        payload = weights_on_disk(survivor.checkpoints)
        if payload is None:
            return None
        self._notice(f"trial {survivor.trial}: its weights were not in the object store and were read from disk")
        self._references[survivor.trial] = reference = ray.put(payload)
        return reference

    def forget(self, survivor: Survivor) -> None:
        """Forget a survivor's reference, so that `get` fetches the newest weights."""
        self._references.pop(survivor.trial, None)

    def release(self, survivor: Survivor) -> None:
        """Free a survivor's weights here and in the vault."""
        self._references.pop(survivor.trial, None)
        release(self._vault, survivor.trial)
