"""A class has one place, a place has one class, and no table says which."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from mhe_dist.bank.class_layout import LabelLayout, balanced_lengths, compose, digits

keys = st.integers(0, 2**63 - 1)
quick = settings(max_examples=60, deadline=None)


@quick
@given(st.integers(1, 3000), st.integers(1, 200), keys)
def test_every_class_has_a_place_of_its_own(num_classes: int, length: int, key: int) -> None:
    layout = LabelLayout(num_classes, length, 4, key)
    labels = torch.arange(num_classes)
    heads, slots = layout.locate(labels)
    assert layout.heads == math.ceil(num_classes / length)
    assert ((heads >= 0) & (heads < layout.heads) & (slots >= 0) & (slots < length)).all()
    assert torch.equal((heads * length + slots).sort().values, labels)
    assert torch.equal(layout.classes(heads, slots), labels)


@quick
@given(st.integers(1, 3000), st.integers(1, 200), keys)
def test_every_place_has_its_class_or_is_padding(num_classes: int, length: int, key: int) -> None:
    layout = LabelLayout(num_classes, length, 4, key)
    heads = torch.arange(layout.heads)[:, None]
    labels = layout.classes(heads, torch.arange(length))
    assert labels.shape == (layout.heads, length)
    assert (labels[:-1] >= 0).all()
    padding = layout.heads * length - num_classes
    assert (labels == -1).sum() == padding
    assert (labels[-1, length - padding :] == -1).all()
    assert torch.equal(labels[labels >= 0].sort().values, torch.arange(num_classes))


@quick
@given(st.integers(1, 10**9), st.integers(1, 10**4), keys, st.integers(0, 2**31))
def test_the_way_there_and_back_at_any_size(
    num_classes: int, length: int, key: int, seed: int
) -> None:
    layout = LabelLayout(num_classes, length, 8, key)
    rng = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, num_classes, (500,), generator=rng)
    labels[:2] = torch.tensor([0, num_classes - 1])
    heads, slots = layout.locate(labels)
    position = heads * length + slots
    assert ((position >= 0) & (position < num_classes)).all()
    assert torch.equal(layout.classes(heads, slots), labels)
    assert len(position.unique()) == len(labels.unique())
    again = layout.locate(layout.classes(position // length, position % length))
    assert torch.equal(again[0] * length + again[1], position)


@pytest.mark.parametrize("num_classes", [2**61, 2**62 - 57])
def test_sizes_far_beyond_any_use(num_classes: int) -> None:
    layout = LabelLayout(num_classes, 100, 8, 5)
    labels = torch.tensor([0, 1, 2, num_classes - 1])
    assert torch.equal(layout.classes(*layout.locate(labels)), labels)


def test_the_permutation_is_the_same_for_ever() -> None:
    heads, slots = LabelLayout(10**9, 100, 8, 1).locate(torch.tensor([0, 1, 10**9 - 1]))
    assert (heads.tolist(), slots.tolist()) == ([7238463, 2827692, 5091705], [2, 33, 78])


def test_what_is_no_class_has_no_place() -> None:
    layout = LabelLayout(10, 4, 2, 3)
    heads, slots = layout.locate(torch.tensor([-1, -100, 10, 12, 2**62, 9]))
    assert heads.tolist()[:5] == [-1] * 5
    assert slots.tolist()[:5] == [-1] * 5
    assert heads[5] >= 0


def test_what_is_no_place_has_no_class() -> None:
    layout = LabelLayout(10, 4, 2, 3)
    heads = torch.tensor([-1, 0, 0, 3, 2, 2, 100])
    slots = torch.tensor([0, -1, 4, 0, 2, 3, 0])
    assert (layout.classes(heads, slots) == -1).all()
    assert layout.classes(torch.tensor(2), torch.tensor(1)) >= 0


def test_nothing_is_asked_of_no_labels() -> None:
    layout = LabelLayout(10, 4, 2, 3)
    none = torch.empty(0, dtype=torch.int64)
    assert layout.locate(none)[0].shape == (0,)
    assert layout.classes(none, none).shape == (0,)


def test_the_arguments_are_left_alone() -> None:
    layout = LabelLayout(100, 4, 2, 3)
    labels = torch.arange(100)
    heads, slots = layout.locate(labels)
    kept = heads.clone(), slots.clone()
    layout.classes(heads, slots)
    assert torch.equal(labels, torch.arange(100))
    assert torch.equal(heads, kept[0])
    assert torch.equal(slots, kept[1])


@pytest.mark.parametrize("num_classes", [1000, 10**9])
def test_keys_give_unrelated_permutations(num_classes: int) -> None:
    labels = torch.arange(1000)
    places = [LabelLayout(num_classes, 1, 1, key).locate(labels)[0] for key in range(20)]
    agreeing = sum(
        int((one == two).sum()) for one, two in itertools.combinations([labels, *places], 2)
    )
    expected = 210 * 1000 / num_classes
    assert stats.poisson.sf(agreeing - 1, expected) > 1e-4
    assert stats.poisson.cdf(agreeing, expected) > 1e-4


@pytest.mark.parametrize("num_classes, length", [(10**5, 1000), (10**9, 10**7), (99_991, 333)])
def test_heads_are_a_uniform_sample_of_the_classes(num_classes: int, length: int) -> None:
    """Consecutive labels, and labels of one residue, spread evenly over the heads."""
    layout = LabelLayout(num_classes, length, 4, 12345)
    heads = num_classes // length  # whole ones
    for labels in (torch.arange(20_000), torch.arange(20_000) * (num_classes // 20_000)):
        head, _ = layout.locate(labels)
        found = torch.bincount(head[head < heads], minlength=heads)
        assert stats.chisquare(found.numpy()).pvalue > 1e-4
        assert stats.chisquare(found.numpy()).pvalue < 1 - 1e-9


def test_neighbours_fall_into_unrelated_heads() -> None:
    head, _ = LabelLayout(10**6, 10**5, 4, 7).locate(torch.arange(50_001))
    pairs = torch.bincount(head[:-1] * 10 + head[1:], minlength=100)
    assert stats.chisquare(pairs.numpy()).pvalue > 1e-4


@quick
@given(st.integers(1, 500), st.integers(1, 64))
def test_group_of_inverts_group_heads(heads: int, groups: int) -> None:
    layout = LabelLayout(heads * 3, 3, groups, 0)
    cut = [layout.group_heads(group) for group in range(groups)]
    assert [head for piece in cut for head in piece] == list(range(heads))
    assert max(map(len, cut)) - min(map(len, cut)) <= 1
    expected = [group for group, piece in enumerate(cut) for _ in piece]
    assert layout.group_of(torch.arange(heads)).tolist() == expected
    assert layout.group_of(torch.tensor([-1])).tolist() == [-1]


def test_a_layout_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="must be positive"):
        LabelLayout(0, 10, 1, 0)


def test_digits_by_hand() -> None:
    assert digits(torch.tensor([0, 23, -1]), [3, 2, 4]).tolist() == [
        [0, 0, 0],
        [2, 1, 3],
        [-1, -1, -1],
    ]
    assert compose(torch.tensor([[2, 1, 3], [1, -1, 0]]), [3, 2, 4]).tolist() == [23, -1]


@quick
@given(st.lists(st.integers(1, 2000), min_size=1, max_size=5), st.integers(0, 2**31))
def test_compose_inverts_digits(lengths: list[int], seed: int) -> None:
    total = math.prod(lengths)
    rng = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, total, (20, 2), generator=rng)
    found = digits(labels, lengths)
    assert found.shape == (20, 2, len(lengths))
    assert ((found >= 0) & (found < torch.tensor(lengths))).all()
    assert torch.equal(compose(found, lengths), labels)


@quick
@given(st.integers(1, 10**12), st.integers(1, 4))
def test_balanced_lengths_are_balanced_and_tight(num_classes: int, levels: int) -> None:
    lengths = balanced_lengths(num_classes, levels)
    assert len(lengths) == levels
    assert math.prod(lengths) >= num_classes
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] - lengths[-1] <= 1
    one_less = sorted(lengths)
    one_less[-1] -= 1  # the next smaller balanced choice
    assert math.prod(one_less) < num_classes or num_classes == 1


def test_balanced_lengths_of_known_sizes() -> None:
    assert balanced_lengths(85_742, 2) == [293, 293]
    assert balanced_lengths(10**9, 3) == [1000, 1000, 1000]
    assert balanced_lengths(990, 2) == [32, 31]
    assert balanced_lengths(1, 2) == [1, 1]
