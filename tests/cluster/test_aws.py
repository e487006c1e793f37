"""The AWS provider, against moto's imitation of EC2 and IAM in this process: what is made before a node starts.

The imitation ends there: it has neither Amazon's deep-learning images nor instances that could be reached by ssh.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

pytest.importorskip("boto3", reason="boto3 is not installed")
moto = pytest.importorskip("moto", reason="moto is not installed")

import boto3  # noqa: E402
from ray.autoscaler._private.util import prepare_config  # noqa: E402

from nkat_ray.cluster import aws  # noqa: E402

REGION = "eu-central-1"
PUBLIC_IMAGE = "/aws/service/ami-amazon-linux-latest/al2023-ami-kernel-default-x86_64"  # one that moto has


@pytest.fixture(scope="module")
def cloud(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """An account in this process, empty at first; Ray's waiting for real IAM is left out."""
    with pytest.MonkeyPatch.context() as patch, moto.mock_aws(config={"iam": {"load_aws_managed_policies": True}}):
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "testing")
        patch.setenv("AWS_DEFAULT_REGION", REGION)
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))  # Ray writes the key pair to ~/.ssh
        patch.setattr(aws.rays_own, "time", SimpleNamespace(sleep=lambda _: None))
        aws.rays_own._get_subnets_or_die.cache_clear()
        yield boto3.client("ec2", region_name=REGION)


@pytest.fixture
def cluster() -> Any:
    """The shipped file with its places edited."""
    text = (Path(__file__).resolve().parents[2] / "cluster.yaml").read_text()
    text = text.replace("203.0.113.7/32", "198.51.100.4/32").replace("s3://edit-me/", "s3://our-bucket/")
    config = prepare_config(yaml.safe_load(text))
    for node_type in config["available_node_types"].values():
        assert node_type["node_config"]["ImageId"].startswith(aws.SSM)
        node_type["node_config"]["ImageId"] = aws.SSM + PUBLIC_IMAGE
    return config


def group_rules(cloud: Any, config: Any) -> list[Any]:
    """Rules of the one security group that all nodes have."""
    ids = {tuple(kind["node_config"]["SecurityGroupIds"]) for kind in config["available_node_types"].values()}
    ((group,),) = ids
    return list(cloud.describe_security_groups(GroupIds=[group])["SecurityGroups"][0]["IpPermissions"])


UNEDITED = {
    "ssh": ("198.51.100.4/32", "203.0.113.7/32", "ssh from 203.0.113.7/32, an example"),
    "world": ("198.51.100.4/32", "0.0.0.0/0", "the whole world"),
    "bucket": ("s3://our-bucket/", "s3://edit-me/", "'edit-me', an example"),
    "no storage": ("export NKAT_STORAGE_PATH=", "export OTHER=", "no NKAT_STORAGE_PATH"),
}


@pytest.mark.parametrize(("edited", "shipped", "said"), UNEDITED.values(), ids=UNEDITED.keys())
def test_a_file_that_was_not_edited_is_refused_before_anything_is_made(
    cloud: Any, cluster: Any, edited: str, shipped: str, said: str
) -> None:
    unedited = json.loads(json.dumps(cluster).replace(edited, shipped))
    with pytest.raises(ValueError, match=said):
        aws.ClosedAWSNodeProvider.bootstrap_config(unedited)
    assert boto3.client("iam").list_roles()["Roles"] == []


def test_the_group_has_ssh_from_one_range_and_the_cluster_itself(cloud: Any, cluster: Any) -> None:
    config = aws.ClosedAWSNodeProvider.bootstrap_config(cluster)
    rules = group_rules(cloud, config)
    assert [entry["CidrIp"] for rule in rules for entry in rule["IpRanges"]] == ["198.51.100.4/32"]
    inside = [rule for rule in rules if rule["UserIdGroupPairs"]]
    assert [rule["IpProtocol"] for rule in inside] == ["-1"]
    groups = {pair["GroupId"] for rule in inside for pair in rule["UserIdGroupPairs"]}
    assert groups == set(config["available_node_types"]["head"]["node_config"]["SecurityGroupIds"])


def test_rays_own_provider_would_open_ssh_to_the_world(cloud: Any, cluster: Any) -> None:
    """Why there is a provider of our own; when this fails, `type: aws` has become enough."""
    cluster["provider"]["security_group"]["GroupName"] = "rays-own"
    config = aws.AWSNodeProvider.bootstrap_config(aws.with_images(cluster))
    found = [entry["CidrIp"] for rule in group_rules(cloud, config) for entry in rule["IpRanges"]]
    assert "0.0.0.0/0" in found
    with pytest.raises(ValueError, match=r"rays-own .* is open to the whole world"):
        aws.ClosedAWSNodeProvider.bootstrap_config(cluster)  # the group of that name is not taken over


def test_rays_rule_is_only_left_out_meanwhile(cloud: Any, cluster: Any) -> None:
    before = aws.rays_own._create_default_ssh_inbound_rules
    aws.ClosedAWSNodeProvider.bootstrap_config(cluster)
    assert aws.rays_own._create_default_ssh_inbound_rules is before


def test_workers_may_use_the_bucket_and_nothing_else(cloud: Any, cluster: Any) -> None:
    config = aws.ClosedAWSNodeProvider.bootstrap_config(cluster)
    assert config["available_node_types"]["worker"]["node_config"]["IamInstanceProfile"] == {"Name": aws.WORKER_ROLE}
    iam = boto3.client("iam")
    policy = iam.get_role_policy(RoleName=aws.WORKER_ROLE, PolicyName="nkat-ray-storage")["PolicyDocument"]
    (statement,) = policy["Statement"]
    assert statement["Resource"] == ["arn:aws:s3:::our-bucket", "arn:aws:s3:::our-bucket/*"]
    assert all(action.startswith("s3:") and "*" not in action for action in statement["Action"])
    assert iam.list_attached_role_policies(RoleName=aws.WORKER_ROLE)["AttachedPolicies"] == []


def test_the_head_may_pass_on_that_role_alone(cloud: Any, cluster: Any) -> None:
    aws.ClosedAWSNodeProvider.bootstrap_config(cluster)
    iam = boto3.client("iam")
    policy = iam.get_role_policy(RoleName="ray-autoscaler-v1", PolicyName="pass-nkat-ray-worker")["PolicyDocument"]
    (statement,) = policy["Statement"]
    assert statement["Action"] == ["iam:PassRole"]
    assert statement["Resource"] == [iam.get_role(RoleName=aws.WORKER_ROLE)["Role"]["Arn"]]


def test_a_second_time_changes_nothing(cloud: Any, cluster: Any) -> None:
    first = aws.ClosedAWSNodeProvider.bootstrap_config(cluster)
    second = aws.ClosedAWSNodeProvider.bootstrap_config(cluster)
    assert json.dumps(first, sort_keys=True, default=str) == json.dumps(second, sort_keys=True, default=str)
    assert len(group_rules(cloud, second)) == 2


def test_roles_of_the_users_own_are_left_alone(cloud: Any, cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aws, "WORKER_ROLE", "not-needed")
    cluster["available_node_types"]["worker"]["node_config"]["IamInstanceProfile"] = {"Name": "theirs"}
    config = aws.ClosedAWSNodeProvider.bootstrap_config(cluster)
    assert config["available_node_types"]["worker"]["node_config"]["IamInstanceProfile"] == {"Name": "theirs"}
    assert "not-needed" not in [role["RoleName"] for role in boto3.client("iam").list_roles()["Roles"]]


def test_images_become_ids_before_the_head_needs_them(cloud: Any, cluster: Any) -> None:
    config = aws.with_images(cluster)
    for node_type in config["available_node_types"].values():
        assert node_type["node_config"]["ImageId"].startswith("ami-")
    assert cluster["available_node_types"]["head"]["node_config"]["ImageId"].startswith(aws.SSM)  # the input stays


def test_a_head_starts_as_the_file_says(cloud: Any, cluster: Any) -> None:
    config = aws.ClosedAWSNodeProvider.bootstrap_config(cluster)
    provider = aws.ClosedAWSNodeProvider(config["provider"], config["cluster_name"])
    for kind, tags in (("head", {"ray-node-type": "head"}), ("worker", {"ray-node-type": "worker"})):
        provider.create_node(config["available_node_types"][kind]["node_config"], tags, 1)
    found = [i for r in cloud.describe_instances()["Reservations"] for i in r["Instances"]]
    by_kind = {tag["Value"]: i for i in found for tag in i["Tags"] if tag["Key"] == "ray-node-type"}
    assert by_kind["head"]["InstanceType"] == "m7i.large"
    assert by_kind["worker"]["InstanceType"] == "g5.xlarge"
    assert by_kind["worker"]["InstanceLifecycle"] == "spot"
    assert "InstanceLifecycle" not in by_kind["head"]
    for instance in found:
        assert {"Key": "ray-cluster-name", "Value": "nkat-ray"} in instance["Tags"]
