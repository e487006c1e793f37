"""`ray up cluster.yaml` itself, against moto's imitation of AWS on localhost, up to the head instance.

The imitation ends where Ray goes on to ssh: the instance has an address that moto invented and that belongs to
somebody. Therefore all of it runs in a network namespace with nothing but the loopback (`unshare -n`): no packet leaves
the machine. What lies beyond (setup commands, Ray's start, workers) is not tested here.
"""

import fcntl
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.cluster

ROOT = Path(__file__).resolve().parents[1]
PORT = 5566
PUBLIC_IMAGE = "ami-amazon-linux-latest/al2023-ami-kernel-default-x86_64"  # moto has none of the deep-learning images
DEADLINE_S = 240.0


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What stands in the imitated account after `ray up`, and what it said."""
    for module in ("boto3", "moto.server", "flask"):
        pytest.importorskip(module, reason=f"{module} is not installed")
    unshare = ["unshare", "--net", "--pid", "--fork", "--kill-child"] + (
        [] if os.getuid() == 0 else ["--map-root-user"]
    )
    if not shutil.which("unshare") or subprocess.run([*unshare, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this machine does not allow network namespaces (unshare --net)")
    if not (ROOT / "uv.lock").exists():
        pytest.skip("there is no uv.lock, which cluster.yaml takes to the nodes; `uv sync` writes it")
    folder = tmp_path_factory.mktemp("account")
    done = subprocess.run(
        [*unshare, sys.executable, __file__, str(folder)],
        capture_output=True,
        text=True,
        timeout=2 * DEADLINE_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((folder / "found.json").read_text())


def test_nothing_but_the_loopback_could_be_reached(launched: Any) -> None:
    assert launched["interfaces"] == ["lo"]


def test_one_head_and_no_worker_was_started(launched: Any) -> None:
    (head,) = launched["instances"]
    assert head["InstanceType"] == "m7i.large"
    assert "InstanceLifecycle" not in head  # on demand
    tags = {tag["Key"]: tag["Value"] for tag in head["Tags"]}
    assert tags["ray-cluster-name"] == "nkat-ray"
    assert tags["ray-node-type"] == "head"
    assert tags["ray-user-node-type"] == "head"


def test_its_disk_is_the_files(launched: Any) -> None:
    (disk,) = launched["volumes"]
    assert (disk["Size"], disk["VolumeType"], disk["Encrypted"]) == (150, "gp3", True)


def test_its_only_group_lets_in_the_cluster_and_one_address_by_ssh(launched: Any) -> None:
    (head,), groups = launched["instances"], {group["GroupId"]: group for group in launched["groups"]}
    (own,) = head["SecurityGroups"]
    assert own["GroupName"] == "nkat-ray"
    rules = groups[own["GroupId"]]["IpPermissions"]
    assert [(r["FromPort"], r["ToPort"], r["IpRanges"][0]["CidrIp"]) for r in rules if r["IpRanges"]] == [
        (22, 22, "198.51.100.4/32")
    ]
    others = [r for r in rules if not r["IpRanges"]]
    assert [pair["GroupId"] for r in others for pair in r["UserIdGroupPairs"]] == [own["GroupId"]]
    assert "0.0.0.0/0" not in json.dumps(rules)


def test_it_has_a_role_and_a_key(launched: Any) -> None:
    (head,) = launched["instances"]
    assert head["IamInstanceProfile"]["Arn"].endswith("ray-autoscaler-v1")
    assert head["KeyName"] in launched["keys"]


def test_ray_then_went_on_to_ssh_and_no_further(launched: Any) -> None:
    assert "Waiting for SSH" in launched["log"]
    assert "Running setup commands" not in launched["log"]


# --- inside the namespace ---------------------------------------------------------------------------------------------


def _inside(folder: Path) -> None:
    """Loopback, moto's server, `ray up`, what it made. All processes end with this one, the first of the namespace."""
    _loopback_up()
    home = folder / "home"
    (home / ".ray").mkdir(parents=True)
    (home / ".ray" / "auth_token").write_text("0" * 64)
    text = (ROOT / "cluster.yaml").read_text().replace("203.0.113.7/32", "198.51.100.4/32")
    text = text.replace("s3://edit-me/", "s3://our-bucket/")
    start, end = text.index("resolve:ssm:/aws/service/"), text.index("/ami-id")
    text = text[:start] + f"resolve:ssm:/aws/service/{PUBLIC_IMAGE}" + text[end + len("/ami-id") :]
    (folder / "cluster.yaml").write_text(text)
    environment = {
        **os.environ, "HOME": str(home),
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{PORT}", "AWS_DEFAULT_REGION": "eu-central-1",
        "AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "MOTO_IAM_LOAD_MANAGED_POLICIES": "true",
        "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "token", "PYTHONUNBUFFERED": "1",
    }  # fmt: skip
    os.environ.update(environment)
    subprocess.Popen(
        [sys.executable, "-c", f"from moto.server import main; main(['-H', '127.0.0.1', '-p', '{PORT}'])"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    _wait_for(lambda: urllib.request.urlopen(f"http://127.0.0.1:{PORT}/moto-api/").status == 200)
    code = "from ray.scripts.scripts import main; main()"
    with (folder / "log").open("w") as log:
        arguments = ["up", "-y", "--no-config-cache", str(folder / "cluster.yaml")]
        up = subprocess.Popen([sys.executable, "-c", code, *arguments], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
    _wait_for(lambda: up.poll() is not None or "Waiting for SSH" in (folder / "log").read_text())
    time.sleep(8)  # it tries, and goes nowhere
    found = {**_account(), "log": (folder / "log").read_text(), "interfaces": [n for _, n in socket.if_nameindex()]}
    (folder / "found.json").write_text(json.dumps(found, default=str))


def _loopback_up() -> None:
    """As `ip link set lo up`, which not every machine has."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as handle:
        request = struct.pack("16sh", b"lo", 0x1 | 0x40)  # IFF_UP, IFF_RUNNING
        fcntl.ioctl(handle, 0x8914, request)  # SIOCSIFFLAGS


def _wait_for(condition: Any) -> None:
    end = time.monotonic() + DEADLINE_S
    while time.monotonic() < end:
        try:
            if condition():
                return
        except OSError:
            pass
        time.sleep(0.5)
    raise TimeoutError(f"not within {DEADLINE_S:g} s")


def _account() -> dict[str, Any]:
    import boto3

    ec2 = boto3.client("ec2")
    instances = [i for r in ec2.describe_instances()["Reservations"] for i in r["Instances"]]
    ids = [disk["Ebs"]["VolumeId"] for i in instances for disk in i["BlockDeviceMappings"]]
    return {
        "instances": instances,
        "volumes": ec2.describe_volumes(VolumeIds=ids)["Volumes"] if ids else [],
        "groups": ec2.describe_security_groups()["SecurityGroups"],
        "keys": [key["KeyName"] for key in ec2.describe_key_pairs()["KeyPairs"]],
    }


if __name__ == "__main__":
    _inside(Path(sys.argv[1]))
