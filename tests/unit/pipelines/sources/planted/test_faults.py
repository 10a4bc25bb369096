"""Planted faults: as many as asked for, and the same in any order of the data."""

from __future__ import annotations

import numpy as np
import pytest

from mhe_dist.errors import UserError
from pipelines.sources.planted.faults import FaultRates, PlannedFaults, plan_faults

CLASSES, EACH = 200, 10
KEYS = [f"image{number}" for number in range(CLASSES * EACH)]
TRUE = np.repeat(np.arange(CLASSES), EACH)
HELDOUT = [f"heldout{number}" for number in range(300)]
STRANGERS = [f"stranger{number}" for number in range(40)]


def plan(
    order: np.ndarray | None = None, seed: int = 1, rates: FaultRates | None = None
) -> PlannedFaults:
    order = np.arange(len(KEYS)) if order is None else order
    keys = [KEYS[number] for number in order]
    return plan_faults(TRUE[order], keys, CLASSES, HELDOUT, STRANGERS, seed, rates or FaultRates())


def test_there_are_as_many_faults_as_asked_for() -> None:
    found = plan()
    assert len(found.classes.split) == 10  # 5 % of 200
    assert found.classes.merged.shape == (5, 2)  # 5 % of 200, pairwise
    assert found.classes.num_classes == 200 + 10 - 5
    assert len(found.relabelled) == 200  # 10 % of 2,000
    assert len(found.leaked) == 3  # 1 % of 300
    assert len(found.foreign_labels) == 40
    assert not set(found.classes.split) & set(found.classes.merged.ravel())


def test_a_class_that_is_split_keeps_half_of_its_images_and_one_that_is_merged_gets_all() -> None:
    found = plan()
    sizes = np.bincount(found.honest, minlength=found.classes.num_classes)
    assert (sizes[found.classes.first[found.classes.split]] == EACH / 2).all()
    assert (sizes[found.classes.second[found.classes.split]] == EACH / 2).all()
    one, other = found.classes.merged.T
    assert (found.classes.first[one] == found.classes.first[other]).all()
    assert (sizes[found.classes.first[one]] == 2 * EACH).all()
    assert sizes.sum() == len(KEYS) and sizes.min() > 0


def test_an_image_that_is_relabelled_never_stays_in_what_is_its_own_class() -> None:
    found = plan(rates=FaultRates(relabelled=1.0))
    assert (found.labels != found.honest).all()
    halves = np.stack([found.classes.first[TRUE], found.classes.second[TRUE]])
    assert not (found.labels == halves).any()
    # Every other class is drawn, the lowest and the highest too.
    assert set(found.labels) == set(range(found.classes.num_classes))


def test_images_without_a_fault_keep_their_class() -> None:
    found = plan()
    kept = np.setdiff1d(np.arange(len(KEYS)), found.relabelled)
    assert (found.labels[kept] == found.honest[kept]).all()


def test_the_faults_are_keyed_and_do_not_depend_on_the_order_of_the_images() -> None:
    order = np.random.default_rng(0).permutation(len(KEYS))
    one, other = plan(), plan(order)
    assert np.array_equal(one.labels[order], other.labels)
    assert np.array_equal(np.sort(order[other.relabelled]), one.relabelled)
    assert not np.array_equal(plan(seed=2).labels, one.labels)


def test_names_tell_the_halves_of_a_class_apart() -> None:
    found = plan()
    names = found.classes.names([f"n{number}" for number in range(CLASSES)])
    split, (one, other) = int(found.classes.split[0]), found.classes.merged[0].tolist()
    assert names[found.classes.first[split]] == f"n{split}"
    assert names[found.classes.second[split]] == f"n{split} (2)"
    assert names[found.classes.first[other]] == f"n{one}"
    assert len(set(names)) == found.classes.num_classes and all(names)


def test_too_few_classes_for_the_rates_are_refused() -> None:
    with pytest.raises(UserError, match="plant fewer faults"):
        plan(rates=FaultRates(split=0.9, merged=0.9))
