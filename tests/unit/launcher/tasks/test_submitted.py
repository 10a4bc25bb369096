"""Commands as jobs: what is sent, what is refused, and what the driver does. Without Ray."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from launcher import cli, job
from launcher.tasks import submitted
from launcher.tasks.submitted import COMMAND_FILE, SpreadCommand, prepare_command
from mhe_dist.errors import RunError, UserError

Captured = pytest.CaptureFixture[str]
EMBED = ["embed", "quickstart", "--images", "tars", "--out", "/shared/rows"]


def test_the_words_of_a_command_travel_with_the_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    typed_in, folder = tmp_path / "typed", tmp_path / "sent"
    typed_in.mkdir()
    folder.mkdir()
    monkeypatch.chdir(typed_in)
    monkeypatch.setattr("sys.argv", ["/bin/mhe", "submit", *EMBED, "-f"])
    command = SpreadCommand.parse(cli.load_verb("embed"), EMBED)
    sent = prepare_command(command, "http://head:8265", 2, {"A": "b"}, 90, folder)
    assert sent.id == "embed-rows-2"
    assert sent.metadata == {"mhe_run": "embed-rows"}
    assert sent.entrypoint == f"exec python -m launcher.job command {COMMAND_FILE}"
    assert sent.environment == {"A": "b", "COLUMNS": "90", "RAY_JOB_STOP_WAIT_TIME_S": "130"}
    assert {"launcher/tasks/submitted.py", COMMAND_FILE} < {*sent.package.files}
    content = json.loads((folder / COMMAND_FILE).read_text())
    assert content == {
        "words": EMBED,
        "results": "/shared/rows",
        "folder": str(typed_in),
        "typed": ["submit", *EMBED, "-f"],
    }


@pytest.mark.parametrize(
    ("words", "name", "results"),
    [
        (["evaluate", "runs/a", "--workers", "4"], "evaluate-a", "runs/a"),
        (["evaluate", "ijb", "runs/a", "--root", "IJBC"], "evaluate-a", "runs/a"),
        (["data", "index", "s3://b/tars"], "data-tars", "s3://b/tars"),
        (["data", "verify", "tars", "--out", "report"], "data-report", "report"),
        (["audit", "quickstart"], "audit-audit", "audit"),
    ],
)
def test_a_command_is_named_by_what_it_writes_to(words: list[str], name: str, results: str) -> None:
    command = SpreadCommand.parse(cli.load_verb(words[0]), words)
    assert (command.name, command.results, command.words) == (name, results, words)


def test_mistakes_are_told_before_anything_is_sent(capsys: Captured) -> None:
    for words, part in (
        (["data", "show", "x"], "mhe data show does its work in one process"),
        (["evaluate", "labels", "a", "--shards", "b", "--labels", "c"], "in one process"),
        (["embed", "a", "--images", "b", "--ouw", "c"], "No such option: --ouw"),
        (["--address", "auto", *EMBED], "comes first, mhe submit embed --address"),
        (["search", "a"], "mhe submit search: is not submitted; a config is, or one of embed,"),
    ):
        assert cli.run(["submit", *words, "--dry-run"]) == 2
        assert part in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    "words",
    [
        ["embed", "a", "--images", "b"],
        ["audit", "a"],
        ["cluster", "a", "--classes", "9"],
        ["data", "verify", "a"],
    ],
)
def test_the_disk_of_the_machine_that_submits_is_not_looked_at(words: list[str]) -> None:
    """The results are the cluster's: a laptop need not have its folders."""
    typed = [*words, "--out", "/proc/1/shared"]
    assert SpreadCommand.parse(cli.load_verb(words[0]), typed).results == "/proc/1/shared"
    assert cli.run(typed) != 0  # a command of this machine still looks


def test_a_dry_run_shows_what_would_be_sent(
    monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert cli.run(["submit", *EMBED, "--env", "X=1", "--dry-run"]) == 0
    said = capsys.readouterr().out
    for part in ("Job embed-rows-1", "launcher.job command", "X=1", COMMAND_FILE):
        assert part in said
    assert cli.run(["submit", "embed", "--help"]) == 0
    assert "--follow" in capsys.readouterr().out


@pytest.fixture
def sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Write a command's file; nodes see what the fixture's list does not name."""
    monkeypatch.chdir(tmp_path)
    blind: list[str] = []
    monkeypatch.setattr(submitted, "_nodes_without", lambda path: blind)
    monkeypatch.setattr("sys.argv", ["job.py", "command", COMMAND_FILE])

    def _send(results: str, folder: Path) -> list[str]:
        content = {
            "words": ["data", "verify", "x"],
            "results": results,
            "folder": str(folder),
            "typed": ["submit", "data", "verify", "x", "--env", "A=b c"],
        }
        (tmp_path / COMMAND_FILE).write_text(json.dumps(content))
        return blind

    return _send


def test_the_driver_runs_the_command_where_it_was_typed_and_ends_as_it_does(
    sent: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[Any] = []

    def _run(words: list[str]) -> int:
        ran.append((words, Path.cwd()))
        return 1

    monkeypatch.setattr(cli, "run", _run)
    (tmp_path / "typed").mkdir()
    sent("report", tmp_path / "typed")
    assert job.main(["command", COMMAND_FILE]) == 1
    assert ran == [(["data", "verify", "x", "--address", "auto"], tmp_path / "typed")]
    assert not list((tmp_path / "typed").iterdir()), "no probe stays"


def test_a_job_that_is_stopped_names_the_command_that_was_submitted(
    sent: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    def _stopped(*_: object, **__: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    index = SimpleNamespace(folder="x", digest="1")
    monkeypatch.setattr("launcher.verbs.data.check.ShardIndex.load", lambda url: index)
    monkeypatch.setattr("launcher.verbs.data.check.choose_workers", _stopped)
    sent("report", tmp_path)
    assert job.main(["command", COMMAND_FILE]) == 128 + signal.SIGTERM
    said = " ".join(capsys.readouterr().out.split())
    assert "the same command goes on with it:" in said
    assert said.endswith("mhe submit data verify x --env 'A=b c'")


def test_results_that_would_end_with_a_node_are_refused(
    sent: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    monkeypatch.setattr(cli, "run", lambda words: 0)
    sent("report", tmp_path / "nowhere")
    assert job.main(["command", COMMAND_FILE]) == 2
    assert "has no such folder; its results would end with that node" in capsys.readouterr().err
    sent("s3://bucket/report", tmp_path / "nowhere")
    assert job.main(["command", COMMAND_FILE]) == 0
    blind = sent(str(tmp_path / "a" / "b"), tmp_path)
    blind += ["node-7", "node-3"]
    assert job.main(["command", COMMAND_FILE]) == 2
    assert "alone, node-3, node-7 cannot see it" in capsys.readouterr().err
    with pytest.raises(UserError, match="cannot be written"):
        submitted.refuse_unshared("/proc/report", "/", True)


def test_the_log_of_a_job_has_no_secrets(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    def fail(*_: str) -> None:
        raise RunError("https://me:planted@host/x: cannot be read")

    monkeypatch.setitem(job.VERBS, "command", fail)
    assert job.main(["command", COMMAND_FILE]) == 1
    said = capsys.readouterr().err
    assert "Traceback" in said and "error: https://***@host/x" in said
    assert "planted" not in said
