"""Heads that compute by kernels wherever kernels may compute, against themselves in float64.

Their banks begin untouched, as those of a run do. The interpreter is slow: they are small.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mhe_dist.distributed.topology import CPU
from pipelines.bench.gpu import agreement
from pipelines.bench.gpu.agreement import HEADS, TOLERANCES, head_config, relative, run_head

SIZES = {"CLASSES": 40, "WIDTH": 8, "BATCH": 6, "STEPS": 2}


@pytest.mark.parametrize("name", HEADS)
def test_equals_float64(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for size, value in SIZES.items():
        monkeypatch.setattr(agreement, size, value)
    config = head_config(name, "cosface", "device", "float32", "sgd")
    plain = run_head(config, CPU, torch.float64, tmp_path)
    for module in ("bank.bank", "bank.initial_rows", "heads.routed.mhs", "heads.margins"):
        monkeypatch.setattr(f"mhe_dist.{module}.use_kernels", lambda *_: True)
    found = run_head(config, CPU, torch.float32, tmp_path)
    errors = {"loss": relative(found.losses, plain.losses)}
    errors["gradient"] = relative(found.gradients, plain.gradients)
    errors |= {key: relative(found.state[key], tensor) for key, tensor in plain.state.items()}
    assert not {key: error for key, error in errors.items() if not error <= TOLERANCES["float32"]}
