"""float32 means float32 on a GPU, too; the flags are torch's, so they are seen without one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mhe_dist.config.schema import OptimConfig, TrainConfig
from mhe_dist.distributed.topology import Topology
from mhe_dist.engine.engine import Engine
from tests.conftest import run_ranks


def flags_of_engines(topology: Topology) -> dict[str, list[bool]]:
    """Flags after an engine of each precision was made in one process."""
    found = {}
    for precision in ("bf16", "float32"):
        train = TrainConfig.model_validate(
            {"global_batch": 2, "micro_batch": 2, "precision": precision}
        )
        Engine(nn.Linear(2, 2), OptimConfig(), train, topology)
        backends = torch.backends
        found[precision] = [
            backends.cuda.matmul.allow_tf32,
            backends.cudnn.allow_tf32,
            backends.cudnn.deterministic,
            backends.cudnn.benchmark,
        ]
    return found


@pytest.fixture(scope="module")
def flags() -> dict[str, list[bool]]:
    """Whether TF32 is allowed in products and convolutions; deterministic; benchmark."""
    return run_ranks(flags_of_engines, 1)[0]


def test_a_float32_run_has_no_tf32_and_deterministic_kernels(flags) -> None:
    assert flags["float32"] == [False, False, True, False]


def test_a_bf16_run_looks_for_the_fastest_kernels(flags) -> None:
    assert flags["bf16"] == [False, False, False, True]
