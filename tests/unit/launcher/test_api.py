"""The door of the launcher: its names, and what `train` gives, raises and shows. Without Ray."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import launcher
from launcher import api, execute
from launcher.terminal.progress import is_live
from mhe_dist.config.write import save_config
from mhe_dist.errors import Preempted, UserError
from tests.support import tiny

NAMES = ["Cluster", "Interrupted", "Job", "Preempted", "RunError", "UserError", "submit", "train"]
IMPORT = """
import sys
import launcher
heavy = {"torch", "ray", "typer", "rich", "pydantic"} & set(sys.modules)
sys.exit(str(heavy) if heavy else 0)
"""


@pytest.fixture
def file(tmp_path: Path) -> str:
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "index.json").write_text("{}")
    path = tmp_path / "a.yaml"
    save_config(tiny.config(tmp_path / "runs", str(tmp_path / "train")), str(path))
    return str(path)


def test_a_handful_of_names_and_no_heavy_library() -> None:
    assert launcher.__all__ == NAMES
    assert all(getattr(launcher, name) for name in NAMES)
    assert set(NAMES) <= set(dir(launcher))
    with pytest.raises(AttributeError, match="nonsense"):
        launcher.nonsense  # noqa: B018
    subprocess.run([sys.executable, "-c", IMPORT], check=True)


def test_the_summary_is_returned_and_a_complete_run_is_left_alone(
    file: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    trained: list[tuple[str, int, float]] = []

    def train(config: Any, handle: Callable[[dict[str, Any]], None], *_: bool) -> None:
        trained.append((config.run.name, config.train.max_steps, config.optim.lr))
        summary = {"steps": config.train.max_steps}
        Path(config.run.path, "summary.json").write_text(json.dumps(summary))
        handle({"event": "end", "summary": summary})

    monkeypatch.setattr(execute, "train_locally", train)
    changes: dict[str, Any] = {"run": {"name": "b"}, "train": {"max_steps": 5}}
    for _ in range(2):
        summary = launcher.train(file, ["optim.lr=0.25"], progress=False, **changes)
        assert summary == {"steps": 5}
    assert trained == [("b", 5, 0.25)]


@pytest.mark.parametrize(
    ("signum", "kind"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Preempted)]
)
def test_ctrl_c_is_what_python_calls_it(
    file: str, monkeypatch: pytest.MonkeyPatch, signum: int, kind: type[BaseException]
) -> None:
    monkeypatch.setattr(execute, "train_locally", lambda *_: signal.raise_signal(signum))
    with pytest.raises(kind):
        launcher.train(file, progress=False)


class FakeCluster:
    address = "http://head:8265"

    def __init__(self, address: str) -> None:
        assert address == self.address
        self.refused: list[str] = []

    def refuse_running(self, config: Any) -> None:
        self.refused.append(config.run.path)

    def start(self, config: Any, variables: dict[str, str]) -> str:
        assert self.refused == [config.run.path] and Path(config.run.path).is_absolute()
        assert variables == {"NCCL_DEBUG": "INFO"}
        return f"{config.run.name}-1"

    def find(self, job_id: str) -> str:
        return f"job {job_id}"


def test_a_submitted_run_is_a_job(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "Cluster", FakeCluster)
    words: dict[str, Any] = {
        "address": FakeCluster.address,
        "preflight": False,
        "run": {"name": "b"},
    }
    assert launcher.submit(file, variables={"NCCL_DEBUG": "INFO"}, **words) == "job b-1"
    with pytest.raises(UserError, match="looks like a secret"):
        launcher.submit(file, variables={"MY_PASSWORD": "x"}, **words)


def test_mistakes_are_raised_together(file: str) -> None:
    with pytest.raises(UserError) as caught:
        launcher.train(file, optim={"lr": -1}, data={"shards": "/nowhere"})
    assert "optim.lr" in str(caught.value)
    assert "/nowhere" in str(caught.value)


def test_a_notebook_gets_a_bar_where_widgets_are(monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = Console(file=io.StringIO(), force_jupyter=True)
    found: dict[str, object] = {}
    monkeypatch.setattr("launcher.terminal.progress.find_spec", found.get)
    assert not is_live(notebook)
    found["ipywidgets"] = object()
    assert is_live(notebook)
    assert not is_live(Console(file=io.StringIO()))
