"""deploy/kubernetes as kustomize renders it: valid, locked down, free of what the operator is known to get wrong."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from kubernetes_validate import validate

DEPLOY = Path(__file__).parents[2] / "deploy"
OVERLAYS = ("cpu", "gpu", "s3")
KUBERNETES = "1.32"
DASK = "kubernetes.dask.org/v1"

pytestmark = pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")


@cache
def rendered(overlay: str) -> list[dict[str, Any]]:
    """Return the resources of an overlay as kubectl applies them."""
    command = ["kubectl", "kustomize", str(DEPLOY / "kubernetes" / "overlays" / overlay)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return list(yaml.safe_load_all(text))


def of_kind(overlay: str, kind: str) -> dict[str, Any]:
    (found,) = (resource for resource in rendered(overlay) if resource["kind"] == kind)
    return found


def pods(overlay: str) -> dict[str, dict[str, Any]]:
    """Return the specifications of all pods by what they are."""
    cluster = of_kind(overlay, "DaskCluster")["spec"]
    run = of_kind(overlay, "Job")["spec"]["template"]["spec"]
    return {"scheduler": cluster["scheduler"]["spec"], "worker": cluster["worker"]["spec"], "run": run}


def containers(overlay: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, pod in pods(overlay).items():
        for container in (*pod.get("initContainers", ()), *pod["containers"]):
            yield name, container


def strings(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        for key, value in node.items():
            yield str(key)
            yield from strings(value)
    elif isinstance(node, list):
        for value in node:
            yield from strings(value)
    else:
        yield str(node)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_kubernetes_accepts_every_resource_and_pod(overlay: str) -> None:
    for resource in rendered(overlay):
        if resource["apiVersion"] != DASK:
            validate(resource, KUBERNETES, strict=True)
    for name, pod in pods(overlay).items():  # the operator's own schema lets unknown fields of a pod pass
        validate({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": pod}, KUBERNETES, strict=True)


def test_the_validation_would_find_a_misspelt_field() -> None:
    pod = {**pods("cpu")["worker"], "resorces": {}}
    with pytest.raises(Exception, match="resorces"):
        validate({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a"}, "spec": pod}, KUBERNETES, strict=True)


def schema_of(kind: str) -> dict[str, Any]:
    """Return the schema of the operator's own resource definition."""
    found = importlib.util.find_spec("dask_kubernetes")
    assert found is not None
    assert found.origin is not None, "dask-kubernetes, of the test extra, is not installed"
    crds = Path(found.origin).parent / "operator" / "deployment" / "helm" / "dask-kubernetes-operator" / "crds"
    definition = yaml.safe_load((crds / f"{kind.lower()}.yaml").read_text())
    (version,) = definition["spec"]["versions"]
    schema: dict[str, Any] = version["schema"]["openAPIV3Schema"]
    return schema


def unknown(node: Any, schema: dict[str, Any], where: str = "") -> list[str]:
    """Return the fields that the schema does not have: Kubernetes drops them without a word."""
    if isinstance(node, list):
        return [name for item in node for name in unknown(item, schema.get("items", {}), f"{where}[]")]
    known = schema.get("properties")
    if not isinstance(node, dict) or not known or schema.get("x-kubernetes-preserve-unknown-fields"):
        return []
    free = {"apiVersion", "kind", "metadata"} if where == "" else set()
    lost = [f"{where}.{key}" for key in node if key not in known and key not in free]
    inside = (unknown(value, known[key], f"{where}.{key}") for key, value in node.items() if key in known)
    return [*lost, *(name for names in inside for name in names)]


@pytest.mark.parametrize("overlay", OVERLAYS)
@pytest.mark.parametrize("kind", ["DaskCluster", "DaskAutoscaler"])
def test_the_operator_knows_every_field(overlay: str, kind: str) -> None:
    resource, schema = of_kind(overlay, kind), schema_of(kind)
    assert resource["apiVersion"] == DASK
    jsonschema.validate(resource, schema)
    assert unknown(resource, schema) == []
    wrong = {**resource, "spec": {**resource["spec"], "sheduler": {}}}
    assert unknown(wrong, schema) == [".spec.sheduler"]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_nothing_is_privileged(overlay: str) -> None:
    for name, pod in pods(overlay).items():
        assert pod["securityContext"]["runAsNonRoot"] is True, name
        assert pod["securityContext"]["runAsUser"] >= 10000
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["automountServiceAccountToken"] is False
        assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys()
        assert all("hostPath" not in volume for volume in pod["volumes"])
    for name, container in containers(overlay):
        context = container["securityContext"]
        assert "privileged" not in context, name
        assert context["allowPrivilegeEscalation"] is False
        assert context["readOnlyRootFilesystem"] is True
        assert context["capabilities"] == {"drop": ["ALL"]}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_container_has_limits_and_a_pinned_image(overlay: str) -> None:
    for name, container in containers(overlay):
        limits = container["resources"]["limits"]
        assert {"cpu", "memory"} <= limits.keys(), name
        assert limits["memory"] == container["resources"]["requests"]["memory"]  # never evicted for what it was granted
        assert re.fullmatch(r"registry\.example\.org/stemtomo:\d+\.\d+\.\d+(-cuda)?", container["image"])


def test_gpus_are_on_workers_alone() -> None:
    for overlay in OVERLAYS:
        with_gpu = {name for name, container in containers(overlay) if "nvidia.com/gpu" in str(container["resources"])}
        assert with_gpu == ({"worker"} if overlay == "gpu" else set())
    assert pods("gpu")["worker"]["containers"][0]["args"][:3] == ["dask", "cuda", "worker"]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_commands_are_those_that_dask_installs(overlay: str) -> None:
    """The operator's defaults name dask-scheduler and dask-worker, which are gone; options must be known too."""
    found = pods(overlay)
    scheduler, worker = (found[name]["containers"][0]["args"] for name in ("scheduler", "worker"))
    assert scheduler[:2] == ["dask", "scheduler"]
    assert worker[:2] == ["dask", "worker"] or worker[:3] == ["dask", "cuda", "worker"]
    assert worker[worker.index("--name") + 1] == "$(DASK_WORKER_NAME)"  # by which the operator retires it
    from distributed.cli.dask_scheduler import main as dask_scheduler
    from distributed.cli.dask_worker import main as dask_worker

    for command, given in ((dask_scheduler, scheduler), (dask_worker, worker)):
        options = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
        assert {text for text in given if text.startswith("--")} <= options


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_secrets_are_named_and_never_written(overlay: str) -> None:
    assert not [resource for resource in rendered(overlay) if resource["kind"] == "Secret"]
    for name, container in containers(overlay):
        for variable in container.get("env", ()):
            assert not re.search(r"KEY|SECRET|TOKEN|PASSWORD", variable["name"]) or "valueFrom" in variable, name
    text = " ".join(strings(rendered(overlay)))
    assert not re.search(r"AKIA[0-9A-Z]{16}|BEGIN [A-Z ]*PRIVATE KEY", text)
    with_secret = {name for name, container in containers(overlay) if "stemtomo-s3" in str(container.get("envFrom"))}
    assert with_secret == ({"worker", "run"} if overlay == "s3" else set())


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_scheduler_is_open_to_its_own_pods_and_the_operator_alone(overlay: str) -> None:
    assert of_kind(overlay, "DaskCluster")["spec"]["scheduler"]["service"]["type"] == "ClusterIP"
    assert not [resource for resource in rendered(overlay) if resource["kind"] in ("Ingress", "Service")]
    policies = [resource["spec"] for resource in rendered(overlay) if resource["kind"] == "NetworkPolicy"]
    own = {"podSelector": {"matchLabels": {"dask.org/cluster-name": "stemtomo"}}}
    (into,) = [policy["ingress"] for policy in policies if "Ingress" in policy["policyTypes"]]
    assert into[0]["from"] == [own]
    assert [set(peer) for rule in into[1:] for peer in rule["from"]] == [{"namespaceSelector"}]
    assert all(policy["podSelector"] == own["podSelector"] for policy in policies)
    template = of_kind(overlay, "Job")["spec"]["template"]
    assert template["metadata"]["labels"]["dask.org/cluster-name"] == "stemtomo"


def test_a_run_goes_on_after_75_and_ends_at_2() -> None:
    job = of_kind("cpu", "Job")["spec"]
    rule = job["podFailurePolicy"]["rules"][0]
    assert (rule["action"], rule["onExitCodes"]["values"]) == ("FailJob", [2])
    command = job["template"]["spec"]["containers"][0]["args"]
    assert float(command[command.index("--grace-s") + 1]) < job["template"]["spec"]["terminationGracePeriodSeconds"]


def test_the_series_of_the_configuration_map_is_read() -> None:
    from stemtomo.pipeline.references import load_configuration

    command = of_kind("s3", "Job")["spec"]["template"]["spec"]["containers"][0]["args"]
    override = command[command.index("--set") + 1]
    configuration = load_configuration(DEPLOY / "kubernetes" / "base" / "series.toml", [override])
    assert str(configuration.store_path) == "s3://stemtomo/series.zarr"


def test_the_image_runs_without_root_and_with_pinned_versions() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    assert re.search(r"^USER 10001:10001$", text, re.MULTILINE)
    assert re.search(r"^ARG PYTHON=python:\d+\.\d+\.\d+-slim-bookworm$", text, re.MULTILINE)
    assert "--constraint deploy/constraints.txt" in text
    lines = [line for line in (DEPLOY / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert len(lines) > 20
    assert all(re.fullmatch(r"[a-z0-9-]+==[^=\s]+", line) for line in lines)
