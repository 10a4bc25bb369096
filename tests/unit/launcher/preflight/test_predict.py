"""What preflight makes of the nodes' answers, and what a node says of itself."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from launcher import cli
from launcher.preflight import node_probe, survey, trial_process
from launcher.preflight.node_probe import probe_node
from launcher.preflight.predict import (
    as_it_would_run,
    find_obstacles,
    find_shortages,
    predict_cost,
    prediction_rows,
    workers_on_nodes,
)
from launcher.preflight.trial_process import measure_trial
from launcher.ray_cluster.code_package import with_absolute_paths
from launcher.ray_cluster.jobs import Job
from mhe_dist.config.schema import Config
from mhe_dist.config.write import save_config
from mhe_dist.engine import settings
from mhe_dist.errors import RunError, UserError
from mhe_dist.sizes import GIB
from pipelines.pretrain.dry_run import dry_run
from tests.support import tiny
from tests.support.config_sections import config
from tests.support.waiting import WATCHDOG_S, wait_for

VERSIONS = {"torch": "2.14.1", "ray": "2.60.0"}


def node(host: str = "a", cpus: int = 4, gpus: int = 0, **changes: Any) -> dict[str, Any]:
    resources = {"CPU": float(cpus), "GPU": float(gpus)}
    return {
        "host": host,
        "python": "3.11.7",
        "versions": VERSIONS,
        "gpus": [],
        "memory": int(8 * GIB),
        "problems": [],
        "slow": "",
        "resources": resources,
        **changes,
    }


def test_nothing_stands_in_the_way_of_a_run_that_fits() -> None:
    assert find_obstacles(config(scale={"workers": 4}), [node("a", 2), node("b", 2)]) == []


def test_every_reason_is_told_at_once() -> None:
    trouble = [("data.shards", "not there")]
    nodes = [
        node("a", 1, problems=trouble),
        node("b", 1, problems=trouble, versions={**VERSIONS, "torch": "2.13.0"}),
        node("c", 1, versions={**VERSIONS, "ray": ""}),
    ]
    refusals = find_obstacles(config(scale={"workers": 4}), nodes)
    assert refusals[0] == "data.shards: not there (on a, b)"
    assert refusals[1].startswith("torch is not the same on all nodes (2.14.1 on")
    assert "2.13.0 on b" in refusals[1]
    assert refusals[2] == "ray is missing on c: install it there"
    assert "scale.workers=4: there is room for 3, each with CPU 1, on 3 nodes." in refusals[3]
    assert len(refusals) == 4


@pytest.mark.parametrize(
    ("scale", "room"),
    [
        ({"cpus_per_worker": 3}, 2),  # 4 CPUs hold one such worker, not 4 / 3
        ({"gpu": True}, 0),
        ({"resources": {"fast": 1}}, 1),
        ({"accelerator_type": "H100"}, 4),
    ],
)
def test_a_worker_needs_its_place_on_one_node(scale: dict[str, Any], room: int) -> None:
    first = node("a")
    first["resources"] |= {"fast": 1.0, "accelerator_type:H100": 1.0}
    settings = config(
        scale={"workers": 8, **scale}, train={"global_batch": 1024}, data={"shards": "x"}
    )
    (refusals,) = find_obstacles(settings, [first, node("b")])
    assert f"there is room for {room}," in refusals


@pytest.mark.parametrize(
    ("placement", "fits", "lacks"),
    [("strict_pack", [4, 1], [3, 3]), ("strict_spread", [1, 1, 2, 1], [4, 4, 0])],
)
def test_a_strict_placement_needs_its_nodes(
    placement: str, fits: list[int], lacks: list[int]
) -> None:
    """Ray would wait for ever where the sum over nodes is enough and no placement is."""
    settings = config(scale={"workers": 4, "placement": placement})
    assert find_obstacles(settings, [node(cpus=count) for count in fits]) == []
    (refusal,) = find_obstacles(settings, [node(cpus=count) for count in lacks])
    room, plain = {"strict_pack": 3, "strict_spread": 2}[placement], placement[len("strict_") :]
    assert (
        f"is room for {room}, each with CPU 1, on {len(lacks)} nodes with scale.placement=strict"
        in refusal
    )
    assert refusal.endswith(f"or scale.resources, set scale.placement={plain}, or add nodes.")
    settings.scale.placement = plain
    assert find_obstacles(settings, [node(cpus=count) for count in lacks]) == []


@pytest.mark.parametrize("placement", ["strict_pack", "strict_spread"])
def test_a_strict_placement_is_for_a_fixed_number_of_workers(placement: str) -> None:
    """Ray counts what has room on all nodes together, and would wait for ever to place that."""
    with pytest.raises(ValueError, match=f"{placement} is for a fixed number of workers"):
        config(scale={**ELASTIC, "placement": placement}, train=BATCH)


ELASTIC = {"workers": {"min": 2, "max": 8}}
BATCH = {"global_batch": 1024}  # 8 micro-batches


@pytest.mark.parametrize(("cpus", "workers"), [(2, 2), (3, 2), (4, 4), (7, 4), (9, 8)])
def test_an_elastic_run_has_the_workers_that_have_room(
    cpus: int, workers: int, capsys: pytest.CaptureFixture[str]
) -> None:
    settings, nodes = config(scale=ELASTIC, train=BATCH), [node("a", cpus - 1), node("b", 1)]
    assert find_obstacles(settings, nodes) == []
    as_run = as_it_would_run(settings, nodes)
    assert as_run.group_sizes() == [workers]
    assert workers_on_nodes(as_run, nodes)[0] == min(workers, cpus - 1)
    assert survey.assess(settings, iter([{"nodes": nodes}]), trial=False) is None
    said = capsys.readouterr().err.replace("\n", " ")
    assert f"of 2 to 8 workers (scale.workers) the run would have {workers} there" in said


@pytest.mark.parametrize(
    ("scale", "cpus", "said"),
    [
        (ELASTIC, 1, "scale.min_workers=2: there is room for 1, each with CPU 1, on 1 node. Lo"),
        (
            {"workers": {"min": 3, "max": 8}},
            3,
            "scale.min_workers=3: there is room for 3, each with CPU 1, on 1 node, and a step can "
            "be shared by 4 at least. Lower scale.min_workers, scale.cpus_per_worker or ",
        ),
    ],
)
def test_an_elastic_run_is_refused_where_its_fewest_workers_have_no_room(
    scale: dict[str, Any], cpus: int, said: str
) -> None:
    (refusal,) = find_obstacles(config(scale=scale, train=BATCH), [node("a", cpus)])
    assert refusal.startswith(said)


def test_an_elastic_run_costs_what_its_workers_cost_on_these_nodes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a machine with room for two of eight, both are tried, each with half of the run."""
    tried: list[tuple[int, ...]] = []
    monkeypatch.setattr(survey, "measure_trial", lambda _, *workers: tried.append(workers))
    monkeypatch.setattr(survey, "list_gpus", lambda: ["one", "another"])
    head = {"kind": "full", "groups": 8}
    settings = config(scale={**ELASTIC, "gpu": True}, train=BATCH, head=head)
    (probed, _) = list(survey.survey_machine(settings, trial=True))
    assert tried == [(2, 2)]
    measured = {**MEASURED, "workers": 2}
    nodes = [{**probed["nodes"][0], "memory": int(64 * GIB), "problems": []}]
    found = survey.assess(settings, iter([{"nodes": nodes}, {"measured": measured}]), trial=True)
    assert found is not None and found.longest_step_s == found.step_s


MEASURED = {
    "footprint": {
        "weights": int(0.2 * GIB),
        "optimizer": int(0.2 * GIB),
        "activations": int(1.0 * GIB),
        "rows": int(0.5 * GIB),
    },
    "trial": {
        "step_s": 0.9,
        "peak_bytes": int(2.5 * GIB),
        "base_bytes": int(0.9 * GIB),
        "device_bytes": 0,
        "rows_bytes": int(0.1 * GIB),
        "head_s": 0.1,
    },
    "workers": 1,
    "samples": 5120,
}


def test_memory_is_that_of_the_trial_and_of_the_rows_it_did_not_meet() -> None:
    found = predict_cost(config(), MEASURED)
    assert found.memory == pytest.approx(2.9 * GIB, rel=1e-6)
    assert dict(found.parts)["libraries"] == int(0.9 * GIB)


def test_a_checkpoint_s_copies_count_where_they_are_more_than_the_activations() -> None:
    measured = {**MEASURED, "footprint": {**MEASURED["footprint"], "activations": 0}}
    assert predict_cost(config(), measured).memory == pytest.approx((2.9 + 0.9) * GIB, rel=1e-6)


@pytest.mark.parametrize("memory", ["device", "host"])
def test_the_rows_of_a_gpu_s_bank_are_in_memory_as_a_whole_in_the_trial(memory: str) -> None:
    """On the card or pinned; a checkpoint copies them, and no activations are on the host."""
    found = predict_cost(config(scale={"gpu": True}, head={"bank": {"memory": memory}}), MEASURED)
    assert found.memory == pytest.approx((2.5 + 0.9) * GIB, rel=1e-6)


def test_time_is_that_of_the_trial_s_steps() -> None:
    found = predict_cost(config(train={"global_batch": 512}), MEASURED)
    assert dict(prediction_rows(found))["time of a step"] == "0.900 s"
    assert dict(prediction_rows(found))["time of an epoch"] == "9 s"


def test_a_head_that_scores_the_embeddings_of_all_workers_takes_longer_than_in_the_trial() -> None:
    """One of four workers was tried: a batch of four times the size meets as many rows."""
    train = {"global_batch": 512}
    gathered = config(head={"kind": "full", "groups": 4}, train=train, scale={"workers": 4})
    found = dict(prediction_rows(predict_cost(gathered, MEASURED)))
    assert found["time of a step"] == "0.900 to 1.200 s"
    assert found["time of an epoch"] == "9 s to 12 s"
    routed = config(head={"groups": 4}, train=train, scale={"workers": 4})
    assert dict(prediction_rows(predict_cost(routed, MEASURED)))["time of a step"] == "0.900 s"


@pytest.mark.parametrize(
    ("placement", "workers", "on_nodes"),
    [
        ("pack", 4, [4, 1, 0, 4]),
        ("spread", 4, [2, 1, 0, 2]),
        ("spread", 9, [4, 1, 0, 4]),
        ("strict_pack", 4, [4, 0, 0, 4]),
        ("strict_spread", 3, [1, 1, 0, 1]),
    ],
)
def test_a_node_may_get_as_many_workers_as_its_placement_lets_it(
    placement: str, workers: int, on_nodes: list[int]
) -> None:
    """A head without CPUs gets none, so the others get more."""
    settings = config(
        scale={"workers": workers, "placement": placement},
        train={"global_batch": workers * 128},
        data={"shards": "x", "streams": workers * 2},
    )
    nodes = [node("a", 4), node("b", 1), node("head", 0), node("d", 5)]
    assert workers_on_nodes(settings, nodes) == on_nodes


def test_what_does_not_fit_is_refused_with_its_largest_part() -> None:
    settings = config(scale={"workers": 4})
    found = predict_cost(settings, MEASURED)
    (refusals,) = find_shortages(settings, found, [node()])
    assert "4 workers on a need 11.60 GiB, and 8.00 GiB are free there" in refusals
    assert "lower train.micro_batch" in refusals
    (refusals,) = find_shortages(settings, found, [node(), node("b")])
    assert refusals.endswith(", or set scale.placement=spread.")
    settings.scale.placement = "spread"
    assert find_shortages(settings, found, [node(), node("b")]) == []


def test_memory_and_cards_are_those_of_the_nodes_that_workers_may_be_on() -> None:
    """A small head without CPUs, and cards of another kind than is asked for, hold no worker."""
    head, large = node("head", 0, memory=GIB), node("large", 4, memory=64 * GIB, gpus=4)
    head["gpus"], large["gpus"] = ["NVIDIA T4, 15360 MiB"], ["NVIDIA H100, 81559 MiB"] * 4
    settings = config(scale={"workers": 4})
    found = predict_cost(settings, MEASURED)._replace(device=int(40 * GIB))
    assert find_shortages(settings, found, [head, large]) == []
    large["memory"] = 4 * GIB
    (refusal,) = find_shortages(settings, found, [head, large])
    assert refusal.startswith("4 workers on large need 11.60 GiB, and 4.00 GiB are free there")


def test_a_card_that_is_too_small_is_named() -> None:
    found = predict_cost(config(), MEASURED)._replace(device=int(40 * GIB))
    large, small = "NVIDIA H100 80GB HBM3, 81559 MiB", "NVIDIA A10G, 23028 MiB"
    nodes = [node(gpus=1), node("b", gpus=1)]
    nodes[0]["gpus"], nodes[1]["gpus"] = [large], [small]
    (refusal,) = find_shortages(config(), found, nodes)
    assert "a worker needs 40.00 GiB on its GPU" in refusal
    assert small in refusal and large not in refusal
    assert find_shortages(config(), found, nodes[:1]) == []
    assert find_shortages(config(), found, [node() | {"gpus": ["a card"]}]) == []


def test_a_node_tries_what_the_run_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(node_probe, "DEADLINE_S", WATCHDOG_S)
    shards = tiny.write_shards(tmp_path / "train", classes=8)
    good = tiny.config(tmp_path / "runs", shards, tracking={"mlflow": False})
    said = probe_node(good)
    assert said["problems"] == []
    assert json.loads(json.dumps(said)) == said
    assert not list((tmp_path / "runs").iterdir()), "the probe leaves nothing"
    bad = tiny.config(
        Path("/proc/runs"),
        str(tmp_path / "lost"),
        tracking={"mlflow": True, "uri": "http://me:planted-secret@127.0.0.1:1"},
        model={"compile": True},
    )
    problems = dict(probe_node(bad)["problems"])
    keys = {key.partition("=")[0] for key in problems}
    assert keys == {"data.shards", "run.dir", "tracking.uri", "model.compile"}
    assert problems["model.compile"].startswith("needs a C++ compiler on a CPU")
    assert "planted-secret" not in str(problems)


def test_a_slow_precision_is_told_once_before_the_trial(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(settings, "resolve_precision", lambda *_: "float32")
    chosen = config(train={"precision": "bf16"})
    slow = probe_node(chosen)["slow"]
    assert slow.startswith("train.precision=bf16: this CPU has no bf16 instructions")
    assert slow.endswith("give train.precision=auto or train.precision=float32")
    assert probe_node(config(train={"precision": "auto"}))["slow"] == ""
    assert probe_node(config(train={"precision": "bf16"}, scale={"gpu": True}))["slow"] == ""

    def events() -> Iterator[dict[str, Any]]:
        yield {"nodes": [node(slow=slow), node("b", slow=slow), node("c")]}
        assert capsys.readouterr().err.replace("\n", " ").strip() == f"note: {slow}"
        yield {"measured": None}

    assert survey.assess(chosen, events(), trial=True) is None


class Jobs:
    """A cluster whose only job has ended."""

    address = "http://127.0.0.1:8265"

    def __init__(self, code: int, output: str) -> None:
        self._code, self._output = code, output

    def find(self, job_id: str) -> Job:
        message = f"Job entrypoint command failed with exit code {self._code}, last available logs"
        return Job(job_id, "", "", "failed", self._code, 0.0, 0.0, message, {})

    def read_output(self, job_id: str) -> str:
        return self._output


LOG = "job_manager.py:581 -- Runtime env is setting up.\n"


@pytest.mark.parametrize(
    ("job", "kind", "message"),
    [
        (Jobs(2, f"{LOG}error: left:\n  b\n"), UserError, "left:\n  b"),
        (Jobs(1, f"{LOG}error: RayError: lost\n"), RunError, "RayError: lost"),
        (Jobs(2, LOG), RunError, "failed with exit code 2, last available logs"),
    ],
)
def test_a_job_that_fails_is_told_in_its_own_words(
    job: Any, kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind) as failed:
        list(survey._events(job, "id"))
    assert str(failed.value).startswith(f"preflight on {job.address}: ")
    assert str(failed.value).endswith(message)


@pytest.mark.slow
def test_the_command_says_what_a_run_costs_and_finds_data_where_it_was_typed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny.write_shards(tmp_path / "train", classes=8)
    monkeypatch.chdir(tmp_path)
    typed = tiny.config(Path("runs"), "train", head={"groups": "auto"})
    save_config(typed, "a.yaml")
    measured: list[dict[str, Any] | None] = []

    def measure(settings: Config, *workers: int) -> dict[str, Any] | None:
        assert with_absolute_paths(typed) == settings  # the trial itself gets the relative paths
        measured.append(measure_trial(typed, *workers))
        return measured[-1]

    monkeypatch.setattr(survey, "measure_trial", measure)
    assert cli.run(["preflight", "a.yaml"]) == 0
    said = capsys.readouterr().out
    expected = ("memory of a worker at its peak", "time of an epoch", "mhe train a.yaml")
    assert "auto: head.groups=1: with 1 group, of which a worker owns whole ones" in said
    for part in ("memory: activations", *expected):
        assert part in said
    (found,) = measured
    assert found is not None and found["samples"] == 8 * tiny.IMAGES


def test_a_mistake_that_a_trial_finds_is_told_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit code 2 of `launcher.job` is a mistake, which it words at its end."""
    said = "a warning of some library\nerror: model.name=x cannot train on images of 3 x 9 x 9\n"
    done = subprocess.CompletedProcess([], 2, "", said)
    monkeypatch.setattr(trial_process, "_run", lambda *_: done)
    with pytest.raises(UserError, match=r"^model\.name=x cannot train on images of 3 x 9 x 9$"):
        measure_trial(tiny.config(Path("runs"), "train"), 1, 1)
    done.stderr = "error: 2 mistakes:\n  run.nam=x: one\n  data.shard=y: another\n"
    with pytest.raises(UserError, match=r"^2 mistakes:\n  run\.nam=x: one\n  data\.shard=y: anot"):
        measure_trial(tiny.config(Path("runs"), "train"), 1, 1)


def test_a_trial_that_takes_too_long_ends_with_its_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = tmp_path / "worker"

    def out_of_time(process: subprocess.Popen[str], timeout: float) -> None:
        wait_for(lambda: worker.exists() and worker.read_text().strip())
        raise subprocess.TimeoutExpired(process.args, timeout)

    monkeypatch.setattr(subprocess.Popen, "communicate", out_of_time)
    script = f"sleep 10000 & echo $! > {worker}; wait"
    with pytest.raises(RunError, match=r"did not end within .* --no-trial"):
        trial_process._run(["sh", "-c", script], dict(os.environ))
    number = int(worker.read_text())
    zombie = psutil.STATUS_ZOMBIE
    wait_for(lambda: not psutil.pid_exists(number) or psutil.Process(number).status() == zombie)


def test_a_trial_refuses_what_cannot_train(tmp_path: Path) -> None:
    shards = tiny.write_shards(tmp_path / "shards", classes=2)
    model = {"kwargs": {"features_only": True}, "neck": "none"}
    with pytest.raises(UserError, match="gives list instead of embeddings"):
        dry_run(tiny.config(tmp_path, shards, model=model), 1, 1, [])
