"""What the loader promises, for any shards, streams, windows, ranks and loader processes."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mhe_dist.config.schema import Config
from mhe_dist.distributed.topology import share
from pipelines.data.mixture.index import open_training_index, samples_per_epoch
from pipelines.shards.index import ShardIndex
from pipelines.shards.label_set import LabelSet
from pipelines.shards.writer import Sample, ShardWriter
from tests.support.data.label_sets import write_labels
from tests.support.data.loading import Loaded, assert_same, loader_of

SIDE, CLASSES = 4, 5
AUGMENT = {"flip": 0.5, "crop": 0.3, "brightness": 0.4, "erase": 0.5}


class Case(NamedTuple):
    """A run's data, and another way to read it."""

    index: ShardIndex
    config: Config
    steps: int
    ranks: int
    workers: int
    start: int


def write(folder: Path, sizes: list[int], prefix: str) -> str:
    rng = np.random.default_rng(len(sizes))
    numbers = itertools.count()
    with ShardWriter(str(folder), "part") as writer:
        for size in sizes:
            writer.write(make(f"{prefix}{next(numbers)}", rng) for _ in range(size))
        writer.finish(CLASSES)
    return str(folder)


def make(key: str, rng: np.random.Generator) -> Sample:
    pixels = rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    image = f"P6 {SIDE} {SIDE} 255\n".encode() + pixels.tobytes()
    return Sample(key, {"ppm": image, "cls": str(rng.integers(CLASSES)).encode()})


@st.composite
def label_sets(draw: st.DrawFn, shards: str) -> str:
    """A label set of some shards, with one class or none for each sample."""
    index = ShardIndex.load(shards)
    one = st.lists(st.integers(0, CLASSES + 1), max_size=1)
    lists = draw(st.lists(one, min_size=index.samples, max_size=index.samples))
    lists[:16] = [each or [0] for each in lists[:16]]  # as many as any case has streams
    return write_labels(f"{shards}-labels", index, lists, CLASSES + 2).folder


def expected_labels(case: Case) -> dict[str, set[int]]:
    """For each key of the first set the label that the run must give it, if a label set does."""
    index = ShardIndex.load(case.config.data.shards)
    if not case.config.data.labels:
        return {}
    given = LabelSet.load(case.config.data.labels).lists(0, index.samples)
    return {f"a{number}": set(given.of(number).tolist()) for number in range(index.samples)}


@st.composite
def cases(draw: st.DrawFn, folder: Path) -> Case:
    sizes = st.lists(st.integers(0, 20), min_size=1, max_size=4).filter(lambda s: sum(s) >= 16)
    data: dict[str, object] = {"shards": write(folder / "a", draw(sizes), "a")}
    if draw(st.booleans()):
        data |= {"labels": draw(label_sets(str(folder / "a")))}
    if draw(st.booleans()):
        other = write(folder / "b", draw(sizes), "b")
        weight = draw(st.sampled_from([0.5, 1, 1.5]))
        data |= {"mix": [{"shards": other, "weight": weight}]}
    if draw(st.booleans()):
        data |= {"images_per_class": draw(st.integers(3, 5))}
    ranks, per_rank = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    micro_batches = ranks * per_rank
    streams = micro_batches * draw(st.integers(1, max(1, 8 // micro_batches)))
    global_batch = streams * draw(st.integers(1, 3))
    data |= {"streams": streams, "shuffle_window": draw(st.integers(1, 12)), "augment": AUGMENT}
    data |= {"image_size": SIDE, "loader_workers": 0}
    config = Config.model_validate(
        {
            "run": {"seed": draw(st.integers(0, 1000))},
            "data": data,
            "train": {"global_batch": global_batch, "micro_batch": global_batch // micro_batches},
        }
    )
    index = open_training_index(config.data, config.run.seed)
    steps = 2 * samples_per_epoch(index) // global_batch + 2
    workers, start = draw(st.integers(1, 2)), draw(st.integers(0, steps - 1))
    return Case(index, config, steps, ranks, workers, start)


def load(case: Case, micro_batches: range, start: int, workers: int = 0) -> Loaded:
    config = case.config.model_copy(deep=True)
    config.data.loader_workers = workers
    loaded: Loaded = {}
    for batch in loader_of(case.index, config, micro_batches, start, case.steps):
        # Alone, a rank has all labels in its hands.
        assert (batch.labels is None) == (len(micro_batches) == config.train.micro_batches)
        for micro in batch.micro_batches:
            loaded[batch.step, micro.index] = (micro.images, micro.labels, micro.keys)
            assert batch.labels is None or torch.equal(batch.labels[micro.index], micro.labels)
    return loaded


def epoch_of(case: Case, loaded: Loaded) -> Counter[str]:
    """Keys of the first epoch of all streams."""
    micro_batches, streams = case.config.train.micro_batches, case.config.data.streams
    per_batch = streams // micro_batches
    per_stream = case.config.train.global_batch // streams
    order = loader_of(case.index, case.config, range(micro_batches), 0, 1).order
    seen: Counter[str] = Counter()
    for (step, number), (_, _, keys) in loaded.items():
        for at, key in enumerate(keys):
            stream = number * per_batch + at // per_stream
            seen[key] += step * per_stream + at % per_stream < order.stream_length(stream)
    return +seen


@pytest.mark.slow
@settings(deadline=None, max_examples=10)
@given(st.data())
def test_any_reader_sees_each_sample_once_and_the_same_pixels(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    case = data.draw(cases(tmp_path_factory.mktemp("case")))
    everything = range(case.config.train.micro_batches)
    whole = load(case, everything, 0)

    chosen, weights = case.config.data, [1.0, *(item.weight for item in case.config.data.mix)]
    seen = epoch_of(case, whole)
    assert seen.total() == samples_per_epoch(case.index)
    assert max(seen.values()) <= (2 if max(weights) > 1 else 1)
    if not chosen.images_per_class and min(weights) == 1:
        urls = [chosen.shards, *(item.shards for item in chosen.mix)]
        sizes = [ShardIndex.load(url).samples for url in urls]
        if chosen.labels:
            sizes[0] = LabelSet.load(chosen.labels).labelled
        assert len(seen) == sum(sizes)
    given = expected_labels(case)
    for _, labels, keys in whole.values():
        for label, key in zip(labels.tolist(), keys, strict=True):
            assert given.get(key, {label}) == {label}

    parts: Loaded = {}
    for rank in range(case.ranks):
        mine = share(len(everything), rank, case.ranks)
        parts |= load(case, mine, 0, workers=case.workers if rank == 0 else 0)
    assert_same(whole, dict(sorted(parts.items())))

    tail = {position: batch for position, batch in whole.items() if position[0] >= case.start}
    assert_same(tail, load(case, everything, case.start))
