"""Manifests of Kubernetes: what must agree does, what a rank's end asks for happens, nothing runs as root."""

from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from mim_scale.errors import EXIT_REQUEUE, DamagedError, DivergedError, MimScaleError
from tests.launch.launches import ROOT, check_launch, options_of, split, without_supervisor


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((ROOT / "launch" / "k8s" / name).read_text()))


SERVICE, JOB = documents("pretrain.yaml")
(RAY_JOB,) = documents("shards.yaml")
CLUSTER = RAY_JOB["spec"]["rayClusterSpec"]


def pods() -> Iterator[dict[str, Any]]:
    yield JOB["spec"]["template"]["spec"]
    yield CLUSTER["headGroupSpec"]["template"]["spec"]
    for group in CLUSTER["workerGroupSpecs"]:
        yield group["template"]["spec"]


def test_kinds() -> None:
    kinds = [(one["apiVersion"], one["kind"]) for one in (SERVICE, JOB, RAY_JOB)]
    assert kinds == [("v1", "Service"), ("batch/v1", "Job"), ("ray.io/v1", "RayJob")]


def test_ranks_find_the_first_pod() -> None:
    """A pod of an Indexed Job is called JOB-INDEX, and found as that name in the headless service of its subdomain."""
    job, service = JOB["metadata"]["name"], SERVICE["metadata"]["name"]
    pod = JOB["spec"]["template"]["spec"]
    assert JOB["spec"]["completionMode"] == "Indexed"
    assert SERVICE["spec"]["clusterIP"] == "None"
    assert SERVICE["spec"]["publishNotReadyAddresses"] is True
    assert SERVICE["spec"]["selector"] == {"batch.kubernetes.io/job-name": job}
    assert pod["subdomain"] == service
    words = words_of_job()
    options, _ = options_of(words[1 : words.index("launch/pretrain.py")])
    assert options["--master_addr"] == f"{job}-0.{service}"
    assert options["--node_rank"] == "$JOB_COMPLETION_INDEX"
    nodes = JOB["spec"]["completions"]
    assert (JOB["spec"]["parallelism"], int(options["--nnodes"])) == (nodes, nodes)
    gpus = pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"]
    assert int(options["--nproc_per_node"]) == gpus


def words_of_job() -> list[str]:
    shell, flag, line = JOB["spec"]["template"]["spec"]["containers"][0]["command"]
    assert (shell, flag) == ("sh", "-c")
    words = split(line)
    # A shell as process 1 would keep SIGTERM to itself.
    assert words[:3] == ["exec", "python", "launch/supervise.py"]
    return without_supervisor(words)


def test_commands_are_ones_that_start() -> None:
    check_launch(words_of_job())
    words = split(RAY_JOB["spec"]["entrypoint"])
    check_launch(words)
    nodes = 1 + sum(group["replicas"] for group in CLUSTER["workerGroupSpecs"])
    assert words[words.index("--nodes") + 1] == str(nodes)


def test_exit_codes_do_what_they_mean() -> None:
    spec = JOB["spec"]
    rules = {
        rule["action"]: rule["onExitCodes"]["values"]
        for rule in spec["podFailurePolicy"]["rules"]
        if "onExitCodes" in rule
    }
    assert rules["Ignore"] == [EXIT_REQUEUE]
    assert set(rules["FailJob"]) == {error.exit_code for error in (MimScaleError, DamagedError, DivergedError)}
    assert spec["template"]["spec"]["restartPolicy"] == "Never"
    assert spec["template"]["spec"]["terminationGracePeriodSeconds"] >= 120


def test_the_cluster_is_authenticated_and_of_our_version() -> None:
    assert CLUSTER["authOptions"] == {"mode": "token"}
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split() if "==" in line)
    assert CLUSTER["rayVersion"] == pins["ray"]


@pytest.mark.parametrize("pod", [*pods()])
def test_pods_ask_for_what_they_need_and_are_not_root(pod: dict[str, Any]) -> None:
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] == 1000
    (container,) = pod["containers"]
    assert set(container["resources"]["requests"]) >= {"cpu", "memory"}
    assert container["resources"]["limits"]["memory"] == container["resources"]["requests"]["memory"]
    assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    mounted = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    assert set(volumes) == set(mounted.values())
    assert volumes[mounted["/dev/shm"]]["emptyDir"]["medium"] == "Memory"
    assert "persistentVolumeClaim" in volumes[mounted["/shared"]]


def test_schemas_of_kubernetes() -> None:
    validator = pytest.importorskip("kubernetes_validate", reason="pip install kubernetes-validate has the schemas")
    for document in (SERVICE, JOB, *({"apiVersion": "v1", "kind": "Pod", "spec": pod} for pod in pods())):
        validator.validate(document, "1.31", strict=True)
