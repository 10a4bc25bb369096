"""What is said of label sets: counts, and what differs between two of them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mhe_dist.errors import UserError
from pipelines.shards import label_report
from pipelines.shards.index import ShardIndex
from pipelines.shards.label_report import ChangedSample, compare_labels, largest, summarize_labels
from pipelines.shards.shard import Shard
from tests.support.data.label_sets import write_labels

NAMES = (["a", "b", "c"], ["c", "d", "a", "b"])


def index_of(samples: int) -> ShardIndex:
    return ShardIndex("nowhere", 1, [Shard("a.tar", samples, 0, "")])


@settings(deadline=None, max_examples=12)
@given(st.data())
def test_changes_are_those_of_sets_of_names(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    samples = data.draw(st.integers(0, 12))
    folder = tmp_path_factory.mktemp("sets")
    given_lists = []
    sets = []
    for number, names in enumerate(NAMES):
        one = st.lists(st.sampled_from(range(len(names))), max_size=3, unique=True)
        lists = data.draw(st.lists(one, min_size=samples, max_size=samples))
        target = f"{folder}/{number}"
        sets.append(write_labels(target, index_of(samples), lists, len(names), names))
        given_lists.append([[names[label] for label in each] for each in lists])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(label_report, "PART", 5)
        found = compare_labels(*sets, 3)
        summary = summarize_labels(sets[0])
    pairs = list(zip(*given_lists, strict=True))
    differing = [n for n, (a, b) in enumerate(pairs) if set(a) != set(b)]
    assert found.same == samples - len(differing)
    assert found.removed == sum(bool(a) and not b for a, b in pairs)
    assert found.added == sum(bool(b) and not a for a, b in pairs)
    assert found.changed == len(differing) - found.removed - found.added
    assert found.first == [ChangedSample(n, *pairs[n]) for n in differing[:3]]
    assert found.classes == ["a", "b", "c", "d"]
    for counts, this, that in ((found.lost, 0, 1), (found.gained, 1, 0)):
        expected = Counter(name for pair in pairs for name in set(pair[this]) - set(pair[that]))
        assert counts.tolist() == [expected[name] for name in found.classes]
    sizes = Counter(len(a) for a, _ in pairs)
    assert summary.samples_by_count.tolist() == [sizes[n] for n in range(sets[0].max_labels + 1)]
    assert summary.per_class.tolist() == [sum(n in a for a, _ in pairs) for n in NAMES[0]]


def test_sets_of_different_data_are_not_compared(tmp_path: Path) -> None:
    sets = [write_labels(f"{tmp_path}/{n}", index_of(n), [[0]] * n, 1) for n in (1, 2)]
    with pytest.raises(UserError, match="belong to different data sets"):
        compare_labels(*sets)


def test_a_table_of_other_classes_is_refused(tmp_path: Path) -> None:
    found = write_labels(f"{tmp_path}/set", index_of(1), [[1]], 2, ["x", "x"])
    with pytest.raises(UserError, match=r"classes\.tsv: not the table of its 2 classes"):
        compare_labels(found, found)
    Path(found.folder, "classes.tsv").unlink()
    with pytest.raises(UserError, match=r"classes\.tsv: cannot be read"):
        compare_labels(found, found)


def test_the_largest_come_first() -> None:
    assert largest([2, 0, 5, 5, 1], 3) == [2, 3, 0]
    assert largest([0, 0], 3) == largest([], 3) == []
