"""AWS nodes for cluster.yaml: Ray's own provider, but closed to the world, and with a role for the workers.

Ray 2.60 opens ssh to every address in each security group that it makes, whatever `IpPermissions` say (it adds to
them), and gives an instance role to the head alone, so that workers reach no bucket. cluster.yaml names this provider
in its place; everything else in the file means what it means for `type: aws`. All of this happens once, on the machine
that runs `ray up`, before an instance is started.
"""

import contextlib
import copy
import json
import re
from collections.abc import Iterator
from typing import Any

import boto3  # type: ignore[import-untyped, import-not-found, unused-ignore]
from ray.autoscaler._private.aws import config as rays_own
from ray.autoscaler._private.aws.node_provider import AWSNodeProvider

ANYWHERE = ("0.0.0.0/0", "::/0")
PLACEHOLDER_NET, PLACEHOLDER_BUCKET = "203.0.113.", "edit-me"  # an address block that nobody has (RFC 5737)
STORAGE = re.compile(r"\bNKAT_STORAGE_PATH=[\"']?s3://([^/\s\"']+)")
SSM = "resolve:ssm:"  # EC2's own notation for an image whose id AWS publishes
WORKER_ROLE = "nkat-ray-worker"
BUCKET_ACTIONS = ["s3:ListBucket", "s3:GetBucketLocation", "s3:GetObject", "s3:PutObject", "s3:DeleteObject"]
BUCKET_ACTIONS += ["s3:AbortMultipartUpload", "s3:ListMultipartUploadParts"]
TRUST = {
    "Version": "2012-10-17",
    "Statement": [{"Effect": "Allow", "Principal": {"Service": "ec2.amazonaws.com"}, "Action": "sts:AssumeRole"}],
}


class ClosedAWSNodeProvider(AWSNodeProvider):
    """Ray's provider with the security group exactly as cluster.yaml has it, and workers that reach the bucket."""

    @staticmethod
    def bootstrap_config(cluster_config: dict[str, Any]) -> dict[str, Any]:
        """Resolve what cluster.yaml leaves open: images, roles, keys, subnets, the security group.

        Raises:
            ValueError: a place to edit was not edited, or the security group is open to the world.
        """
        refuse_unedited(cluster_config)
        with _no_rule_of_rays_own():
            config: dict[str, Any] = AWSNodeProvider.bootstrap_config(with_images(cluster_config))
        refuse_open_groups(config)
        return with_worker_role(config)


def storage_bucket(cluster_config: dict[str, Any]) -> str:
    """Name of the bucket that the nodes' environment sets as NKAT_STORAGE_PATH.

    Raises:
        ValueError: no setup command sets it.
    """
    found = STORAGE.search("\n".join(cluster_config.get("setup_commands", [])))
    if not found:
        raise ValueError("setup_commands set no NKAT_STORAGE_PATH=s3://...; workers could not store their results")
    return found[1]


def refuse_unedited(cluster_config: dict[str, Any]) -> None:
    """Refuse a cluster.yaml whose two places to edit are as shipped, before anything is made.

    Raises:
        ValueError: says which place.
    """
    rules = cluster_config["provider"].get("security_group", {}).get("IpPermissions", [])
    for cidr in _cidrs(rules):
        if cidr.startswith(PLACEHOLDER_NET):
            raise ValueError(f"cluster.yaml allows ssh from {cidr}, an example; put your own address there, with /32")
        if cidr in ANYWHERE:
            raise ValueError(f"cluster.yaml opens a port to {cidr}, the whole world; name your own addresses instead")
    bucket = storage_bucket(cluster_config)
    if PLACEHOLDER_BUCKET in bucket:
        raise ValueError(f"cluster.yaml stores on the bucket {bucket!r}, an example; put a bucket of yours there")


def with_images(cluster_config: dict[str, Any]) -> dict[str, Any]:
    """Replace `resolve:ssm:<name>` by the image's id: the head, which starts the workers, may not ask for it itself."""
    config = copy.deepcopy(cluster_config)
    client = boto3.client("ssm", region_name=config["provider"]["region"])
    for node_type in config["available_node_types"].values():
        image = node_type["node_config"].get("ImageId", "")
        if image.startswith(SSM):
            found = client.get_parameter(Name=image.removeprefix(SSM))
            node_type["node_config"]["ImageId"] = found["Parameter"]["Value"]
    return config


@contextlib.contextmanager
def _no_rule_of_rays_own() -> Iterator[None]:
    """Ray's rule for ssh from everywhere is left out; should a later Ray have no such function, this fails."""
    before = rays_own._create_default_ssh_inbound_rules
    rays_own._create_default_ssh_inbound_rules = list
    try:
        yield
    finally:
        rays_own._create_default_ssh_inbound_rules = before


def refuse_open_groups(config: dict[str, Any]) -> None:
    """Refuse security groups that let the whole world in, e.g. one of this name that Ray made before.

    Raises:
        ValueError: says which group.
    """
    nodes = [node_type["node_config"] for node_type in config["available_node_types"].values()]
    ids = sorted({group for node in nodes for group in node["SecurityGroupIds"]})
    client = boto3.client("ec2", region_name=config["provider"]["region"])
    for group in client.describe_security_groups(GroupIds=ids)["SecurityGroups"]:
        if set(_cidrs(group["IpPermissions"])) & set(ANYWHERE):
            raise ValueError(
                f"security group {group['GroupName']} ({group['GroupId']}) is open to the whole world; "
                "delete it, or change GroupName in cluster.yaml"
            )


def _cidrs(rules: list[dict[str, Any]]) -> list[str]:
    v4 = [entry["CidrIp"] for rule in rules for entry in rule.get("IpRanges", [])]
    return v4 + [entry["CidrIpv6"] for rule in rules for entry in rule.get("Ipv6Ranges", [])]


def with_worker_role(config: dict[str, Any]) -> dict[str, Any]:
    """Give workers without a role of their own one that may use the bucket and nothing else.

    The head's role (Ray's) may then pass that role on, which it needs in order to start such workers.
    """
    head = config["head_node_type"]
    without = [
        node_type["node_config"]
        for name, node_type in config["available_node_types"].items()
        if name != head and "IamInstanceProfile" not in node_type["node_config"]
    ]
    profile = config["head_node"].get("IamInstanceProfile")
    if not without or profile is None:  # the user's own roles: theirs to arrange
        return config
    iam = boto3.client("iam")
    arn = _worker_role(iam, storage_bucket(config))
    name = profile["Arn"].rsplit("/", 1)[-1]
    (role,) = iam.get_instance_profile(InstanceProfileName=name)["InstanceProfile"]["Roles"]
    iam.put_role_policy(
        RoleName=role["RoleName"], PolicyName="pass-nkat-ray-worker", PolicyDocument=_policy(["iam:PassRole"], [arn])
    )
    for node in without:
        node["IamInstanceProfile"] = {"Name": WORKER_ROLE}
    return config


def _worker_role(iam: Any, bucket: str) -> str:
    """Make the workers' role and its profile where they are missing; returns the role's ARN."""
    exists = iam.exceptions.EntityAlreadyExistsException
    with contextlib.suppress(exists):
        iam.create_role(RoleName=WORKER_ROLE, AssumeRolePolicyDocument=json.dumps(TRUST))
    statement = _policy(BUCKET_ACTIONS, [f"arn:aws:s3:::{bucket}", f"arn:aws:s3:::{bucket}/*"])
    iam.put_role_policy(RoleName=WORKER_ROLE, PolicyName="nkat-ray-storage", PolicyDocument=statement)
    with contextlib.suppress(exists):
        iam.create_instance_profile(InstanceProfileName=WORKER_ROLE)
    with contextlib.suppress(iam.exceptions.LimitExceededException):  # it already has its one role
        iam.add_role_to_instance_profile(InstanceProfileName=WORKER_ROLE, RoleName=WORKER_ROLE)
    return str(iam.get_role(RoleName=WORKER_ROLE)["Role"]["Arn"])


def _policy(actions: list[str], resources: list[str]) -> str:
    statement = {"Effect": "Allow", "Action": actions, "Resource": resources}
    return json.dumps({"Version": "2012-10-17", "Statement": [statement]})
