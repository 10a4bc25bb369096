"""A machine as clusters and containers have them: each oddity has stopped a run of some project.

All at once, and the losses are those of an ordinary machine.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mhe_dist.config.write import save_config
from mhe_dist.tracking.jsonl import read_records
from tests.support import tiny
from tests.support.terminal import MHE

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).parents[2]
# A host name that nothing resolves, the 64 MiB of shared memory that Docker gives, few open files,
# and a user id without an account (OpenShift).
SCRIPT = """
hostname nowhere-at-all
mount -t tmpfs -o size=64m tmpfs /dev/shm
ulimit -n 256
exec unshare --user --map-user=12345 --map-group=12345 "$@"
"""
NOWHERE = "127.0.0.1:9"
PROXIES = {f"{name}_proxy": f"http://{NOWHERE}" for name in ("http", "https", "HTTP", "HTTPS")}
TEXT = {"LC_ALL": "C", "LANG": "C", "PYTHONIOENCODING": "ascii", "TERM": "dumb"}


def odd_environment(folder: Path) -> dict[str, str]:
    """No home, no name, no UTF-8, proxies for everything, somebody's cluster, a long TMPDIR."""
    temporary = folder / ("t" * 90)
    temporary.mkdir()
    known = {k: v for k, v in os.environ.items() if k not in ("USER", "LOGNAME")}
    places = {"HOME": str(folder / "no home"), "TMPDIR": str(temporary), "RAY_ADDRESS": NOWHERE}
    return known | PROXIES | TEXT | places | {"PYTHONPATH": str(ROOT)}


def can_make_namespaces() -> bool:
    """Whether this user may mount in a namespace of their own, and become another user in one."""
    words = ["unshare", "--uts", "--mount", "sh", "-c", SCRIPT, "sh", "true"]
    return shutil.which("unshare") is not None and not subprocess.call(
        words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


def losses(run: Path) -> list[float]:
    return [record["loss"] for record in read_records(run / "metrics.jsonl") if "loss" in record]


@pytest.mark.skipif(not can_make_namespaces(), reason="needs the right to make namespaces")
def test_an_odd_machine_trains_as_any_other(tmp_path: Path) -> None:
    config = tiny.config(
        tmp_path / "runs",
        tiny.write_shards(tmp_path / "train", classes=8),
        data={"loader_workers": 1},
        train={"max_steps": 3, "log_every": 1},
        scale={"workers": 2},
        checkpoint={"every_steps": 0, "every_minutes": 0},
        tracking={"mlflow": False},
        export={"formats": []},
    )
    save_config(config, str(tmp_path / "tiny.yaml"))
    train = [MHE, "train", str(tmp_path / "tiny.yaml")]
    odd = ["unshare", "--uts", "--mount", "sh", "-c", SCRIPT, "sh", *train, "run.name=odd"]
    done = subprocess.run(
        odd, env=odd_environment(tmp_path), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    plain = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run(
        [*plain, "-m", "pipelines.pretrain", train[-1], "run.name=plain"],
        env=environment,
        capture_output=True,
        check=True,
    )
    found = losses(tmp_path / "runs" / "odd")
    assert len(found) == 3
    assert found == losses(tmp_path / "runs" / "plain")
