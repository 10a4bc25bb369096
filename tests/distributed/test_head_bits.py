"""The rows that a routed head learns, and what it says to the network, are the same on any ranks.

A few steps of training amplify the last bit of a gradient until it is seen in the losses, so that
"the same run on another number of workers" means little without this. It holds where a row of a
BLAS product does not depend on the number of the others (see `heads/batch_invariant.py`).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mhe_dist.config.head import HeadConfig
from mhe_dist.distributed.topology import Topology
from mhe_dist.heads.batch_invariant import LEAST_ROWS
from mhe_dist.heads.registry import build_head
from mhe_dist.heads.row_head import HeadSpec
from tests.conftest import run_ranks
from tests.support.heads.head_runs import gathered_state

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
RANKS = [pytest.param(2, marks=pytest.mark.long), 3, pytest.param(6, marks=pytest.mark.long)]
LABELS = 5
SEVERAL = {
    "softmax": {"mhs": {"length": 64, "extra_heads": 6}},
    "multi_label": {"objective": "multi_label", "mhs": {"length": 64, "extra_heads": 6}},
    "many pairs per head": {"mhs": {"length": 1000, "extra_heads": 1, "correction": True}},
    "own alone": {"margin": {"kind": "arcface"}, "mhs": {"negatives": "own"}},
}
CONFIGS |= {f"several labels, {name}": changes for name, changes in SEVERAL.items()}


def _steps(topology: Topology, case: str) -> dict[str, Tensor]:
    """The head's state after some steps, and the gradients of the embeddings."""
    rng = torch.Generator().manual_seed(1)
    shape = (STEPS, MICRO_BATCHES, BATCH)
    lists = (LABELS,) if case.startswith("several") else ()
    labels = torch.randint(-len(lists), CLASSES, (*shape, *lists), generator=rng)
    embeddings = torch.randn(*shape, WIDTH, generator=rng)
    changes: dict[str, Any] = CONFIGS[case]
    block = {"length": 100, "extra_heads": 8} | changes.get("mhs", {})
    config = HeadConfig.model_validate({"groups": 6, **changes, "mhs": block})
    gradients = []
    head = build_head(HeadSpec(config, CLASSES, WIDTH, 3, MICRO_BATCHES), topology)
    for step in range(STEPS):
        head.plan(step, labels[step])
        for i in topology.share(MICRO_BATCHES):
            x = embeddings[step, i].clone().requires_grad_()
            head(x, labels[step, i]).loss.backward()
            assert x.grad is not None
            gradients.append(x.grad)
        head.step(0.1)
    state = {name: tensor for name, tensor in head.state().tensors.items() if head.loads(name)}
    return state | {"gradients": torch.stack(gradients).unflatten(0, (STEPS, -1))}


States = dict[str, dict[str, Tensor]]


def _states(topology: Topology, cases: list[str]) -> States:
    return {case: _steps(topology, case) for case in cases}


@pytest.fixture(scope="module")
def alone(selected: list[str]) -> States:
    return _states(Topology(), selected)


@pytest.fixture(scope="module", params=RANKS, ids=lambda size: f"W={size}")
def spread(request: pytest.FixtureRequest, selected: list[str]) -> list[States]:
    return run_ranks(_states, request.param, selected)


def _rows_stand_alone() -> bool:
    a, b = torch.randn(64, WIDTH), torch.randn(384, WIDTH)
    factors = (b.T, b.T.contiguous())
    return all(torch.equal(a[:n] @ b, (a @ b)[:n]) for b in factors for n in range(LEAST_ROWS, 64))


@pytest.mark.parametrize("case", CONFIGS)
def test_rows_are_the_same_bits(case: str, alone: States, spread: list[States]) -> None:
    if not _rows_stand_alone():
        pytest.skip("this BLAS sums a row of a product in an order that depends on the others")
    fields = {name.split("/")[-1] for name in alone[case] if name.startswith("rows/")}
    assert "weight" in fields
    for field in fields:
        found = gathered_state([rank[case] for rank in spread], field)
        assert torch.equal(found, gathered_state([alone[case]], field)), field
    gradients = torch.cat([rank[case]["gradients"] for rank in spread], 1)
    assert torch.equal(gradients, alone[case]["gradients"])
