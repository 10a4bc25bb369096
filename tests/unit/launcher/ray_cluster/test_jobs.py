"""What is sent to a cluster, and what is not; what a job's state means. Without Ray."""

from __future__ import annotations

import ast
import io
import json
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import requests
from aiohttp import ServerDisconnectedError
from ray.job_submission import JobStatus

from launcher import cli
from launcher.ray_cluster import jobs
from launcher.ray_cluster.code_package import PACKAGES, with_absolute_paths
from launcher.ray_cluster.dashboard import ADDRESS_VARIABLE, resolve_address
from launcher.ray_cluster.jobs import Submission, _to_job, build_submission, resolve_variables
from launcher.terminal.event_log import EventLogWriter, parse_event, split_lines
from mhe_dist.config.describe import all_keys
from mhe_dist.config.load import load_config
from mhe_dist.config.schema import Config
from mhe_dist.config.section import path_keys
from mhe_dist.config.shipped import SCHEMA, shipped_configs
from mhe_dist.config.write import save_config
from mhe_dist.errors import Preempted, RunError, UserError
from tests.support import tiny

ROOT = Path(__file__).parents[4]
DATA = "package_data"  # of setup.py
SECRET = "correct-horse-battery"


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return with_absolute_paths(tiny.config(tmp_path / "runs", str(tmp_path / "train")))


def prepare(config: Config, folder: Path, address: str = "http://head:8265") -> Submission:
    folder.mkdir(exist_ok=True)
    return build_submission(config, address, 3, {}, folder)


def test_the_code_and_the_settings_travel_and_nothing_else(config: Config, tmp_path: Path) -> None:
    sent = prepare(config, tmp_path / "sent").package
    assert {
        "launcher/job.py",
        "pipelines/pretrain/main.py",
        "mhe_dist/train/loop.py",
        "run.yaml",
    } < {*sent.files}
    assert {name.partition("/")[0] for name in sent.files} == {*PACKAGES, "run.yaml"}
    names = [SCHEMA, *(f"{name}.yaml" for name in shipped_configs())]
    configs = {f"mhe_dist/configs/{name}" for name in names}
    files = {
        str(path.relative_to(ROOT))
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {"pipelines/report/page.html.j2", "pipelines/report/audit/audit.css"} < files
    assert {*sent.files} == configs | files | {"run.yaml"}
    assert sent.bytes == sum((sent.folder / name).stat().st_size for name in sent.files)
    assert load_config(str(sent.folder / "run.yaml")) == config


def test_the_wheel_holds_the_kinds_of_files_that_travel(config: Config, tmp_path: Path) -> None:
    sent = prepare(config, tmp_path / "sent").package
    kinds = {Path(name).suffix for name in sent.files if name.partition("/")[0] in PACKAGES}
    setup = ast.walk(ast.parse((ROOT / "setup.py").read_text()))
    [data] = [word.value for word in setup if isinstance(word, ast.keyword) and word.arg == DATA]
    patterns = ast.literal_eval(data)
    of_configs = {".yaml", ".json"}
    assert {f"*{kind}" for kind in kinds - of_configs - {".py"}} == {*patterns[""]}


def test_local_paths_hold_in_any_folder_and_urls_stay(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    config = Config.model_validate(
        {
            "run": {"dir": "runs"},
            "data": {"shards": "data/train", "glyphs": {"fonts": "fonts"}},
            "evaluate": {
                "shards": "s3://bucket/heldout",
                "verification": ["lfw.bin", "s3://bucket/cfp.bin"],
                "classification": "more",
                "labels": "tagged",
                "label_set": "tags",
            },
            "tracking": {"uri": "sqlite:///runs/mlflow.db"},
            "model": {"init_from": "r50.pth"},
        }
    )
    there = with_absolute_paths(config)
    assert there.run.path == f"{tmp_path}/runs/run"
    assert there.data.shards == f"{tmp_path}/data/train"
    assert there.data.glyphs is not None and there.data.glyphs.fonts == f"{tmp_path}/fonts"
    assert there.evaluate.shards == "s3://bucket/heldout"
    assert there.tracking.uri == f"sqlite:///{tmp_path}/runs/mlflow.db"
    assert there.head.bank.path == ""
    assert there.model.init_from == f"{tmp_path}/r50.pth"
    assert there.evaluate.verification == [f"{tmp_path}/lfw.bin", "s3://bucket/cfp.bin"]
    assert there.evaluate.classification == f"{tmp_path}/more"
    assert there.evaluate.labels == f"{tmp_path}/tagged"
    assert there.evaluate.label_set == f"{tmp_path}/tags"
    assert config.run.dir == "runs"


def test_a_database_is_a_path_whatever_its_driver(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    data, uri = {"shards": "s3://bucket/train"}, "sqlite+pysqlite:///mlflow.db"
    config = Config.model_validate({"data": data, "tracking": {"uri": uri}})
    there = f"sqlite+pysqlite:///{tmp_path}/mlflow.db"
    assert with_absolute_paths(config).tracking.uri == there


def test_a_dollar_in_the_name_of_the_working_directory_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The job read its settings, and took the name for a variable: the run began elsewhere."""
    (tmp_path / "a$HOME").mkdir()
    monkeypatch.chdir(tmp_path / "a$HOME")
    with pytest.raises(UserError, match=r"run.dir=.*/a\$HOME/runs: `\$` in the name of a folder"):
        with_absolute_paths(tiny.config(Path("runs"), "train"))


def test_every_text_of_the_config_is_a_path_that_is_placed_or_none() -> None:
    """A new key belongs to `PathText`, or into the list here."""
    no_paths = {
        *("run.name", "model.name", "scale.accelerator_type", "checkpoint.keep_best"),
        *("data.glyphs.heldout_fonts", "evaluate.typefaces", "resume.allow"),
        *("tracking.uri", "tracking.experiment"),  # `map_paths` looks into the uri by itself
    }
    texts, placed = set(), set()
    for key in all_keys():
        parent, _, name = key.path.rpartition(".")
        if key.field.annotation in (str, list[str], dict[str, str]):
            texts.add(key.path)
            section = next((each.section for each in all_keys() if each.path == parent), None)
            placed |= {key.path} if name in path_keys(section or Config) else set()
    assert {"data.mix.shards", "evaluate.label_set", "head.bank.path"} < placed
    assert texts - placed == no_paths


def test_a_job_says_what_it_runs(config: Config, tmp_path: Path) -> None:
    sent = prepare(config, tmp_path / "sent")
    assert sent.id == "run-3"
    assert sent.entrypoint == "exec python -m launcher.job run run.yaml"
    assert sent.metadata == {"mhe_run": "run", "mhe_path": config.run.path}
    assert sent.environment["OMP_NUM_THREADS"] == "1"
    assert sent.environment["RAY_TRAIN_V2_ENABLED"] == "1"
    here = prepare(config, tmp_path / "here", "http://127.0.0.1:8265")
    assert sys.executable in here.entrypoint, "this machine's nodes run this interpreter"


@pytest.mark.parametrize("there", [True, False])
def test_behind_a_forwarded_port_a_job_starts_with_the_nodes_own_python(
    there: bool, config: Config, tmp_path: Path, monkeypatch
) -> None:
    ours, nodes = tmp_path / "our venv" / "python", tmp_path / "bin" / "python"
    for python in [nodes] + [ours] * there:
        python.parent.mkdir()
        python.write_text('#!/bin/sh\necho "$0" "$@"\n')
        python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(ours))
    sent = prepare(config, tmp_path / "sent", "http://127.0.0.1:8265")
    path = {"PATH": f"{nodes.parent}:/bin:/usr/bin"}
    done = subprocess.run(
        sent.entrypoint, shell=True, env=path, capture_output=True, text=True, check=True
    )
    assert done.stdout == f"{ours if there else nodes} -m launcher.job run run.yaml\n"


def test_secrets_do_not_travel(monkeypatch, config: Config, tmp_path: Path) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:{SECRET}@mlflow")
    config.run.dir = f"sftp://me:{SECRET}@host/runs"
    sent = prepare(config, tmp_path / "sent")
    assert sent.metadata["mhe_path"] == "sftp://***@host/runs/run"
    assert SECRET not in json.dumps([sent.environment, sent.metadata, sent.entrypoint])
    for word in ("AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_URI", f"X={SECRET}", "DB_PASSWORD=x"):
        with pytest.raises(UserError, match="looks like a secret"):
            resolve_variables([word])


def test_variables_are_passed_on_by_value_or_by_name(monkeypatch) -> None:
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "eth0")
    monkeypatch.delenv("NOT_SET", raising=False)
    assert resolve_variables(["NCCL_SOCKET_IFNAME", "A=b=c"]) == {
        "NCCL_SOCKET_IFNAME": "eth0",
        "A": "b=c",
    }
    with pytest.raises(UserError, match="no such variable"):
        resolve_variables(["NOT_SET"])
    for word in ("=3", "1X=3", "A B=3", ""):
        with pytest.raises(UserError, match="is no name of a variable; give NAME=VALUE"):
            resolve_variables([word])


def test_a_dry_run_shows_everything_but_secrets(
    monkeypatch, config: Config, tmp_path, capsys
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    file = tmp_path / "a.yaml"
    save_config(config, str(file))
    uri = f"tracking.uri=https://me:{SECRET}@mlflow.example"
    words = ["submit", str(file), uri, "--dry-run", "--env", "NCCL_DEBUG=INFO"]
    monkeypatch.setattr(sys, "argv", ["mhe", *words])
    assert cli.run(words) == 0
    said = capsys.readouterr().out
    for part in (
        "launcher.job run run.yaml",
        "1 workers",
        "pack",
        "NCCL_DEBUG=INFO",
        "mhe_dist/train/loop.py",
        "uri: https://***@mlflow.example",
        f"submit {file} 'tracking.uri=https://***@mlflow.example' --env NCCL_DEBUG=INFO",
    ):
        assert part in said
    assert SECRET not in said


def test_an_address_comes_from_the_option_the_environment_or_this_machine(monkeypatch) -> None:
    monkeypatch.delenv(ADDRESS_VARIABLE, raising=False)
    assert resolve_address("") == "http://127.0.0.1:8265"
    monkeypatch.setenv(ADDRESS_VARIABLE, "https://head/")
    assert resolve_address("") == "https://head"
    assert resolve_address("http://other:1") == "http://other:1"
    with pytest.raises(UserError, match="http://HEAD:8265"):
        resolve_address("head:6379")


@pytest.mark.parametrize("port", ["99999", "abc", "0", "-1"])
def test_a_port_that_cannot_be_is_a_mistake(port: str, monkeypatch, capsys) -> None:
    address = f"http://127.0.0.1:{port}"
    for words in (["jobs"], ["status", "x"]):
        assert cli.run([*words, "--address", address]) == 2
        said = " ".join(capsys.readouterr().err.split())
        assert f"--address={address}: give the cluster's dashboard, http://HEAD:8265" in said
    monkeypatch.setenv(ADDRESS_VARIABLE, address)
    assert cli.run(["jobs"]) == 2
    assert f"{ADDRESS_VARIABLE}={address}: give" in " ".join(capsys.readouterr().err.split())


def test_a_host_that_no_machine_can_be_called_is_a_mistake(capsys) -> None:
    assert cli.run(["jobs", "--address", "http://a..b:8265"]) == 2
    assert "no Ray cluster answers at http://a..b:8265" in capsys.readouterr().err


def test_a_cluster_that_is_not_there_is_told_at_once(capsys) -> None:
    assert cli.run(["jobs", "--address", "http://127.0.0.1:1"]) == 2
    assert "ray start --head --disable-usage-stats" in capsys.readouterr().err


def detail(
    status: JobStatus, exit_code: int | None = None, job: str = "a-1", run: str = "a"
) -> Any:
    return SimpleNamespace(
        submission_id=job,
        metadata={"mhe_run": run, "mhe_path": f"/runs/{run}"},
        status=status,
        driver_exit_code=exit_code,
        start_time=1500,
        end_time=None,
        message=None,
        runtime_env=None,
    )


@pytest.mark.parametrize(
    ("status", "exit_code", "over", "code"),
    [
        (JobStatus.PENDING, None, False, 0),
        (JobStatus.RUNNING, None, False, 0),
        (JobStatus.SUCCEEDED, 0, True, 0),
        (JobStatus.FAILED, 2, True, 2),
        (JobStatus.FAILED, None, True, 1),
        (JobStatus.STOPPED, None, True, Preempted.exit_code),
    ],
)
def test_commands_exit_as_the_job_did(status, exit_code, over: bool, code: int) -> None:
    job = _to_job(detail(status, exit_code))
    assert (job.run, job.path, job.started) == ("a", "/runs/a", 1.5)
    assert (job.is_over, job.exit_code) == (over, code)


class Namesakes:
    """A Jobs client with a finished job, and one of a run that is called as that job is."""

    def __init__(self) -> None:
        self.listed = [
            detail(JobStatus.RUNNING, job="faces-1-1", run="faces-1"),
            detail(JobStatus.SUCCEEDED, job="faces-1", run="faces"),
        ]

    async def tail_job_logs(self, job_id: str) -> AsyncIterator[str]:
        yield "first"

    def get_job_logs(self, job_id: str) -> str:
        return "first"

    def list_jobs(self) -> list[Any]:
        return self.listed


def test_a_job_is_found_by_its_id_before_the_run_that_is_called_so(monkeypatch) -> None:
    client = Namesakes()
    monkeypatch.setattr(jobs, "create_client", lambda address: client)
    cluster = jobs.Cluster()
    assert cluster.find("faces-1").id == "faces-1"
    assert cluster.find("faces").id == "faces-1"
    assert "".join(cluster.follow("faces-1")) == "first"
    assert cluster.wait("faces-1", 0.0).id == "faces-1"
    del client.listed[1]
    assert cluster.find("faces-1").id == "faces-1-1", "the run of that name"
    for request in (lambda: list(cluster.follow("faces-1")), lambda: cluster.wait("faces-1", 0.0)):
        with pytest.raises(UserError, match="no job or run 'faces-1'"):
            request()


def test_a_run_whose_jobs_were_deleted_in_part_gets_a_new_id(monkeypatch) -> None:
    """Two of three were left, so the next one was to be the third once more, which Ray refused."""
    client = Namesakes()
    client.listed += [detail(JobStatus.FAILED, job="faces-3", run="faces")]
    monkeypatch.setattr(jobs, "create_client", lambda address: client)
    assert jobs.Cluster().next_attempt("faces") == 4
    assert jobs.Cluster().next_attempt("faces-1") == 2
    assert jobs.Cluster().next_attempt("face") == 1


def test_events_come_back_from_a_log_that_holds_other_lines_too() -> None:
    sink = io.StringIO()
    lines = EventLogWriter(sink)
    lines.handle({"event": "metrics", "step": 3, "loss": 0.5})
    with lines.counting("drawing") as progress:
        progress(1, 2)
        progress(2, 2)
    text = f"from a library\n{sink.getvalue()}" + '{"event": "cut'
    pieces = [text[start : start + 7] for start in range(0, len(text), 7)]
    found = [parse_event(line) for line in split_lines(iter(pieces))]
    assert [event and event["event"] for event in found] == [None, "metrics", "waiting", None]
    assert found[1] is not None and (found[1]["step"], found[1]["loss"]) == (3, 0.5)
    assert found[1]["time"] > 1e9


class Unsteady:
    """A Jobs client whose network fails: while it reads, and in the next `refused` requests."""

    def __init__(self, refused: int) -> None:
        self.refused, self.over = refused, False

    async def tail_job_logs(self, job_id: str) -> AsyncIterator[str]:
        yield "one "
        if self.refused:
            raise ServerDisconnectedError
        self.over = True
        yield "two "

    def list_jobs(self) -> list[Any]:
        if self.refused:
            self.refused -= 1
            raise requests.exceptions.ConnectionError("no route to host")
        return [detail(JobStatus.SUCCEEDED if self.over else JobStatus.RUNNING)]

    def get_job_logs(self, job_id: str) -> str:
        return "one two three"


def test_a_job_is_followed_over_a_network_that_fails_for_a_while(monkeypatch) -> None:
    monkeypatch.setattr(jobs, "create_client", lambda address: Unsteady(3))
    monkeypatch.setattr(jobs, "POLL_S", 0.01)
    assert "".join(jobs.Cluster().follow("a-1")) == "one two three"
    monkeypatch.setattr(jobs, "PATIENCE_S", 0.0)
    with pytest.raises(RunError, match="does not answer: no route to host"):
        list(jobs.Cluster().follow("a-1"))
