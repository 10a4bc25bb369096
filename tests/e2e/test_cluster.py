"""Two nodes for real: submitted over the Jobs API, watched, stopped, resumed, and one of them lost.

One story, because each start of a cluster and of a run costs half a minute.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from launcher import cli
from mhe_dist.config.load import load_config
from mhe_dist.config.write import save_config
from mhe_dist.errors import Preempted
from pipelines.embedding.folder import MANIFEST, ROWS_FILE
from pipelines.embedding.write_folder import FolderOptions, write_folder
from pipelines.shards.writer import Sample, ShardWriter
from pipelines.sources.webdataset import index_shards
from tests.support import tiny
from tests.support.servers.raylets import ROOT, Raylets
from tests.support.terminal import until
from tests.support.waiting import ended, stretched

pytestmark = [pytest.mark.e2e, pytest.mark.cluster]

ENDLESS = 10**6  # steps of a run that has not ended when it is stopped, however long that takes
STEPS = 400  # after that
MHE = "from launcher.cli import main; main()"
DRIVER = {
    "RAY_AUTH_MODE": "token",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # lets 127.0.0.1 be the driver's address
}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Raylets]:
    with Raylets() as raylets:
        raylets.add()
        yield raylets


@pytest.fixture
def config(tmp_path: Path) -> Path:
    config = tiny.config(
        tmp_path / "runs",
        tiny.write_shards(tmp_path / "train"),
        run={"name": "both"},
        train={"max_steps": ENDLESS, "epochs": 10**6},
        scale={"workers": {"min": 1, "max": 2}},
        resume={"allow": ["train.max_steps"]},
        checkpoint={"every_steps": 20},
        export={"formats": ["timm"]},
    )
    path = tmp_path / "both.yaml"
    save_config(config, str(path))
    return path


class Terminal:
    """Somebody who types commands; `mhe` is that of this checkout."""

    def __init__(self, cluster: Raylets) -> None:
        self.environment = {
            **os.environ,
            "RAY_API_SERVER_ADDRESS": cluster.address,
            "RAY_AUTH_TOKEN": cluster.token,  # and no RAY_AUTH_MODE: who has a token, uses it
            "PYTHONPATH": str(ROOT),
            "PYTHONUNBUFFERED": "1",
            "COLUMNS": "200",
        }

    def start(self, *words: str, **variables: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", MHE, *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**self.environment, **variables},
        )

    def mhe(self, *words: str, **variables: str) -> tuple[int, str]:
        process = self.start(*words, **variables)
        output = ended(process)
        return process.returncode, output


def train_workers(token: str) -> list[psutil.Process]:
    """The processes that train on the cluster with that token, one per rank."""
    found = []
    for process in psutil.process_iter(["name", "environ"]):
        name, variables = process.info["name"] or "", process.info["environ"] or {}
        if "RayTrainWorker" in name and variables.get("RAY_AUTH_TOKEN") == token:
            found.append(process)
    return found


def test_what_cannot_work_is_refused_with_every_reason(cluster: Raylets, config: Path) -> None:
    begin = time.monotonic()
    words = ["data.shards=/nowhere", "run.name=lost", "run.dir=/proc/runs"]
    words += ["scale.workers=4", "scale.min_workers=4"]
    code, output = Terminal(cluster).mhe("submit", str(config), *words, "--follow")
    seconds = time.monotonic() - begin
    assert code == 2, output
    for part in (
        "3 reasons",
        "data.shards=/nowhere: there is no such folder",
        "run.dir: /proc/runs",
        "room for 2",
    ):
        assert part in output
    assert seconds < stretched(60), "nobody waits for workers that there is no room for"
    code, output = Terminal(cluster).mhe(
        "submit", str(config), *words, "--follow", "--no-preflight"
    )
    assert code == 2, output
    assert "data.shards=/nowhere" in output and "there is no such folder" in output


def test_a_submitted_command_and_tasks_of_an_evaluation_give_what_one_process_gives(
    cluster: Raylets, tmp_path: Path
) -> None:
    terminal = Terminal(cluster)
    shards = tiny.write_shards(tmp_path / "heldout", first=10_000)
    run = tiny.trained_run(tmp_path / "runs", shards).run.path
    there, here = str(tmp_path / "there"), str(tmp_path / "here")
    words = ["embed", run, "--images", shards, "--workers", "2", "--out"]
    code, output = terminal.mhe("submit", *words, there, "--follow")
    assert code == 0, output
    for part in ("embed-there-1", "embedding", f"{there}: 360 embeddings of 32", "Next"):
        assert part in output
    write_folder(run, shards, here, FolderOptions())
    for name in (MANIFEST, ROWS_FILE):
        assert Path(there, name).read_bytes() == Path(here, name).read_bytes()

    code, output = terminal.mhe("submit", *words[:3], f"{shards}/none", "--out", there, "-f")
    assert code == 2 and "a folder of embeddings follows the index of shards" in output

    compare = ["evaluate", "identification", run, "--all-pairs", "--images", shards]
    assert cli.run(compare) == 0
    figures = Path(run, "evaluation", "identification.json").read_bytes()
    code, output = terminal.mhe(*compare, "--address", cluster.gcs, **DRIVER)
    assert code == 0, output
    assert Path(run, "evaluation", "identification.json").read_bytes() == figures


def test_a_run_over_two_nodes_that_loses_one(cluster: Raylets, config: Path) -> None:
    terminal = Terminal(cluster)
    run = load_config(str(config))

    code, output = terminal.mhe("jobs", RAY_AUTH_TOKEN="0" * 32)
    assert code == 2 and "RAY_AUTH_TOKEN" in output

    code, output = terminal.mhe("submit", str(config))
    assert code == 0, output
    assert f"{cluster.address}/#/jobs/both-1" in output
    watching = terminal.start("logs", "both", "-f")
    until(watching, "checkpoint")
    workers = train_workers(cluster.token)
    assert len({worker.ppid() for worker in workers}) == 2, "one worker on each node"

    code, output = terminal.mhe("submit", str(config))
    assert code == 2 and "job both-1 is running with this run" in output
    code, output = terminal.mhe("status", "both")
    assert code == 0 and "running" in output and f"of {ENDLESS:,}" in output

    code, output = terminal.mhe("stop", "both")
    assert code == 0 and "stopped" in output and "It goes on from" in output, output
    rest = ended(watching)
    assert watching.returncode == Preempted.exit_code, rest
    assert terminal.mhe("status", "both-1")[0] == Preempted.exit_code
    stopped_at = len(tiny.per_step(run)[0])
    assert stopped_at >= 20

    steps = stopped_at + STEPS
    words = ["--follow", "--no-preflight", f"train.max_steps={steps}"]
    going_on = terminal.start("submit", str(config), *words)
    output = until(going_on, "checkpoint")
    assert f"Resumed at step {stopped_at}" in output
    cluster.lose()
    until(going_on, "Resumed at step")
    until(going_on, "checkpoint")
    assert len(train_workers(cluster.token)) == 1, "on what is left"
    rest = ended(going_on)
    assert going_on.returncode == 0, rest
    assert Path(run.run.path, "export", "timm", "config.json").exists()
    losses, _ = tiny.per_step(run)
    assert len(losses) == steps
    assert sum(losses[-20:]) < 0.5 * sum(losses[:20])

    code, output = terminal.mhe("jobs")
    assert code == 0
    rows = [line.split() for line in output.splitlines()]
    listed = [(row[0], row[2]) for row in rows if row[1] == "both"]
    assert listed == [("both-2", "succeeded"), ("both-1", "stopped")]


# Of a tar: 200 of them keep two nodes busy for longer than it takes to notice that one is lost.
SAMPLES = 2000


def hard_linked_tars(folder: Path, count: int) -> None:
    """Tars of `SAMPLES` samples of 10 classes: one, under many names."""
    with ShardWriter(str(folder.parent / "one"), "part") as writer:
        members = ({"jpg": b"not decoded", "cls": str(n % 10).encode()} for n in range(SAMPLES))
        writer.write(Sample(f"{n:04d}", each) for n, each in enumerate(members))
        writer.finish(10)
    folder.mkdir()
    for number in range(count):
        os.link(folder.parent / "one" / "part-000000.tar", folder / f"{number:03d}.tar")


def test_tasks_over_two_nodes_that_lose_one_give_what_one_process_gives(
    cluster: Raylets, tmp_path: Path
) -> None:
    """The last story: the cluster has lost a node before it."""
    cluster.add()
    hard_linked_tars(tmp_path / "tars", 200)
    there, here = tmp_path / "there", tmp_path / "here"
    words = ["data", "index", str(tmp_path / "tars"), "--out", str(there), "--address", cluster.gcs]
    indexing = Terminal(cluster).start(*words, **DRIVER)

    def finished() -> int:
        return len(list((there / ".index.partial").glob("0*.json")))

    while finished() < 10 and indexing.poll() is None:
        time.sleep(0.01)
    cluster.lose()
    lost_at = finished()
    made = index_shards([str(tmp_path / "tars")], str(here)).index
    output = ended(indexing)
    assert indexing.returncode == 0, output
    assert 10 <= lost_at < 200, "a node is lost in the middle"
    assert "127.0.0.1 is lost; others do again what it worked on" in output
    assert "state-dump" not in output
    assert made.samples == 200 * SAMPLES
    files = [path.name for path in sorted(here.iterdir())]
    assert files == [path.name for path in sorted(there.iterdir())]
    for name in files:
        assert (there / name).read_bytes() == (here / name).read_bytes()
