"""What DeepSpeed brings along, and no run uses, stays out of the process."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import os, sys
import torch
from mhe_dist.config.schema import OptimConfig, TrainConfig
from mhe_dist.distributed.topology import connect
from mhe_dist.engine.engine import Engine
model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 2))
Engine(model, OptimConfig(), TrainConfig(global_batch=2, micro_batch=2), connect())
assert not {"mlflow", "torch._inductor.compile_fx"} & set(sys.modules)
assert "TORCHDYNAMO_DISABLE" not in os.environ
import mlflow  # is hidden no longer
"""


@pytest.mark.slow
def test_an_engine_needs_neither_mlflow_nor_a_compiler() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-800:]
