"""What a driver of a Ray cluster refuses, and what Ray leaves behind. Ray itself is not started."""

from __future__ import annotations

import random
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from launcher.ray_cluster import connection, environment, ray_internals
from launcher.ray_cluster.connection import (
    _move_logs,
    ask_nodes,
    existing_cluster,
    get_result,
    local_cluster,
)
from mhe_dist.errors import RunError, UserError
from tests.support.config_sections import config


@pytest.mark.parametrize(
    ("scale", "said"),
    [
        ({"gpu": True}, "room for 1, each with CPU 1, GPU 1, on 1 node. .*scale.gpu=false"),
        ({"placement": "strict_spread"}, "room for 1, .*set scale.placement=spread, or add nodes"),
        ({"resources": {"fast": 1}}, "room for 0, each with CPU 1, fast 1, on 1 node. .*resources"),
        ({"accelerator_type": "H100"}, "room for 0, each with CPU 1, accelerator_type:H100 "),
    ],
)
def test_a_run_that_this_machine_has_no_room_for_is_refused_before_it_waits(
    scale: dict[str, Any], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    monkeypatch.setattr(ray_internals, "start_local_ray", lambda *_: "")
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0, "GPU": 1.0})
    run = {"dir": str(tmp_path)}
    too_large = local_cluster(config(run=run, scale={"workers": 2, **scale}))
    with pytest.raises(UserError, match=f"scale.workers=2: there is {said}"), too_large:
        pytest.fail("Ray would wait")
    with local_cluster(config(run=run, scale={"workers": 1, "gpu": True})):
        pass


def test_a_machine_holds_more_workers_than_can_share_a_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of a sweep's trials, all together (`sweep.tuner.run_sweep`)."""
    import ray

    monkeypatch.setattr(ray_internals, "start_local_ray", lambda *_: "")
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 3.0})
    trials = config(run={"dir": str(tmp_path)})
    trials.scale.workers = 3
    assert trials.group_sizes() == []
    with local_cluster(trials):
        pass
    trials.scale.workers = 5
    with pytest.raises(UserError, match=r"scale\.workers=5: there is room for 3"):
        local_cluster(trials).__enter__()


TIMED_OUT = (
    "The current node timed out during startup. This could happen because some of the raylet "
    "failed to startup or the GCS has become overloaded."
)


@pytest.mark.parametrize("error", [Exception(TIMED_OUT), RuntimeError(""), TimeoutError("GCS")])
def test_ray_that_does_not_start_says_what_to_do(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = []

    def start(cpus: int, object_store_bytes: int, folder: str, dashboard: bool) -> str:
        folders.append(Path(folder))
        raise error

    monkeypatch.setattr(ray_internals, "start_local_ray", start)
    made = config(run={"dir": str(tmp_path)})
    with pytest.raises(RunError) as failed, local_cluster(made):
        pytest.fail("Ray has not started")
    for part in (str(error), "Load ", "end other work or wait", "scale.workers", "mhe doctor"):
        assert part in str(failed.value)
    assert "the same command goes on" in str(failed.value)
    assert folders and not folders[0].exists()


@pytest.mark.parametrize("dashboard", [False, True])
def test_the_dashboard_is_started_on_loopback_and_only_when_it_is_asked_for(
    dashboard: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    given: dict[str, Any] = {}

    def init(**arguments: Any) -> Any:
        given.update(arguments)
        return SimpleNamespace(dashboard_url="127.0.0.1:8266")

    monkeypatch.setattr(ray, "init", init)
    link = ray_internals.start_local_ray(1, 100, str(tmp_path), dashboard)
    assert link == ("http://127.0.0.1:8266" if dashboard else "")
    assert given["include_dashboard"] is dashboard
    assert given["dashboard_host"] == given["_node_ip_address"] == "127.0.0.1"


def test_a_node_s_agents_get_ports_that_are_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray
    from ray._private import parameter

    taken = socket.create_server(("127.0.0.1", 0))
    monkeypatch.setattr(environment, "AGENT_PORTS", range(taken.getsockname()[1], 2**16))
    monkeypatch.setattr(random, "sample", lambda ports, _: ports)  # the taken one comes first
    ports: list[int | None] = []

    def init(*, _metrics_export_port: int, **_: Any) -> Any:
        node = parameter.RayParams(metrics_export_port=_metrics_export_port)
        ports.extend((node.metrics_agent_port, node.metrics_export_port))
        ports.extend((node.runtime_env_agent_port, node.dashboard_agent_listen_port))
        return SimpleNamespace(dashboard_url="")

    monkeypatch.setattr(ray, "init", init)
    with taken:
        ray_internals.start_local_ray(1, 100, str(tmp_path))
        assert len(set(ports)) == 4
        assert all(port and port > taken.getsockname()[1] for port in ports)


def test_a_cluster_that_answers_and_is_of_no_use_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import ray

    def start(**arguments: Any) -> None:
        raise RuntimeError("Failed to get node info")

    monkeypatch.setattr(ray, "init", start)
    expected = pytest.raises(RunError, match=r"Failed to get node info.*ray status --address auto")
    with expected, existing_cluster("auto"):
        pytest.fail("Ray has not connected")


def test_ray_s_logs_are_kept_and_its_folder_is_not(tmp_path: Path) -> None:
    logs = tmp_path / "ray" / "session_7" / "logs"
    logs.mkdir(parents=True)
    (logs / "raylet.out").write_text("x")
    (tmp_path / "ray" / "session_latest").symlink_to(logs.parent)
    _move_logs(tmp_path / "ray", tmp_path / "kept")
    assert (tmp_path / "kept" / "session_7" / "raylet.out").read_text() == "x"
    assert not (tmp_path / "ray").exists()


def test_a_cluster_that_did_not_start_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "ray").mkdir()
    _move_logs(tmp_path / "ray", tmp_path / "kept")
    assert not list(tmp_path.iterdir())


class Nodes:
    """Ray's functions for a cluster whose nodes take a while to answer, by a clock of their own."""

    def __init__(self, answers_at: dict[str, float], dies_at: dict[str, float]) -> None:
        self.now = 0.0
        self._answers_at, self._dies_at = answers_at, dies_at

    def nodes(self) -> list[dict[str, Any]]:
        return [
            {"NodeID": name, "NodeManagerHostname": name, "Alive": self._ends(name) > self.now}
            for name in self._answers_at
        ]

    def remote(self, label_selector: dict[str, str], **_: Any) -> Any:
        return lambda function: SimpleNamespace(remote=lambda: label_selector["ray.io/node-id"])

    def wait(self, tasks: list[str], num_returns: int, timeout: float) -> Any:
        last = max(self._answers_at[task] for task in tasks)
        self.now = min(self.now + timeout, max(self.now, last))
        done = [task for task in tasks if self._answers_at[task] <= self.now]
        return done, [task for task in tasks if task not in done]

    def get(self, task: str) -> str:
        return f"answer of {task}"

    def _ends(self, name: str) -> float:
        return self._dies_at.get(name, float("inf"))


@pytest.mark.parametrize(
    ("answers_at", "dies_at", "refusal", "after_s"),
    [
        ({"a": 1.0, "b": 100.0}, {}, "", 100.0),
        ({"a": 1.0, "b": 1e9, "c": 1e9}, {}, "do not answer within 180 s: b, c", 185.0),
        ({"a": 1.0, "b": 1e9, "c": 50.0}, {"b": 30.0}, "left the cluster meanwhile: b", 35.0),
    ],
    ids=["busy", "hung", "lost"],
)
def test_a_busy_node_has_time_to_answer_and_a_lost_one_is_named_at_once(
    answers_at: dict[str, float],
    dies_at: dict[str, float],
    refusal: str,
    after_s: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import ray

    cluster = Nodes(answers_at, dies_at)
    for name in ("nodes", "remote", "wait", "get"):
        monkeypatch.setattr(ray, name, getattr(cluster, name))
    monkeypatch.setattr(connection, "time", SimpleNamespace(monotonic=lambda: cluster.now))
    if refusal:
        with pytest.raises(UserError, match=refusal):
            ask_nodes(str)
    else:
        answers = ask_nodes(str)
        assert [(node["NodeID"], answer) for node, answer in answers] == [
            (name, f"answer of {name}") for name in answers_at
        ]
    assert cluster.now <= after_s


def test_an_error_of_a_task_has_its_own_words_and_not_ray_s_traceback(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What a trial on a cluster refuses was shown with pages about processes of Ray."""
    import ray

    raised = ray.exceptions.RayTaskError("try", "Traceback (most recent ...", UserError("use 8"))

    def get(task: object) -> None:
        raise raised.as_instanceof_cause()

    monkeypatch.setattr(ray, "get", get)
    with pytest.raises(UserError) as failed:
        get_result(object())
    assert (type(failed.value), str(failed.value)) == (UserError, "use 8")


WRONG = ("127.0.0.1:99999", "127.0.0.1:abc", "127.0.0.1:0", "127.0.0.1", "http://127.0.0.1:8265")


@pytest.mark.parametrize("address", [*WRONG, "local", "head:6379/path", "[::1:6379"])
def test_an_address_that_is_none_is_a_mistake(address: str) -> None:
    with pytest.raises(UserError) as refused, existing_cluster(address):
        pytest.fail("there is no cluster")
    assert str(refused.value).startswith(f"--address={address}: give HOST:PORT")


def test_a_cluster_that_is_not_there_is_told_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ray itself tries for several minutes."""
    monkeypatch.setattr(ray_internals, "connect", lambda *_: pytest.fail("Ray was asked"))
    with socket.socket() as taken:  # a port at which nothing listens
        taken.bind(("127.0.0.1", 0))
        for address in (f"127.0.0.1:{taken.getsockname()[1]}", "a..b:6379"):
            refused = pytest.raises(UserError, match=f"no Ray cluster at {address}: .*HOST:PORT")
            with refused, existing_cluster(address):
                pytest.fail("there is no cluster")
