"""`python -m nkat_ray.cluster.ping HOST:PORT typed|found`: check for a Ray cluster with a node on this machine.

This is a separate process, because Ray's client waits for minutes and may end its process. If the driver of a search
could not connect, it prints one line and ends with exit code 1.
"""

import sys
import time
from typing import Final

from ray._private import services
from ray._private.authentication.authentication_token_setup import (
    ensure_token_if_auth_enabled,
    maybe_enable_token_auth_if_token_available,
)
from ray._raylet import GcsClient  # type: ignore[attr-defined, unused-ignore]
from ray.core.generated.gcs_pb2 import GcsNodeInfo  # type: ignore[attr-defined, unused-ignore]
from ray.exceptions import AuthenticationError, RayError

NODE_S: Final = 5.0  # a node that has just been started appears within this time
TOKEN_SIGNS: Final = ("token", "Unauthenticated")
TOKEN_ADVICE: Final = (
    "if the cluster requires a token, RAY_AUTH_MODE must be token and ~/.ray/auth_token must contain the cluster's"
)


def problem(endpoint: str, *, found: bool) -> str | None:
    """Return why a driver on this machine could not connect; None if it could.

    Args:
        found: whether Ray found the address itself (`auto`), in which case it also uses the user's token.
    """
    if found:
        maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
    address = services.canonicalize_bootstrap_address(endpoint)
    try:
        ensure_token_if_auth_enabled(create_token_if_missing=False)
        client = GcsClient(address=address)
        end = time.monotonic() + NODE_S
        while not _here(client):
            if time.monotonic() > end:
                return (
                    "a Ray cluster answers there, but this machine is not one of its nodes; start the search on one of "
                    f"them, or join first: ray start --address={endpoint}"
                )
            time.sleep(0.5)
    except (RayError, AuthenticationError) as error:
        reason = str(error).strip().rstrip(":").split(". ")[0]
        if any(sign in str(error) for sign in TOKEN_SIGNS):
            return f"Ray refused this process ({reason}); {TOKEN_ADVICE}"
        return f"no Ray cluster answers there ({reason})"
    return None


def _here(client: GcsClient) -> bool:
    """Return whether a living node of the cluster runs on this machine."""
    alive = client.get_all_node_info(timeout=NODE_S, state_filter=GcsNodeInfo.GcsNodeState.ALIVE)
    return bool({node.hex() for node in alive} & set(services.find_node_ids()))


if __name__ == "__main__":
    trouble = problem(sys.argv[1], found=sys.argv[2] == "found")
    if trouble:
        print(trouble)
    sys.exit(1 if trouble else 0)
