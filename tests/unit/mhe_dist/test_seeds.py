"""Draws are functions of (seed, purpose, ids): stable, independent and of the right law."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from mhe_dist import noise, seeds


def test_derive_is_the_same_for_ever() -> None:
    assert seeds.derive(0, "dropout") == 6289530383798674994
    assert seeds.derive(7, "extra heads", 3, 10**9) == 6102632844045027356


def test_derive_tells_every_part_apart_and_fits_63_bits() -> None:
    parts = [(0, "a"), (1, "a"), (0, "b"), (0, "a", 0), (0, "a", 1), (0, "a", 0, 1), (0, "a", 1, 0)]
    keys = [seeds.derive(*part) for part in parts]  # type: ignore[arg-type]
    assert len(set(keys)) == len(keys)
    assert all(0 <= key < 2**63 for key in keys)


def test_derive_takes_numpy_integers_for_what_they_are() -> None:
    assert seeds.derive(1, "a", np.int64(5)) == seeds.derive(1, "a", 5)  # type: ignore[arg-type]


def test_mix64_makes_the_published_sequence_of_splitmix64() -> None:
    """That of the seed 1234567, in NumPy and in torch."""
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    states = [(1234567 + step * seeds.GOLDEN) % 2**64 for step in (1, 2, 3)]
    assert seeds.mix64(np.array(states, np.uint64)).tolist() == expected
    mixed = noise._mix(torch.tensor([seeds.signed(state, 64) for state in states]))
    assert mixed.numpy().view(np.uint64).tolist() == expected


@pytest.mark.parametrize("bits", [32, 64])
def test_signed_wraps_around(bits: int) -> None:
    top = 1 << (bits - 1)
    words = (0, 1, top - 1, top, 2 * top - 1, 2 * top, 2 * top + 5)
    assert [seeds.signed(word, bits) for word in words] == [0, 1, top - 1, -top, -1, 0, 5]


def test_generator_repeats_and_differs_by_id() -> None:
    first, again, other = (seeds.generator(1, "order", i).random(8) for i in (3, 3, 4))
    assert (first == again).all()
    assert not np.isin(first, other).any()


def test_seed_torch_repeats_whatever_was_drawn_before() -> None:
    seeds.seed_torch(1, "dropout", 5)
    first = torch.rand(4)
    torch.rand(100)
    seeds.seed_torch(1, "dropout", 5)
    assert torch.equal(torch.rand(4), first)


@pytest.mark.parametrize("population, count", [(0, 0), (5, 0), (5, 5), (10, 3), (1000, 400)])
def test_a_sample_is_sorted_distinct_and_inside(population: int, count: int) -> None:
    for draw in range(20):
        got = seeds.sample_without_replacement(population, count, seeds.generator(0, "t", draw))
        assert got.dtype == np.int64
        assert got.shape == (count,)
        assert (np.diff(got) > 0).all()
        assert ((got >= 0) & (got < population)).all()


def test_a_small_sample_of_a_huge_population_costs_little() -> None:
    got = seeds.sample_without_replacement(10**15, 1000, seeds.generator(0, "t"))
    assert len(np.unique(got)) == 1000
    assert got.max() > 9 * 10**14


@pytest.mark.parametrize("population, count", [(5, 2), (10, 2)])
def test_every_subset_is_equally_likely(population: int, count: int) -> None:
    rng = seeds.generator(0, "subsets")
    draws = [
        tuple(seeds.sample_without_replacement(population, count, rng).tolist())
        for _ in range(4000)
    ]
    found = np.unique(np.array(draws), axis=0, return_counts=True)[1]
    assert len(found) == math.comb(population, count)
    assert stats.chisquare(found).pvalue > 1e-4


def test_more_than_there_are_is_refused() -> None:
    with pytest.raises(ValueError, match="6 of 5"):
        seeds.sample_without_replacement(5, 6, seeds.generator(0, "t"))


@pytest.mark.parametrize("population", [3, 500, 32_000, 32_001, 10**9])
def test_first_positions_are_those_of_a_sort(population: int) -> None:
    drawn = np.random.default_rng(population).integers(0, population, 1000)
    expected = np.sort(np.unique(drawn, return_index=True)[1])
    assert np.array_equal(seeds._first_positions(drawn, population), expected)
