"""`python -m pipelines.pretrain`: Ctrl-C ends it with a sentence, whatever it is doing."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from mhe_dist.config.schema import Config
from mhe_dist.config.write import config_to_yaml
from mhe_dist.distributed.topology import Topology
from mhe_dist.errors import UserError
from pipelines.pretrain import __main__ as command
from pipelines.pretrain.main import run_pretraining
from tests.support import tiny
from tests.support.waiting import WATCHDOG_S

# The command, but for how long it waits for MLflow at its end.
COMMAND = """
import sys
from mhe_dist.tracking import mlflow
from pipelines.pretrain.__main__ import main
mlflow._CLOSE_S = mlflow._GRACE_S = 1.0
sys.exit(main(sys.argv[1:]))
"""
SENTENCE = "interrupted; the same command goes on from the newest complete checkpoint\n"


def interrupt(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    "where", ["mhe_dist.config.load.load_config", "pipelines.pretrain.main.run_pretraining"]
)
def test_ctrl_c_is_told_in_a_sentence(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(config_to_yaml(tiny.config(tmp_path, "shards")))
    monkeypatch.setattr(where, interrupt)
    monkeypatch.setattr(command.preemption, "listen_for_sigterm", lambda: None)
    assert command.main([str(file)]) == 130
    assert capfd.readouterr().err == SENTENCE


@pytest.fixture
def end_of(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., int]:
    """The exit code of the command for a config, whose run is what is given."""

    def command_that_runs(run: Callable[..., Any], config: Config) -> int:
        file = tmp_path / "run.yaml"
        file.write_text(config_to_yaml(config))
        monkeypatch.setattr("pipelines.pretrain.main.run_pretraining", run)
        monkeypatch.setattr(command.preemption, "listen_for_sigterm", lambda: None)
        monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            code = command.main([str(file)])
            assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        finally:
            signal.signal(signal.SIGINT, before)
        return code

    return command_that_runs


def test_what_ctrl_c_makes_of_a_library_is_no_fault(
    tmp_path: Path, end_of: Callable[..., int], capfd: pytest.CaptureFixture[str]
) -> None:
    """It ends the loader's processes as well, and torch may tell of that before Python does."""

    def lose_a_worker(*_: Any, **__: Any) -> None:
        with suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        raise RuntimeError("DataLoader worker (pid 7) exited unexpectedly")

    assert end_of(lose_a_worker, tiny.config(tmp_path, "shards")) == 130
    assert capfd.readouterr().err == SENTENCE


def test_ctrl_c_that_a_library_keeps_to_itself_ends_the_run_as_well(
    tmp_path: Path, end_of: Callable[..., int], capfd: pytest.CaptureFixture[str]
) -> None:
    """Python loses what is raised in a finalizer; the run went on to its end."""

    class Finalized:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGINT)

    def lose_the_interrupt(config: Config, on_event: Callable[[Any], None]) -> Any:
        Finalized()
        return run_pretraining(config, on_event)

    config = tiny.config(tmp_path / "runs", tiny.write_shards(tmp_path / "train"))
    assert end_of(lose_the_interrupt, config) == 130
    assert capfd.readouterr().err.endswith(SENTENCE)
    assert not Path(config.run.path, "summary.json").exists()


@pytest.mark.slow
def test_ctrl_c_while_mlflow_does_not_answer(tmp_path: Path) -> None:
    # Shells let what is in the background ignore SIGINT, and so would the process.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        uri = f"http://127.0.0.1:{silent.getsockname()[1]}"
        config = tiny.config(
            tmp_path / "runs",
            tiny.write_shards(tmp_path / "train"),
            data={"loader_workers": 2},
            tracking={"mlflow": True, "uri": uri},
        )
        file = tmp_path / "run.yaml"
        file.write_text(config_to_yaml(config))
        process = subprocess.Popen(
            [sys.executable, "-c", COMMAND, str(file)],
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )
        killer = threading.Timer(WATCHDOG_S, process.kill)
        killer.start()
        connection = silent.accept()[0]  # MLflow's client asks, and waits
        os.killpg(process.pid, signal.SIGINT)
        stderr = process.communicate()[1]
        killer.cancel()
        connection.close()
    assert process.returncode == 130, stderr
    assert SENTENCE in stderr  # the thread that speaks with MLflow may have the last word
    assert "Traceback" not in stderr
    with pytest.raises(ProcessLookupError):  # nothing of its session runs on
        os.killpg(process.pid, 0)


def _train(topology: Topology, config: Config) -> None:
    run_pretraining(config)


def test_ranks_that_cannot_share_a_step_are_told_at_once(
    run_distributed: Callable[..., list[Any]], tmp_path: Path
) -> None:
    """`torchrun` starts any number; it ended in the traceback of a product of shapes."""
    sizes = {"global_batch": 16, "micro_batch": 4}
    config = tiny.config(tmp_path / "runs", tiny.write_shards(tmp_path / "train"), train=sizes)
    with pytest.raises(UserError, match=r"3 ranks cannot share the 4 micro-.* start 1, 2, 4 ranks"):
        run_distributed(_train, 3, config)
    assert not (tmp_path / "runs").exists(), "before anything is made"
