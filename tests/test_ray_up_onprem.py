"""docs/cluster.md's cluster of one's own machines, for real: `ray up`, two runs, a machine that dies, `ray down`.

Two machines stand in namespaces of this one, each with a real sshd (tests/onprem_cluster.py); the YAML and the commands
are read out of the document. The first run loses its worker in the middle of Stage 1; the machine comes back; the
second run has both from first to last. No packet leaves the machine.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

pytestmark = pytest.mark.cluster

SCRIPT = Path(__file__).with_name("onprem_cluster.py")
DATA = os.environ.get("NKAT_DATA_DIR")
DEADLINE_S = 1800.0  # a busy machine takes its time
OUTER = "unshare --mount --net --pid --fork --kill-child --mount-proc".split()  # when it ends, so does all inside
TOOLS = {"unshare": "util-linux", "ip": "iproute2", "sshd": "openssh-server", "ssh": "openssh-client", "rsync": "rsync"}
PROBE = "ip link add br0 type bridge && ip link add v1 type veth peer name v2 && unshare --uts --mount true"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What was found between `ray up` and `ray down`; `folder` has the outputs, and `shared` with the runs."""
    if os.getuid() != 0:
        pytest.skip("only root may make these namespaces and mounts")
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    for tool, package in TOOLS.items():
        if not shutil.which(tool, path=path):
            pytest.skip(f"there is no {tool}; Debian's package {package} has it")
    probe = subprocess.run([*OUTER, "sh", "-c", PROBE], capture_output=True, text=True, check=False)
    if probe.returncode:
        pytest.skip(f"this machine does not allow namespaces with a bridge in them: {probe.stderr.strip()}")
    if not DATA:
        pytest.skip("NKAT_DATA_DIR is unset: no real data")
    folder = tmp_path_factory.mktemp("onprem")
    try:
        done = subprocess.run(
            [*OUTER, sys.executable, SCRIPT, folder], capture_output=True, text=True, timeout=DEADLINE_S, check=False
        )
    except subprocess.TimeoutExpired:
        pytest.fail(f"not done within {DEADLINE_S:g} s\n{ends_of_outputs(folder)}")
    assert done.returncode == 0, f"{done.stdout}{done.stderr}\n{ends_of_outputs(folder)}"
    return {**json.loads((folder / "found.json").read_text()), "folder": folder}


def ends_of_outputs(folder: Path) -> str:
    return "\n".join(f"== {path.name}\n{path.read_text()[-3000:]}" for path in sorted(folder.glob("*.log")))


def output(cluster: Any, command: str) -> str:
    text: str = (cluster["folder"] / f"{command}.log").read_text()
    return text


def rows(cluster: Any, run: str, table: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = pq.read_table(cluster["folder"] / "shared" / run / f"{table}.parquet").to_pylist()
    return found


def summary(cluster: Any, run: str) -> Any:
    return json.loads((cluster["folder"] / "shared" / run / "summary.json").read_text())


def epochs(cluster: Any, run: str) -> list[tuple[int, int, str]]:
    """(trial, epoch, node) of every report, in order."""
    lines = (cluster["folder"] / "shared" / run / "journal.jsonl").read_text().splitlines()
    events = [event for event in map(json.loads, lines) if event["event"] == "result"]
    return [(event["trial"], event["row"]["epoch"], event["row"]["node"]) for event in events]


def test_nothing_but_the_two_machines_could_be_reached(cluster: Any) -> None:
    assert cluster["interfaces"] == ["br0", "lo", "vn1", "vn2"]


def test_ray_up_makes_a_cluster_that_the_doctor_finds_healthy(cluster: Any) -> None:
    assert (cluster["token"], cluster["up"]) == (0, 0), output(cluster, "up")
    assert cluster["doctor"] == 0, output(cluster, "doctor")
    for found in ("2 answered", "read and written", "demanded on every node", "not public"):
        assert found in output(cluster, "doctor")


@pytest.mark.parametrize("client", ["stranger", "forger"])
def test_a_client_without_the_token_is_refused(client: str, cluster: Any) -> None:
    assert cluster[client] == 2
    said = output(cluster, client)
    assert "Authentication token is missing or incorrect" in said  # the cluster's own answer
    assert "Ray refused this process" in said
    assert "RAY_AUTH_MODE must be token and ~/.ray/auth_token" in said  # what to do
    assert list((cluster["folder"] / client).glob("runs/*")) == []


def test_the_run_ends_with_its_results_on_the_shared_storage(cluster: Any) -> None:
    assert cluster["whole"] == 0, output(cluster, "whole")
    found = summary(cluster, "whole")
    assert (found["exit_code"], found["n_trials"]) == (0, 4)
    assert found["winner"]["trial"] in found["survivors"]
    assert {source["verified"] for source in found["data"].values()} == {True}
    for name in ("report.html", "best/model.safetensors", "optuna_journal.log"):
        assert (cluster["folder"] / "shared/whole" / name).stat().st_size > 0


def test_trials_ran_on_both_nodes(cluster: Any) -> None:
    assert {node for _, _, node in epochs(cluster, "whole")} == {"n1", "n2"}
    assert [(row["trial"], row["stop_reason"]) for row in rows(cluster, "whole", "trials")] == [
        (trial, "finished") for trial in range(4)
    ]


def test_stage_2_ran_on_both_nodes_with_weights_that_crossed_the_network(cluster: Any) -> None:
    trained = {row["trial"]: row["node"] for row in rows(cluster, "whole", "trials")}
    found = rows(cluster, "whole", "stage2")
    assert [row["error"] for row in found if row["status"] != "ok"] == []
    assert {row["node"] for row in found} == {"n1", "n2"}
    crossed = {(trained[row["trial"]], row["node"]) for row in found}
    assert ("n2", "n1") in crossed
    assert ("n1", "n2") in crossed
    assert "read from disk" not in " ".join(summary(cluster, "whole")["notices"])  # so through the object store


def test_a_run_whose_worker_dies_goes_on_from_the_last_checkpoint_and_ends(cluster: Any) -> None:
    assert cluster["killed"] == 0, output(cluster, "killed")
    orphan = cluster["orphan"]
    assert [(epoch, node) for trial, epoch, node in epochs(cluster, "killed") if trial == orphan] == [
        (1, "n2"),
        (2, "n1"),  # its second epoch, and not its first again: the checkpoint was on the shared storage
    ]
    ended = rows(cluster, "killed", "trials")
    assert [(row["trial"], row["stop_reason"], row["error"]) for row in ended] == [
        (trial, "finished", None) for trial in range(4)
    ]
    found = summary(cluster, "killed")
    assert any(f"trial {orphan} is retried after an error" in notice for notice in found["notices"])
    assert orphan in found["survivors"]
    assert [row["error"] for row in rows(cluster, "killed", "stage2") if row["status"] != "ok"] == []


def test_ray_down_leaves_nothing_of_ray_on_either_node(cluster: Any) -> None:
    assert all(any("raylet" in command for command in cluster["before"][node]) for node in ("n1", "n2"))
    assert cluster["down"] == 0, output(cluster, "down")
    assert cluster["stop"] == 0, output(cluster, "stop")
    assert cluster["after"] == {"n1": [], "n2": []}
