"""Averaged weights: the average of the definition, through a checkpoint, into what is exported."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from mhe_dist.backbone.ema import AveragedWeights, backbone_weights
from mhe_dist.checkpoint.store import CheckpointStore
from mhe_dist.config.schema import Config
from mhe_dist.distributed.topology import Topology
from pipelines.pretrain.main import run_pretraining
from pipelines.runs.trained import load_trained_backbone
from tests.support import tiny


def test_the_average_by_hand_and_where_it_is_applied() -> None:
    layer = nn.Linear(1, 1, bias=False)
    layer.weight.data.fill_(1.0)
    average = AveragedWeights(dict(layer.named_parameters()), 0.75)
    for value in (5.0, 9.0):
        layer.weight.data.fill_(value)
        average.update()
    assert average.tensors["weight"].item() == 0.75 * (0.75 * 1 + 0.25 * 5) + 0.25 * 9
    with pytest.raises(ZeroDivisionError), average.applied():
        assert layer.weight.item() == average.tensors["weight"].item()
        raise ZeroDivisionError
    assert layer.weight.item() == 9.0
    state = {"model.a": 1, "model.b": 2, "ema.b": 3, "optim.a": 4}
    assert backbone_weights(state) == {"a": 1, "b": 3}


def train_twice(topology: Topology, whole: dict, resumed: dict) -> bool:
    """A run of six steps, and the same from the checkpoint of its third."""
    run_pretraining(Config.model_validate(whole))
    if topology.is_first:
        step = "checkpoints/step_00000003"
        config = Config.model_validate(resumed)
        shutil.copytree(f"{whole['run']['dir']}/whole/{step}", f"{config.run.path}/{step}")
    topology.barrier()
    run_pretraining(Config.model_validate(resumed))
    return True


def tensors(config: Config, step: int) -> dict[str, torch.Tensor]:
    store = CheckpointStore(f"{config.run.path}/checkpoints", Topology())
    newest = store.newest()
    assert newest is not None
    assert newest.step == step
    return newest.load(lambda name: not name.startswith("head/"))


def test_it_goes_through_a_checkpoint_and_is_exported(run_distributed, tmp_path: Path) -> None:
    shards = tiny.write_shards(tmp_path / "train")
    changes = {
        "optim": {"lr": 0.1, "warmup_steps": 0, "ema": 0.8},
        "train": {"max_steps": 6},
        "checkpoint": {"every_steps": 3},
        "scale": {"workers": 2},
    }
    whole = tiny.config(tmp_path, shards, run={"name": "whole"}, **changes)
    resumed = tiny.config(tmp_path, shards, run={"name": "resumed"}, **changes)
    assert all(run_distributed(train_twice, 2, whole.model_dump(), resumed.model_dump()))
    first, second = tensors(whole, 6), tensors(resumed, 6)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
    name = "net.fc.weight"
    assert not torch.equal(first[f"ema.{name}"], first[f"model.{name}"])
    loaded = load_trained_backbone(whole.run.path).model.state_dict()
    assert torch.equal(loaded[name], first[f"ema.{name}"])
    assert torch.equal(loaded["neck.running_mean"], first["model.neck.running_mean"])


def test_weights_that_are_cut_have_no_average(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"optim\.ema=0\.9 needs whole weights"):
        tiny.config(tmp_path, "unused", optim={"ema": 0.9}, scale={"zero_stage": 3})
