"""The blocks of docs/library.md: all in order in an empty folder; the one with DDP on two ranks."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mhe_dist.config.head import HeadConfig
from mhe_dist.distributed.topology import Topology
from mhe_dist.heads.registry import build_head
from mhe_dist.heads.row_head import HeadSpec, RowHead
from tests.conftest import run_ranks
from tests.support.heads.head_outcomes import softmax_of
from tests.support.heads.head_runs import gathered_state
from tests.support.heads.reference import DenseHead

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "library.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
(TRAIN,) = (block for block in BLOCKS if "def train(" in block)
CLASSES, INPUTS, WIDTH, STEPS, SAMPLES, SEED, LR = 1000, 7, 6, 3, 12, 3, 0.1
SIZES = {"length": 100, "extra_heads": 8}


@pytest.mark.slow
def test_every_block_runs_in_an_empty_folder(tmp_path: Path) -> None:
    script = tmp_path / "page.py"
    script.write_text("\n".join(BLOCKS))
    ranks = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    variables = {name: value for name, value in os.environ.items() if name not in ranks}
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=tmp_path,
        # Without bf16: there oneDNN (torch 2.14) computes the weights' gradient of a layer that
        # strides over one pixel, as the last ones of these 16 do, from memory that nobody wrote.
        env=variables | {"PYTHONPATH": str(ROOT), "ONEDNN_MAX_CPU_ISA": "AVX2"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def network() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(INPUTS, WIDTH).double()


def data() -> list[tuple[Tensor, Tensor]]:
    rng = torch.Generator().manual_seed(7)
    inputs = torch.randn(STEPS, SAMPLES, INPUTS, generator=rng, dtype=torch.float64)
    labels = torch.randint(0, CLASSES, (STEPS, SAMPLES), generator=rng)
    return list(zip(inputs, labels, strict=True))


def train_as_shown(topology: Topology) -> dict[str, Any]:
    """The block's own `train` on this rank's half of each batch."""
    # Up to where the block itself calls it.
    source = TRAIN[: TRAIN.index("\nmodel = ")]
    names: dict[str, Any] = {}
    exec(compile(source, "docs/library.md", "exec"), names)
    half = SAMPLES // topology.world_size
    mine = slice(topology.rank * half, (topology.rank + 1) * half)
    batches = [(inputs[mine], labels[mine]) for inputs, labels in data()]
    model = network()
    head, losses = names["train"](
        model, batches, CLASSES, WIDTH, dtype=torch.float64, groups=8, **SIZES
    )
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    return {"losses": losses, "weights": weights, "state": head.state_dict()}


def plain() -> tuple[Tensor, Tensor, Tensor]:
    """The same training in one process with dense float64 rows: losses, weights, rows."""
    config = HeadConfig.model_validate({"kind": "mhs", "groups": 8, "mhs": SIZES})
    head = build_head(HeadSpec(config, CLASSES, WIDTH, SEED, 1, torch.float64), Topology())
    assert isinstance(head, RowHead)
    layout = head.layout
    rows = head.initial_rows(torch.arange(layout.heads)).flatten(0, 1)
    dense = DenseHead(config, rows.requires_grad_())
    model, losses = network(), []
    optimizer = torch.optim.SGD(model.parameters(), LR, momentum=0.9)
    for step, (inputs, labels) in enumerate(data()):
        units, slots = layout.locate(labels)
        bias, touched = softmax_of(head, step, units)
        loss = dense.loss(model(inputs), units * layout.length + slots, bias)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        numbers = [unit * layout.length + j for unit in touched for j in range(layout.length)]
        dense.update(dense.rows.grad, numbers, LR)
        losses.append(loss.detach())
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    return torch.stack(losses), weights, dense.rows.detach().view(-1, layout.length, WIDTH)


def test_the_loop_with_ddp_equals_one_process_with_dense_rows() -> None:
    ranks = run_ranks(train_as_shown, 2)
    losses, weights, rows = plain()
    near = {"rtol": 1e-10, "atol": 1e-10}
    torch.testing.assert_close(sum(rank["losses"] for rank in ranks) / 2, losses, **near)
    for rank in ranks:
        torch.testing.assert_close(rank["weights"], weights, **near)
    states = [rank["state"]["tensors"] for rank in ranks]
    units = gathered_state(states, "units")
    torch.testing.assert_close(gathered_state(states, "weight"), rows[units], **near)
