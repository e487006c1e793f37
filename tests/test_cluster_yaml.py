"""cluster.yaml: Ray's own validation, and what it opens, starts and spends. Nothing here needs AWS or a network."""

import copy
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "cluster.yaml").read_text()
WITHOUT_COMMENTS = re.sub(r"(^|\s)#.*", "", TEXT)


@pytest.fixture
def cluster() -> Any:
    return yaml.safe_load(TEXT)


@pytest.fixture
def workers(cluster: Any) -> dict[str, Any]:
    return {name: kind for name, kind in cluster["available_node_types"].items() if name != cluster["head_node_type"]}


def prepared(cluster: Any) -> Any:
    """As `ray up` prepares and validates it."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(copy.deepcopy(cluster))
    validate_config(config)
    return config


def test_ray_finds_the_file_valid_and_complete(cluster: Any) -> None:
    config = prepared(cluster)
    assert config["available_node_types"].keys() == {"head", "worker"}
    assert config["head_setup_commands"][: len(cluster["setup_commands"])] == cluster["setup_commands"]
    assert config["worker_setup_commands"][: len(cluster["setup_commands"])] == cluster["setup_commands"]


def test_the_validation_would_find_a_wrong_key(cluster: Any) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    cluster["idle_minutes"] = 5
    with pytest.raises(jsonschema.ValidationError, match="idle_minutes"):
        prepared(cluster)


def test_ssh_comes_from_one_range_and_nothing_else_is_open(cluster: Any) -> None:
    (rule,) = cluster["provider"]["security_group"]["IpPermissions"]
    assert (rule["IpProtocol"], rule["FromPort"], rule["ToPort"]) == ("tcp", 22, 22)
    assert set(rule) == {"IpProtocol", "FromPort", "ToPort", "IpRanges"}  # no second way in: IPv6, prefix lists, groups
    (source,) = rule["IpRanges"]
    assert source["CidrIp"].endswith("/32")
    for everywhere in ("0.0.0.0", "::/0"):
        assert everywhere not in TEXT


def test_what_a_user_edits_is_named_once() -> None:
    assert len(re.findall(r"\d+\.\d+\.\d+\.\d+/\d+", WITHOUT_COMMENTS)) == 1
    assert len(re.findall(r"s3://", WITHOUT_COMMENTS)) == 1
    assert len(re.findall(r"region:", WITHOUT_COMMENTS)) == 1
    edited = [line for line in TEXT.splitlines() if "# EDIT" in line]
    for word in ("region:", "CidrIp:", "NKAT_STORAGE_PATH=", "max_workers:", "InstanceType:"):
        assert any(word in line for line in edited), word


def test_nought_to_eight_spot_gpu_workers_that_leave_when_idle(cluster: Any, workers: dict[str, Any]) -> None:
    assert cluster["max_workers"] == 8
    assert cluster["idle_timeout_minutes"] == 5
    for kind in workers.values():
        assert (kind["min_workers"], kind["max_workers"]) == (0, 8)
        assert kind["resources"]["GPU"] == 1
        assert kind["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert cluster["provider"]["cache_stopped_nodes"] is False


def test_the_head_is_on_demand_and_runs_no_trial(cluster: Any) -> None:
    head = cluster["available_node_types"][cluster["head_node_type"]]
    assert "InstanceMarketOptions" not in head["node_config"]
    assert head["resources"] == {"CPU": 0}


def test_disks_are_encrypted_and_the_metadata_service_asks_for_a_token(cluster: Any) -> None:
    for kind in cluster["available_node_types"].values():
        (disk,) = kind["node_config"]["BlockDeviceMappings"]
        assert disk["Ebs"]["Encrypted"]
        assert disk["Ebs"]["DeleteOnTermination"]
        assert kind["node_config"]["MetadataOptions"]["HttpTokens"] == "required"


def test_every_node_has_the_token_and_asks_for_it(cluster: Any) -> None:
    environment = cluster["setup_commands"][0]
    assert re.search(r"export .*\bRAY_AUTH_MODE=token\b", environment)
    assert cluster["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"


def test_the_dashboard_stays_local_and_no_usage_is_reported(cluster: Any) -> None:
    (start,) = [command for command in cluster["head_start_ray_commands"] if "--head" in command]
    assert "--dashboard-host=127.0.0.1" in start.split()
    assert "--disable-usage-stats" in start.split()  # `ray up` overrules the environment, but not the flag
    assert "RAY_USAGE_STATS_ENABLED=0" in cluster["setup_commands"][0]


def test_the_storage_path_is_what_the_program_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    from nkat_ray.config import RunConfig

    (path,) = re.findall(r"export NKAT_STORAGE_PATH=(\S+)", TEXT)
    monkeypatch.setenv("NKAT_STORAGE_PATH", path)
    assert RunConfig.from_preset("round2").storage_path == path


def test_the_project_travels_without_environment_runs_and_history(cluster: Any) -> None:
    sources = [source for source in cluster["file_mounts"].values() if not source.startswith("~")]
    assert [name for name in sources if name != "uv.lock" and not (ROOT / name).exists()] == []
    assert {"nkat_ray", "tune_round2.py", "pyproject.toml", "uv.lock"} <= set(sources)
    assert not {".", ".venv", "runs", ".git"} & set(sources)  # Ray reads every mounted file to see what changed
    build = (ROOT / "pyproject.toml").read_text()
    for needed in re.findall(r'^readme = "(.+)"', build, re.MULTILINE):
        assert needed in sources


def test_every_node_installs_the_locked_versions(cluster: Any) -> None:
    assert any("uv sync --frozen" in command for command in cluster["setup_commands"])


# --- docs/cluster.md --------------------------------------------------------------------------------------------------

DOCUMENT = (ROOT / "docs/cluster.md").read_text()
BLOCKS = [yaml.safe_load(block) for block in re.findall(r"^```yaml\n(.*?)^```$", DOCUMENT, re.MULTILINE | re.DOTALL)]


def documented(kind: str) -> Any:
    (found,) = [block for block in BLOCKS if block.get("provider", {}).get("type") == kind]
    return found


def test_the_variant_for_machines_of_ones_own_is_valid_and_asks_for_the_token() -> None:
    config = prepared(documented("local"))
    assert config["provider"]["type"] == "local"
    assert "RAY_AUTH_MODE=token" in config["setup_commands"][0]
    assert "~/.ray/auth_token" in config["file_mounts"]
    assert any("--dashboard-host=127.0.0.1" in command for command in config["head_start_ray_commands"])


def test_the_variant_for_gcp_replaces_parts_of_the_file_and_is_valid(cluster: Any) -> None:
    config = prepared({**cluster, **documented("gcp")})
    kinds = config["available_node_types"]
    assert kinds["worker"]["node_config"]["scheduling"][0]["preemptible"]
    assert "scheduling" not in kinds["head"]["node_config"]
    assert (kinds["worker"]["min_workers"], kinds["worker"]["max_workers"]) == (0, 8)


def test_the_variant_for_kubernetes_has_the_same_limits() -> None:
    (found,) = [block["spec"] for block in BLOCKS if block.get("kind") == "RayCluster"]
    (workers,) = found["workerGroupSpecs"]
    assert (workers["minReplicas"], workers["maxReplicas"]) == (0, 8)
    assert found["autoscalerOptions"]["idleTimeoutSeconds"] == 300
    assert found["authOptions"] == {"mode": "token"}
    assert found["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


def ray_commands() -> list[list[str]]:
    """Every command of Ray's that the document shows, without what comes before it on its line."""
    bash = "\n".join(re.findall(r"^```bash\n(.*?)^```$", DOCUMENT, re.MULTILINE | re.DOTALL))
    return [shlex.split(match) for match in re.findall(r"(?:^|uv run )ray (.+)$", bash, re.MULTILINE)]


@pytest.mark.parametrize("words", ray_commands(), ids=" ".join)
def test_rays_commands_exist_with_their_flags(words: list[str]) -> None:
    from ray.scripts.scripts import cli

    command: Any = cli
    while words and hasattr(command, "commands") and words[0] in command.commands:
        command, words = command.commands[words[0]], words[1:]
    assert command is not cli
    known = {flag for parameter in command.params for flag in (*parameter.opts, *parameter.secondary_opts)}
    own = words[: words.index("--")] if "--" in words else words
    assert {word.split("=")[0] for word in own if word.startswith("--")} - known == set()
