"""AWS nodes for cluster.yaml: Ray's provider, but without ssh from everywhere and with a role for workers.

Ray 2.60 allows ssh from every address in each security group that it creates, regardless of `IpPermissions`, and gives
an instance role only to the head, so that workers cannot use a bucket. cluster.yaml therefore names this provider; the
rest of the file has the same meaning as with `type: aws`. The code runs once, on the machine that runs `ray up`, before
an instance is started.
"""

import contextlib
import copy
import json
import re
from collections.abc import Iterator
from typing import Any, Final

import boto3  # type: ignore[import-untyped, import-not-found, unused-ignore]
from ray.autoscaler._private.aws import config as rays_own
from ray.autoscaler._private.aws.node_provider import AWSNodeProvider

from nkat_ray.errors import UserError

ANYWHERE: Final = ("0.0.0.0/0", "::/0")
PLACEHOLDER_NET: Final = "203.0.113."  # addresses reserved for documentation (RFC 5737)
PLACEHOLDER_BUCKET: Final = "edit-me"
STORAGE: Final = re.compile(r"\bNKAT_STORAGE_PATH=[\"']?s3://([^/\s\"']+)")
SSM: Final = "resolve:ssm:"  # EC2's notation for an image whose id AWS publishes
WORKER_ROLE: Final = "nkat-ray-worker"
BUCKET_ACTIONS: Final = [
    f"s3:{action}"
    for action in ("ListBucket", "GetBucketLocation", "GetObject", "PutObject", "DeleteObject", "AbortMultipartUpload",
                   "ListMultipartUploadParts")
]  # fmt: skip


class ClosedAWSNodeProvider(AWSNodeProvider):
    """Ray's provider, with the security group exactly as in cluster.yaml, and workers that can use the bucket."""

    @staticmethod
    def bootstrap_config(cluster_config: dict[str, Any]) -> dict[str, Any]:
        """Complete cluster.yaml with images, roles, keys, subnets and the security group.

        Raises:
            UserError: a placeholder was not edited, or the security group is open to the world.
        """
        refuse_unedited(cluster_config)
        with _without_rays_ssh_rule():
            config: dict[str, Any] = AWSNodeProvider.bootstrap_config(with_images(cluster_config))
        refuse_open_groups(config)
        return with_worker_role(config)


def storage_bucket(cluster_config: dict[str, Any]) -> str:
    """Return the name of the bucket that the nodes' environment sets as NKAT_STORAGE_PATH.

    Raises:
        UserError: no setup command sets it.
    """
    found = STORAGE.search("\n".join(cluster_config.get("setup_commands", [])))
    if not found:
        raise UserError("setup_commands set no NKAT_STORAGE_PATH=s3://...; workers could not store their results")
    return found[1]


def refuse_unedited(cluster_config: dict[str, Any]) -> None:
    """Refuse (UserError) a cluster.yaml whose two placeholders were not edited, before anything is created."""
    for cidr in _cidrs(cluster_config["provider"].get("security_group", {}).get("IpPermissions", [])):
        if cidr.startswith(PLACEHOLDER_NET):
            raise UserError(f"cluster.yaml allows ssh from {cidr}, an example; put your own address there, with /32")
        if cidr in ANYWHERE:
            raise UserError(f"cluster.yaml opens a port to {cidr}, the whole world; name your own addresses instead")
    bucket = storage_bucket(cluster_config)
    if PLACEHOLDER_BUCKET in bucket:
        raise UserError(f"cluster.yaml stores on the bucket {bucket!r}, an example; put a bucket of yours there")


def with_images(cluster_config: dict[str, Any]) -> dict[str, Any]:
    """Replace `resolve:ssm:<name>` by the image's id, which the head has no permission to look up."""
    config = copy.deepcopy(cluster_config)
    client = boto3.client("ssm", region_name=config["provider"]["region"])
    for node_type in config["available_node_types"].values():
        image = node_type["node_config"].get("ImageId", "")
        if image.startswith(SSM):
            found = client.get_parameter(Name=image.removeprefix(SSM))
            node_type["node_config"]["ImageId"] = found["Parameter"]["Value"]
    return config


@contextlib.contextmanager
def _without_rays_ssh_rule() -> Iterator[None]:
    """Leave out Ray's rule for ssh from everywhere; raise AttributeError if Ray has no such function any more."""
    before = rays_own._create_default_ssh_inbound_rules
    rays_own._create_default_ssh_inbound_rules = list
    try:
        yield
    finally:
        rays_own._create_default_ssh_inbound_rules = before


def refuse_open_groups(config: dict[str, Any]) -> None:
    """Refuse (UserError) security groups open to the world, e.g. one that Ray created earlier under this name."""
    nodes = [node_type["node_config"] for node_type in config["available_node_types"].values()]
    ids = sorted({group for node in nodes for group in node["SecurityGroupIds"]})
    client = boto3.client("ec2", region_name=config["provider"]["region"])
    for group in client.describe_security_groups(GroupIds=ids)["SecurityGroups"]:
        if set(_cidrs(group["IpPermissions"])) & set(ANYWHERE):
            raise UserError(
                f"security group {group['GroupName']} ({group['GroupId']}) is open to the whole world; "
                "delete it, or change GroupName in cluster.yaml"
            )


def _cidrs(rules: list[dict[str, Any]]) -> list[str]:
    v4 = [entry["CidrIp"] for rule in rules for entry in rule.get("IpRanges", [])]
    return v4 + [entry["CidrIpv6"] for rule in rules for entry in rule.get("Ipv6Ranges", [])]


def with_worker_role(config: dict[str, Any]) -> dict[str, Any]:
    """Give workers without a role one that may use only the bucket.

    The head's role, which Ray creates, gets the permission to pass that role to the workers that it starts.
    """
    without = [
        node_type["node_config"]
        for name, node_type in config["available_node_types"].items()
        if name != config["head_node_type"] and "IamInstanceProfile" not in node_type["node_config"]
    ]
    profile = config["head_node"].get("IamInstanceProfile")
    if not without or profile is None:  # the user provides roles
        return config
    iam = boto3.client("iam")
    arn = _worker_role(iam, storage_bucket(config))
    name = profile["Arn"].rsplit("/", 1)[-1]
    (role,) = iam.get_instance_profile(InstanceProfileName=name)["InstanceProfile"]["Roles"]
    passing = _policy(Action=["iam:PassRole"], Resource=[arn])
    iam.put_role_policy(RoleName=role["RoleName"], PolicyName="pass-nkat-ray-worker", PolicyDocument=passing)
    for node in without:
        node["IamInstanceProfile"] = {"Name": WORKER_ROLE}
    return config


def _worker_role(iam: Any, bucket: str) -> str:
    """Create the workers' role and its instance profile if they are missing; return the role's ARN."""
    exists = iam.exceptions.EntityAlreadyExistsException
    with contextlib.suppress(exists):
        trust = _policy(Principal={"Service": "ec2.amazonaws.com"}, Action="sts:AssumeRole")
        iam.create_role(RoleName=WORKER_ROLE, AssumeRolePolicyDocument=trust)
    storing = _policy(Action=BUCKET_ACTIONS, Resource=[f"arn:aws:s3:::{bucket}", f"arn:aws:s3:::{bucket}/*"])
    iam.put_role_policy(RoleName=WORKER_ROLE, PolicyName="nkat-ray-storage", PolicyDocument=storing)
    with contextlib.suppress(exists):
        iam.create_instance_profile(InstanceProfileName=WORKER_ROLE)
    with contextlib.suppress(iam.exceptions.LimitExceededException):  # the profile already has a role
        iam.add_role_to_instance_profile(InstanceProfileName=WORKER_ROLE, RoleName=WORKER_ROLE)
    return str(iam.get_role(RoleName=WORKER_ROLE)["Role"]["Arn"])


def _policy(**statement: Any) -> str:
    """Return an IAM policy with one `Allow` statement, as JSON."""
    return json.dumps({"Version": "2012-10-17", "Statement": [{"Effect": "Allow", **statement}]})
