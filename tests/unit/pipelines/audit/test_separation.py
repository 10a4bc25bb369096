"""Faults are told from what is right: how many they are, how certain each one is."""

from __future__ import annotations

import numpy as np
import pytest

from pipelines.audit.separation import part_in_two, separate


def drawn(seed: int, right: int, faults: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What is observed, which of it is a fault, and faults that were made."""
    rng = np.random.default_rng(seed)
    observed = np.concatenate([rng.normal(-0.5, 0.1, right), rng.normal(0.4, 0.15, faults)])
    return observed, np.arange(right + faults) >= right, rng.normal(0.4, 0.15, 3000)


@pytest.mark.parametrize("faults", [500, 100])
def test_the_share_of_faults_is_estimated_and_they_are_found(faults: int) -> None:
    observed, is_fault, made = drawn(0, 5000, faults)
    found = separate(observed, [made], 0.01)
    assert found.shares[0] == pytest.approx(faults / (5000 + faults), rel=0.1)
    accused = observed >= found.threshold
    assert is_fault[accused].mean() >= 0.98
    assert accused[is_fault].mean() >= 0.95
    assert found.examined == len(observed)


def test_nothing_is_accused_where_nothing_is_wrong() -> None:
    for seed in range(5):
        observed, _, made = drawn(seed, 5000, 0)
        assert (observed >= separate(observed, [made], 0.01).threshold).mean() < 0.001


def test_probabilities_are_those_of_bayes() -> None:
    rng = np.random.default_rng(1)
    right, faults = rng.exponential(0.2, 40_000), rng.normal(0.8, 0.2, 10_000)
    found = separate(np.concatenate([right, faults]), [rng.normal(0.8, 0.2, 20_000)], 0.05)
    for value in (0.3, 0.5, 0.7, 0.9, 1.1):
        density = 0.2 * np.exp(-((value - 0.8) ** 2) / 0.08) / np.sqrt(0.08 * np.pi)
        exact = density / (density + 0.8 * np.exp(-value / 0.2) / 0.2)
        assert found.probability(np.array([value]))[0, 0] == pytest.approx(exact, abs=0.06)


def test_a_lower_false_rate_accuses_fewer_of_those_that_are_right() -> None:
    rng = np.random.default_rng(2)
    observed = np.concatenate([rng.normal(0, 0.2, 20_000), rng.normal(0.8, 0.2, 2000)])
    made = rng.normal(0.8, 0.2, 5000)
    strict, loose = (separate(observed, [made], rate) for rate in (0.0002, 0.01))
    assert loose.threshold < strict.threshold
    for found, rate in ((strict, 0.0002), (loose, 0.01)):
        accused = np.arange(22_000)[observed >= found.threshold]
        assert (accused < 20_000).sum() <= 1.5 * rate * 20_000
        assert found.expected_false <= min(rate * len(observed), 0.05 * len(accused))


def test_what_could_not_be_examined_is_left_out() -> None:
    observed, _, made = drawn(3, 1000, 200)
    holes = np.concatenate([observed, [np.nan] * 100])
    assert separate(holes, [made], 0.01).threshold == separate(observed, [made], 0.01).threshold
    found = separate(holes, [made], 0.01)
    assert found.probability(np.array([np.nan, -9.0, 9.0]))[0].tolist() == [0, 0, 1]


@pytest.mark.parametrize("observed", [[], [0.3], [np.nan, np.nan], [0.5] * 20])
def test_too_little_to_see_accuses_nothing(observed: list[float]) -> None:
    found = separate(np.array(observed), [np.array([0.5, 0.6])], 0.01)
    assert not (np.array(observed) >= found.threshold).any()
    assert separate(np.linspace(0, 1, 9), [np.empty(0)], 0.01).threshold == np.inf


def test_two_kinds_of_fault_are_told_apart() -> None:
    rng = np.random.default_rng(4)
    high, low = rng.normal(0.8, 0.1, 5000), rng.normal(0.4, 0.1, 5000)
    observed = np.concatenate([rng.normal(0.8, 0.1, 900), rng.normal(0.4, 0.1, 100)])
    found = part_in_two(observed, high, low, 0.03)
    assert found.shares[0] == pytest.approx(0.9, abs=0.02)
    chance = found.probability(observed)[0]
    assert (chance[:900] >= 0.5).mean() > 0.97 and (chance[900:] < 0.5).mean() > 0.9
    taken = observed >= found.threshold
    assert taken[:900].mean() > 0.95 and (~taken[:900]).sum() < 50
    assert taken[900:].sum() <= 0.06 * taken.sum() and found.expected_false <= 0.03 * taken.sum()
