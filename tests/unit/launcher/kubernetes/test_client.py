"""`mhe k8s` against an API server that keeps objects in memory, over HTTP."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml

from launcher import cli
from launcher.kubernetes import client as client_module
from launcher.kubernetes.client import KubernetesClient
from launcher.kubernetes.manifests import KubernetesTarget
from launcher.terminal.event_log import EventLogWriter
from mhe_dist.config.write import save_config
from mhe_dist.errors import Preempted, UserError
from tests.support import tiny
from tests.support.servers.stores import serving

JOBS = "/apis/ray.io/v1/namespaces/mhe/rayjobs"


class Api(ThreadingHTTPServer):
    """The little of an API server that is spoken to."""

    def __init__(self) -> None:
        self.jobs: dict[str, dict[str, Any]] = {}
        self.maps: list[dict[str, Any]] = []
        self.posted: list[str] = []
        self.tokens: list[str] = []
        self.log = ""
        self.logs: dict[str, str] = {}  # of pods that print something of their own
        self.dropped = 0  # lines at the begin of a log that its node has no longer
        self.cuts = 0  # of the connections that read a log
        self.later: list[Callable[[], None]] = []  # one for each time that RayJobs are listed
        self.pods = {"submitter": ""}
        self.refuses_maps = False
        self.is_shut_out = False  # from the dashboard, by a NetworkPolicy
        super().__init__(("127.0.0.1", 0), Handler)

    def now(self, name: str, job: str, deployment: str) -> None:
        status = {"jobStatus": job, "jobDeploymentStatus": deployment}
        self.jobs[name]["status"] = status | {"jobId": f"{name}-xyz", "rayClusterName": "small-ray"}


class Handler(BaseHTTPRequestHandler):
    server: Api

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        if path == JOBS:
            if self.server.later:
                self.server.later.pop(0)()
            self._answer({"items": [self.server.jobs[name] for name in sorted(self.server.jobs)]})
        elif path == "/api/v1/namespaces/mhe/pods":
            pods = self.server.pods.items() if self.server.log else []
            made = [{"name": name, "creationTimestamp": at or None} for name, at in pods]
            self._answer({"items": [{"metadata": metadata} for metadata in made]})
        elif path == "/api/v1/namespaces/mhe/secrets/small-ray":
            token = base64.b64encode(b"ray-token").decode()
            self._answer({"data": {"auth_token": token}})
        elif path.endswith("/log") and (pod := path.split("/")[-2]) in self.server.pods:
            missing = 100 if self.server.cuts else 0
            self.server.cuts -= bool(missing)
            log = self._log(self.server.logs.get(pod, self.server.log))
            self._send(200, log.encode(), "text/plain", missing)
        else:
            self._answer({"message": "not found"}, 404)

    def _log(self, text: str) -> str:
        """The lines that the node still has, with their times in a kubelet's format if wanted."""
        lines = text.splitlines(keepends=True)
        if "timestamps=true" in self.path.lower():
            lines = [f"2030-01-01T00:00:{n:02}.000000000Z {line}" for n, line in enumerate(lines)]
        return "".join(lines[self.server.dropped :])

    def do_POST(self) -> None:
        path = urlsplit(self.path).path
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if path == JOBS:
            item = json.loads(body)
            item["metadata"]["uid"] = "uid-1"
            self.server.jobs[item["metadata"]["name"]] = item
            self._answer(item, 201)
        elif path == "/api/v1/namespaces/mhe/configmaps" and self.server.refuses_maps:
            self._answer({"message": "configmaps already exists"}, 409)
        elif path == "/api/v1/namespaces/mhe/configmaps":
            self.server.maps.append(json.loads(body))
            self._answer(self.server.maps[-1], 201)
        elif "/proxy/" in path:
            if self.server.is_shut_out:
                self._answer({"message": "error trying to reach service: i/o timeout"}, 503)
                return
            self.server.posted.append(path)
            self.server.tokens.append(self.headers.get("X-Ray-Authorization", ""))
            self._send(200, b"true", "application/json")
        else:
            self._answer({"message": "forbidden"}, 403)

    def do_DELETE(self) -> None:
        del self.server.jobs[self.path.rpartition("/")[2]]
        self._answer({"status": "Success"})

    def _answer(self, value: Any, code: int = 200) -> None:
        self._send(code, json.dumps(value).encode(), "application/json")

    def _send(self, code: int, body: bytes, kind: str, missing: int = 0) -> None:
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body) + missing))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Api]:
    server = Api()
    with serving(server) as url:
        kubeconfig = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "here",
            "contexts": [{"name": "here", "context": {"cluster": "here", "user": "me"}}],
            "clusters": [{"name": "here", "cluster": {"server": url}}],
            "users": [{"name": "me", "user": {"token": "t"}}],
        }
        file = tmp_path / "kubeconfig"
        file.write_text(yaml.safe_dump(kubeconfig))
        monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(file))
        monkeypatch.setenv("COLUMNS", "200")
        yield server


@pytest.fixture
def file(tmp_path: Path) -> str:
    run = {"name": "small", "dir": "s3://bucket/runs"}
    config = tiny.config(tmp_path, "s3://bucket/train", run=run)
    path = tmp_path / "small.yaml"
    save_config(config, str(path))
    return str(path)


@pytest.mark.slow
def test_a_run_from_submission_to_its_end(api: Api, file: str, capsys) -> None:
    assert cli.run(["k8s", "submit", file, "--image", "mhe:1"]) == 0
    assert "small-1" in capsys.readouterr().out
    job = api.jobs["small-1"]
    assert "image: mhe:1" in yaml.safe_dump(job)
    (settings,) = api.maps
    assert settings["metadata"]["ownerReferences"][0]["uid"] == "uid-1"
    assert yaml.safe_load(settings["data"]["run.yaml"])["run"]["name"] == "small"
    assert cli.run(["k8s", "status", "small"]) == 0

    api.now("small-1", "RUNNING", "Running")
    assert cli.run(["k8s", "submit", file]) == 2
    assert "RayJob small-1 is running with this run" in capsys.readouterr().err
    assert cli.run(["k8s", "logs", "small"]) == 2
    assert "prints nothing yet" in capsys.readouterr().err
    assert cli.run(["k8s", "stop", "small", "--context", "here"]) == 0
    assert "mhe k8s status small-1 --context here says when" in capsys.readouterr().out

    api.now("small-1", "SUCCEEDED", "Complete")
    assert cli.run(["k8s", "status", "small"]) == 0
    assert cli.run(["k8s", "submit", file]) == 0
    assert set(api.jobs) == {"small-1", "small-2"}


@pytest.mark.slow
def test_logs_are_drawn_and_exit_as_the_run_did(api: Api, file: str, capsys) -> None:
    assert cli.run(["k8s", "submit", file]) == 0

    class Sink:
        def write(self, text: str) -> None:
            api.log += text

        def flush(self) -> None:
            pass

    EventLogWriter(Sink()).handle({"event": "checkpoint", "step": 20, "path": "/data/x"})  # type: ignore[arg-type]
    api.log += "a line of a library\n"
    api.now("small-1", "FAILED", "Failed")
    assert cli.run(["k8s", "logs", "small", "-f"]) == 1
    said = capsys.readouterr().out
    assert "step 20  checkpoint /data/x" in said
    assert "a line of a library" in said


def nothing() -> None:
    pass


@pytest.mark.parametrize(
    ("end", "code"),
    [
        (("FAILED", "Failed"), 1),
        (("RUNNING", "Failed"), 1),
        (("STOPPED", "Complete"), Preempted.exit_code),
        (("SUCCEEDED", "Complete"), 0),
    ],
)
def test_logs_exit_as_the_run_did_also_where_the_operator_says_so_after_its_log(
    api: Api, file: str, end: tuple[str, str], code: int, monkeypatch, capsys
) -> None:
    monkeypatch.setattr(client_module, "POLL_S", 0.0)
    assert cli.run(["k8s", "submit", file]) == 0
    api.now("small-1", "RUNNING", "Running")
    api.log = "Traceback: out of memory\n"
    api.later = [nothing] * 5 + [lambda: api.now("small-1", *end)]
    capsys.readouterr()
    assert cli.run(["k8s", "logs", "small", "-f"]) == code
    assert capsys.readouterr().out == "Traceback: out of memory\n"
    assert not api.later


@pytest.mark.parametrize("cuts", [0, 2])
def test_a_log_whose_connection_ends_before_its_run_is_followed_again(
    api: Api, file: str, cuts: int
) -> None:
    assert cli.run(["k8s", "submit", file]) == 0
    api.now("small-1", "RUNNING", "Running")
    api.log, api.cuts = "one\nzw\u00f6lf\n", cuts

    def goes_on() -> None:
        api.log += "\u00fcber\nthree\n"

    def ends() -> None:
        api.log += "four"
        api.now("small-1", "SUCCEEDED", "Complete")

    api.later = [nothing, nothing, goes_on, nothing, ends]
    waited: list[float] = []
    output = "".join(KubernetesClient("mhe").follow("small-1", waited.append))
    assert output == "one\nzw\u00f6lf\n\u00fcber\nthree\nfour"
    assert waited == [client_module.POLL_S] * 4


def test_a_log_whose_node_has_begun_a_new_file_is_followed_in_that(api: Api, file: str) -> None:
    """It was silent until the new file was longer than what had been read."""
    assert cli.run(["k8s", "submit", file]) == 0
    api.now("small-1", "RUNNING", "Running")
    api.log = "a long first line\nsecond\n"

    def begins_a_new_file() -> None:
        api.log += "third\n"
        api.dropped = 2

    def ends() -> None:
        api.log += "fourth\n"
        api.now("small-1", "SUCCEEDED", "Complete")

    api.later = [nothing, begins_a_new_file, ends]
    output = "".join(KubernetesClient("mhe").follow("small-1", lambda seconds: None))
    assert output == "a long first line\nsecond\nthird\nfourth\n"


def test_a_run_that_failed_and_begins_again_is_followed_into_its_next_pod(
    api: Api, file: str
) -> None:
    assert cli.run(["k8s", "submit", file]) == 0
    api.now("small-1", "RUNNING", "Running")
    api.log = "first\n"

    def submits_once_more() -> None:
        api.now("small-1", "FAILED", "Running")
        api.pods["again"] = "2030-01-01T00:00:00Z"

    def retries() -> None:
        api.now("small-1", "FAILED", "Retrying")
        api.pods.clear()

    def begins_again() -> None:
        api.now("small-1", "RUNNING", "Running")
        api.pods["second"], api.logs["second"] = "2030-01-02T00:00:00Z", "second"

    def ends() -> None:
        api.now("small-1", "SUCCEEDED", "Complete")

    api.later = [nothing, submits_once_more, retries, begins_again, ends]
    output = "".join(KubernetesClient("mhe").follow("small-1", lambda seconds: None))
    assert output == "first\nsecond"


def test_stop_asks_ray_and_now_deletes(api: Api, file: str, capsys) -> None:
    assert cli.run(["k8s", "submit", file]) == 0
    api.now("small-1", "RUNNING", "Running")
    assert cli.run(["k8s", "stop", "small"]) == 0
    (path,) = api.posted
    assert path.endswith("/services/small-ray-head-svc:8265/proxy/api/jobs/small-1-xyz/stop")
    assert api.tokens == ["Bearer ray-token"]
    api.now("small-1", "STOPPED", "Complete")
    assert cli.run(["k8s", "status", "small-1"]) == Preempted.exit_code
    api.now("small-1", "RUNNING", "Running")
    assert cli.run(["k8s", "stop", "small", "--now"]) == 0
    assert not api.jobs


def test_a_dashboard_that_the_api_server_does_not_reach_is_told(api: Api, file, capsys) -> None:
    assert cli.run(["k8s", "submit", file]) == 0
    api.now("small-1", "RUNNING", "Running")
    api.is_shut_out = True
    assert cli.run(["k8s", "stop", "small"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "small-1 is not stopped: the API server does not reach Ray's dashboard (503)" in said
    assert "docs/clusters.md" in said


def test_mistakes_are_told(api: Api, file: str, capsys) -> None:
    assert cli.run(["k8s", "status", "nobody"]) == 2
    assert "no RayJob or run 'nobody'" in capsys.readouterr().err
    assert cli.run(["k8s", "submit", file, "--namespace", "other"]) == 2
    assert "404" in capsys.readouterr().err
    uri = "tracking.uri=http://me:planted-secret@mlflow"
    assert cli.run(["k8s", "submit", file, uri]) == 2
    assert "hold a secret" in capsys.readouterr().err
    assert not api.jobs


def test_relative_paths_are_refused_or_put_on_the_claim(api: Api, file: str, capsys) -> None:
    assert cli.run(["k8s", "submit", file, "run.dir=runs"]) == 2
    said = capsys.readouterr().err
    assert "run.dir=runs: is relative" in said and "it becomes /data/runs" in said
    assert not api.jobs
    assert cli.run(["k8s", "submit", file, "run.dir=runs", "--claim", "c"]) == 0
    assert "run.dir: runs is /data/runs in the pods, on claim c" in capsys.readouterr().err
    (settings,) = api.maps
    assert yaml.safe_load(settings["data"]["run.yaml"])["run"]["dir"] == "/data/runs"
    assert api.jobs["small-1"]["metadata"]["annotations"]["mhe/path"] == "/data/runs/small"
    api.now("small-1", "RUNNING", "Running")
    assert cli.run(["k8s", "submit", file, "run.dir=runs", "--claim", "c"]) == 2, "the same run"


def test_what_is_on_no_claim_is_refused(api: Api, file: str, capsys) -> None:
    words = ["run.dir=/data/runs", "tracking.uri=sqlite:////home/me/mlflow.db"]
    assert cli.run(["k8s", "submit", file, *words[:1]]) == 2
    assert "run.dir: in /data, where nothing is mounted" in capsys.readouterr().err
    assert cli.run(["k8s", "submit", file, *words, "--claim", "c"]) == 2
    assert "tracking.uri=/home/me/mlflow.db: is in no pod" in capsys.readouterr().err
    assert not api.jobs


def test_a_rayjob_whose_settings_are_refused_does_not_stay(api: Api, file: str, capsys) -> None:
    api.refuses_maps = True
    assert cli.run(["k8s", "submit", file]) == 2
    assert "409" in capsys.readouterr().err
    assert not api.jobs, "it would wait for settings that never come"
    api.refuses_maps = False
    assert cli.run(["k8s", "submit", file]) == 0
    assert set(api.jobs) == {"small-1"}


def test_the_last_rayjob_is_the_newest_and_not_the_last_by_name(api: Api, file: str) -> None:
    assert cli.run(["k8s", "submit", file]) == 0
    for number in range(2, 11):
        job = api.jobs["small-1"]
        api.jobs[f"small-{number}"] = job | {
            "metadata": job["metadata"] | {"name": f"small-{number}"}
        }
    client = KubernetesClient("mhe")
    assert client.find("small").name == "small-10"
    for number in range(1, 11):
        metadata = api.jobs[f"small-{number}"]["metadata"]
        metadata["creationTimestamp"] = f"2030-01-{20 - number:02d}T00:00:00Z"
    assert client.find("small").name == "small-1", "by when they were made"
    api.log = "x"
    api.pods = {"submitter": "2030-01-02T00:00:00Z", "z-earlier": "2030-01-01T00:00:00Z"}
    assert list(client.read_output("small-1")) == ["x"]


def test_a_rayjob_is_found_by_its_name_before_the_run_that_is_called_so(api: Api, file) -> None:
    for name in ("faces", "faces-1"):
        assert cli.run(["k8s", "submit", file, f"run.name={name}"]) == 0
    assert set(api.jobs) == {"faces-1", "faces-1-1"}
    client = KubernetesClient("mhe")
    assert client.find("faces-1").name == "faces-1"
    assert client.find("faces-1-1").name == "faces-1-1"
    del api.jobs["faces-1"]
    assert client.find("faces-1").name == "faces-1-1", "the run of that name"
    with pytest.raises(UserError, match="no RayJob or run 'faces-1'"):
        client.find("faces-1", only_rayjob=True)


def test_a_run_whose_name_begins_with_a_digit_is_found_by_it(api: Api, file: str) -> None:
    assert cli.run(["k8s", "submit", file, "run.name='2026-11-30'"]) == 0
    assert set(api.jobs) == {"run-2026-11-30-1"}
    assert KubernetesClient("mhe").find("2026-11-30").name == "run-2026-11-30-1"
    assert cli.run(["k8s", "status", "2026-11-30"]) == 0


@pytest.mark.parametrize(
    "words",
    [
        ["--namespace", "M H E"],
        ["--claim", "mhe_data"],
        ["--secret", ""],
        ["--queue", "-a"],
        ["--image", ""],
        ["--image", "mhe 1"],
        ["--memory", "lots"],
        ["--memory", "-4Gi"],
        ["--memory", "0Gi"],
        ["--memory", "4GB"],
    ],
)
def test_what_no_kubernetes_takes_is_refused_by_its_option(
    file: str, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["k8s", "render", file, *words]) == 2
    assert f"{words[0]} {words[1]!r}: is no" in capsys.readouterr().err


def test_a_kubeconfig_that_is_no_yaml_is_a_mistake(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "kubeconfig").write_text("a: [")
    monkeypatch.setattr(
        "kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", f"{tmp_path}/kubeconfig"
    )
    assert cli.run(["k8s", "status"]) == 2
    assert "no usable kubeconfig" in capsys.readouterr().err


@pytest.mark.parametrize("memory", ["4Gi", "500Mi", "0.5Gi", "2G", "1000000000"])
def test_amounts_of_memory(memory: str) -> None:
    assert KubernetesTarget(memory=memory).memory == memory
