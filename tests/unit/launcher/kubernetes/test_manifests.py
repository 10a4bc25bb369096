"""What the pods of a run offer to Ray: room for one worker each, and time to save."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from launcher import cli
from launcher.kubernetes.manifests import (
    POD_GRACE_S,
    KubernetesTarget,
    build_raycluster,
    build_rayjob,
)
from launcher.ray_cluster.environment import count_slots, placement_needs
from launcher.ray_cluster.train import GRACE_S
from mhe_dist.config.schema import Config
from mhe_dist.errors import UserError
from mhe_dist.sizes import GIB


def config(**scale: Any) -> Config:
    values = {"data": {"shards": "s3://bucket/train"}, "scale": {"workers": 2, **scale}}
    return Config.model_validate(values)


def offered(made: Mapping[str, Any]) -> dict[str, float]:
    """What Ray has of a worker's pod: its start parameters, or else KubeRay gives it the limits."""
    (group,) = made["spec"].get("rayClusterSpec", made["spec"])["workerGroupSpecs"]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    parameters = group["rayStartParams"]
    (resources,) = shlex.split(parameters.get("resources", '"{}"'))  # KubeRay's command line
    return {
        "CPU": float(parameters.get("num-cpus", limits["cpu"])),
        "GPU": float(limits.get("nvidia.com/gpu", 0)),
        "memory": float(limits["memory"].removesuffix("Gi")) * GIB,
        **json.loads(resources),
    }


@pytest.mark.parametrize("build", [build_rayjob, build_raycluster])
@pytest.mark.parametrize(
    "scale",
    [
        {},
        {"cpus_per_worker": 4},
        {"gpu": True, "cpus_per_worker": 2},
        {"resources": {"fast_disk": 1, "licence": 0.5}},
        {"resources": {"memory": 3 * GIB}},
        {"resources": {"CPU": 2}},
    ],
)
def test_a_pod_has_room_for_one_worker(build: Any, scale: dict[str, Any]) -> None:
    settings = config(**scale)
    made = build(settings, KubernetesTarget(memory="4Gi"))
    assert count_slots(offered(made), placement_needs(settings)) == 1


def test_more_memory_than_a_pod_has_is_refused() -> None:
    settings = config(resources={"memory": 5 * GIB})
    with pytest.raises(UserError, match=r"scale\.resources.memory=5368709120.*--memory=5000M"):
        build_rayjob(settings, KubernetesTarget(memory="5000M"))
    assert build_rayjob(settings, KubernetesTarget(memory="5Gi"))


@pytest.mark.parametrize(
    ("memory", "fits"),
    [("500Mi", False), ("1Gi", True), ("1.1G", True), ("1073741824", True), ("1000000k", False)],
)
def test_memory_is_compared_in_kubernetes_own_units(memory: str, fits: bool) -> None:
    settings = config(resources={"memory": GIB})
    with nullcontext() if fits else pytest.raises(UserError, match="--memory"):
        build_rayjob(settings, KubernetesTarget(memory=memory))


def test_the_head_and_the_deadlines_are_what_was_asked_for() -> None:
    job = build_rayjob(config(), KubernetesTarget(start_minutes=5, max_hours=48))
    assert job["spec"]["preRunningDeadlineSeconds"] == 5 * 60
    assert job["spec"]["activeDeadlineSeconds"] == 48 * 3600
    without = build_rayjob(config(), KubernetesTarget(start_minutes=0, max_hours=0))
    assert not [field for field in without["spec"] if "Deadline" in field]
    target = KubernetesTarget(head_cpus=8, head_memory="32Gi")
    head = build_raycluster(config(), target)["spec"]["headGroupSpec"]["template"]["spec"]
    assert head["containers"][0]["resources"]["limits"] == {"cpu": "8", "memory": "32Gi"}
    with pytest.raises(UserError, match="--head-memory 'much'"):
        KubernetesTarget(head_memory="much")


def test_ray_drains_a_pod_that_ends_for_as_long_as_a_save_may_take() -> None:
    spec = build_raycluster(config(), KubernetesTarget())["spec"]
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        variables = {item["name"]: item["value"] for item in pod["containers"][0]["env"]}
        drained = int(variables["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"])  # 30 by default
        assert GRACE_S < drained < pod["terminationGracePeriodSeconds"] == POD_GRACE_S


def test_an_elastic_run_is_told_that_kuberay_waits_for_all_its_pods(tmp_path: Path, capsys) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("data: {shards: 's3://b/train'}\nrun: {dir: 's3://b/runs'}\n")
    words = ["k8s", "render", str(file), "scale.workers={min: 2, max: 8}", "--start-minutes", "90"]
    assert cli.run(words) == 0
    said = capsys.readouterr()
    assert "all 8 workers run, at most 90 min (--start-minutes)" in said.err
    assert "mhe k8s render --cluster" in said.err
    assert cli.run([*words, "--cluster"]) == 0
    assert "waits until" not in capsys.readouterr().err
