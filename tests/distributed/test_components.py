"""`configs/glyphs_components.yaml` on a few patterns: every head learns the labels of images."""

from __future__ import annotations

from pathlib import Path

import pytest

from mhe_dist.config.load import load_config
from pipelines.pretrain.main import run_pretraining
from pipelines.shards.index import ShardIndex
from tests.support import tiny
from tests.support.data.label_sets import write_labels

CONFIG = Path(__file__).parents[2] / "configs" / "glyphs_components.yaml"
HEADS = {
    "route": [],
    "gather": ["head.mhs.exchange=gather"],
    "full": ["head.kind=full"],
    "partial_fc": ["head.kind=partial_fc"],
    "mhc": ["head.kind=mhc"],
}
PARTS = 24


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Shards, and a label set of theirs: one class is in every third image, others are rare."""
    shards = tiny.write_shards(tmp_path_factory.mktemp("shards") / "train")
    index = ShardIndex.load(shards)
    own = [int(label) for shard in index.shards for label in shard.labels]
    lists = [
        [2 + each % 11, 13 + each % 11, *([each % 2] if each % 3 else [0, 1])] if each else []
        for each in own
    ]
    return shards, write_labels(str(Path(shards).parent / "labels"), index, lists, PARTS).folder


@pytest.mark.long
@pytest.mark.parametrize("head", HEADS)
def test_a_head_is_above_the_most_frequent_labels(
    head: str, sets: tuple[str, str], tmp_path: Path
) -> None:
    shards, labels = sets
    small = [
        *(f"data.shards={shards}", f"data.labels={labels}", f"data.image_size={tiny.SIDE}"),
        *("data.labels_per_sample=4", "data.streams=8", "data.loader_workers=0"),
        *("train.global_batch=64", "train.micro_batch=64", "train.epochs=24"),
        *("model.kwargs={channels: [8, 16, 16, 32]}", "model.embedding_dim=32"),
        *(f"evaluate.labels={shards}", f"evaluate.label_set={labels}"),
        *(f"run.dir={tmp_path}", "tracking.mlflow=false", "export.formats=[]"),
        *("data.augment={}", "train.precision=float32"),
    ]
    length = ["head.mhs.length=4"] if head in ("route", "gather") else []
    config = load_config(str(CONFIG), [*small, *length, *HEADS[head]])
    found = run_pretraining(config)["heldout"]
    for name in ("p@1", "p@3", "psp@3"):
        assert found[f"labels/{name}"] > found[f"labels/frequent/{name}"] + 0.1, found
