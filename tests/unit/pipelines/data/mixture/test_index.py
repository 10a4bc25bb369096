"""What an epoch is made of: classes, images of a class, several sets; always the same number."""

from __future__ import annotations

import hashlib
import json
import tracemalloc
from collections import Counter
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mhe_dist.config.data import DataConfig
from mhe_dist.errors import UserError
from pipelines.data.mixture import dataset, drawn
from pipelines.data.mixture.class_list import find_other_name, names_in_run, read_classes
from pipelines.data.mixture.dataset import MixedDataset, draw_at_most
from pipelines.data.mixture.index import (
    Mixture,
    label_digests,
    open_training_index,
    samples_per_epoch,
)
from pipelines.data.order import SampleOrder
from pipelines.data.sample import BadSampleError
from pipelines.evaluate.classification import count_images
from pipelines.shards.index import ShardIndex
from pipelines.shards.label_set import NO_LABEL, LabelSet
from pipelines.shards.packing import pack_labels, pack_offsets
from pipelines.shards.shard import Shard
from tests.support.data.label_sets import write_labels
from tests.support.data.shard_sets import PACKED

CLASSES = 7
SHARDS = [[0, 1, 1, 2, 3], [], [3, 3, 3, 5, 5, 5, 5], [1, 6, 6, 0, 3, 2]]  # no image of class 4
ALL = [label for shard in SHARDS for label in shard]


def save(folder: Path, shards: list[list[int]] = SHARDS, labels: bool = True) -> str:
    """An index without tars."""
    described = [
        Shard(
            f"{number}.tar",
            len(row),
            512 * len(row),
            f"sha256:{hash(tuple(row)):x}",
            pack_offsets(range(0, 512 * len(row) + 1, 512)),
            pack_labels(row) if labels else "",
        )
        for number, row in enumerate(shards)
    ]
    folder.mkdir(exist_ok=True)
    ShardIndex(str(folder), CLASSES, described).save()
    rows = [f"{number}\t{ALL.count(number)}\tname {number}" for number in range(CLASSES)]
    (folder / "classes.tsv").write_text("\n".join(["class\tsamples\tname", *rows, ""]))
    return str(folder)


@pytest.fixture
def shards(tmp_path: Path) -> str:
    return save(tmp_path / "set")


def listed(folder: str, lines: str) -> str:
    path = Path(folder) / "list.tsv"
    path.write_text(lines)
    return str(path)


def opened(shards: str, **data: object) -> Mixture:
    found = open_training_index(DataConfig(shards=shards, **data), seed=5)
    assert isinstance(found, Mixture)
    return found


def epoch(found: Mixture, number: int) -> list[tuple[int, int]]:
    """(shard, sample in it) of an epoch."""
    chosen = found.draw(number)
    assert len(chosen) == len(found.shards)
    return [
        (shard, int(inside))
        for shard, numbers in enumerate(chosen)
        for inside in (range(found.shards[shard].samples) if numbers is None else numbers)
    ]


def labels(found: Mixture, number: int) -> list[int]:
    return sorted(found.entry(*sample).label for sample in epoch(found, number))


def test_without_a_choice_there_is_no_view(shards: str) -> None:
    found = open_training_index(DataConfig(shards=shards), seed=0)
    assert type(found) is ShardIndex
    assert samples_per_epoch(found) == len(ALL)


def test_relative_paths_of_data_sets_are_those_of_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names = [save(Path(name)) for name in ("one", "two")]
    found = opened(names[0], images_per_class=2, mix=[{"shards": names[1]}])
    expected = [str(tmp_path / name / f"{n}.tar") for name in names for n in range(len(SHARDS))]
    for index in (found, found.cut(0, len(expected))):  # a loader process has the latter
        assert [index.url(shard) for shard in range(len(expected))] == expected


@pytest.mark.parametrize("limit", [1, 2, 3, 100])
def test_at_most_so_many_images_of_a_class_drawn_anew(shards: str, limit: int) -> None:
    found = opened(shards, images_per_class=limit)
    wanted = sorted(Counter({c: min(n, limit) for c, n in Counter(ALL).items()}).elements())
    assert samples_per_epoch(found) == len(wanted)
    epochs = [epoch(found, number) for number in range(8)]
    assert all(labels(found, number) == wanted for number in range(8))
    assert all(len(set(drawn)) == len(drawn) for drawn in epochs)
    assert epochs == [epoch(found, number) for number in range(8)]
    distinct = {tuple(drawn) for drawn in epochs}
    assert len(distinct) == 1 if limit == 100 else len(distinct) > 4


@pytest.mark.parametrize(
    "lines",
    ["class\n6\n3\n", "name\nname 3\nname 6\n", "class\tsamples\tname\n3\t5\tx\n6\t2\ty"],
    ids=["ids", "names", "lines of the class map"],
)
def test_classes_of_a_list_are_numbered_by_their_ids(shards: str, lines: str) -> None:
    found = opened(shards, classes=listed(shards, lines))
    assert found.num_classes == 2
    assert labels(found, 0) == [0] * 5 + [1] * 2
    assert samples_per_epoch(found) == 7


def test_classes_of_a_run_have_the_names_of_those_that_were_chosen(shards: str) -> None:
    """Class 0 of a run of classes 3 and 6 was called by the name of class 0."""
    data = DataConfig(shards=shards, classes=listed(shards, "class\n6\n3\n"))
    assert names_in_run(data, range(2)) == {0: "name 3", 1: "name 6"}
    assert names_in_run(data, {1}) == {1: "name 6"}
    assert names_in_run(data, {0, 1, -1}) == {0: "name 3", 1: "name 6"}, "a head pads with -1"
    assert names_in_run(DataConfig(shards=shards), {6}) == {6: "name 6"}
    labels = labelled(shards, [[3]] * len(ALL))
    of_labels = data.model_copy(update={"labels": labels})
    assert names_in_run(of_labels, range(2)) == {0: "name 4", 1: "name 1"}
    mixed = data.model_copy(update={"mix": [data]})
    gone = data.model_copy(update={"classes": f"{shards}/nothing.tsv"})
    assert names_in_run(mixed, {0}) == names_in_run(gone, {0}) == {}


def test_sets_have_classes_of_their_own_and_come_as_often_as_they_weigh(
    shards: str, tmp_path: Path
) -> None:
    other = save(tmp_path / "other", [[0, 0, 2, 6], [1, 1]])
    mix = [{"shards": other, "weight": 2.5, "classes": listed(shards, "class\n0\n6\n")}]
    found = opened(shards, mix=mix)
    assert found.num_classes == CLASSES + 2
    for number in range(3):
        counts = Counter(labels(found, number))
        assert {c: counts[c] for c in range(CLASSES)} == {c: ALL.count(c) for c in range(CLASSES)}
        # 3 images of the other set are listed: twice all of them, and a half, rounded.
        assert 2 * 2 <= counts[CLASSES] <= 3 * 2
        assert 2 * 1 <= counts[CLASSES + 1] <= 3 * 1
        assert counts[CLASSES] + counts[CLASSES + 1] == 2 * 3 + 2
    assert {found.url(shard) for shard, _ in epoch(found, 0)} <= {
        f"{folder}/{n}.tar" for folder in (shards, other) for n in range(4)
    }


@settings(deadline=None, max_examples=30)
@given(st.data())
def test_an_order_shows_what_was_drawn_exactly_once(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    label = st.integers(0, CLASSES - 1)
    rows = data.draw(st.lists(st.lists(label, max_size=12), min_size=1, max_size=5).filter(any))
    folder = save(tmp_path_factory.mktemp("set"), rows)
    weight = data.draw(st.sampled_from([0.75, 1, 1.5, 3]))
    mix = [{"shards": folder, "weight": weight}] if data.draw(st.booleans()) else []
    chosen: dict[str, object] = {"mix": mix}
    if data.draw(st.booleans()):
        samples = sum(map(len, rows))
        lists = data.draw(st.lists(st.lists(label, max_size=1), min_size=samples, max_size=samples))
        lists[0] = [0]
        chosen["labels"] = write_labels(
            f"{folder}-labels", ShardIndex.load(folder), lists, CLASSES
        ).folder
    chosen["images_per_class"] = data.draw(st.integers(0 if len(chosen) > 1 or mix else 1, 4))
    found = opened(folder, **chosen)
    streams = data.draw(st.integers(1, min(6, samples_per_epoch(found))))
    window = data.draw(st.integers(1, 9))
    order = SampleOrder([s.samples for s in found.shards], streams, window, 1, found)
    for number in range(2):
        shown: list[tuple[int, int]] = []
        for stream in range(streams):
            length = order.stream_length(stream)
            for window_slice in order.window_slices(stream, number * length, (number + 1) * length):
                spans = order.spans(window_slice.window)
                inside = [(p.shard, i) for p in spans for i in range(p.start, p.stop)]
                permuted = order.permutation(window_slice.window)
                assert len(inside) == len(permuted)
                shown += [inside[i] for i in permuted[window_slice.start : window_slice.stop]]
        assert sorted(shown) == sorted(epoch(found, number))


def labelled(folder: str, lists: list[list[int]], name: str = "labels") -> str:
    """A label set of a data set of this module; its classes are called `name 7`, `name 6`, ..."""
    names = [f"name {CLASSES - number}" for number in range(CLASSES + 1)]
    index = ShardIndex.load(folder)
    return write_labels(f"{folder}-{name}", index, lists, CLASSES + 1, names).folder


def numbers_of(found: Mixture, number: int) -> list[int]:
    """Samples of an epoch by their numbers through the data set."""
    return [int(found.starts[shard]) + inside for shard, inside in epoch(found, number)]


@pytest.mark.parametrize("choice", [{}, {"images_per_class": 2}, {"classes": True}])
def test_a_label_set_that_says_what_the_tars_say_changes_nothing(
    shards: str, choice: dict[str, object]
) -> None:
    if choice.get("classes"):
        choice = {"classes": listed(shards, "class\n6\n3\n")}
    same = labelled(shards, [[label] for label in ALL])
    found = opened(shards, labels=same, **choice)
    plain = open_training_index(DataConfig(shards=shards, **choice), seed=5)
    order = [
        SampleOrder([s.samples for s in index.shards], 3, 4, 5, subset)
        for index, subset in ((found, found), (plain, plain if choice else None))
    ]
    for step in range(8):
        drawn = order[0].batch(step, 6)
        assert drawn == order[1].batch(step, 6)
        for shard, inside in drawn:
            expected = plain.shards[shard].label(inside) if not choice else None
            assert expected is None or found.entry(shard, inside).label == expected
            assert not choice or found.entry(shard, inside) == plain.entry(shard, inside)


def test_samples_without_a_class_are_in_no_epoch(shards: str) -> None:
    """Also where the tars' labels are not in the index: nobody asks for them."""
    save(Path(shards), labels=False)
    given = [[number % 3] if number % 4 else [] for number in range(len(ALL))]
    found = opened(shards, labels=labelled(shards, given))
    assert found.num_classes == CLASSES + 1
    assert samples_per_epoch(found) == sum(map(bool, given))
    assert numbers_of(found, 0) == [number for number, each in enumerate(given) if each]
    for shard, inside in epoch(found, 0):
        assert [found.entry(shard, inside).label] == given[int(found.starts[shard]) + inside]
    with pytest.raises(BadSampleError, match="gives it 0 classes"):
        found.entry(0, 0)


def test_classes_and_images_of_a_class_count_over_the_label_set(shards: str) -> None:
    given = [[], [7], [7], [7], [2], [2], [], [5], [5], [5], *([] for _ in ALL[10:])]
    labels_url = labelled(shards, given)
    found = opened(shards, labels=labels_url, images_per_class=2)
    assert labels(found, 0) == [2, 2, 5, 5, 7, 7]
    assert len({tuple(epoch(found, number)) for number in range(8)}) > 2
    named = listed(shards, "name\nname 0\nname 5\n")  # 7 and 2 in the label set
    found = opened(shards, labels=labels_url, classes=named)
    assert (found.num_classes, labels(found, 0)) == (2, [0, 0, 1, 1, 1])
    assert numbers_of(found, 0) == [1, 2, 3, 4, 5]
    with pytest.raises(UserError, match=r"'8' is no class of .*set-labels, which has 8 classes"):
        opened(shards, labels=labels_url, classes=listed(shards, "class\n8\n"))
    with pytest.raises(UserError, match="no image of it would be in an epoch"):
        opened(shards, labels=labels_url, classes=listed(shards, "class\n6\n"))


def test_each_set_of_a_mix_has_its_labels(shards: str, tmp_path: Path) -> None:
    other = save(tmp_path / "other", [[0, 0, 2, 6], [1, 1]])
    first = labelled(other, [[7], [], [0], [0], [], []])
    found = opened(shards, mix=[{"shards": other, "labels": first, "weight": 2}])
    assert found.num_classes == CLASSES + CLASSES + 1
    expected = [*ALL, *[CLASSES, CLASSES, CLASSES + 7] * 2]
    assert labels(found, 0) == sorted(expected)
    digest = label_digests(found)
    assert list(digest) == ["data.mix.0.labels"]
    second = labelled(other, [[7], [], [0], [0], [1], []], "again")
    again = opened(shards, mix=[{"shards": other, "labels": second, "weight": 2}])
    assert label_digests(again) != digest and again.digest != found.digest
    moved = labelled(other, [[7], [], [0], [0], [], []], "moved")
    again = opened(shards, mix=[{"shards": other, "labels": moved, "weight": 2}])
    assert label_digests(again) == digest and again.digest == found.digest
    assert label_digests(opened(shards, images_per_class=1)) == {}


SEVERAL = [[7, 0], [], [2], [5, 2, 7], [3, 3], *([number % 3, 3] for number in range(5, len(ALL)))]


def all_labels(found: Mixture, number: int) -> list[list[int]]:
    """The labels of the samples of an epoch, in the order of the shards."""
    table = found.labels_in_epoch(np.array(numbers_of(found, number)), number)
    assert table is not None and table.shape[1:] == found.label_shape
    return [[label for label in row if label >= 0] for row in table.tolist()]


def test_a_sample_shows_all_labels_that_there_is_room_for(shards: str) -> None:
    several = labelled(shards, SEVERAL)
    found = opened(shards, labels=several, labels_per_sample=9)
    assert (found.label_shape, found.draws_labels) == ((3,), True)
    assert samples_per_epoch(found) == len(ALL) - 1
    assert all_labels(found, 0) == [sorted(set(each)) for each in SEVERAL if each]
    found = opened(shards, labels=several, labels_per_sample=2)
    epochs = [all_labels(found, number) for number in range(9)]
    for epoch_labels in epochs:
        for shown, given_ids in zip(epoch_labels, filter(None, SEVERAL), strict=True):
            assert set(shown) <= set(given_ids)
            assert len(shown) == min(2, len(set(given_ids)))
    assert len({tuple(each[2]) for each in epochs}) == 3, "each pair of three is drawn"
    one = opened(shards, labels=several, labels_per_sample=1)
    assert one.label_shape == ()
    table = one.labels_in_epoch(np.arange(len(ALL)), 4)
    assert table is not None and table.shape == (len(ALL),)


def test_labels_of_classes_that_were_not_chosen_are_left_out(shards: str) -> None:
    several, classes = labelled(shards, SEVERAL), listed(shards, "class\n7\n2\n")
    found = opened(shards, labels=several, labels_per_sample=3, classes=classes)
    wanted = [sorted({[2, 7].index(n) for n in each if n in (2, 7)}) for each in SEVERAL]
    assert numbers_of(found, 0) == [n for n, each in enumerate(wanted) if each]
    assert all_labels(found, 0) == [each for each in wanted if each]
    assert [found.entry(0, n).label for n in (0, 2, 3)] == [1, 0, 0]
    with pytest.raises(BadSampleError, match="gives it 0 classes"):
        found.entry(0, 4)


@pytest.mark.parametrize("packed", [False, True])
def test_sets_with_one_and_with_several_labels_mix(
    shards: str, tmp_path: Path, packed: bool
) -> None:
    other = str(PACKED / "own") if packed else save(tmp_path / "other", [[0, 0, 2, 6], [1, 1]])
    classes = ShardIndex.load(other).num_classes
    several = labelled(shards, SEVERAL)
    mix = [{"shards": shards, "labels": several, "weight": 2}]
    found = opened(other, mix=mix, labels_per_sample=2)
    labels = all_labels(found, 0)
    own = ShardIndex.load(other)
    assert labels[: own.samples] == [[int(n)] for s in own.shards for n in s.labels]
    passes = [each for each in labels[own.samples :]]
    assert {n for each in passes for n in each} <= {n + classes for n in range(CLASSES + 1)}
    half = len(passes) // 2
    assert passes[:half] != passes[half:], "each pass draws for itself"


def test_images_of_a_class_are_counted_by_what_a_run_shows(shards: str, tmp_path: Path) -> None:
    one = labelled(shards, [[7], [], [2], *([number % 3] for number in range(3, len(ALL)))], "one")
    several, classes = labelled(shards, SEVERAL), listed(shards, "class\n7\n2\n")
    plain = [ALL.count(number) for number in range(CLASSES)]
    single = Counter(labels(opened(shards, labels=one), 0))
    lists = Counter(label for each in SEVERAL for label in set(each))
    mix = [{"shards": shards, "labels": url, "weight": 2} for url in (one, several)]
    found = opened(shards, mix=mix, labels_per_sample=1)
    wanted = plain + [each[number] for each in (single, lists) for number in range(CLASSES + 1)]
    assert count_images(found) is not None and count_images(found).tolist() == wanted
    chosen = opened(shards, labels=several, labels_per_sample=1, classes=classes)
    assert chosen.count_images().tolist() == [lists[2], lists[7]]
    classes = listed(shards, "class\n3\n4\n")
    assert opened(shards, classes=classes).count_images().tolist() == [ALL.count(3), 0]


@pytest.mark.parametrize("part", [1, 5])
def test_labels_that_are_read_in_parts_are_those_read_at_once(
    shards: str, tmp_path: Path, part: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = labelled(shards, [[7], [], [2], *([number % 3] for number in range(3, len(ALL)))], "one")
    several, classes = labelled(shards, SEVERAL), listed(shards, "class\n7\n2\n")
    choices: list[dict[str, object]] = [
        {"labels": several, "labels_per_sample": 2},
        {"labels": several, "labels_per_sample": 3, "classes": classes},
        {"labels": one},
        {"labels": one, "images_per_class": 2},
        {"labels": one, "classes": classes},
    ]

    def contents(folder: str) -> list[object]:
        monkeypatch.setenv("MHE_CACHE_DIR", str(tmp_path / folder))  # nothing is drawn before
        found = [opened(shards, **choice) for choice in choices]
        return [
            (epoch(each, 3), samples_per_epoch(each), each.count_images().tolist())
            for each in found
        ]

    whole = contents("whole")
    monkeypatch.setattr(dataset, "_PART", part)
    monkeypatch.setattr(drawn, "_CHUNK", part)
    assert contents("parts") == whole


def test_labels_that_a_run_cannot_learn_are_refused(shards: str, tmp_path: Path) -> None:
    two = labelled(shards, [[0, 1], *([1] for _ in ALL[1:])])
    refused = r"data.labels=.*a sample up to 2 classes; set data.labels_per_sample=2"
    with pytest.raises(UserError, match=refused):
        opened(shards, labels=two)
    refused = r"data.images_per_class=3 counts .*labels gives an image up to 2 classes"
    with pytest.raises(UserError, match=refused):
        opened(shards, labels=two, labels_per_sample=2, images_per_class=3)
    other = save(tmp_path / "other", [[0, 0, 2, 6], [1, 1]])
    with pytest.raises(UserError, match="made for the data set with digest"):
        opened(other, labels=two)
    with pytest.raises(UserError, match="no label set here"):
        opened(shards, labels=other)


def test_a_draw_favours_nobody() -> None:
    counts = Counter[int]()
    for seed in range(400):
        rng = np.random.Generator(np.random.Philox(key=seed))
        drawn = draw_at_most([5, 0, 2, 1], 2, rng)
        assert len(drawn) == 5
        counts.update(drawn.tolist())
    assert [counts[number] for number in (5, 6, 7)] == [400] * 3
    # 160 expected, standard deviation 9.8
    assert all(120 < counts[number] < 200 for number in range(5))


class _Words:
    """A source of given random words."""

    def __init__(self, words: np.ndarray) -> None:
        self.bit_generator, self.words = self, words

    def random_raw(self, count: int) -> np.ndarray:
        assert count == len(self.words)
        return self.words


@pytest.mark.parametrize("different", [1, 3, 1 << 32], ids=["all equal", "many equal", "distinct"])
def test_the_drawn_are_those_with_the_least_words_and_the_earlier_of_equals(different: int) -> None:
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 9, 50)
    words = rng.integers(0, different, counts.sum(), np.uint64) << np.uint64(32)
    for limit in (0, 1, 4, 100):
        expected, start = [], 0
        for count in counts:
            order = np.argsort(words[start : start + count], kind="stable")[:limit]
            expected += sorted((start + order).tolist())
            start += count
        assert draw_at_most(counts, limit, _Words(words)).tolist() == expected  # type: ignore[arg-type]


def test_the_digest_tells_choices_apart_and_not_where_they_lie(shards: str, tmp_path: Path) -> None:
    moved = save(tmp_path / "moved")
    ids, same = listed(shards, "class\n1\n2\n"), listed(moved, "name\nname 2\nname 1\n")
    assert opened(shards, classes=ids).digest == opened(moved, classes=same).digest
    digests = [
        opened(shards, classes=ids).digest,
        opened(shards, images_per_class=2).digest,
        opened(shards, images_per_class=3).digest,
        opened(shards, mix=[{"shards": moved}]).digest,
        opened(shards, mix=[{"shards": moved, "weight": 0.5}]).digest,
    ]
    assert len(set(digests)) == 5


def test_labels_of_a_mix_cannot_slip_into_the_next_set(tmp_path: Path) -> None:
    folder = save(tmp_path / "damaged", [[1, CLASSES, -1]])
    found = opened(folder, mix=[{"shards": folder}])
    assert found.entry(0, 0).label == 1
    assert found.entry(1, 0).label == CLASSES + 1
    for inside in (1, 2):
        with pytest.raises(BadSampleError, match=r"is not in \[0, 7\)"):
            found.entry(0, inside)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("3\n4\n", r"list.tsv:1: a list of classes begins with a line `class`"),
        ("class\n3\n7\n", r"list.tsv:3: '7' is no class of .*set, which has 7 classes"),
        ("class\nx\n", r"list.tsv:2: 'x' is no class"),
        ("name\nnobody\n", r"list.tsv:2: 'nobody' is no name"),
        ("class\n3\n1\n3\n", r"list.tsv:4: '3' stands in line 2 already"),
        ("class\n", r"list.tsv: no class is listed"),
        ("", r"list.tsv:1: a list"),
    ],
)
def test_a_list_that_is_none_is_refused(shards: str, lines: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_classes(listed(shards, lines), ShardIndex.load(shards))


MANY = 10_000


def many_classes(folder: Path, first: int = 0, name: str = "product {:012d}") -> str:
    """The names of many classes, of 20 letters each."""
    folder.mkdir()
    rows = "".join(f"{number}\t10\t{name.format(number)}\n" for number in range(first, MANY))
    (folder / "classes.tsv").write_text(f"class\tsamples\tname\n{rows}")
    return str(folder)


def peak_of(work: Callable[[], Any]) -> float:
    """Bytes of a class at the peak, while all of `MANY` are read."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1] / MANY
    finally:
        tracemalloc.stop()


def test_labels_of_a_sample_take_nothing_of_a_size_that_grows_with_the_chosen_classes(
    shards: str,
) -> None:
    """Every chosen class was read for each sample: 30 ms of a processor with 10^7 of them."""
    several = LabelSet.load(labelled(shards, SEVERAL))
    chosen = np.append([2, 7], np.arange(100, 100 + MANY))
    source = MixedDataset(ShardIndex.load(shards), several, 0, chosen, 0, "data")
    assert source.max_labels > 1
    numbers = np.arange(4)
    source.drawn_labels(numbers, 3, numbers, 0, 0)  # opens the columns
    assert peak_of(lambda: source.entry(0, 0)) < 1
    assert peak_of(lambda: source.drawn_labels(numbers, 3, numbers, 0, 0)) < 1
    assert source.entry(0, 0).label == 1


def test_images_without_a_class_take_no_room(shards: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a label set that gives few images a class; each of the others took 26 bytes."""
    labels = np.full(MANY * 10, NO_LABEL)
    labels[:7] = np.arange(7) % CLASSES
    parts = [(start, labels[start : start + MANY]) for start in range(0, len(labels), MANY)]
    monkeypatch.setattr(MixedDataset, "_parts", lambda self: iter(parts))
    few = LabelSet.load(labelled(shards, [[0]] * len(ALL)))
    source = MixedDataset(ShardIndex("set", CLASSES, []), few, 0, None, 2, "data")
    assert peak_of(source._count_classes) < 30  # three for each of the images read together
    classes, counts = source._count_classes()
    assert (classes.tolist(), counts.tolist()) == (list(range(CLASSES)), [1] * CLASSES)


def test_lists_and_names_of_very_many_classes_are_read_line_by_line(tmp_path: Path) -> None:
    """As lists of rows they took 700 bytes a class and rank, 70 GB for 10^8 of them."""
    folder = many_classes(tmp_path / "set")
    index = ShardIndex(folder, MANY, [])
    assert peak_of(lambda: read_classes(f"{folder}/classes.tsv", index)) < 40
    some = listed(str(tmp_path / "set"), "name\nproduct 000000000007\nproduct 000000000003\n")
    assert peak_of(lambda: read_classes(some, index)) < 10
    assert read_classes(some, index).tolist() == [3, 7]
    same = many_classes(tmp_path / "same", first=5)
    assert peak_of(lambda: find_other_name(folder, same)) < 10
    assert find_other_name(folder, same) is None
    other = many_classes(tmp_path / "other", first=MANY - 1, name="other {}")
    last = f"product {MANY - 1:012d}", f"other {MANY - 1}"
    assert find_other_name(folder, other) == (MANY - 1, *last)
    assert find_other_name(folder, str(tmp_path / "nowhere")) is None


def test_the_digest_of_very_many_chosen_classes_is_made_part_by_part(shards: str) -> None:
    chosen = opened(shards, classes=listed(shards, "class\n0\n1\n3\n"))
    (part,) = chosen.passes
    many = replace(part, source=replace(part.source, classes=np.arange(5 * MANY)))
    whole = [
        [part.source.index.digest, 0, classes, 1.0] for classes in (list(range(5 * MANY)), None)
    ]
    both = replace(chosen, passes=(many, replace(part, source=replace(part.source, classes=None))))
    expected = "sha256:" + hashlib.sha256(json.dumps(whole).encode()).hexdigest()
    assert both.digest == expected, "the digest that checkpoints hold"
    assert peak_of(lambda: replace(both).digest) < 100


def test_choices_that_cannot_be_made_are_refused(shards: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"missing.tsv: cannot be opened"):
        opened(shards, classes=str(tmp_path / "missing.tsv"))
    with pytest.raises(UserError, match="no image of it would be in an epoch"):
        opened(shards, classes=listed(shards, "class\n4\n"))
    with pytest.raises(UserError, match=r"no image of it .* weight=0\.01"):
        opened(shards, mix=[{"shards": shards, "weight": 0.01}])
    with pytest.raises(UserError, match=r"nowhere: no shards here"):
        opened(shards, mix=[{"shards": str(tmp_path / "nowhere")}])
    unlabelled = save(tmp_path / "unlabelled", labels=False)
    with pytest.raises(UserError, match=r"0.tar: the index does not hold its labels"):
        opened(unlabelled, images_per_class=1)


@pytest.mark.parametrize(("per_class", "bound"), [(0, 3), (2, 60)])
def test_a_rank_keeps_nothing_of_a_size_that_grows_with_the_classes(
    per_class: int, bound: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It kept 16 bytes for each class; of the images of a pass it needs their number alone."""
    labels = np.random.default_rng(0).integers(0, MANY, 900)
    parts = [(0, labels[:500]), (500, labels[500:])]
    monkeypatch.setattr(MixedDataset, "_parts", lambda self: iter(parts))
    chosen = np.arange(0, MANY, 2)
    source = MixedDataset(ShardIndex("set", MANY, []), None, 0, chosen, per_class, "data")
    assert peak_of(lambda: source.pass_samples) < bound
    counts = np.bincount(labels, minlength=MANY)[chosen]
    assert source.pass_samples == (np.minimum(counts, per_class) if per_class else counts).sum()
    kept = set(vars(source)) - {each.name for each in fields(MixedDataset)}
    assert kept == {"pass_samples"}
