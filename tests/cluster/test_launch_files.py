"""Launch files: each passes the check of the program that reads it, refuses what is misspelt, and opens nothing to the world."""

from __future__ import annotations

import copy
import fnmatch
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
RAY_UP = ("aws", "gcp", "onprem")
KUBERAY = sorted(path.name for path in (CLUSTER / "kuberay").glob("ray*.yaml"))
JOBS = [name for name in KUBERAY if name.startswith("rayjob")]
TEXTS = [*sorted(CLUSTER.glob("*.yaml")), *sorted((CLUSTER / "kuberay").glob("*.yaml")), CLUSTER / "Dockerfile"]
Change = Callable[[dict], Any]


def documents(*parts: str) -> list[dict]:
    return list(yaml.safe_load_all(CLUSTER.joinpath(*parts).read_text()))


def ray_up(name: str) -> dict:
    return yaml.safe_load((CLUSTER / f"{name}.yaml").read_text())


def strict(schema: Any) -> Any:
    """An OpenAPI schema of a custom resource as a JSON schema that refuses unknown keys."""
    if not isinstance(schema, dict):
        return schema
    made = {key: strict_value(key, value) for key, value in schema.items() if not key.startswith("x-")}
    if schema.get("x-kubernetes-int-or-string"):
        return {"anyOf": [{"type": "integer"}, {"type": "string"}]}
    if "properties" in schema and "additionalProperties" not in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
        made["additionalProperties"] = False
    if schema.get("nullable") and isinstance(made.get("type"), str):
        made["type"] = [made["type"], "null"]
    return made


def strict_value(key: str, value: Any) -> Any:
    if key == "properties":
        return {name: strict(sub) for name, sub in value.items()}
    if key in ("anyOf", "oneOf", "allOf"):
        return [strict(sub) for sub in value]
    return strict(value)


@pytest.fixture(scope="session")
def operator() -> dict[str, jsonschema.protocols.Validator]:
    """Kind -> the KubeRay operator's own schema of it."""
    folder = Path(os.environ.get("I3CL_SHARED", ROOT.parent / "shared")) / "kuberay"
    made = {}
    for kind in ("RayCluster", "RayJob"):
        path = folder / f"ray.io_{kind.lower()}s.yaml"
        if not path.is_file():
            pytest.skip(f"the operator's schemas are not here ({path})")
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        definition = yaml.load(path.read_text(), Loader=loader)
        version = next(entry for entry in definition["spec"]["versions"] if entry["name"] == "v1")
        schema = strict(version["schema"]["openAPIV3Schema"])
        schema["properties"]["metadata"] = {"type": "object"}
        made[kind] = jsonschema.Draft202012Validator(schema)
    return made


def set_at(document: Any, path: str, value: Any) -> None:
    """Replace the value at a dotted path; … is removal. Numbers are list indices."""
    *parents, last = [int(key) if key.isdigit() else key for key in path.split(".")]
    for key in parents:
        document = document[key]
    if value is ...:
        del document[last]
    else:
        document[last] = value


def changed(document: dict, path: str, value: Any) -> dict:
    document = copy.deepcopy(document)
    set_at(document, path, value)
    return document


# ------------------------------------------------------------------------------------------------------------- ray up


def check_ray_up(config: dict) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(config))


@pytest.mark.parametrize("name", RAY_UP)
def test_ray_accepts_the_file(name):
    check_ray_up(ray_up(name))


@pytest.mark.parametrize(
    ("name", "path", "value"),
    [
        ("aws", "max_wrokers", 3),
        ("aws", "head_node_type", "heads"),
        ("aws", "available_node_types.gpu_spot.max_worker", 3),
        ("aws", "available_node_types.gpu_spot.resources.GPU", "one"),
        ("aws", "available_node_types.gpu_spot.node_config", ...),
        ("gcp", "available_node_types.head.node_conf", {}),
        ("gcp", "idle_timeout_minutes", "ten"),
        ("gcp", "provider.type", ...),
        ("onprem", "auth.ssh_pass", "x"),
        ("onprem", "setup_commands", "make setup"),
    ],
)
def test_ray_refuses_mistakes(name, path, value):
    with pytest.raises((jsonschema.ValidationError, ValueError, KeyError, TypeError)):
        check_ray_up(changed(ray_up(name), path, value))


def check_aws(config: dict) -> None:
    """Every node_config against the shape of EC2's RunInstances, as Ray calls it."""
    import botocore.session
    from botocore.validate import ParamValidator

    shape = botocore.session.get_session().get_service_model("ec2").operation_model("RunInstances").input_shape
    for name, node_type in config["available_node_types"].items():
        node = dict(node_type["node_config"])
        assert node.pop("SubnetIds"), name  # Ray's own key, of which it takes one
        unknown = unknown_keys(node, shape)
        assert not unknown, (name, unknown)
        report = ParamValidator().validate({**node, "SubnetId": "s", "MinCount": 1, "MaxCount": 1}, shape)
        assert not report.has_errors(), (name, report.generate_report())
        check_enums(node, shape)


def unknown_keys(value: Any, shape: Any) -> list[str]:
    """Botocore passes unknown keys of nested structures; AWS does not."""
    if shape.type_name == "structure":
        known = [key for key in value if key in shape.members]
        return [key for key in value if key not in shape.members] + [
            sub for key in known for sub in unknown_keys(value[key], shape.members[key])
        ]
    if shape.type_name == "list":
        return [sub for item in value for sub in unknown_keys(item, shape.member)]
    return []


def check_enums(value: Any, shape: Any) -> None:
    if shape.type_name == "structure":
        for key, item in value.items():
            check_enums(item, shape.members[key])
    elif shape.type_name == "list":
        for item in value:
            check_enums(item, shape.member)
    elif getattr(shape, "enum", None):
        assert value in shape.enum, (value, shape.name)


def test_aws_machines_are_what_ec2_understands():
    check_aws(ray_up("aws"))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("ImageID", "ami-1"),
        ("MetadataOptions.HttpToken", "required"),
        ("MetadataOptions.HttpTokens", "always"),
        ("BlockDeviceMappings.0.Ebs.VolumeSize", "150"),
        ("BlockDeviceMappings.0.Ebs.Encryption", True),
        ("InstanceMarketOptions.SpotOptions.SpotInstanceType", "onetime"),
        ("InstanceType", "g6.4xxlarge"),
        ("SubnetIds", []),
    ],
)
def test_aws_mistakes_are_refused(path, value):
    config = changed(ray_up("aws"), f"available_node_types.gpu_spot.node_config.{path}", value)
    with pytest.raises(AssertionError):
        check_aws(config)


class FakeAws:
    """An account in moto with what docs/clusters/aws.md asks for, and aws.yaml filled in with it."""

    def __init__(self) -> None:
        import boto3

        self.ec2 = boto3.resource("ec2", region_name="eu-west-1")
        self.iam = boto3.client("iam", region_name="eu-west-1")
        network = self.ec2.create_vpc(CidrBlock="10.0.0.0/16")
        self.subnet = network.create_subnet(CidrBlock="10.0.0.0/24").id
        self.group = network.create_security_group(GroupName="own", Description="own").id
        for profile in ("Head", "Workers"):
            self.iam.create_instance_profile(InstanceProfileName=profile)
        image = next(iter(self.ec2.images.all())).id
        text = (CLUSTER / "aws.yaml").read_text()
        for name, value in {
            "REPLACE_REGION": "eu-west-1",
            "subnet-REPLACE_PRIVATE": self.subnet,
            "sg-REPLACE": self.group,
            "REPLACE_HEAD_PROFILE": "Head",
            "REPLACE_WORKER_PROFILE": "Workers",
            "ami-REPLACE_UBUNTU_2404": image,
            "ami-REPLACE_GPU_2404": image,
        }.items():
            text = text.replace(name, value)
        assert "REPLACE" not in re.sub(r"#.*", "", text)
        self.config = yaml.safe_load(text)

    def launch(self) -> dict[str, Any]:
        """One machine of every type, by Ray's own code: type -> instance."""
        from ray.autoscaler._private.aws.config import bootstrap_aws
        from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
        from ray.autoscaler._private.util import prepare_config

        config = bootstrap_aws(prepare_config(self.config))
        provider = AWSNodeProvider(config["provider"], config["cluster_name"])
        for name, node_type in config["available_node_types"].items():
            node = copy.deepcopy(node_type["node_config"])
            provider.create_node(node, {"ray-node-kind": "worker", "ray-user-node-type": name}, 1)
        made = list(self.ec2.instances.all())
        return {next(tag["Value"] for tag in one.tags if tag["Key"] == "ray-user-node-type"): one for one in made}


@pytest.fixture
def aws_account(tmp_path, monkeypatch):
    moto = pytest.importorskip("moto", reason="moto is not installed")
    monkeypatch.setenv("HOME", str(tmp_path))  # Ray writes the SSH key there
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    for name in ("AWS_ENDPOINT_URL", "AWS_SESSION_TOKEN", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    with moto.mock_aws():
        yield FakeAws()


def test_ray_launches_the_machines_of_aws(aws_account, tmp_path):
    groups = {group.id for group in aws_account.ec2.security_groups.all()}
    machines = aws_account.launch()
    assert machines.keys() == aws_account.config["available_node_types"].keys()
    for name, machine in machines.items():
        assert machine.public_ip_address is None and machine.subnet_id == aws_account.subnet, name
        assert [group["GroupId"] for group in machine.security_groups] == [aws_account.group], name
        assert machine.metadata_options["HttpTokens"] == "required", name
        assert machine.iam_instance_profile["Arn"].endswith("/Head" if name == "head" else "/Workers"), name
        assert (machine.instance_lifecycle == "spot") == name.endswith("_spot"), name
    # Ray has made nothing in the account but the key, whose file nobody else reads.
    assert {group.id for group in aws_account.ec2.security_groups.all()} == groups
    assert aws_account.iam.list_roles()["Roles"] == []
    (key,) = (tmp_path / ".ssh").iterdir()
    assert key.stat().st_mode & 0o077 == 0


def test_without_the_security_group_ray_would_open_ssh_to_everyone(aws_account):
    for node_type in aws_account.config["available_node_types"].values():
        del node_type["node_config"]["SecurityGroupIds"]
    aws_account.launch()
    rules = [rule for group in aws_account.ec2.security_groups.all() for rule in group.ip_permissions]
    assert any(source["CidrIp"] == "0.0.0.0/0" for rule in rules for source in rule.get("IpRanges", []))


def gcp_problems(value: Any, name: str, schemas: dict) -> Iterator[str]:
    """Keys and types of a Compute Engine message that its discovery document does not have."""
    for key, item in value.items():
        field = schemas[name]["properties"].get(key)
        if field is None:
            yield f"{name}.{key}"
            continue
        for one in item if field.get("type") == "array" and isinstance(item, list) else [item]:
            kind = field.get("items", field) if field.get("type") == "array" else field
            if field.get("type") == "array" and not isinstance(item, list):
                yield f"{name}.{key}: no list"
            elif "$ref" in kind:
                if isinstance(one, dict):
                    yield from gcp_problems(one, kind["$ref"], schemas)
                else:
                    yield f"{name}.{key}: no object"
            elif kind["type"] == "object" and "properties" in kind:
                yield from gcp_problems(one, key, {key: kind, **schemas})
            elif kind.get("enum") and one not in kind["enum"]:
                yield f"{name}.{key}: {one}"
            elif kind["type"] == "boolean" and not isinstance(one, bool):
                yield f"{name}.{key}: no boolean"
            elif kind["type"] == "string" and not isinstance(one, str) and kind.get("format") != "int64":
                yield f"{name}.{key}: no string"


@pytest.fixture(scope="session")
def compute_schemas() -> dict:
    """Messages of the Compute Engine API, from Google's client library."""
    found = importlib.util.find_spec("googleapiclient")
    if found is None or not found.submodule_search_locations:
        pytest.skip("google-api-python-client, which holds the schemas of Compute Engine, is not installed")
    folder = Path(next(iter(found.submodule_search_locations)))
    return json.loads((folder / "discovery_cache" / "documents" / "compute.v1.json").read_text())["schemas"]


def test_gcp_machines_are_what_compute_engine_understands(compute_schemas):
    for node_type in ray_up("gcp")["available_node_types"].values():
        assert list(gcp_problems(node_type["node_config"], "Instance", compute_schemas)) == []


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("machinetype", "g2"),
        ("scheduling", [{"preemptible": True}]),
        ("scheduling.provisioningModel", "CHEAP"),
        ("disks.0.initializeParams.diskSize", 3),
        ("shieldedInstanceConfig.enableSecureBoot", "yes"),
        ("networkInterfaces", {"subnetwork": "x"}),
        ("metadata.items.0.keys", "x"),
    ],
)
def test_gcp_mistakes_are_refused(compute_schemas, path, value):
    node = ray_up("gcp")["available_node_types"]["gpu_spot"]["node_config"]
    assert list(gcp_problems(changed(node, path, value), "Instance", compute_schemas))


@pytest.mark.parametrize("name", RAY_UP)
def test_ray_up_opens_nothing(name):
    config = ray_up(name)
    commands = config["head_start_ray_commands"] + config["worker_start_ray_commands"]
    starts = [command for command in commands if "ray start" in command or "spot_notice" in command]
    assert starts and all("RAY_AUTH_MODE=token" in command for command in starts)
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    heads = [command for command in config["head_start_ray_commands"] if "ray start" in command]
    assert len(heads) == 1 and heads[0].count("--dashboard-host=127.0.0.1") == heads[0].count("--dashboard-host") == 1
    for needed in ("RAY_health_check_period_ms=", "--port=6379", "--num-cpus=0", "ulimit -n", "--autoscaling-config="):
        assert needed in heads[0]
    assert "0.0.0.0" not in str(config) and "ray-client-server" not in str(config)
    for source in config["file_mounts"].values():
        assert source.startswith("~/") or (ROOT / source).exists(), source
        assert source not in (".", "~/", "./")
        # What rsync leaves out is no part of the project (i3cl/data is code).
        for path in (ROOT / source).rglob("*.*") if (ROOT / source).is_dir() else []:
            names = [part for part in path.relative_to(ROOT).parts if part != "__pycache__"]
            patterns = [pattern.rsplit("/", 1)[-1] for pattern in config["rsync_exclude"]]
            assert not any(fnmatch.fnmatch(name, pattern) for name in names for pattern in patterns), path
    if name != "onprem":
        assert config["provider"]["use_internal_ips"] is True and config["provider"]["cache_stopped_nodes"] is False
        assert "ssh_proxy_command" in config["auth"]


def test_own_machines_are_started_as_was_tried():
    """Ray 2.60's second autoscaler starts no worker of a local provider, and the head must not guess its address."""
    (head,) = [command for command in ray_up("onprem")["head_start_ray_commands"] if "ray start" in command]
    assert f"--node-ip-address={ray_up('onprem')['provider']['head_ip']} " in head
    guide = (ROOT / "docs" / "clusters" / "onprem.md").read_text()
    assert guide.index("export RAY_UP_enable_autoscaler_v2=0") < guide.index("ray up cluster/onprem.yaml ")


def test_aws_machines_are_closed():
    for name, node_type in ray_up("aws")["available_node_types"].items():
        node = node_type["node_config"]
        assert node["MetadataOptions"]["HttpTokens"] == "required", name
        assert node["MetadataOptions"]["HttpPutResponseHopLimit"] == 1, name
        assert node["SecurityGroupIds"] and node["IamInstanceProfile"], name  # else Ray makes ones that are wide open
        assert all(disk["Ebs"]["Encrypted"] and disk["Ebs"]["DeleteOnTermination"] for disk in node["BlockDeviceMappings"])
        assert ("InstanceMarketOptions" in node) == name.endswith("_spot")
    assert "security_group" not in ray_up("aws")["provider"]


def test_gcp_machines_are_closed():
    for name, node_type in ray_up("gcp")["available_node_types"].items():
        node = node_type["node_config"]
        assert all("accessConfigs" not in interface for interface in node["networkInterfaces"]), name
        assert all(node["shieldedInstanceConfig"].values()), name
        assert {"key": "enable-oslogin", "value": "TRUE"} in node["metadata"]["items"], name
        assert (node.get("scheduling", {}).get("provisioningModel") == "SPOT") == name.endswith("_spot")
        assert name == "head" or "@REPLACE_PROJECT.iam" in node["serviceAccounts"][0]["email"]
    assert "ssh_private_key" in ray_up("gcp")["auth"]  # else Ray adds a key to the whole project


# ------------------------------------------------------------------------------------------------------------ KubeRay


@pytest.mark.parametrize("name", KUBERAY)
def test_the_operator_accepts_the_file(operator, name):
    for document in documents("kuberay", name):
        assert document["apiVersion"] == "ray.io/v1"
        assert [error.message for error in operator[document["kind"]].iter_errors(document)] == []


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("spec.entrypiont", "python"),
        ("spec.backoffLimit", "three"),
        ("spec.rayClusterSpec.authOptions.mode", "tokens"),
        ("spec.rayClusterSpec.headGroupSpec.template", ...),
        ("spec.rayClusterSpec.workerGroupSpecs.0.template", ...),
        ("spec.rayClusterSpec.workerGroupSpecs.0.minReplica", 1),
        ("spec.rayClusterSpec.workerGroupSpecs.0.groupName", ...),
        ("spec.rayClusterSpec.headGroupSpec.rayStartParams.num-cpus", 0),
        ("spec.rayClusterSpec.headGroupSpec.template.spec.containers.0.imagePullPolicies", "Always"),
        ("spec.rayClusterSpec.headGroupSpec.template.spec.containers", ...),
        ("spec.rayClusterSpec.gcsFaultToleranceOptions.redisPassword", "secret"),
    ],
)
def test_the_operator_refuses_mistakes(operator, path, value):
    (job,) = documents("kuberay", "rayjob-train.yaml")
    assert list(operator["RayJob"].iter_errors(changed(job, path, value)))


def core_documents() -> list[dict]:
    """Kubernetes' own kinds, and every pod of the clusters as a Pod."""
    found = [document for name in ("base.yaml", "redis.yaml") for document in documents("kuberay", name)]
    return found + [
        {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x", **template.get("metadata", {})}, "spec": template["spec"]}
        for name in KUBERAY
        for _, template in pods(name)
    ]


def test_kubernetes_accepts_its_own_kinds():
    kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")
    for document in core_documents():
        kubernetes_validate.validate(document, "1.33", strict=True)
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(changed(core_documents()[1], "annotation", {}), "1.33", strict=True)
    pod = next(doc for doc in core_documents() if doc["kind"] == "Pod" and "lifecycle" in doc["spec"]["containers"][0])
    for path, value in (
        ("spec.containers.0.securityContexts", {}),
        ("spec.containers.0.lifecycle.preStop.exec.command", "python"),
        ("spec.volumes.0.emptyDir", "yes"),
    ):
        with pytest.raises(kubernetes_validate.ValidationError):
            kubernetes_validate.validate(changed(pod, path, value), "1.33", strict=True)


def cluster_spec(name: str) -> dict:
    (document,) = documents("kuberay", name)
    return document["spec"] if document["kind"] == "RayCluster" else document["spec"]["rayClusterSpec"]


def pods(name: str) -> list[tuple[str, dict]]:
    """Pod templates of a KubeRay file or of redis.yaml, by role."""
    if name == "redis.yaml":
        return [("redis", doc["spec"]["template"]) for doc in documents("kuberay", name) if doc["kind"] == "StatefulSet"]
    spec = cluster_spec(name)
    found = [("head", spec["headGroupSpec"]["template"])]
    found += [(group["groupName"], group["template"]) for group in spec["workerGroupSpecs"]]
    (document,) = documents("kuberay", name)
    if "submitterPodTemplate" in document["spec"]:
        found.append(("submitter", document["spec"]["submitterPodTemplate"]))
    return found


@pytest.mark.parametrize("name", [*KUBERAY, "redis.yaml"])
def test_pods_are_hardened(name):
    for role, template in pods(name):
        spec = template["spec"]
        assert spec["securityContext"]["runAsNonRoot"] is True and spec["securityContext"]["runAsUser"] >= 10000, role
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, role
        assert not {"hostNetwork", "hostPID", "hostIPC"} & spec.keys(), role
        assert role == "head" or spec["automountServiceAccountToken"] is False
        assert all({"emptyDir", "secret"} & volume.keys() for volume in spec.get("volumes", [])), role
        for container in spec["containers"]:
            check_container(container)
            assert re.search(r":\d+\.\d+\.\d+", container["image"])
            mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
            assert {"/data"} <= mounts.keys() if role == "redis" else {"/tmp", "/home/i3cl"} <= mounts.keys()
            if role == "gpu":
                assert "nvidia.com/gpu" in container["resources"]["limits"]
                shm = next(volume for volume in spec["volumes"] if volume["name"] == mounts["/dev/shm"])
                assert shm["emptyDir"]["medium"] == "Memory"
    if name != "redis.yaml":
        check_container(cluster_spec(name)["autoscalerOptions"])


def check_container(container: dict) -> None:
    security = container["securityContext"]
    assert security["allowPrivilegeEscalation"] is False and security["readOnlyRootFilesystem"] is True
    assert security["capabilities"] == {"drop": ["ALL"]} and "privileged" not in security
    for amount in ("cpu", "memory", "ephemeral-storage"):
        assert container["resources"]["requests"][amount] == container["resources"]["limits"][amount]
    assert not any("value" in env and re.search("PASSWORD|TOKEN|SECRET|KEY", env["name"]) for env in container.get("env", []))


@pytest.mark.parametrize("name", KUBERAY)
def test_clusters_are_alike(name):
    """The jobs bring the cluster of raycluster.yaml, with other numbers of workers to begin with."""

    def shape(spec: dict) -> dict:
        spec = copy.deepcopy(spec)
        for group in spec["workerGroupSpecs"]:
            assert 0 <= group["minReplicas"] <= group.pop("replicas") <= group["maxReplicas"]
            del group["minReplicas"]
        return spec

    spec = cluster_spec(name)
    assert shape(spec) == shape(cluster_spec("raycluster.yaml"))
    assert spec["authOptions"] == {"mode": "token"} and spec["enableInTreeAutoscaling"] is True
    assert list(spec["gcsFaultToleranceOptions"]["redisPassword"]) == ["valueFrom"]
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert spec["headGroupSpec"]["serviceType"] == "ClusterIP"
    # The operator refuses anything else beside the autoscaler's version 2.
    assert spec["autoscalerOptions"]["version"] == "v2"
    groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    assert all(group["template"]["spec"]["restartPolicy"] == "Never" for group in groups)


def test_spot_workers_say_goodbye():
    for role, template in pods("raycluster.yaml"):
        if role in ("gpu", "cpu"):
            command = template["spec"]["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
            assert command[:3] == ["python", "/opt/i3cl/cluster/spot_notice.py", "now"]
            seconds = int(command[3].removeprefix("--seconds="))
            assert seconds < template["spec"]["terminationGracePeriodSeconds"]


def test_only_the_cluster_and_the_operator_reach_ray():
    base = documents("kuberay", "base.yaml")
    policies = {document["metadata"]["name"]: document["spec"] for document in base if document["kind"] == "NetworkPolicy"}
    assert policies["default-deny"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    own = policies["ray"]["podSelector"]["matchLabels"]
    for name in KUBERAY:
        for _, template in pods(name):
            assert own.items() <= template["metadata"]["labels"].items()
    assert policies["ray"]["ingress"][0] == {"from": [{"podSelector": {"matchLabels": own}}]}
    assert all(rule["from"] and rule["ports"] for rule in policies["ray"]["ingress"][1:])
    assert all(peer for rule in policies["ray"]["ingress"] for peer in rule["from"])  # {} would be everybody
    (redis,) = pods("redis.yaml")
    assert policies["redis"]["podSelector"]["matchLabels"] == redis[1]["metadata"]["labels"]


@pytest.mark.parametrize("name", JOBS)
def test_jobs_continue_and_clean_up(name):
    (job,) = documents("kuberay", name)
    spec = job["spec"]
    assert spec["shutdownAfterJobFinishes"] is True and spec["ttlSecondsAfterFinished"] > 0 and spec["backoffLimit"] > 0
    python, script, *arguments = shlex.split(spec["entrypoint"])
    assert python == "python" and (ROOT / script).is_file()
    assert (ROOT / arguments[arguments.index("--config") + 1]).is_file()
    done = subprocess.run(
        [sys.executable, script, *arguments, "--dry-run"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load(done.stdout)["storage"].startswith("s3://")


# -------------------------------------------------------------------------------------------------------- all of them


def locked(package: str) -> str:
    found = re.search(rf"^{package}==(\S+)", (ROOT / "requirements.lock").read_text(), re.M)
    assert found
    return found[1]


def test_versions_agree_with_the_lock():
    ray = locked("ray")
    for name in KUBERAY:
        assert cluster_spec(name)["rayVersion"] == ray
        for _, template in pods(name):
            assert template["spec"]["containers"][0]["image"].endswith(f"-ray{ray}")
    assert f"-ray{ray}" in (CLUSTER / "Dockerfile").read_text()
    # The comments and checks of the driver are for CUDA 13.
    assert re.search(r"^nvidia-cudnn-cu13==", (ROOT / "requirements.lock").read_text(), re.M)


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_nothing_is_open_and_nothing_is_secret(path):
    text = path.read_text()
    for word in (":latest", "LoadBalancer", "NodePort", "hostNetwork", "hostPath", "privileged:", "0.0.0.0/0", "RAY_AUTH_TOKEN="):
        assert word not in text, word
    for secret in (
        r"\b(AKIA|ASIA)[A-Z0-9]{16}\b",
        r"-----BEGIN",
        r"\b[0-9a-f]{40,}\b",
        r"(?i)(password|secret_?(access_?)?key|token)\s*[:=]\s*['\"]?[A-Za-z0-9+/]{12,}",
        r"\b\d{12}\b",
        r"\b(10|192\.168|172\.(1[6-9]|2\d|3[01]))(\.\d{1,3}){2,3}\b",
        r"\b(sg|subnet|vpc|ami|i)-[0-9a-f]{8,17}\b",
    ):
        assert not re.search(secret, text), secret


@pytest.mark.parametrize("name", [*RAY_UP, "kuberay"])
def test_the_guide_lists_every_placeholder(name):
    files = sorted((CLUSTER / "kuberay").glob("*.yaml")) if name == "kuberay" else [CLUSTER / f"{name}.yaml"]
    uncommented = [re.sub(r"(^|\s)#.*", "", line) for path in files for line in path.read_text().splitlines()]
    used = set(re.findall(r"REPLACE(?:_[A-Z0-9]+)*", "\n".join(uncommented)))
    guide = (ROOT / "docs" / "clusters" / f"{name}.md").read_text()
    listed = set(re.findall(r"REPLACE(?:_[A-Z0-9]+)*", guide)) - {"REPLACE_"}
    assert used <= listed, used - listed


def test_the_image_is_small_and_not_root():
    lines = [line for line in (CLUSTER / "Dockerfile").read_text().splitlines() if line and not line.startswith("#")]
    stages = [index for index, line in enumerate(lines) if line.startswith("FROM ")]
    assert len(stages) == 2 and all(re.match(r"FROM python:3\.\d+\.\d+-slim-\w+( AS build)?$", lines[index]) for index in stages)
    final = lines[stages[1] :]
    assert "USER 10001:10001" in final and not any("pip install" in line or "build-essential" in line for line in final)
    assert any("--constraint requirements.lock" in line for line in lines[: stages[1]])
    ignore = (ROOT / ".dockerignore").read_text().splitlines()
    rules = [line for line in ignore if line and not line.startswith("#")]
    assert rules[0] == "*"  # an allow-list
    for line in lines:
        if line.startswith("COPY ") and "--from" not in line:
            for source in line.split()[1:-1]:
                assert (ROOT / source).exists() and f"!{source}" in rules, source
