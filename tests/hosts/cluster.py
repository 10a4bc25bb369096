"""A Ray cluster over two hosts, as docs/clusters.md starts one, a desk to type at, an S3 store."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from launcher.ray_cluster.environment import LOCAL_ENVIRONMENT
from tests.hosts.host import ROOT, Host, hosts, until_answers
from tests.hosts.wire import Wire

BUCKET = "s3://bucket"
_GCS, _DASHBOARD, _STORE = 6379, 8265, 5000
_START = ("python", str(Path(__file__).with_name("ray_start.py")), "start")
_NODE = (
    *("--block", "--num-cpus=1", f"--object-store-memory={100 * 2**20}"),
    *("--dashboard-agent-grpc-port=20001", "--metrics-export-port=20002"),
    "--runtime-env-agent-port=20003",
)
_RAY = {
    "RAY_AUTH_MODE": "token",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_agent_register_timeout_ms": LOCAL_ENVIRONMENT["RAY_agent_register_timeout_ms"],
    # A host that is silent for 20 s is lost; by default for a minute.
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "3000",
    "RAY_health_check_failure_threshold": "5",
}


class HostCluster:
    """Two hosts with one CPU each for Ray, and one without Ray.

    Attributes:
        wire: between them.
        head, other: the nodes.
        desk: where `mhe` is typed; it has this checkout, the token and the dashboard's address.
        shared: a folder that all hosts see.
    """

    def __init__(self, wire: Wire, made: list[Host], shared: Path) -> None:
        self.wire, self.shared = wire, shared
        self.head, self.other, self.desk, self._store = made
        variables = {
            "AWS_ENDPOINT_URL": f"http://{self._store.address}:{_STORE}",
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        for host in made:
            host.environment |= variables
        for node in (self.head, self.other):
            node.environment |= _RAY
        self.desk.environment |= {
            "PYTHONPATH": str(ROOT),
            "RAY_API_SERVER_ADDRESS": f"http://{self.head.address}:{_DASHBOARD}",
        }
        self._running: list[subprocess.Popen[str]] = []

    def start_ray(self) -> None:
        """Start Ray on the nodes, with a token that all but the store have."""
        self.head.check("ray", "get-auth-token", "--generate")
        token = self.head.check("cat", "/tmp/home/.ray/auth_token")
        for host in (self.other, self.desk):
            host.check("mkdir", "/tmp/home/.ray")
            host.check("sh", "-c", 'printf %s "$1" >/tmp/home/.ray/auth_token', "sh", token)
        self._start(self.head, *_START, "--head", "--dashboard-host=0.0.0.0", *_NODE)
        until_answers(self.other, self.head.address, _GCS)
        self._start(self.other, *_START, f"--address={self.head.address}:{_GCS}", *_NODE)
        until_answers(self.desk, self.head.address, _DASHBOARD)

    def start_store(self) -> None:
        """Start an S3 server with an empty bucket."""
        self._start(self._store, "moto_server", "-H", "0.0.0.0", "-p", str(_STORE))
        until_answers(self.desk, self._store.address, _STORE)
        self.desk.check("python", "-c", f"import fsspec; fsspec.filesystem('s3').mkdir('{BUCKET}')")

    def copy(self, source: str, target: str) -> None:
        """Copy a folder into a new one; URLs of the store or paths that the desk sees."""
        copy = "import sys; from fsspec.generic import rsync; rsync(*sys.argv[1:])"
        self.desk.check("python", "-c", copy, *map(_url, (source, target)))

    def submit(self, config: str, *words: str) -> subprocess.Popen[str]:
        """Type `mhe submit CONFIG --follow` at the desk."""
        return self.mhe("submit", config, "--follow", *words)

    def mhe(self, *words: str) -> subprocess.Popen[str]:
        """Start a command of mhe at the desk."""
        return self.desk.start("mhe", *words)

    def _start(self, host: Host, *command: str) -> None:
        log = self.shared / f"{host.name}.log"
        words = ["sh", "-c", 'exec "$@" >"$0" 2>&1', str(log), *command]
        self._running.append(host.start(*words))

    def wait(self) -> None:
        """Wait for the servers of hosts that have ended."""
        for process in self._running:
            process.communicate()


@contextmanager
def host_cluster(shared: Path) -> Iterator[HostCluster]:
    """Hosts, with Ray on two of them, for the length of a `with` block."""
    with hosts(shared, "head", "other", "desk", "store") as (wire, made):
        cluster = HostCluster(wire, made, shared)
        cluster.start_ray()
        yield cluster
    cluster.wait()


def _url(path: str) -> str:
    return path if "://" in path else f"file://{os.path.abspath(path)}"
