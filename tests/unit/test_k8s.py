"""Every overlay of k8s/ renders, is valid, and keeps the doors closed."""

from __future__ import annotations

import copy
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from launcher import cli
from launcher.kubernetes.manifests import (
    KubernetesTarget,
    build_config_map,
    build_raycluster,
    build_rayjob,
    rayjob_name,
)
from launcher.ray_cluster.jobs import STOP_WAIT_S
from launcher.ray_cluster.train import GRACE_S
from mhe_dist.config.load import load_config
from mhe_dist.config.schema import Config

ROOT = Path(__file__).parents[2]
CRDS = ROOT.parent / "shared" / "kuberay"
OVERLAYS = sorted(path.name for path in (ROOT / "k8s" / "overlays").iterdir())
PATHS = ["data.shards=/data/glyphs/train", "evaluate.shards=/data/glyphs/heldout"]
PATHS += ["run.dir=/data/runs", "tracking.uri=http://mlflow:5000"]
KUBERNETES = "1.30"
Object = dict[str, Any]


@pytest.fixture(scope="module")
def rendered() -> dict[str, list[Object]]:
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed: kustomize overlays are not rendered")
    made = {}
    for name in OVERLAYS:
        command = ["kubectl", "kustomize", str(ROOT / "k8s" / "overlays" / name)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        made[name] = [item for item in yaml.safe_load_all(done.stdout) if item]
    return made


def config(**sections: Any) -> Config:
    return Config.model_validate({"data": {"shards": "s3://bucket/train"}, **sections})


def schema(kind: str) -> Object:
    """The CRD's schema, in which a field that it does not name is a mistake."""
    file = CRDS / f"ray.io_{kind.lower()}s.yaml"
    if not file.exists():
        pytest.skip(f"KubeRay's CRDs are not in {CRDS}")
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    crd = yaml.load(file.read_text(), Loader=loader)
    (version,) = (v for v in crd["spec"]["versions"] if v["name"] == "v1")
    return strict(version["schema"]["openAPIV3Schema"])


def strict(node: Any) -> Any:
    if isinstance(node, list):
        return [strict(item) for item in node]
    if not isinstance(node, dict):
        return node
    node = {key: strict(value) for key, value in node.items()}
    if node.get("x-kubernetes-int-or-string"):
        node = {"type": ["integer", "string"]}
    named = isinstance(node.get("properties"), dict) and node["properties"]
    if node.get("type") == "object" and named and "additionalProperties" not in node:
        node["additionalProperties"] = False
    return node


def check_ray(item: Object) -> None:
    found = schema(item["kind"])
    # `metadata` is the API server's own, not the CRD's.
    found["properties"]["metadata"] = {"type": "object"}
    jsonschema.Draft7Validator(found).validate(item)


def pods(item: Any) -> Iterator[Object]:
    """Every pod spec in an object."""
    if isinstance(item, dict):
        if "containers" in item:
            yield item
        for value in item.values():
            yield from pods(value)
    elif isinstance(item, list):
        for value in item:
            yield from pods(value)


@pytest.mark.parametrize("name", OVERLAYS)
def test_core_objects_are_valid(rendered: dict[str, list[Object]], name: str) -> None:
    core = [item for item in rendered[name] if not item["apiVersion"].startswith("ray.io")]
    assert {"Deployment", "StatefulSet", "NetworkPolicy"} <= {item["kind"] for item in core}
    for item in core:
        kubernetes_validate.validate(item, KUBERNETES, strict=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", OVERLAYS)
def test_ray_objects_are_what_kuberay_defines(rendered, name: str) -> None:
    (item,) = (item for item in rendered[name] if item["apiVersion"] == "ray.io/v1")
    check_ray(item)
    misspelt = copy.deepcopy(item)
    misspelt["spec"]["backofLimit"] = 1
    with pytest.raises(jsonschema.ValidationError, match="backofLimit"):
        check_ray(misspelt)


@pytest.mark.parametrize("name", OVERLAYS)
def test_every_container_is_confined_limited_and_told_its_secrets_by_reference(
    rendered, name: str
) -> None:
    found = [pod for item in rendered[name] for pod in pods(item)]
    assert len(found) >= 5
    for pod in found:
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["automountServiceAccountToken"] is False
        assert pod["serviceAccountName"]
        for container in pod["containers"]:
            context = container["securityContext"]
            assert context["readOnlyRootFilesystem"] is True
            assert context["allowPrivilegeEscalation"] is False
            assert context["capabilities"] == {"drop": ["ALL"]}
            assert {"cpu", "memory"} <= set(container["resources"]["limits"])
            for variable in container.get("env", []):
                if "PASSWORD" in variable["name"] or "SECRET" in variable["name"]:
                    assert "secretKeyRef" in variable["valueFrom"]
    assert not [item for item in rendered[name] if item["kind"] == "Secret"]


@pytest.mark.parametrize("name", OVERLAYS)
def test_the_dashboard_is_open_to_nobody_outside(rendered, name: str) -> None:
    policies = [item for item in rendered[name] if item["kind"] == "NetworkPolicy"]
    default = next(p for p in policies if p["spec"]["podSelector"] == {})
    assert not default["spec"].get("ingress")
    for policy in policies:
        for rule in policy["spec"].get("ingress", []):
            assert rule["from"], f"{policy['metadata']['name']} lets everybody in"
    services = [item for item in rendered[name] if item["kind"] == "Service"]
    assert all(s["spec"].get("type", "ClusterIP") == "ClusterIP" for s in services)


def test_no_command_line_shows_the_password_of_the_database() -> None:
    text = (ROOT / "k8s" / "base" / "mlflow.yaml").read_text()
    (server,) = (item for item in yaml.safe_load_all(text) if item["kind"] == "Deployment")
    (container,) = server["spec"]["template"]["spec"]["containers"]
    assert "PASSWORD" not in " ".join([*container["command"], *container["args"]])
    (given,) = (each for each in container["env"] if each["name"] == "PGPASSWORD")
    assert given["valueFrom"]["secretKeyRef"]["key"] == "POSTGRES_PASSWORD"


def test_long_lived_containers_have_probes(rendered) -> None:
    for item in rendered["cpu-smoke"]:
        if item["kind"] in ("Deployment", "StatefulSet"):
            (container,) = item["spec"]["template"]["spec"]["containers"]
            assert {"readinessProbe", "livenessProbe"} <= set(container)


def test_overlays_are_what_they_are_called(rendered) -> None:
    (smoke,) = (i for i in rendered["cpu-smoke"] if i["kind"] == "RayJob")
    (gpu,) = (i for i in rendered["gpu"] if i["kind"] == "RayJob")
    (cluster,) = (i for i in rendered["cluster"] if i["kind"] == "RayCluster")
    worker = gpu["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["template"]["spec"]
    assert worker["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert worker["nodeSelector"] and worker["tolerations"]
    shm = next(v for v in worker["volumes"] if v["name"] == "shm")
    assert shm["emptyDir"] == {"medium": "Memory", "sizeLimit": "16Gi"}
    assert gpu["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] and gpu["spec"]["suspend"]
    assert not [i for i in rendered["gpu"] if i["kind"] == "PersistentVolumeClaim"]
    assert "nvidia" not in yaml.safe_dump(smoke)
    (claim,) = (i for i in rendered["cpu-smoke"] if i["kind"] == "PersistentVolumeClaim")
    for pod in pods(smoke["spec"]["rayClusterSpec"]):
        claims = [v["persistentVolumeClaim"] for v in pod["volumes"] if v["name"] == "data"]
        assert claims == [{"claimName": claim["metadata"]["name"]}]
    assert smoke["spec"]["activeDeadlineSeconds"] < gpu["spec"]["activeDeadlineSeconds"]
    assert cluster["spec"]["gcsFaultToleranceOptions"]["redisPassword"]["valueFrom"]
    assert cluster["spec"]["authOptions"] == {"mode": "token"}


@pytest.mark.parametrize(
    ("words", "file"),
    [
        (PATHS, "run/rayjob.yaml"),
        (["--cluster"], "cluster/raycluster.yaml"),
    ],
)
def test_the_files_are_those_that_the_command_renders(words, file: str, capsys) -> None:
    command = ["k8s", "render", str(ROOT / "configs" / "quickstart.yaml"), *words]
    assert cli.run(command) == 0
    assert capsys.readouterr().out == (ROOT / "k8s" / file).read_text(), (
        f"mhe {' '.join(command)} > k8s/{file}"
    )


@pytest.mark.parametrize("gpu", [False, True])
def test_any_run_makes_a_valid_rayjob(gpu: bool) -> None:
    settings = config(run={"name": "Big_Run.v2"}, scale={"workers": 4, "gpu": gpu})
    target = KubernetesTarget(image="registry/mhe@sha256:0", claim="c", queue="q", memory="8Gi")
    job = build_rayjob(settings, target, 3)
    check_ray(job)
    assert job["metadata"]["name"] == "big-run-v2-3"
    workers = job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
    assert workers["replicas"] == workers["minReplicas"] == 4
    limits = workers["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert limits.get("nvidia.com/gpu") == ("1" if gpu else None)
    assert limits["memory"] == "8Gi"
    check_ray(build_raycluster(settings, target))
    kubernetes_validate.validate(build_config_map(settings, target, "a"), KUBERNETES, strict=True)


def test_a_run_that_is_stopped_has_time_to_save_before_ray_or_its_pod_ends_it() -> None:
    settings, target = config(), KubernetesTarget()
    for made in (build_rayjob(settings, target), build_raycluster(settings, target)):
        found = list(pods(made["spec"].get("rayClusterSpec", made["spec"])))
        assert len(found) == 2
        for pod in found:
            variables = {item["name"]: item["value"] for item in pod["containers"][0]["env"]}
            granted = int(variables["RAY_JOB_STOP_WAIT_TIME_S"])  # 3 where Ray finds none
            assert GRACE_S < granted == STOP_WAIT_S < pod["terminationGracePeriodSeconds"]


def test_the_settings_that_travel_are_those_of_the_run(tmp_path: Path) -> None:
    source = str(ROOT / "configs" / "quickstart.yaml")
    before = load_config(source, ["optim.lr=0.3", "run.name='007'"])
    made = build_config_map(before, KubernetesTarget(), "a")
    file = tmp_path / "run.yaml"
    file.write_text(made["data"]["run.yaml"])
    assert load_config(str(file)) == before


@pytest.mark.parametrize(
    ("run", "name"),
    [
        ("a", "a-1"),
        ("A_b.C", "a-b-c-1"),
        ("x" * 99, "x" * 40 + "-1"),
        ("9-", "run-9-1"),
        ("2026-11-30", "run-2026-11-30-1"),
        ("7" * 99, "run-" + "7" * 36 + "-1"),
    ],
)
def test_names_are_those_that_kubernetes_and_kuberay_allow(run: str, name: str) -> None:
    assert rayjob_name(run, 1) == name
    # `ValidateRayJobMetadata` of KubeRay: a DNS-1035 label, which begins with a letter.
    assert re.fullmatch("[a-z]([-a-z0-9]*[a-z0-9])?", name) and len(name) <= 47
    job = build_rayjob(config(run={"name": run}), KubernetesTarget())
    assert re.fullmatch(
        "[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?", job["metadata"]["labels"]["mhe/run"]
    )


def test_the_image_is_lean_and_nobody_s() -> None:
    text = (ROOT / "Dockerfile").read_text()
    stages = [line for line in text.splitlines() if line.startswith("FROM ")]
    assert len(stages) == 2 and all(":3.11." in stage for stage in stages)
    assert "USER 1000:1000" in text
    assert "-c constraints.txt" in text
    assert " gcc libc6-dev " in text, "model.compile on a GPU"
    assert (ROOT / ".dockerignore").read_text().startswith("*\n")
