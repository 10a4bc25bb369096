"""Manifests for Kubernetes: a run as a KubeRay RayJob, or a Ray cluster that stays."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from typing import Any

import yaml

from launcher.ray_cluster.environment import (
    DRIVER_ENVIRONMENT,
    process_environment,
    worker_resources,
)
from launcher.ray_cluster.jobs import STOP_WAIT_S, stop_environment
from mhe_dist.config.schema import Config
from mhe_dist.config.write import config_to_dict, config_to_yaml
from mhe_dist.errors import UserError
from mhe_dist.redact import masked

Manifest = dict[str, Any]
API = "ray.io/v1"
RUN_LABEL, PATH_ANNOTATION = "mhe/run", "mhe/path"
SETTINGS_FOLDER, SETTINGS = "/etc/mhe", "run.yaml"
CLAIM_FOLDER = "/data"
TMP_FOLDER, HOME_FOLDER = "/tmp", "/home/mhe"  # of a pod; they end with it
USER = 1000
POD_GRACE_S = STOP_WAIT_S + 20  # until Kubernetes kills a pod that it asked to end
_LONGEST_NAME = 40  # KubeRay adds to it, and 63 is a label's limit
_NAME = re.compile(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?")
_MEMORY = re.compile(r"(?=.*[1-9])([0-9]+(?:\.[0-9]+)?)([KMGTPE]i|[kMGTPE])?")
_RAYS_OWN = ("CPU", "GPU", "memory", "object_store_memory")  # not among its custom resources


@dataclass(frozen=True)
class KubernetesTarget:
    """Where in Kubernetes a run goes.

    Attributes:
        image: with mhe in it (Dockerfile), by tag or, better, by digest.
        namespace: of the RayJob.
        claim: PersistentVolumeClaim that is mounted at `/data`; empty: data and runs are at URLs.
        secret: whose keys become variables of all pods (S3 keys, MLFLOW_TRACKING_URI); it may lack.
        queue: Kueue's LocalQueue, which starts all pods of a run or none; empty: none.
        memory: of a worker, as Kubernetes writes it.
        head_cpus, head_memory: of the head, which holds Ray's services and the run's driver.
        start_minutes: in which all pods of a RayJob must run, or it fails; 0: no limit.
        max_hours: after which a RayJob is ended; 0: no limit.
        shared_memory: of /dev/shm in a worker.
    """

    image: str = "mhe:latest"
    namespace: str = "mhe"
    claim: str = ""
    secret: str = "mhe-environment"
    queue: str = ""
    memory: str = "4Gi"
    head_cpus: int = 1
    head_memory: str = "4Gi"
    start_minutes: int = 30
    max_hours: int = 14 * 24
    shared_memory: str = "1Gi"

    def __post_init__(self) -> None:
        """Refuse what no Kubernetes takes.

        Raises:
            UserError: names the option.
        """
        names = {"namespace": self.namespace, "claim": self.claim, "secret": self.secret}
        for option, name in {**names, "queue": self.queue}.items():
            optional = option in ("claim", "queue") and not name
            if not optional and not _NAME.fullmatch(name):
                raise UserError(
                    f"--{option} {name!r}: is no name of Kubernetes; give small letters, digits, "
                    "- and ., such as mhe-data"
                )
        if not re.fullmatch(r"\S+", self.image):
            raise UserError(
                f"--image {self.image!r}: is no image; give NAME:TAG or NAME@sha256:..."
            )
        for option, amount in {"memory": self.memory, "head-memory": self.head_memory}.items():
            if not _MEMORY.fullmatch(amount):
                raise UserError(
                    f"--{option} {amount!r}: is no amount of memory; give a number and its unit, "
                    "such as 4Gi or 500Mi"
                )


def build_rayjob(config: Config, target: KubernetesTarget, attempt: int = 1) -> Manifest:
    """The RayJob that trains a run.

    Raises:
        UserError: a worker needs more than its pod has.
    """
    labels = {**_labels("run"), RUN_LABEL: run_label(config.run.name)}
    if target.queue:
        labels["kueue.x-k8s.io/queue-name"] = target.queue
    name = rayjob_name(config.run.name, attempt)
    return {
        "apiVersion": API,
        "kind": "RayJob",
        "metadata": {
            "name": name,
            "namespace": target.namespace,
            "labels": labels,
            "annotations": {PATH_ANNOTATION: config.run.path},
        },
        "spec": {
            "entrypoint": f"python -m launcher.job run {SETTINGS_FOLDER}/{SETTINGS}",
            "submissionMode": "K8sJobMode",
            "suspend": bool(target.queue),  # Kueue lets it go when there is room for all of it
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": 600,
            **_deadlines(target),
            "backoffLimit": 2,
            "submitterPodTemplate": _submitter(target),
            "rayClusterSpec": cluster_spec(config, target, config_map=name),
        },
    }


def build_raycluster(config: Config, target: KubernetesTarget) -> Manifest:
    """A Ray cluster that stays, as large as a run needs, for `mhe submit`.

    Its head may be lost: what it knows is kept in Redis (k8s/base/redis.yaml).

    Raises:
        UserError: a worker needs more than its pod has.
    """
    spec = cluster_spec(config, target)
    password = {"secretKeyRef": {"name": "mhe-redis", "key": "password"}}
    spec["gcsFaultToleranceOptions"] = {
        "redisAddress": "redis:6379",
        "redisPassword": {"valueFrom": password},
    }
    return {
        "apiVersion": API,
        "kind": "RayCluster",
        "metadata": {"name": "mhe", "namespace": target.namespace, "labels": _labels("cluster")},
        "spec": spec,
    }


def build_config_map(
    config: Config, target: KubernetesTarget, name: str, owner: str = ""
) -> Manifest:
    """The ConfigMap with a run's settings; it goes with the RayJob of that uid.

    Raises:
        UserError: the settings hold a secret, which a ConfigMap does not keep.
    """
    values = config_to_dict(config)
    if masked(values) != values:
        raise UserError(
            "the settings hold a secret, which a ConfigMap shows to everybody in the namespace: "
            "put it into a Secret and name that with --secret (MLFLOW_TRACKING_URI, for instance)"
        )
    metadata: Manifest = {"name": name, "namespace": target.namespace, "labels": _labels("run")}
    if owner:
        reference = {"apiVersion": API, "kind": "RayJob", "name": name, "uid": owner}
        metadata["ownerReferences"] = [reference]
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": metadata,
        # Only what was set: a manifest that is kept stays right when there are new keys.
        "data": {SETTINGS: config_to_yaml(config, changed_only=True)},
    }


def manifests_to_yaml(made: list[Manifest]) -> str:
    """Manifests as YAML documents, without anchors: people read and patch them."""
    dumper = type("Plain", (yaml.SafeDumper,), {"ignore_aliases": lambda self, data: True})
    return yaml.dump_all(made, Dumper=dumper, sort_keys=False, allow_unicode=True)


def rayjob_name(run: str, attempt: int) -> str:
    """The name of a run's n-th RayJob: lower case, digits and dashes, first a letter.

    KubeRay does not start one whose name begins with a digit, though Kubernetes takes it.
    """
    plain = re.sub(r"[^a-z0-9]+", "-", run.lower()).strip("-")
    if plain[0].isdigit():
        plain = f"run-{plain}"
    return f"{plain[:_LONGEST_NAME].strip('-')}-{attempt}"


def run_label(run: str) -> str:
    """The name of a run as the value of a label: 63 characters, the last a letter or digit."""
    return run[:63].rstrip("._-")


def cluster_spec(config: Config, target: KubernetesTarget, config_map: str = "") -> Manifest:
    """Head and workers: the head computes nothing, a worker pod holds one worker.

    Args:
        config: `scale` says how many workers and what each one gets.
        target: where it goes.
        config_map: ConfigMap with the settings for the driver, which runs on the head.

    Raises:
        UserError: a worker needs more memory than its pod has.
    """
    from importlib import metadata

    scale = config.scale
    return {
        "rayVersion": metadata.version("ray"),
        "authOptions": {"mode": "token"},
        "headGroupSpec": {
            "rayStartParams": {"num-cpus": "0", "dashboard-host": "0.0.0.0"},
            "template": _pod("head", config, target, config_map),
        },
        "workerGroupSpecs": [
            {
                "groupName": "workers",
                "replicas": scale.workers,
                "minReplicas": scale.workers,
                "maxReplicas": scale.workers,
                "rayStartParams": _worker_offer(config, target),
                "template": _pod("worker", config, target, ""),
            }
        ],
    }


def _deadlines(target: KubernetesTarget) -> Manifest:
    seconds = {
        "preRunningDeadlineSeconds": target.start_minutes * 60,
        "activeDeadlineSeconds": target.max_hours * 3600,
    }
    return {field: limit for field, limit in seconds.items() if limit}


def _worker_offer(config: Config, target: KubernetesTarget) -> dict[str, str]:
    """What a worker's pod offers to Ray: what one worker takes.

    KubeRay fills in the pod's memory and GPUs. It would also fill in its CPUs, which are one more.
    """
    needs = worker_resources(config)
    if needs.get("memory", 0) > _memory_bytes(target.memory):
        raise UserError(
            f"scale.resources.memory={needs['memory']:.0f} bytes of a worker do not fit into its "
            f"pod, --memory={target.memory}: give more there, or lower that"
        )
    offer = {"num-cpus": str(math.ceil(needs["CPU"]))}
    if own := {name: amount for name, amount in needs.items() if name not in _RAYS_OWN}:
        offer["resources"] = json.dumps(json.dumps(own))  # quoted: it is part of a command line
    return offer


def _memory_bytes(amount: str) -> float:
    """An amount that `_MEMORY` fits, in bytes."""
    number, unit = _MEMORY.sub(r"\1 \2", amount).split(" ")
    power = "KMGTPE".index(unit[0].upper()) + 1 if unit else 0
    return float(number) * (1024 if unit.endswith("i") else 1000) ** power


def _pod(kind: str, config: Config, target: KubernetesTarget, config_map: str) -> Manifest:
    volumes = [
        {"name": "tmp", "emptyDir": {}},
        {"name": "home", "emptyDir": {}},
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": target.shared_memory}},
    ]
    mounts: list[Manifest] = [
        {"name": "tmp", "mountPath": TMP_FOLDER},
        {"name": "home", "mountPath": HOME_FOLDER},
        {"name": "shm", "mountPath": "/dev/shm"},
    ]
    if target.claim:
        volumes.append({"name": "data", "persistentVolumeClaim": {"claimName": target.claim}})
        mounts.append({"name": "data", "mountPath": CLAIM_FOLDER})
    if config_map:
        volumes.append({"name": "settings", "configMap": {"name": config_map}})
        mounts.append({"name": "settings", "mountPath": SETTINGS_FOLDER, "readOnly": True})
    spec: Manifest = {
        **_pod_security(),
        "terminationGracePeriodSeconds": POD_GRACE_S,
        "containers": [
            {
                **_container(f"ray-{kind}", target),
                "env": _variables(config),
                "envFrom": [{"secretRef": {"name": target.secret, "optional": True}}],
                "resources": _resources(kind, config, target),
                "volumeMounts": mounts,
            }
        ],
        "volumes": volumes,
    }
    if kind == "worker" and config.scale.gpu:
        spec["tolerations"] = [
            {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}
        ]
    return {"metadata": {"labels": _labels(f"ray-{kind}")}, "spec": spec}


def _submitter(target: KubernetesTarget) -> Manifest:
    """The pod that hands the job to the head and repeats its output."""
    small = {"cpu": "500m", "memory": "512Mi"}
    spec = {
        **_pod_security(),
        "restartPolicy": "Never",
        "containers": [
            {
                **_container("ray-job-submitter", target),
                "resources": {"requests": small, "limits": small},
                "volumeMounts": [
                    {"name": "tmp", "mountPath": TMP_FOLDER},
                    {"name": "home", "mountPath": HOME_FOLDER},
                ],
            }
        ],
        "volumes": [{"name": "tmp", "emptyDir": {}}, {"name": "home", "emptyDir": {}}],
    }
    return {"metadata": {"labels": _labels("submitter")}, "spec": spec}


def _container(name: str, target: KubernetesTarget) -> Manifest:
    return {
        "name": name,
        "image": target.image,
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
    }


def _pod_security() -> Manifest:
    return {
        "serviceAccountName": "mhe",
        "automountServiceAccountToken": False,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER,
            "runAsGroup": USER,
            "fsGroup": USER,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
    }


def _resources(kind: str, config: Config, target: KubernetesTarget) -> Manifest:
    if kind == "head":
        amounts: Manifest = {"cpu": str(target.head_cpus), "memory": target.head_memory}
    else:
        # One core more for the loader processes.
        amounts = {"cpu": str(config.scale.cpus_per_worker + 1), "memory": target.memory}
        if config.scale.gpu:
            amounts["nvidia.com/gpu"] = "1"
    return {"requests": dict(amounts), "limits": dict(amounts)}


def _variables(config: Config) -> list[dict[str, str]]:
    values = {**DRIVER_ENVIRONMENT, **process_environment(config), "HOME": HOME_FOLDER}
    values |= stop_environment()  # for Ray's own process on the head, which ends the driver
    # A pod that is to end is drained first: its run saves itself (`mailbox.watch_stop`).
    values["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"] = str(STOP_WAIT_S)
    return [{"name": name, "value": value} for name, value in sorted(values.items())]


def _labels(component: str) -> dict[str, str]:
    return {"app.kubernetes.io/part-of": "mhe", "app.kubernetes.io/component": component}
