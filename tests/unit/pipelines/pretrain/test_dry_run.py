"""A trial of one node's workers stands for workers of the whole run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mhe_dist.config.head import HeadConfig
from mhe_dist.config.load import load_config
from mhe_dist.config.schema import Config, validate_combinations
from mhe_dist.config.shipped import shipped_configs
from mhe_dist.config.write import config_to_dict
from mhe_dist.distributed.topology import Topology
from mhe_dist.heads.base import NO_SAMPLE
from mhe_dist.heads.multilevel.cascade import MultiHeadCascade
from mhe_dist.heads.registry import build_head
from mhe_dist.heads.row_head import HeadSpec, RowHead
from mhe_dist.train.batch import MicroBatch, StepBatch
from pipelines.pretrain.dry_run import dry_run, fold_labels, share_of_head, share_of_run
from pipelines.runs.auto_sizes import settle_sizes
from tests.support import tiny

CLASSES, WORKERS, TRIED = 120_000, 32, 4
WIDTH = 4
KINDS: dict[str, dict[str, Any]] = {
    "full": {"kind": "full"},
    "partial_fc": {"kind": "partial_fc"},
    "mhs route": {"mhs": {"length": 10, "extra_heads": 6}},
    "mhs own": {"mhs": {"length": 10, "extra_heads": 6, "negatives": "own"}},
    "mhs batch": {
        "mhs": {"length": 10, "extra_heads": 64, "exchange": "gather", "negatives": "batch"}
    },
    "mhc": {"kind": "mhc"},
    "mhc of three levels": {"kind": "mhc", "mhc": {"lengths": [30, 40, 100]}},
}


def rows_held(head: HeadConfig, classes: int, workers: int) -> int:
    """The most sharded rows that one of some workers holds."""
    spec = HeadSpec(head, classes, WIDTH, 0, workers)
    counts = []
    for rank in range(workers):
        built = build_head(spec, Topology(rank, workers))
        if isinstance(built, RowHead):
            banks = [built.bank]
        else:
            assert isinstance(built, MultiHeadCascade)
            banks = [level.bank for level in list(built.levels.values())[1:]]
        counts.append(sum(len(bank.units) * bank.length for bank in banks))
    return max(counts)


@pytest.mark.parametrize("groups", [32, 40, 128])
@pytest.mark.parametrize("kind", KINDS)
def test_a_tried_worker_holds_what_the_fullest_worker_of_the_run_holds(
    kind: str, groups: int
) -> None:
    head = HeadConfig.model_validate({"groups": groups, **KINDS[kind]})
    of_run = rows_held(head, CLASSES, WORKERS)
    share, classes = share_of_head(head, CLASSES, TRIED, WORKERS)
    assert rows_held(share, classes, TRIED) == pytest.approx(of_run, rel=0.02)
    assert share.validate_combinations(TRIED) == []


def test_a_tried_worker_draws_as_many_extra_heads() -> None:
    route = HeadConfig.model_validate({"groups": 32, **KINDS["mhs route"]})
    assert share_of_head(route, CLASSES, TRIED, WORKERS)[0].mhs.extra_heads == 6, "of each group"
    gather = HeadConfig.model_validate({"groups": 32, **KINDS["mhs batch"]})
    assert share_of_head(gather, CLASSES, TRIED, WORKERS)[0].mhs.extra_heads == 8, "of all"


def test_a_trial_of_all_workers_and_a_head_that_is_not_sharded_are_whole() -> None:
    head = HeadConfig.model_validate({"groups": 40})
    assert share_of_head(head, CLASSES, WORKERS, WORKERS) == (head, CLASSES)
    product = HeadConfig.model_validate({"kind": "mhp"})
    assert share_of_head(product, CLASSES, TRIED, WORKERS) == (product, CLASSES)


def test_a_worker_of_an_elastic_run_is_tried_with_its_share_of_the_workers_there_are(
    tmp_path: Path,
) -> None:
    sizes = {"scale": {"workers": {"min": 2, "max": 8}}, "train": {"global_batch": 1024}}
    values = {"data": {"shards": "x", "streams": 16}, "head": {"groups": 8}, **sizes}
    settings = Config.model_validate(values)
    share, _ = share_of_run(settings, CLASSES, 1, 4, str(tmp_path))
    assert (share.scale.workers, share.scale.elastic) == (1, False)
    assert (share.train.global_batch, share.data.streams) == (256, 4)


COSFACE = ("head.margin.kind=cosface", "head.margin.m=auto")
NEAR_A_RULE = {
    "shipped": [],
    "best by shards": ["checkpoint.keep_best=rank1", "evaluate.shards=y"],
    "best by pairs": ["checkpoint.keep_best=lfw/accuracy", "evaluate.verification=[lfw.bin]"],
    "best by labels": [
        *("checkpoint.keep_best=labels/map", "evaluate.labels=y", "evaluate.label_set=z"),
        "data.labels_per_sample=4",
    ],
    "row files": ["head.bank.memory=file", "head.bank.path=/rows", "run.dir=memory://runs"],
    "auto": ["head.groups=auto", "head.objective=softmax", *COSFACE],
    "elastic": ["scale.workers={min: 2, max: 4}"],
    "batch": ["head.mhs.exchange=gather", "head.mhs.negatives=batch"],
    "averaged and cut": ["optim.ema=0.9", "scale.zero_stage=2"],
    "many workers": ["train.global_batch=1024", "train.micro_batch=32", "data.streams=32"],
}


@pytest.mark.parametrize("rule", NEAR_A_RULE)
@pytest.mark.parametrize("name", shipped_configs())
def test_a_trial_of_a_valid_run_is_valid(name: str, rule: str) -> None:
    """A run that kept the best checkpoint by its shards alone could not be tried."""
    sizes = ["train.global_batch=512", "train.micro_batch=128", "data.streams=64"]
    fixed = ["scale.workers=4", "head.kind=mhs", "head.groups=8", "evaluate.every_steps=5"]
    config = load_config(name, [*sizes, *fixed, *NEAR_A_RULE[rule]])
    settled = settle_sizes(config, CLASSES)
    for workers in (1, 4):
        share, _ = share_of_run(settled, CLASSES, workers, 4, "/tmp/trial")
        assert validate_combinations(share) == []
        assert not share.evaluate.has_sets
        assert Config.model_validate(config_to_dict(share)) == share


def test_labels_are_folded_and_what_is_no_label_stays() -> None:
    labels = torch.tensor([[3, 12], [25, -1], [NO_SAMPLE, 40]])
    part = MicroBatch(0, torch.zeros(3), labels, ["a", "b", "c"])
    folded = fold_labels(StepBatch(0, [part], 0.5, labels[None]), 40, 10)
    expected = torch.tensor([[3, 2], [5, -1], [NO_SAMPLE, 40]])  # 40 is no class of the run
    assert folded.micro_batches[0].labels.equal(expected)
    assert folded.labels is not None and folded.labels.equal(expected[None])
    alone = fold_labels(StepBatch(0, [part]), 40, 10)
    assert alone.labels is None


@pytest.mark.slow
def test_a_trial_of_two_workers_of_eight_holds_an_eighth_of_the_rows_in_each(
    tmp_path: Path,
) -> None:
    classes, width = 400_000, 128
    shards = Path(tiny.write_shards(tmp_path / "shards"))
    index = json.loads((shards / "index.json").read_text())
    (shards / "index.json").write_text(json.dumps(index | {"num_classes": classes}))
    settings = tiny.config(
        tmp_path,
        str(shards),
        head={"kind": "full", "groups": 8},
        model={"embedding_dim": width},
        train={"global_batch": 128, "max_steps": 12},
        scale={"workers": 8},
    )
    measured = dry_run(settings, 2, 8, [])
    rows = classes // 8 * width * 4 * 2  # float32, and their momentum
    # With the numbers of its units.
    assert measured["trial"]["rows_bytes"] == pytest.approx(rows, rel=0.02)
    gained = measured["trial"]["peak_bytes"] - measured["trial"]["base_bytes"]
    # Rows, their momentum and gradient, and what a worker needs without a head. With a half of all
    # classes it was 463 MiB.
    assert gained < rows * 1.5 + (150 << 20)
    assert 0 < measured["trial"]["head_s"] < measured["trial"]["step_s"]
    assert measured["workers"] == 2
