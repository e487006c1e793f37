"""The vault: an actor that owns the survivors' weights in Ray's object store, so that they outlive their trials.

An object that a trial puts into the store is lost with the trial's process. A trial therefore sends the value to this
actor, which puts it into the store. The vault does not outlive the cluster; the trials' checkpoints on disk also
contain all weights.
"""

import uuid
from typing import Any, Final

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

NAMESPACE: Final = "nkat-ray"


@ray.remote(num_cpus=0)
class Vault:
    """Own the best weights of each survivor, as bytes of `train.checkpoint.Weights`."""

    def __init__(self) -> None:
        self._kept: dict[int, tuple[float, ray.ObjectRef[bytes]]] = {}

    def put(self, trial: int, score: float, payload: bytes) -> None:
        """Keep a trial's weights, unless better ones are kept already."""
        if trial not in self._kept or score >= self._kept[trial][0]:
            self._kept[trial] = (score, ray.put(payload))

    def references(self, trial: int) -> "list[ray.ObjectRef[bytes]]":
        """Return the reference to a trial's weights in a list (Ray would resolve a bare one); [] if there are none."""
        return [self._kept[trial][1]] if trial in self._kept else []

    def release(self, trial: int) -> None:
        """Free a trial's weights."""
        self._kept.pop(trial, None)


def open_vault(name: str) -> ActorHandle[Any]:
    """Start this driver's vault on the driver's node, since a worker node may be a spot instance."""
    actor: Any = Vault  # ray.remote's stub has no `options`
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    handle: ActorHandle[Any] = actor.options(
        name=f"vault-{name}-{uuid.uuid4().hex[:8]}", namespace=NAMESPACE, scheduling_strategy=here
    ).remote()
    return handle


def deposit(vault: ActorHandle[Any], trial: int, score: float, payload: bytes) -> bool:
    """Send weights to the vault, and wait; return False if it is gone, so that the weights are on disk only."""
    try:
        ray.get(vault.put.remote(trial, score, payload))
    except RayActorError:
        return False
    return True


def withdraw(vault: ActorHandle[Any], trial: int) -> "ray.ObjectRef[bytes] | None":
    """Return a reference to a trial's weights; None if the vault is gone or does not have them."""
    try:
        references: list[ray.ObjectRef[bytes]] = ray.get(vault.references.remote(trial))
    except RayActorError:
        return None
    return references[0] if references else None


def release(vault: ActorHandle[Any], trial: int) -> None:
    """Free a trial's weights, without waiting; does nothing if the vault is gone."""
    vault.release.remote(trial)
