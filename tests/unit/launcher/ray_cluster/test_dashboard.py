"""Dashboards that do not answer, and those that a proxy would keep away."""

from __future__ import annotations

import json
import socket
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import ray

from launcher.ray_cluster import dashboard, jobs
from mhe_dist.errors import RunError
from tests.support.servers.stores import serving


def test_a_dashboard_that_takes_connections_and_does_not_answer_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A head that hangs, or a proxy without one: every command of jobs waited for ever."""
    monkeypatch.setattr(dashboard, "ANSWER_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(RunError, match=f"{address} does not answer: .*[Tt]imed out"):
            jobs.Cluster(address)


class Dashboard(BaseHTTPRequestHandler):
    """The little of a dashboard that a client asks at first."""

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        versions = {"version": "4", "ray_version": ray.__version__, "ray_commit": ""}
        body = json.dumps(versions if self.path == "/api/version" else []).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_dashboard_is_asked_directly_whatever_proxy_the_environment_names(
    host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was said to be no dashboard where NO_PROXY does not name it."""
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with serving(ThreadingHTTPServer(("127.0.0.1", 0), Dashboard)) as url:
        assert jobs.Cluster(url.replace("127.0.0.1", host)).jobs() == []
