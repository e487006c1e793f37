"""The checkpoint vault: survivors' weights in the Ray object store, outliving the trial that made them.

`ray.put` inside a trial dies with the trial's process. The *value* therefore goes to this actor, which puts it itself
and so owns it. It does not outlive the cluster: each weight is also in the trial's checkpoint on disk.
"""

import uuid
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

NAMESPACE = "nkat-ray"


@ray.remote(num_cpus=0)
class Vault:
    """Holds references to survivors' weights (the bytes of `train.checkpoint.Weights`)."""

    def __init__(self) -> None:
        self._held: dict[int, tuple[float, ray.ObjectRef[bytes]]] = {}

    def put(self, trial: int, score: float, payload: bytes) -> None:
        """Hold a trial's weights unless better ones are held; the worse are released."""
        if trial not in self._held or score >= self._held[trial][0]:
            self._held[trial] = (score, ray.put(payload))

    def reference(self, trial: int) -> "list[ray.ObjectRef[bytes]]":
        """The reference in a list (empty if none is held), so that Ray hands it on instead of the value."""
        return [self._held[trial][1]] if trial in self._held else []

    def release(self, trial: int) -> None:
        """Let a trial's weights go."""
        self._held.pop(trial, None)


def open_vault(name: str) -> ActorHandle[Any]:
    """A vault of this driver alone: the handle travels by hand, and the name is only for people (`ray list actors`).

    It lives on the driver's node, the head as a rule: a worker may be a spot instance.
    """
    actor: Any = Vault  # ray.remote's stub does not know `options`
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    handle: ActorHandle[Any] = actor.options(
        name=f"vault-{name}-{uuid.uuid4().hex[:8]}", namespace=NAMESPACE, scheduling_strategy=here
    ).remote()
    return handle


def deposit(vault: ActorHandle[Any], trial: int, score: float, payload: bytes) -> bool:
    """Hand weights to the vault and wait until it holds them; False if the vault is gone (the disk still has them)."""
    try:
        ray.get(vault.put.remote(trial, score, payload))
    except RayActorError:
        return False
    return True


def release(vault: ActorHandle[Any], trial: int) -> None:
    """Let a trial's weights go; does not wait. A vault that is gone holds nothing."""
    vault.release.remote(trial)


def withdraw(vault: ActorHandle[Any], trial: int) -> "ray.ObjectRef[bytes] | None":
    """Reference to a trial's weights; None if the vault is gone or never had them."""
    try:
        held: list[ray.ObjectRef[bytes]] = ray.get(vault.reference.remote(trial))
    except RayActorError:
        return None
    return held[0] if held else None
