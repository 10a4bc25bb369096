"""`launcher.train(config)`: two runs in one process, the second one off the main thread."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mhe_dist.config.write import save_config
from tests.support import tiny

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).parents[2]
SCRIPT = """
import signal, sys
from concurrent.futures import ThreadPoolExecutor
import launcher

file = sys.argv[1]
handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
first = launcher.train(file, run={"name": "first"})
assert first["steps"] == 4 and first["resumed_from"] is None, first
assert launcher.train(file, run={"name": "first"}) == first, "a complete run is left alone"
with ThreadPoolExecutor(1) as pool:
    second = pool.submit(launcher.train, file, ["run.name=second"], progress=False).result()
assert second["run"].endswith("second")
for name in ("loss", "grad_norm", "sample_digest"):
    assert second["training"][name] == first["training"][name], name
assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
try:
    launcher.train(file, run={"name": "first"}, optim={"lr": 7.0})
except launcher.UserError as error:
    assert "optim.lr: 0.02 in the run, 7.0 now" in str(error)
else:
    raise AssertionError("another run of the same name must be refused")
"""


@pytest.mark.long
def test_two_runs_in_one_process(tmp_path: Path) -> None:
    config = tiny.config(
        tmp_path / "runs",
        tiny.write_shards(tmp_path / "train", classes=8),
        train={"max_steps": 4},
        checkpoint={"every_steps": 0, "every_minutes": 0},
        tracking={"mlflow": False},
        export={"formats": []},
    )
    file = tmp_path / "tiny.yaml"
    save_config(config, str(file))
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(file)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "of 8 classes, 4 steps." in done.stdout
    assert (tmp_path / "runs" / "second" / "summary.json").exists()
