"""A Ray cluster of several raylets on this machine's loopback, with a token of its own.

They live in a process of their own, because what Ray reads from the environment it reads once:
`python -m tests.support.servers.raylets` starts the head and then obeys the lines that it is sent.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from launcher.ray_cluster.environment import LOCAL_ENVIRONMENT, free_ports
from launcher.ray_cluster.ray_internals import agents_not_awaited

ROOT = Path(__file__).parents[3]
END_S = 30.0
AGENT_PORTS = (
    *("dashboard_agent_listen_port", "metrics_agent_port"),
    *("metrics_export_port", "runtime_env_agent_port"),
)


class Raylets:
    """Nodes of one CPU each, the first one the head; all processes end with the `with` block.

    Attributes:
        address: of the Jobs API.
        gcs: for drivers on this machine.
        token: for whoever speaks to the cluster.
        others: names of the nodes beside the head.
    """

    def __init__(self) -> None:
        self._folder = tempfile.mkdtemp(prefix="mhe-", dir="/tmp")  # socket paths are short
        self.token = secrets.token_hex(16)
        variables = {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self.token,
            "RAY_TMPDIR": self._folder,
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # lets 127.0.0.1 be the nodes' address
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_agent_register_timeout_ms": LOCAL_ENVIRONMENT["RAY_agent_register_timeout_ms"],
            "RAY_health_check_period_ms": "1000",  # a lost node is noticed in seconds
            "RAY_health_check_timeout_ms": "2000",
            "RAY_health_check_failure_threshold": "3",
        }
        with Path(self._folder, "log").open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.support.servers.raylets"],
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
                env={**os.environ, **variables},
            )
        self.address, self.gcs = self._command("head").split()
        self.others: list[str] = []

    def add(self) -> None:
        """Start another node."""
        self.others.append(self._command("add"))

    def lose(self) -> None:
        """End a node beside the head at once, as a power cut does."""
        self._command(f"kill {self.others.pop()}")

    def __enter__(self) -> Raylets:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait(END_S)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _command(self, line: str) -> str:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        for answer in self._process.stdout:
            if answer.startswith("{"):
                return str(json.loads(answer)["answer"])
        raise RuntimeError(Path(self._folder, "log").read_text())


def serve() -> None:
    """Start nodes and end them as the lines of standard input say."""
    from ray.cluster_utils import Cluster

    cluster = Cluster()
    nodes: dict[str, Any] = {}
    for line in sys.stdin:
        verb, *rest = line.split()
        if verb == "kill":
            cluster.remove_node(nodes.pop(rest[0]), allow_graceful=False)
            answer = ""
        else:
            options = {"node_ip_address": "127.0.0.1", "num_cpus": 1, "num_gpus": 0}
            # Of itself the head's dashboard agent takes a fixed port: a second cluster on this
            # machine would start, and never take a job.
            options |= dict(zip(AGENT_PORTS, free_ports(len(AGENT_PORTS)), strict=True))
            if verb == "head":
                (dashboard,) = free_ports(1)
                options |= {"include_dashboard": True, "dashboard_host": "127.0.0.1"}
                options |= {"dashboard_port": dashboard}
            else:  # as on two machines: else one node's copy of a job's code replaces the other's
                options["temp_dir"] = f"{os.environ['RAY_TMPDIR']}/{len(nodes)}"
            with agents_not_awaited():
                node = cluster.add_node(object_store_memory=100 * 2**20, **options)
            nodes[node.unique_id] = node
            answer = node.unique_id
            if verb == "head":
                answer = f"http://{node.webui_url} {cluster.address}"
        sys.stdout.write(json.dumps({"answer": answer}) + "\n")
        sys.stdout.flush()
    cluster.shutdown()


if __name__ == "__main__":
    serve()
