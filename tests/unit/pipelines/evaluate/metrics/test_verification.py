"""The 1:1 protocol of docs/formats.md, against small cases by hand and a plain loop."""

import numpy as np
import pytest

from mhe_dist.errors import UserError
from pipelines.evaluate.metrics.verification import fold_slices, tar_at_far, ten_fold_accuracy

EXACT = 1e-12


def plain_folds(count):
    """scikit-learn's KFold without shuffling, by hand."""
    sizes = [count // 10 + (1 if fold < count % 10 else 0) for fold in range(10)]
    bounds = np.concatenate([[0], np.cumsum(sizes)])
    for fold in range(10):
        test = list(range(bounds[fold], bounds[fold + 1]))
        yield [i for i in range(count) if i not in set(test)], test


def plain_accuracy(distances, same):
    # Plain numbers: NumPy's own are slow in a loop.
    distances, same = distances.tolist(), same.tolist()
    thresholds, scores, chosen = np.arange(0, 4, 0.01).tolist(), [], []
    for train, test in plain_folds(len(same)):
        best, best_accuracy = None, -1.0
        for t in thresholds:
            right = sum((distances[i] < t) == same[i] for i in train) / len(train)
            if right > best_accuracy:
                best, best_accuracy = t, right
        chosen.append(best)
        scores.append(sum((distances[i] < best) == same[i] for i in test) / len(test))
    mean = sum(scores) / 10
    return mean, (sum((s - mean) ** 2 for s in scores) / 10) ** 0.5, chosen


def plain_tar(distances, same, target):
    thresholds = np.arange(0, 4, 0.001)
    tars, fars, chosen = [], [], []
    for train, test in plain_folds(len(same)):
        d, s = distances[train], same[train]
        roc_curve = [(d[~s] < t).sum() / (~s).sum() for t in thresholds]
        if roc_curve[-1] < target:
            t = 0.0
        else:
            i = next(i for i, far in enumerate(roc_curve) if far >= target)
            share = (target - roc_curve[i - 1]) / (roc_curve[i] - roc_curve[i - 1])
            t = thresholds[i - 1] + share * (thresholds[i] - thresholds[i - 1])
        d, s = distances[test], same[test]
        chosen.append(t)
        tars.append((d[s] < t).sum() / s.sum())
        fars.append((d[~s] < t).sum() / (~s).sum())
    return np.mean(tars), np.mean(fars), chosen


@pytest.fixture(params=[(0, 120), (1, 83), (2, 307)])
def case(request):
    seed, count = request.param
    rng = np.random.default_rng(seed)
    same = rng.random(count) < 0.5
    distances = np.clip(np.where(same, 1.2, 2.0) + 0.5 * rng.standard_normal(count), 0, 4)
    return distances, same


def test_accuracy_equals_a_plain_loop(case):
    mean, std, thresholds = plain_accuracy(*case)
    found = ten_fold_accuracy(*case)
    assert found.mean == pytest.approx(mean, abs=EXACT)
    assert found.std == pytest.approx(std, abs=EXACT)
    np.testing.assert_allclose(found.thresholds, thresholds, atol=EXACT)


@pytest.mark.parametrize("target", [1e-3, 1e-2, 0.1, 0.5])
def test_tar_equals_a_plain_loop(case, target):
    tar, far, thresholds = plain_tar(*case, target)
    found = tar_at_far(*case, target)
    np.testing.assert_allclose(found.thresholds, thresholds, atol=EXACT)
    assert (found.tar, found.far) == pytest.approx((tar, far), abs=EXACT)


def test_accuracy_equals_scikit_learns_folds(case):
    from sklearn.metrics import accuracy_score
    from sklearn.model_selection import KFold

    distances, same = case
    grid, scores = np.arange(0, 4, 0.01), []
    for train, test in KFold(10, shuffle=False).split(distances):
        right = (distances[train, None] < grid) == same[train, None]
        best = grid[np.argmax(right.mean(axis=0))]
        scores.append(accuracy_score(same[test], distances[test] < best))
    assert ten_fold_accuracy(distances, same).mean == pytest.approx(np.mean(scores), abs=EXACT)


def test_a_case_by_hand():
    """Nine folds are separated by any threshold above 0.5; the tenth has its pairs swapped."""
    distances = np.array([0.5, 3.0] * 9 + [3.0, 0.5])
    same = np.array([True, False] * 10)
    found = ten_fold_accuracy(distances, same)
    assert found.mean == pytest.approx(0.9, abs=EXACT)
    assert found.std == pytest.approx(0.3, abs=EXACT)
    # "same iff distance < t": 0.51 is the first that accepts 0.5.
    np.testing.assert_allclose(found.thresholds, 0.51, atol=EXACT)


def test_the_threshold_is_interpolated_between_the_neighbours_of_the_target():
    """Eighteen impostors to train on, at 1.0005 and so on, one per step of the grid."""
    distances = np.empty(40)
    same = np.arange(40) % 2 == 0
    distances[same] = 0.1
    distances[~same] = 1.0005 + 0.001 * np.arange(20)
    found = tar_at_far(distances, same, 0.25)
    # Last fold: trained on impostors 0..17; FAR reaches 4/18 at 1.004 and 5/18 at 1.005.
    assert found.thresholds[-1] == pytest.approx(1.004 + 0.001 * 0.5, abs=EXACT)
    # First fold: impostors 2..19, two steps later.
    assert found.thresholds[0] == pytest.approx(1.006 + 0.001 * 0.5, abs=EXACT)
    assert found.tar == 1.0


def test_a_target_that_no_threshold_reaches_accepts_nothing():
    distances = np.where(np.arange(40) % 2 == 0, 0.1, 3.9995)
    found = tar_at_far(distances, np.arange(40) % 2 == 0, 0.5)
    assert found.tar == 0.0
    assert not found.thresholds.any()


def test_a_pair_at_the_threshold_is_not_the_same():
    same = np.arange(40) % 2 == 0
    found = tar_at_far(np.where(same, 0.0, 1.0), same, 0.0)
    assert not found.thresholds.any()
    assert found.tar == 0.0


def test_folds_are_contiguous_and_the_first_are_longer():
    assert [(s.start, s.stop) for s in fold_slices(23)][:4] == [(0, 3), (3, 6), (6, 9), (9, 11)]
    assert fold_slices(23)[-1].stop == 23


def test_too_few_pairs_are_the_users_mistake():
    with pytest.raises(UserError, match="9 pairs are too few for 10 folds"):
        ten_fold_accuracy(np.zeros(9), np.zeros(9, bool))
    with pytest.raises(UserError, match="no same or no different"):
        tar_at_far(np.zeros(20), np.zeros(20, bool), 0.1)
