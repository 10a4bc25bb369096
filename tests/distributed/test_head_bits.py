"""The rows that a routed head learns are the same bits on any number of ranks.

A few steps of training amplify the last bit of a gradient until it is seen in the losses, so that
"the same run on another number of workers" means little without this. It holds where a row of a
BLAS product does not depend on the number of the others (see `heads/batch_invariant.py`).
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mhe_dist.config.head import HeadConfig
from mhe_dist.distributed.topology import Topology
from mhe_dist.heads.batch_invariant import LEAST_ROWS
from mhe_dist.heads.registry import build_head
from mhe_dist.heads.row_head import HeadSpec
from tests.conftest import run_ranks
from tests.distributed.head_runs import gathered_state

CLASSES, WIDTH, MICRO_BATCHES, BATCH, STEPS = 5000, 128, 6, 32, 3
CONFIGS = {
    "few samples per head": {"mhs": {"length": 64, "extra_heads": 6}},
    "many samples per head": {"mhs": {"length": 1000, "extra_heads": 1}},
    "own alone": {"mhs": {"length": 64, "negatives": "own"}},
    "adamw": {"optim": {"kind": "adamw"}},
    "bfloat16": {"bank": {"dtype": "bfloat16"}},
    "arcface": {"margin": {"kind": "arcface", "m": 0.5}},
    "no margin": {"margin": {"kind": "none"}},
}


def _steps(topology: Topology, changes: dict) -> dict[str, Tensor]:
    """The head's state after some steps."""
    rng = torch.Generator().manual_seed(1)
    shape = (STEPS, MICRO_BATCHES, BATCH)
    labels = torch.randint(0, CLASSES, shape, generator=rng)
    embeddings = torch.randn(*shape, WIDTH, generator=rng)
    config = HeadConfig.model_validate({"groups": 6} | changes)
    head = build_head(HeadSpec(config, CLASSES, WIDTH, 3, MICRO_BATCHES), topology)
    for step in range(STEPS):
        head.plan(step, labels[step])
        for i in topology.share(MICRO_BATCHES):
            x = embeddings[step, i].clone().requires_grad_()
            head(x, labels[step, i]).loss.backward()
        head.step(0.1)
    return {name: tensor for name, tensor in head.state().tensors.items() if head.loads(name)}


States = dict[str, dict[str, Tensor]]


def _states(topology: Topology, cases: list[str]) -> States:
    return {case: _steps(topology, CONFIGS[case]) for case in cases}


@pytest.fixture(scope="module")
def alone(selected: list[str]) -> States:
    return _states(Topology(), selected)


@pytest.fixture(scope="module", params=[2, 3, 6], ids=lambda size: f"W={size}")
def spread(request: pytest.FixtureRequest, selected: list[str]) -> list[States]:
    return run_ranks(_states, request.param, selected)


def _rows_stand_alone() -> bool:
    a, b = torch.randn(64, WIDTH), torch.randn(WIDTH, 384)
    return all(torch.equal(a[:n] @ b, (a @ b)[:n]) for n in range(LEAST_ROWS, 64))


@pytest.mark.parametrize("case", CONFIGS)
def test_rows_are_the_same_bits(case: str, alone: States, spread: list[States]) -> None:
    if not _rows_stand_alone():
        pytest.skip("this BLAS sums a row of a product in an order that depends on the others")
    fields = {name.split("/")[-1] for name in alone[case] if name.startswith("rows/")}
    assert "weight" in fields
    for field in fields:
        found = gathered_state([rank[case] for rank in spread], field)
        assert torch.equal(found, gathered_state([alone[case]], field)), field
