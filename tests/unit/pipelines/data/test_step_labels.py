"""The labels of a step are those of the samples that the order shows, wherever one begins."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mhe_dist.config.data import DataConfig
from pipelines.bench.scale.index import write_synthetic_index
from pipelines.data.mixture.index import Mixture, open_training_index, samples_per_epoch
from pipelines.data.order import SampleOrder
from pipelines.data.step_labels import StepLabels
from pipelines.shards.index import ShardIndex
from tests.support.data.label_sets import write_labels
from tests.support.data.shard_sets import PACKED


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two data sets, of 37 and 60 samples, and a label set of the first one."""
    root = tmp_path_factory.mktemp("sets")
    for samples, per_shard in ((37, 5), (60, 60)):
        (root / str(samples)).mkdir()
        write_synthetic_index(f"{root}/{samples}", samples, per_shard)
    index = ShardIndex.load(f"{root}/37")
    lists = [[number % 5] if number % 3 else [] for number in range(37)]
    write_labels(f"{root}/labels", index, lists, 6)
    several = [[number % 5, number % 7, number % 3] for number in range(37)]
    write_labels(f"{root}/several", index, several, 7)
    Path(root, "list.tsv").write_text("class\n1\n2\n")
    names = ("37", "60", "labels", "list.tsv", "several")
    return [f"{root}/{name}" for name in names]


def label_of(index: ShardIndex, shard: int, position: int) -> int:
    if isinstance(index, Mixture):
        return index.entry(shard, position).label
    return int(index.shards[shard].labels[position])


@settings(deadline=None, max_examples=15)
@given(st.data())
def test_each_sample_has_its_own_label(folders: list[str], data: st.DataObject) -> None:
    first, second, labels, classes, _ = folders
    mix = [{"shards": second, "weight": data.draw(st.sampled_from([0.5, 1, 1.5]))}]
    if data.draw(st.booleans()):
        mix.append({"shards": first, "labels": labels})
    config = DataConfig(
        shards=first,
        mix=mix if data.draw(st.booleans()) else [],
        labels=labels if data.draw(st.booleans()) else "",
        classes=classes if data.draw(st.booleans()) else "",
        images_per_class=data.draw(st.integers(0, 3)),
    )
    index = open_training_index(config, 3)
    streams = data.draw(st.integers(1, min(5, samples_per_epoch(index))))
    global_batch = streams * data.draw(st.integers(1, 9))
    sizes = [shard.samples for shard in index.shards]
    subset = index if isinstance(index, Mixture) else None
    order = SampleOrder(sizes, streams, data.draw(st.integers(1, 12)), 3, subset)
    assert index.has_label_columns
    found = StepLabels(index, order, global_batch)
    start = data.draw(st.integers(0, 20))
    steps = range(start, start + data.draw(st.integers(0, 8)))
    expected = [[label_of(index, *each) for each in order.batch(s, global_batch)] for s in steps]
    assert [made.tolist() for made in found.steps(steps)] == expected
    for step, labels_of_step in zip(reversed(steps), reversed(expected), strict=True):
        assert found.of(step).tolist() == labels_of_step


@pytest.mark.parametrize("limit", [1, 2, 5])
def test_several_labels_of_a_step_are_those_of_its_epochs(folders: list[str], limit: int) -> None:
    first, second, _, classes, several = folders
    mix = [{"shards": second}]
    config = DataConfig(
        shards=first, labels=several, labels_per_sample=limit, classes=classes, mix=mix
    )
    index = open_training_index(config, 3)
    assert isinstance(index, Mixture) and index.has_label_columns
    order = SampleOrder(index.sizes, 4, 6, 3, index)
    length = [order.stream_length(stream) for stream in range(4)]
    steps, shape = range(5, 5 + 3 * min(length) // 2), index.label_shape
    for step, made in zip(steps, StepLabels(index, order, 8).steps(steps), strict=True):
        assert made.shape == (8, *shape)
        # Two samples of each stream, whose epochs end at different steps.
        epochs = [(2 * step + n) // length[stream] for stream in range(4) for n in range(2)]
        numbers = [int(index.starts[shard]) + inside for shard, inside in order.batch(step, 8)]
        for number, epoch, row in zip(numbers, epochs, made, strict=True):
            found = index.labels_in_epoch(np.array([number]), epoch)
            assert found is not None and (found[0] == row).all()


def test_a_sample_without_an_entry_has_any_label(folders: list[str]) -> None:
    """It is in no epoch, but the lookup of a whole range must not fail on it."""
    config = DataConfig(shards=folders[0], labels=folders[2], mix=[{"shards": folders[1]}])
    index = open_training_index(config, 3)
    found = index.labels_of(np.arange(index.samples))
    assert found is not None
    assert [found[n] for n in range(37) if n % 3] == [n % 5 for n in range(37) if n % 3]


def test_labels_that_are_in_no_column_are_not_known(folders: list[str], tmp_path: Path) -> None:
    assert not ShardIndex.load(str(PACKED / "own")).has_label_columns
    alone = ShardIndex.load(folders[0])
    (tmp_path / "set").mkdir()
    unlabelled = [shard.columns._replace(labels=None) for shard in alone.shards]
    assert unlabelled and alone.has_label_columns
    mixed = open_training_index(
        DataConfig(shards=str(PACKED / "own"), mix=[{"shards": folders[0]}]), 3
    )
    assert not mixed.has_label_columns
