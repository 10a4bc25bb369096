"""A run that goes on with other numbers of workers and other ZeRO stages is the same run.

At the full learning rate from the first step on: what rounding changed would soon be seen.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mhe_dist.config.schema import Config
from mhe_dist.distributed.topology import Topology
from mhe_dist.errors import Preempted
from pipelines.pretrain import preemption
from pipelines.pretrain.main import run_pretraining
from pipelines.pretrain.recorder import ignore_event
from pipelines.pretrain.run import Run
from pipelines.runs.warm_start import HEAD_PREFIX
from tests.support import tiny

STEPS = 16


def go_on(topology: Topology, config: dict[str, Any], until: int) -> list[str]:
    """Train until all are told to stop, after step `until`; tensors that loading changed."""

    def on_event(event: dict[str, Any]) -> None:
        if event["event"] == "metrics" and event["step"] >= until:
            preemption.request()

    changed = loaded_otherwise(topology, config)
    try:
        run_pretraining(Config.model_validate(config), on_event)
    except Preempted:
        assert until < STEPS
    else:
        assert until == STEPS
    return changed


def loaded_otherwise(topology: Topology, config: dict[str, Any]) -> list[str]:
    """Tensors of the newest checkpoint that this rank's freshly loaded state does not equal."""
    run = Run(Config.model_validate(config), topology, ignore_event)
    run.tracker.close()
    newest = run.store.newest()
    if newest is None:
        return []
    rows = run.head.state().with_prefix(HEAD_PREFIX).tensors
    state = run.engine.state() | rows
    saved = newest.load(lambda name: name in state)
    assert rows and saved.keys() == state.keys()
    return [name for name, tensor in state.items() if not torch.equal(tensor, saved[name])]


@pytest.mark.parametrize(
    ("optimizer", "stages"), [({"lr": 0.1}, (1, 1, 1)), ({"kind": "adamw", "lr": 1e-3}, (0, 3, 1))]
)
def test_two_one_three_workers_in_mid_epoch(
    run_distributed, tmp_path: Path, optimizer: dict[str, Any], stages: tuple[int, int, int]
) -> None:
    config = tiny.config(
        tmp_path,
        tiny.write_shards(tmp_path / "shards"),
        data={"streams": 24},
        head={"optim": {"kind": optimizer.get("kind", "sgd")}},
        optim=optimizer | {"warmup_steps": 0},
        train={"max_steps": STEPS, "global_batch": 96},
    )
    for workers, stage, until in zip((2, 1, 3), stages, (4, 9, STEPS), strict=True):
        values = config.model_dump()
        values["scale"] |= {"workers": workers, "zero_stage": stage}
        changed = run_distributed(go_on, workers, values, until)
        assert changed == [[]] * workers, f"loaded by {workers} workers at ZeRO {stage}"
    uninterrupted = config.model_copy(deep=True)
    uninterrupted.run.name = "uninterrupted"
    values = uninterrupted.model_dump()
    values["scale"] |= {"workers": 2, "zero_stage": stages[0]}
    run_distributed(go_on, 2, values, STEPS)
    losses, keys = tiny.per_step(config)
    wanted, wanted_keys = tiny.per_step(uninterrupted)
    assert keys == wanted_keys
    assert losses == pytest.approx(wanted, rel=1e-6), "rounding of the reported mean"
    assert tiny.differing(config, uninterrupted) == []
