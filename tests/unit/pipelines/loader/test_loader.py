"""The loader: the same pixels whoever reads them, and nothing lost without a word."""

from __future__ import annotations

import io
import random
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset

from mhe_dist.config.schema import Config
from mhe_dist.errors import RunError, UserError
from mhe_dist.train.batch import MicroBatch
from pipelines.data.mixture.index import open_training_index
from pipelines.data.sequential import read_in_order
from pipelines.loader.loader import Loader
from pipelines.shards.index import ShardIndex
from pipelines.shards.writer import ShardWriter
from tests.support.data.label_sets import write_labels
from tests.support.data.loading import Loaded, assert_same, loader_of
from tests.support.data.patterns import (
    CLASSES,
    PNG_DATA,
    SIDE,
    damage,
    image,
    sample,
    write_patterns,
)

AUGMENT = {
    "flip": 0.5,
    "crop": 0.2,
    "rotate": 20,
    "brightness": 0.3,
    "saturation": 0.5,
    "blur": 0.5,
}


@pytest.fixture
def index(tmp_path: Path) -> ShardIndex:
    return write_patterns(str(tmp_path / "set"))


def configure(index: ShardIndex, **data: object) -> Config:
    """Four micro-batches of two streams; a step is two samples of each of the eight streams."""
    sizes = {"streams": 8, "shuffle_window": 9, "image_size": SIDE, "loader_workers": 0}
    several = {"kind": "mhc", "mhc": {"multi_label": True}}
    return Config(
        run={"seed": 3},
        head=several if data.get("labels_per_sample") else {},
        data={"shards": index.folder, "max_bad_fraction": 1, **sizes, **data},
        train={"global_batch": 16, "micro_batch": 4},
    )


def load(loader: Loader) -> Loaded:
    loaded = {}
    for batch in loader:
        for micro in batch.micro_batches:
            check(micro)
            loaded[batch.step, micro.index] = micro.images, micro.labels, micro.keys
    return loaded


def check(micro: MicroBatch) -> None:
    assert micro.images.dtype == torch.uint8
    assert micro.images.shape == (4, 3, SIDE, SIDE)
    assert micro.labels.dtype == torch.int64
    assert micro.labels.shape == (4,)
    assert micro.labels.tolist() == [int(key[1:]) % CLASSES for key in micro.keys]


def test_an_epoch_shows_every_sample_once_and_unchanged(index: ShardIndex) -> None:
    # 25 samples in each stream: the first epoch ends in the middle of step 12.
    loaded = load(loader_of(index, configure(index), range(4), 0, 13))
    keys = [key for step in range(12) for micro in range(4) for key in loaded[step, micro][2]]
    last = [key for micro in range(4) for key in loaded[12, micro][2][::2]]
    assert sorted(keys + last) == [f"s{number:03d}" for number in range(200)]
    images, _, keys = loaded[5, 2]
    expected = torch.from_numpy(image(int(keys[1][1:]))).permute(2, 0, 1)
    assert torch.equal(images[1], expected)


@pytest.mark.parametrize("ranks", [2, 4])
def test_any_number_of_ranks_sees_the_same_batches(index: ShardIndex, ranks: int) -> None:
    config = configure(index, augment=AUGMENT)
    whole = load(loader_of(index, config, range(4), 0, 14))
    parts: Loaded = {}
    for rank in range(ranks):
        mine = range(4 * rank // ranks, 4 * (rank + 1) // ranks)
        parts |= load(loader_of(index, config, mine, 0, 14))
    assert_same(whole, dict(sorted(parts.items())))


@pytest.mark.parametrize("workers", [1, 2, 7])
def test_any_number_of_loader_processes_makes_the_same_pixels(
    index: ShardIndex, workers: int
) -> None:
    expected = load(loader_of(index, configure(index, augment=AUGMENT), range(1, 3), 3, 14))
    config = configure(index, augment=AUGMENT, loader_workers=workers)
    assert_same(expected, load(loader_of(index, config, range(1, 3), 3, 14)))


def test_a_resume_is_the_tail_of_the_uninterrupted_run(index: ShardIndex) -> None:
    config = configure(index, augment=AUGMENT)
    whole = load(loader_of(index, config, range(4), 0, 30))
    for start in random.Random(0).sample(range(1, 30), 4):
        tail = load(loader_of(index, config, range(4), start, 30))
        assert_same({position: v for position, v in whole.items() if position[0] >= start}, tail)


def test_no_label_is_looked_up_before_the_first_step(
    index: ShardIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of each shard was: of 100,000 shards that read the whole column, on every rank."""

    def refuse(*_: object) -> None:
        raise AssertionError("a label is looked up")

    monkeypatch.setattr(ShardIndex, "labels_of", refuse)
    config = configure(index)
    half = {"global_batch": 16, "micro_batches": 4, "local_micro_batches": range(2)}
    loader = Loader(ShardIndex.load(index.folder), config.data, stop_step=1, **half)
    with pytest.raises(AssertionError, match="a label is looked up"):
        next(iter(loader))


def test_augmentation_changes_with_the_epoch(index: ShardIndex) -> None:
    config = configure(index, augment={"brightness": 0.5})
    seen: dict[str, list[torch.Tensor]] = {}
    for images, _, keys in load(loader_of(index, config, range(4), 0, 25)).values():
        for picture, key in zip(images, keys, strict=True):
            seen.setdefault(key, []).append(picture)
    repeated = [pictures for pictures in seen.values() if len(pictures) == 2]
    assert len(repeated) > 150
    assert sum(torch.equal(*pictures) for pictures in repeated) < 5


def test_the_global_random_state_is_left_alone(index: ShardIndex) -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    load(loader_of(index, configure(index, loader_workers=1), range(4), 0, 2))
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("limit", [1, 2])
def test_several_labels_come_with_their_samples(index: ShardIndex, limit: int) -> None:
    lists = [[number % 9, number % 4, number % 7] for number in range(200)]
    labels = write_labels(f"{index.folder}-labels", index, lists, CLASSES).folder
    damage(index, 1, 3, b"x" * 40, PNG_DATA)
    config = configure(index, labels=labels, labels_per_sample=limit, loader_workers=1)
    mixture = open_training_index(config.data, config.run.seed)
    replaced, shape = 0, (4,) if limit == 1 else (4, 2)
    whole = {}
    for batch in loader_of(mixture, config, range(4), 0, 14):
        whole |= {(batch.step, micro.index): micro for micro in batch.micro_batches}
    parts = [loader_of(mixture, config, range(n, n + 2), 0, 14) for n in (0, 2)]
    for batch in chain(*parts):
        assert batch.labels is not None
        for micro in batch.micro_batches:
            assert micro.labels.shape == shape and micro.labels.dtype == torch.int64
            assert torch.equal(micro.labels, whole[batch.step, micro.index].labels)
            for key, row in zip(micro.keys, micro.labels.view(4, -1).tolist(), strict=True):
                own = set(lists[int(key[1:])])
                shown = {label for label in row if label >= 0}
                assert shown <= own and len(shown) == min(limit, len(own))
            replaced += not torch.equal(batch.labels[micro.index], micro.labels)
    # The damaged sample comes in both epochs; its substitute has labels of its own.
    assert replaced == 2


def test_waiting_is_measured(index: ShardIndex) -> None:
    assert all(b.wait_s > 0 for b in loader_of(index, configure(index), range(4), 0, 2))


@pytest.mark.parametrize(
    ("data", "offset", "words"),
    [
        (b"\xff" * 40, PNG_DATA, "s030.png"),
        (b"\x00" * 512, 0, "0 samples where the index has one"),
        (b"\xee" * 512, 0, "not a sample of a tar"),
    ],
    ids=["pixels", "empty header", "broken header"],
)
def test_a_bad_sample_is_counted_named_and_replaced(
    index: ShardIndex, data: bytes, offset: int, words: str
) -> None:
    good = load(loader_of(index, configure(index), range(4), 0, 12))
    damage(index, 1, 7, data, offset)  # sample 30
    for workers in (0, 2):
        loader = loader_of(index, configure(index, loader_workers=workers), range(4), 0, 12)
        loaded = load(loader)
        assert loader.faults.seen == 12 * 16
        assert loader.faults.count == 1
        [(position, reason)] = loader.faults.samples.items()
        assert position == f"sample 7 of {index.url(1)}"
        assert words in reason
        changed = [
            (before, after)
            for at, (_, _, keys) in good.items()
            for before, after in zip(keys, loaded[at][2], strict=True)
            if before != after
        ]
        # Everything else is as it was; the substitute comes from the same window.
        assert [before for before, _ in changed] == ["s030"]


def test_the_substitute_is_the_same_for_everybody(index: ShardIndex) -> None:
    damage(index, 1, 7, b"\xff" * 40, PNG_DATA)
    whole = load(loader_of(index, configure(index, augment=AUGMENT), range(4), 0, 14))
    parts: Loaded = {}
    for micro in range(4):
        config = configure(index, augment=AUGMENT, loader_workers=2)
        parts |= load(loader_of(index, config, range(micro, micro + 1), 0, 14))
    assert_same(whole, dict(sorted(parts.items())))


def test_a_substitute_does_not_repeat_pixels(index: ShardIndex) -> None:
    damage(index, 1, 7, b"\xff" * 40, PNG_DATA)
    config = configure(index, augment={"brightness": 0.5})
    loader = loader_of(index, config, range(4), 0, 12)
    pictures: dict[str, list[torch.Tensor]] = {}
    for images, _, keys in load(loader).values():
        for picture, key in zip(images, keys, strict=True):
            pictures.setdefault(key, []).append(picture)
    assert loader.faults.count == 1
    [twice] = [found for found in pictures.values() if len(found) == 2]
    assert not torch.equal(*twice)


def test_a_bad_sample_ends_the_run_if_the_rule_says_so(index: ShardIndex) -> None:
    damage(index, 1, 7, b"\xff" * 40, PNG_DATA)
    with pytest.raises(RunError, match=r"sample 7 of .*part-000001.tar: s030.png: .*on_bad_sample"):
        load(loader_of(index, configure(index, on_bad_sample="fail"), range(4), 0, 14))


def test_too_many_bad_samples_end_the_run(index: ShardIndex) -> None:
    for number in range(3):
        damage(index, 1, number, b"\xff" * 40, PNG_DATA)
    load(loader_of(index, configure(index, max_bad_fraction=3 / 200), range(4), 0, 12))
    with pytest.raises(RunError, match=r"3 bad samples, more than data\.max_bad_fraction"):
        load(loader_of(index, configure(index, max_bad_fraction=2.9 / 200), range(4), 0, 13))


@pytest.mark.parametrize("label", [b"x", b"-1", b"10", b"5"])
def test_a_bad_label_is_a_bad_sample(index: ShardIndex, label: bytes) -> None:
    offsets = index.shards[0].offsets
    whole = int(offsets[5] - offsets[4])
    damage(index, 0, 4, label + b"\0" * (512 - len(label)), whole - 512)
    with open(index.url(0), "r+b") as tar:  # the size in the header of s004.cls
        _resize_member(tar, int(offsets[5]) - 1024, len(label))
    loader = loader_of(index, configure(index), range(4), 0, 13)
    load(loader)
    [reason] = loader.faults.samples.values()
    assert reason.startswith("s004.cls: ")


def _resize_member(tar: io.BufferedRandom, at: int, size: int) -> None:
    tar.seek(at)
    header = bytearray(tar.read(512))
    header[124:136] = f"{size:011o}\0".encode()
    header[148:156] = b" " * 8
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    tar.seek(at)
    tar.write(header)


def test_a_truncated_shard_is_noticed(index: ShardIndex) -> None:
    # webdataset itself ends silently there.
    with open(index.url(4), "r+b") as tar:
        tar.truncate(int(index.shards[4].offsets[55]) + 700)
    loader = loader_of(index, configure(index, shuffle_window=25), range(4), 0, 13)
    load(loader)
    assert sorted(loader.faults.samples) == [
        f"sample {number} of {index.url(4)}" for number in range(55, 60)
    ]
    assert all("too early" in reason for reason in loader.faults.samples.values())


@pytest.mark.parametrize("workers", [0, 2])
def test_a_missing_shard_is_no_bad_sample_but_a_failure(index: ShardIndex, workers: int) -> None:
    Path(index.url(4)).unlink()
    with pytest.raises(RunError, match=r"part-000004.tar: cannot be read"):
        load(loader_of(index, configure(index, loader_workers=workers), range(4), 0, 13))


def test_fewer_samples_than_streams_are_refused(index: ShardIndex) -> None:
    config = Config(data={"shards": "x", "streams": 256}, train={"global_batch": 256})
    with pytest.raises(UserError, match=r"data\.streams=256"):
        loader_of(index, config, range(2), 0, 1)


def test_plain_webdataset_decodes_the_same(index: ShardIndex) -> None:
    url = f"{index.folder}/part-{{000000..000006}}.tar"
    read = list(webdataset.WebDataset(url, shardshuffle=False).decode("pil"))
    assert [s["cls"] for s in read] == [number % CLASSES for number in range(200)]
    assert np.array_equal(np.asarray(read[99]["png"]), image(99))


def test_shards_behind_a_url(index: ShardIndex) -> None:
    with ShardWriter("memory://stream/set", "part") as writer:
        writer.write(sample(number) for number in range(200))
        remote = writer.finish(CLASSES)
    loaded = load(loader_of(remote, configure(remote), range(4), 0, 3))
    assert len(loaded) == 12
    assert read_in_order(remote, 3, 5, SIDE)[2] == ["s003", "s004"]
