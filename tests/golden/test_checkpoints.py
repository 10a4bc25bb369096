"""Checkpoints of an early version load, and what is saved again is the same, bit for bit."""

from __future__ import annotations

import json

import pytest
from torch import Tensor

from mhe_dist.backbone.model import build_backbone
from mhe_dist.config.stored import stored_config
from mhe_dist.distributed.topology import Topology
from mhe_dist.engine.engine import Engine
from mhe_dist.heads.registry import build_head
from mhe_dist.heads.row_head import HeadSpec
from pipelines.runs.warm_start import HEAD_PREFIX, find_checkpoint
from tests.conftest import run_ranks
from tests.golden.record_checkpoints import CHECKPOINTS, DIGESTS, HEADS, STEPS, digests


def path_of(head: str) -> str:
    return f"{CHECKPOINTS}/{head}/step_{STEPS:08d}"


def restore(topology: Topology, head: str, folder: str) -> dict[str, str]:
    """Load a checkpoint into a new engine and head; digests of what they would save."""
    checkpoint = find_checkpoint(path_of(head))
    config = stored_config(checkpoint.run["config"])
    model = build_backbone(config.model, config.data.image_size)
    engine = Engine(model, config.optim, config.train, topology, config.scale.zero_stage)
    spec = HeadSpec(
        config.head,
        checkpoint.run["classes"],
        config.model.embedding_dim,
        config.run.seed,
        config.train.micro_batches,
        folder=folder,
        epoch_steps=checkpoint.run["samples"] / config.train.global_batch,
    )
    classifier = build_head(spec, topology)
    engine.load_state(checkpoint.load(lambda name: not name.startswith(HEAD_PREFIX)))
    rows: dict[str, Tensor] = checkpoint.load(lambda name: name.startswith(HEAD_PREFIX))
    classifier.load_state({name.removeprefix(HEAD_PREFIX): rows[name] for name in rows})
    return digests(engine.state() | classifier.state().with_prefix(HEAD_PREFIX).tensors)


@pytest.mark.parametrize("head", HEADS)
def test_the_tensors_are_read_as_they_were_written(head: str) -> None:
    recorded = json.loads(DIGESTS.read_text())[head]
    assert digests(find_checkpoint(path_of(head)).load(lambda _: True)) == recorded


@pytest.mark.parametrize("head", HEADS)
def test_a_run_restores_them(head: str, tmp_path) -> None:
    (found,) = run_ranks(restore, 1, head, str(tmp_path))
    assert found == json.loads(DIGESTS.read_text())[head]
