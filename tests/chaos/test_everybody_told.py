"""SIGTERM to a command, to its process group, to all its descendants, at any time: nothing is lost.

systemd, Slurm and `timeout` tell all processes of a job to stop, not one alone. Each test tells one
kind of command three times in one phase of a run, and each command goes on from the one before.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import psutil
import pytest

import launcher
from launcher.ray_cluster.jobs import Cluster
from mhe_dist.checkpoint.store import CheckpointStore
from mhe_dist.config.schema import Config
from mhe_dist.config.write import config_to_yaml
from mhe_dist.distributed.topology import Topology
from mhe_dist.errors import Preempted
from mhe_dist.tracking.jsonl import read_records
from pipelines.pretrain.main import run_pretraining
from tests.conftest import run_ranks
from tests.golden.record import train
from tests.support import tiny
from tests.support.servers.raylets import Raylets
from tests.support.terminal import MHE
from tests.support.waiting import WATCHDOG_S, ended, stretched, wait_for

pytestmark = pytest.mark.chaos

ROOT = Path(__file__).parents[2]
STEPS, EVERY, LOADERS = 48, 12, 2
ENDED = (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
PHASES = ["starting", "stepping", "saving", "evaluating", "exporting"]


def main_process(pid: int) -> None:
    os.kill(pid, signal.SIGTERM)


def group(pid: int) -> None:
    """As `timeout` does: the process, and at once its group, so that it hears of it twice."""
    os.kill(pid, signal.SIGTERM)
    os.killpg(os.getpgid(pid), signal.SIGTERM)


def all_descendants(pid: int) -> None:
    """The youngest first: a rank hears of it when its loader processes have."""
    first = psutil.Process(pid)
    for process in [*reversed(first.children(recursive=True)), first]:
        process.terminate()


TELL = (main_process, group, all_descendants)
Cell = tuple[str, Callable[[int], None]]


def stopped_within_s() -> float:
    """Half a minute of a quiet machine."""
    return stretched(30.0)


class Session:
    """A command that is to be told to stop: in a session of its own, with its own temporary folder.

    Attributes:
        folder: the temporary folder; short, for the paths of Ray's sockets.
    """

    def __init__(self, phase: str) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="t-", dir="/tmp"))
        self.mark = Path(tempfile.mkdtemp(prefix="m-", dir="/tmp")) / "mark"
        self.variables = {
            "MHE_TEST_PHASE": phase,
            "MHE_TEST_MARK": str(self.mark),
            "TMPDIR": str(self.folder),
            "PYTHONPATH": f"{Path(__file__).parent / 'slowed'}:{ROOT}",
        }

    def wait_for_phase(self, is_over: Callable[[], bool]) -> None:
        wait_for(lambda: self.mark.exists() or is_over())
        assert self.mark.exists(), "the phase did not begin"

    def steps_ended(self) -> int:
        """Steps of the run that had ended when the command was over; 0: none of this command."""
        file = Path(f"{self.mark}.ended")
        return int(file.read_text()) if file.exists() else 0

    def processes(self) -> list[psutil.Process]:
        """All processes that it has started and that run, but an actor that a cluster keeps."""
        found = []
        for process in psutil.process_iter():
            try:
                is_ours = process.environ().get("MHE_TEST_MARK") == str(self.mark)
                if is_ours and "_AutoscalingCoord" not in "".join(process.cmdline()):
                    found.append(process)
            except psutil.Error:
                continue
        return [process for process in found if process.status() not in ENDED]

    def assert_nothing_is_left(self, but: str) -> None:
        """Args: but: pattern of names of folders that are not ours to remove."""
        assert self.processes() == []
        assert [f for f in self.folder.iterdir() if not fnmatchcase(f.name, but)] == []
        shutil.rmtree(self.folder)
        shutil.rmtree(self.mark.parent)


class Command:
    """A way to train, that is told to stop and started again.

    Attributes:
        exit_code: of a command that was told to stop.
        leaves: pattern of what another's program leaves in the temporary folder then.
    """

    exit_code, leaves = Preempted.exit_code, ""

    def __init__(self, words: list[str]) -> None:
        self._words = words

    def stop(self, file: Path, phase: str, tell: Callable[[int], None]) -> tuple[Session, str]:
        """Train until the phase, tell it to stop; what was told, and what it said."""
        session = Session(phase)
        process = self._start(file, os.environ | session.variables)
        session.wait_for_phase(lambda: process.poll() is not None)
        began = time.monotonic()
        tell(process.pid)
        try:
            output, _ = process.communicate(timeout=2 * stopped_within_s())
        except subprocess.TimeoutExpired:
            for left in session.processes():
                left.kill()
            output, _ = process.communicate()
        seconds = time.monotonic() - began
        assert process.returncode == self.exit_code, output
        assert seconds < stopped_within_s(), output
        return session, output

    def complete(self, file: Path) -> None:
        """Train to the end."""
        process = self._start(file, dict(os.environ))
        output = ended(process)
        assert process.returncode == 0, output

    def _start(self, file: Path, variables: dict[str, str]) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*self._words, str(file)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            env=variables | {"COLUMNS": "200", "PYTHONUNBUFFERED": "1"},
        )


class Torchrun(Command):
    """Its agent ends with 1 and leaves its folder for logs, whatever the ranks say."""

    exit_code, leaves = 1, "torchelastic_*"

    def __init__(self, workers: int) -> None:
        agent = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        super().__init__([*agent, f"--nproc-per-node={workers}", "-m", "pipelines.pretrain"])
        self._workers = workers

    def stop(self, file: Path, phase: str, tell: Callable[[int], None]) -> tuple[Session, str]:
        session, output = super().stop(file, phase, tell)
        assert output.count("told to stop") == self._workers, output
        return session, output


class Submit(Command):
    """A job of a cluster; who is told is its driver."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster

    def stop(self, file: Path, phase: str, tell: Callable[[int], None]) -> tuple[Session, str]:
        session = Session(phase)
        name = self._submit(file, session.variables)
        session.wait_for_phase(lambda: self._cluster.find(name).is_over)
        (driver,) = [p for p in session.processes() if "launcher.job" in p.cmdline()]
        began = time.monotonic()
        tell(driver.pid)
        job = self._cluster.wait(name, 2 * stopped_within_s())
        output = self._cluster.read_output(name)
        assert job.exit_code == self.exit_code, output
        while session.processes() and time.monotonic() - began < stopped_within_s():
            time.sleep(0.1)  # the cluster ends the workers of a driver that has left
        assert time.monotonic() - began < stopped_within_s(), output
        return session, output

    def complete(self, file: Path) -> None:
        name = self._submit(file, {})
        job = self._cluster.wait(name, WATCHDOG_S)
        assert job.exit_code == 0 and job.is_over, self._cluster.read_output(name)

    def _submit(self, file: Path, variables: dict[str, str]) -> str:
        address = self._cluster.address
        return launcher.submit(str(file), address=address, preflight=False, variables=variables).id


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """To train on, and to evaluate on: three blocks of images."""
    folder = tmp_path_factory.mktemp("shards")
    heldout = tiny.write_shards(folder / "heldout", classes=25, first=1000)
    return tiny.write_shards(folder / "train"), heldout


def make_config(
    folder: Path, shards: tuple[str, str], name: str, workers: int, steps: int = STEPS
) -> Config:
    return tiny.config(
        folder,
        shards[0],
        run={"name": name},
        data={"loader_workers": LOADERS},
        train={"max_steps": steps, "epochs": 1000, "log_every": 2},
        evaluate={"shards": shards[1], "pairs": 100, "every_steps": EVERY},
        checkpoint={"every_steps": 10},
        scale={"workers": workers},
        export={"formats": ["timm"]},
    )


@pytest.fixture(scope="module")
def uninterrupted(
    tmp_path_factory: pytest.TempPathFactory, shards: tuple[str, str]
) -> Callable[[int], Config]:
    """`uninterrupted(workers)`: a run that nobody disturbed; it is made once."""
    made: dict[int, Config] = {}

    def make(workers: int) -> Config:
        if workers not in made:
            folder = tmp_path_factory.mktemp("undisturbed")
            made[workers] = make_config(folder, shards, "undisturbed", workers)
            run_ranks(train, workers, made[workers].model_dump())
        return made[workers]

    return make


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Of two nodes, whose token this process has."""
    with Raylets() as raylets, pytest.MonkeyPatch.context() as patch:
        raylets.add()
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN", raylets.token)
        yield Cluster(raylets.address)


def stop_again_and_again(command: Command, config: Config, cells: list[Cell]) -> Path:
    """Start a run and tell it to stop, once per phase and way to tell; the file of its config."""
    file = Path(config.run.dir) / "run.yaml"
    file.write_text(config_to_yaml(config))
    before = 0
    for phase, tell in cells:
        session, output = command.stop(file, phase, tell)
        ended = max(before, session.steps_ended())
        saved = CheckpointStore(f"{config.run.path}/checkpoints", Topology()).newest()
        before = saved.step if saved else 0
        cell = f"{phase}, {tell.__name__}: step {before} of {ended} is saved\n{output}"
        assert ended - 1 <= before <= ended, cell
        session.assert_nothing_is_left(command.leaves)
    return file


def stop_thrice(command: Command, config: Config, phase: str) -> None:
    """Tell a run to stop in a phase, in each way; then let it complete."""
    command.complete(stop_again_and_again(command, config, [(phase, tell) for tell in TELL]))


def results(config: Config) -> list[dict[str, Any]]:
    """What was found on the held-out images, by step."""
    records = read_records(f"{config.run.path}/metrics.jsonl")
    named = [{k: v for k, v in r.items() if k == "step" or "heldout" in k} for r in records]
    return [record for record in named if len(record) > 1]


def assert_same(config: Config, other: Config) -> None:
    assert tiny.per_step(config) == tiny.per_step(other)
    assert tiny.differing(config, other) == []
    steps = range(EVERY - 1, other.train.max_steps, EVERY)
    assert [r["step"] for r in results(other)] == list(steps)
    assert results(config) == results(other)


def test_a_process_and_all_that_it_started(tmp_path: Path, shards: tuple[str, str]) -> None:
    config = make_config(tmp_path, shards, "stopped", 1, 2 * EVERY)
    command = Command([sys.executable, "-m", "pipelines.pretrain"])
    cells: list[Cell] = [("starting", group), ("stepping", all_descendants)]
    stop_again_and_again(command, config, cells)
    other = make_config(tmp_path, shards, "undisturbed", 1, 2 * EVERY)
    for each in (config, other):
        run_pretraining(each)
    assert_same(config, other)


@pytest.mark.long
@pytest.mark.parametrize("phase", ["importing", *PHASES])
def test_pipelines_pretrain(
    phase: str, tmp_path: Path, shards: tuple[str, str], uninterrupted: Callable[[int], Config]
) -> None:
    config = make_config(tmp_path, shards, "stopped", 1)
    stop_thrice(Command([sys.executable, "-m", "pipelines.pretrain"]), config, phase)
    assert_same(config, uninterrupted(1))


@pytest.mark.long
@pytest.mark.parametrize("phase", PHASES)
def test_torchrun(
    phase: str, tmp_path: Path, shards: tuple[str, str], uninterrupted: Callable[[int], Config]
) -> None:
    config = make_config(tmp_path, shards, "stopped", 2)
    stop_thrice(Torchrun(2), config, phase)
    assert_same(config, uninterrupted(2))


@pytest.mark.long
@pytest.mark.parametrize("phase", ["importing", "connecting", "joining", *PHASES])
def test_mhe_train(
    phase: str, tmp_path: Path, shards: tuple[str, str], uninterrupted: Callable[[int], Config]
) -> None:
    config = make_config(tmp_path, shards, "stopped", 2)
    stop_thrice(Command([MHE, "train"]), config, phase)
    assert_same(config, uninterrupted(2))


@pytest.mark.long
@pytest.mark.parametrize("phase", ["joining", *PHASES])
def test_a_job_of_mhe_submit(
    phase: str,
    tmp_path: Path,
    shards: tuple[str, str],
    uninterrupted: Callable[[int], Config],
    cluster: Cluster,
) -> None:
    config = make_config(tmp_path, shards, "stopped", 2)
    stop_thrice(Submit(cluster), config, phase)
    assert_same(config, uninterrupted(2))
