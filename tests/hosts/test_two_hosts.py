"""A run over two hosts that share nothing but a network, and one folder where a test says so.

Whatever happens to the network and to the hosts, the run ends with the weights of a run on one
host that nothing happened to, bit for bit. `make test` has the first test, `make chaos` all.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from mhe_dist.config.schema import Config
from mhe_dist.config.write import save_config
from tests.conftest import run_ranks
from tests.golden.record import train
from tests.hosts.cluster import BUCKET, HostCluster, host_cluster
from tests.hosts.host import why_not
from tests.support import tiny
from tests.support.terminal import until
from tests.support.waiting import ended

pytestmark = [
    pytest.mark.chaos,
    pytest.mark.e2e,
    pytest.mark.skipif(bool(why_not()), reason=f"no hosts can be made here: {why_not()}"),
]

STEPS, CUT_S = 120, 8.0


@pytest.fixture(scope="module")
def shared() -> Iterator[Path]:
    """A folder that all hosts see, with data."""
    with tempfile.TemporaryDirectory(prefix="hosts-") as name:
        tiny.write_shards(Path(name, "train"))
        yield Path(name)


@pytest.fixture(scope="module")
def cluster(shared: Path) -> Iterator[HostCluster]:
    with host_cluster(shared) as both:
        yield both


@pytest.fixture(scope="module")
def reference(shared: Path) -> Any:
    """`reference(steps)`: such a run, of two processes of this host."""

    @cache
    def run(steps: int) -> Config:
        config = settings(shared, f"undisturbed-{steps}", steps)
        run_ranks(train, 2, config.model_dump())
        return config

    return run


def settings(shared: Path, name: str, steps: int = STEPS, **scale: Any) -> Config:
    """A run that has one rank on each host."""
    return tiny.config(
        shared / "runs",
        str(shared / "train"),
        run={"name": name},
        train={"max_steps": steps, "epochs": 1000},
        scale={"workers": 2, "placement": "strict_spread", **scale},
        checkpoint={"every_steps": 20},
    )


def saved(config: Config, shared: Path) -> str:
    """Path of its YAML file."""
    path = shared / f"{config.run.name}.yaml"
    save_config(config, str(path))
    return str(path)


def assert_same_weights(config: Config, reference: Any) -> None:
    """It saw the same samples in each step, and has the same weights, rows and momenta."""
    other = reference(config.train.max_steps)
    assert tiny.per_step(config)[1] == tiny.per_step(other)[1]
    assert tiny.differing(config, other) == []


def test_a_run_over_two_hosts(cluster: HostCluster, shared: Path, reference: Any) -> None:
    config = settings(shared, "plain", 40)
    with_address = f"http://{cluster.head.address}:8265"
    denied = cluster.desk.start("mhe", "jobs", RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="0" * 64)
    output = ended(denied)
    assert denied.returncode == 2 and "RAY_AUTH_TOKEN" in output, output
    run = cluster.submit(saved(config, shared), "--address", with_address)
    output = ended(run)
    assert run.returncode == 0, output
    assert "takes jobs from anybody" not in output
    assert_same_weights(config, reference)


@pytest.mark.long
def test_a_link_that_is_cut_and_mended(cluster: HostCluster, shared: Path, reference: Any) -> None:
    """First the one of a node, in which training waits, then the one of who watches the run."""
    config = settings(shared, "cut")
    run = cluster.submit(saved(config, shared), "--no-preflight")
    for host in (cluster.other, cluster.desk):
        until(run, "  checkpoint ")
        lost = cluster.wire.lost
        host.unplug()
        time.sleep(CUT_S)
        host.plug()
        assert cluster.wire.lost > lost, "there was something to lose"
    output = ended(run)
    assert run.returncode == 0, output
    assert_same_weights(config, reference)


@pytest.mark.long
def test_a_slow_link_that_loses_packets(cluster: HostCluster, shared: Path, reference: Any) -> None:
    config = settings(shared, "slow", 20)
    cluster.wire.delay_s, cluster.wire.loss = 0.05, 0.01
    try:
        run = cluster.submit(saved(config, shared))
        output = ended(run)
    finally:
        cluster.wire.delay_s = cluster.wire.loss = 0.0
    assert run.returncode == 0, output
    assert_same_weights(config, reference)


@pytest.mark.long
def test_no_shared_disk(cluster: HostCluster, shared: Path, reference: Any) -> None:
    """Data and results are in a store that the hosts reach over the network."""
    cluster.start_store()
    cluster.copy(str(shared / "train"), f"{BUCKET}/train")
    config = settings(shared, "store", 40)
    words = [f"run.dir={BUCKET}/runs", f"data.shards={BUCKET}/train"]
    run = cluster.submit(saved(config, shared), *words)
    output = ended(run)
    assert run.returncode == 0, output
    assert not Path(config.run.path).exists()
    cluster.copy(f"{BUCKET}/runs/store", config.run.path)
    assert_same_weights(config, reference)


@pytest.mark.long
def test_a_host_that_is_lost_for_good(cluster: HostCluster, shared: Path, reference: Any) -> None:
    """The last story of this cluster."""
    config = settings(shared, "lost", workers={"min": 1, "max": 2}, placement="spread")
    run = cluster.submit(saved(config, shared), "--no-preflight")
    until(run, "  checkpoint ")
    cluster.other.lose()
    output = ended(run)
    assert run.returncode == 0, output
    assert "Resumed at step" in output
    assert_same_weights(config, reference)
