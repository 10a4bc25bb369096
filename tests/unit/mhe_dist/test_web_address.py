"""Addresses of servers, and who is told that one cannot be."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher import cli
from launcher.preflight.node_probe import _mlflow
from mhe_dist.errors import UserError
from mhe_dist.tracking.mlflow import MlflowTracker
from mhe_dist.web_address import is_web_address
from tests.support import tiny

GOOD = ("http://host", "https://host:8265/", "http://[::1]:80/path", "http://me:secret@host:1")
BAD = (
    *("http://host:99999", "http://host:abc", "http://host:0", "http://host:-1"),
    *("http://", "http:/host", "http://[::1", "host:8265", "s3://host", ""),
)


def test_addresses() -> None:
    assert [url for url in GOOD if not is_web_address(url)] == []
    assert [url for url in BAD if is_web_address(url)] == []


@pytest.mark.parametrize("uri", ["http://127.0.0.1:99999", "http://127.0.0.1:abc"])
def test_a_port_of_mlflow_that_cannot_be_is_told_before_the_run(uri: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no MLflow tracking URI: give http"):
        MlflowTracker(uri, "mhe", "run")
    config = tiny.config(tmp_path, "unused", tracking={"uri": uri, "mlflow": True})
    [(key, problem)] = _mlflow(config)
    assert key == "tracking.uri" and problem == (
        f"{uri} is no address of a server: give http(s)://host:port"
    )


@pytest.mark.parametrize("port", ["99999", "abc"])
def test_shards_at_a_port_that_cannot_be(port: str, capsys: pytest.CaptureFixture[str]) -> None:
    url = f"http://127.0.0.1:{port}/faces"
    assert cli.run(["data", "verify", url]) == 2
    assert "is no address of a server" in capsys.readouterr().err
