import time
import uuid
from collections.abc import Iterator
from typing import Any

import pytest

from nkat_ray.search.vault import deposit, open_vault, withdraw

PAYLOAD = bytes(range(256)) * 1000  # above Ray's limit for values that travel inside a message


@pytest.fixture(scope="module")
def shared(ray_local: Any) -> Iterator[tuple[str, Any]]:
    """One vault for all tests (an actor takes seconds to start), with its name."""
    name = f"test-{uuid.uuid4().hex}"
    handle = open_vault(name)
    yield name, handle
    ray_local.kill(handle)


@pytest.fixture
def vault(shared: tuple[str, Any], ray_local: Any) -> Any:
    """The vault, emptied."""
    ray_local.get([shared[1].release.remote(trial) for trial in range(6)])
    return shared[1]


def kill(ray: Any, actor: Any) -> None:
    """Kill an actor and wait until it is gone: Ray returns before that, and until then it may answer."""
    ray.kill(actor)
    limit = time.monotonic() + 60
    while time.monotonic() < limit:
        try:
            ray.get(actor.__ray_ready__.remote())
        except ray.exceptions.RayActorError:
            return
        time.sleep(0.05)
    pytest.fail("the actor still answers a minute after it was killed")


def held(ray: Any, vault: Any, trial: int) -> bytes | None:
    reference = withdraw(vault, trial)
    return None if reference is None else ray.get(reference)


def test_what_is_deposited_can_be_withdrawn_byte_for_byte(ray_local: Any, vault: Any) -> None:
    assert deposit(vault, 3, 0.6, PAYLOAD)
    assert held(ray_local, vault, 3) == PAYLOAD
    assert held(ray_local, vault, 3) == PAYLOAD  # withdrawing takes nothing out


def test_a_trial_without_a_deposit_has_none(ray_local: Any, vault: Any) -> None:
    assert withdraw(vault, 3) is None


@pytest.mark.parametrize(
    ("first", "second", "kept"), [(0.6, 0.7, b"second"), (0.7, 0.6, b"first"), (0.6, 0.6, b"second")]
)
def test_better_weights_replace_and_worse_do_not(
    ray_local: Any, vault: Any, first: float, second: float, kept: bytes
) -> None:
    deposit(vault, 0, first, b"first")
    deposit(vault, 0, second, b"second")
    assert held(ray_local, vault, 0) == kept


def test_trials_are_kept_apart_and_released_alone(ray_local: Any, vault: Any) -> None:
    deposit(vault, 0, 0.6, b"zero")
    deposit(vault, 1, 0.7, b"one")
    ray_local.get(vault.release.remote(0))
    ray_local.get(vault.release.remote(7))  # never there
    assert held(ray_local, vault, 0) is None
    assert held(ray_local, vault, 1) == b"one"


def test_a_value_survives_the_process_that_deposited_it(ray_local: Any, vault: Any) -> None:
    class Trial:
        def train(self, vault: Any) -> bool:
            from nkat_ray.search.vault import deposit

            return deposit(vault, 5, 0.7, bytes(range(256)) * 1000)

    trial = ray_local.remote(num_cpus=0)(Trial).remote()
    assert ray_local.get(trial.train.remote(vault))
    kill(ray_local, trial)
    assert held(ray_local, vault, 5) == PAYLOAD


def test_a_task_takes_the_reference_as_its_argument(ray_local: Any, vault: Any) -> None:
    """The weights go from the store to the task; the driver never holds them."""
    deposit(vault, 0, 0.6, PAYLOAD)
    size = ray_local.remote(num_cpus=0)(lambda payload: len(payload))
    assert ray_local.get(size.remote(withdraw(vault, 0))) == len(PAYLOAD)


def test_two_runs_of_one_name_have_two_vaults(ray_local: Any, vault: Any, shared: tuple[str, Any]) -> None:
    deposit(vault, 0, 0.6, b"x")
    assert held(ray_local, open_vault(shared[0]), 0) is None


def test_another_run_has_another_vault_and_one_that_is_gone_gives_none_and_takes_nothing(
    ray_local: Any, vault: Any
) -> None:
    other = open_vault(f"test-{uuid.uuid4().hex}")
    deposit(vault, 0, 0.6, b"x")
    assert withdraw(other, 0) is None
    assert deposit(other, 0, 0.6, b"y")
    kill(ray_local, other)
    assert not deposit(other, 0, 0.7, b"z")
    assert withdraw(other, 0) is None
