"""Rank-k and TAR at FAR over all pairs, against small cases by hand and plain loops."""

import math

import numpy as np
import pytest

from mhe_dist.errors import UserError
from pipelines.embedding.embeddings import normalize_embeddings
from pipelines.evaluate.metrics import gallery_search, identification, roc
from pipelines.evaluate.metrics.identification import (
    Identification,
    NormalizedRows,
    identify,
)
from pipelines.evaluate.metrics.roc import FARS, Roc
from pipelines.storage.worker_pool import Processes
from tests.support.data.rows import unit

EXACT = 1e-12


def plain_rank(probe, label, gallery, names):
    best = {}
    for row, name in zip(gallery, names, strict=True):
        best[name] = max(best.get(name, -2.0), float(probe @ row))
    if label not in best:
        return 0
    return sum(score >= best[label] - 1e-13 for score in best.values())


@pytest.fixture
def case():
    rng = np.random.default_rng(0)
    names = np.concatenate([rng.permutation(40), rng.integers(0, 40, 25)])  # some twice
    centres = rng.standard_normal((45, 12))
    labels = rng.integers(0, 45, 150)  # 40 to 44 are not enrolled
    gallery = unit(centres[names] + 0.6 * rng.standard_normal((65, 12)), float)
    probes = unit(centres[labels] + 0.9 * rng.standard_normal((150, 12)), float)
    return gallery, names, probes, labels


@pytest.fixture(params=[(1024, 4096), (40, 16), (1, 1)])
def found(request, case, monkeypatch):
    band, tile = request.param
    monkeypatch.setattr(identification, "BAND", band)
    monkeypatch.setattr(gallery_search, "BAND", band)
    monkeypatch.setattr(gallery_search, "_TILE", tile)
    return identify(*case, max_far=0.5)


def test_ranks_equal_a_plain_loop(case, found):
    gallery, names, probes, labels = case
    expected = [
        plain_rank(p, label, gallery, names) for p, label in zip(probes, labels, strict=True)
    ]
    assert found.ranks.tolist() == expected
    enrolled = np.array([r for r in expected if r])
    for k in (1, 3, 5):
        assert found.rank(k) == pytest.approx(np.mean(enrolled <= k), abs=EXACT)
    assert found.classes == 40
    assert found.chance(1) == 1 / 40
    assert 0.2 < found.rank(1) < 0.95


def test_tar_equals_a_plain_loop(case, found):
    gallery, names, probes, labels = case
    scores, own = probes @ gallery.T, labels[:, None] == names[None]
    impostors = np.sort(scores[~own])[::-1]
    assert found.roc.impostors == len(impostors)
    for far in (0.0, 1e-4, 1e-3, 1e-2, 0.1, 0.5):
        candidates = impostors[: int(far * len(impostors)) + 2]
        thresholds = [t for t in candidates if (scores[~own] > t).sum() <= far * len(impostors)]
        expected = np.mean(scores[own] > min(thresholds))
        assert found.roc.tar(far) == pytest.approx(expected, abs=EXACT)


def test_tar_equals_the_roc_of_scikit_learn_and_of_torchmetrics(case, found):
    import torch
    from sklearn.metrics import roc_curve
    from torchmetrics.functional.classification import binary_roc

    gallery, names, probes, labels = case
    scores, own = (probes @ gallery.T).ravel(), (labels[:, None] == names[None]).ravel()
    far, tar, _ = roc_curve(own, scores, drop_intermediate=False)
    unit_scores = torch.tensor((scores + 1) / 2)
    torch_far, torch_tar, _ = binary_roc(unit_scores, torch.tensor(own).long())
    for target in (1e-3, 1e-2, 0.1, 0.3):
        assert found.roc.tar(target) == pytest.approx(tar[far <= target].max(), abs=EXACT)
        reached = torch_tar[torch_far <= target].max().item()
        assert found.roc.tar(target) == pytest.approx(reached, abs=1e-6)  # float32 there


def test_the_curve_goes_through_what_is_reported(found):
    far, tar = found.roc.curve(0.1)
    assert (np.diff(far) > 0).all() and (np.diff(tar) >= 0).all()
    inside = [target for target in FARS if target >= 1 / found.roc.impostors]
    assert inside and [tar[far == target].item() for target in inside] == [
        found.roc.tar(target) for target in inside
    ]


def test_the_nearest_are_the_best_in_order(case, found):
    gallery, _, probes, _ = case
    scores = probes @ gallery.T
    expected = np.argsort(-scores, axis=1)[:, :5]
    np.testing.assert_array_equal(found.nearest, expected)
    np.testing.assert_allclose(found.scores, np.take_along_axis(scores, expected, 1), atol=EXACT)


def test_a_case_by_hand():
    gallery = np.eye(3)
    probes = unit(np.array([[3.0, 1, 0], [3, 2, 1], [0, 1, 2], [1, 0, 0]]), float)
    found = identify(gallery, np.array([10, 20, 30]), probes, np.array([10, 20, 20, 99]))
    assert found.ranks.tolist() == [1, 2, 2, 0]
    assert found.rank(1) == pytest.approx(1 / 3, abs=EXACT)
    assert found.rank(2) == 1.0
    assert found.roc.impostors == 9


def test_a_collapsed_model_identifies_nobody():
    """All embeddings equal: whatever a tie is worth, it must not look like success."""
    row = unit(np.random.default_rng(0).standard_normal((1, 64)), float)
    # A product gives equal rows scores that differ in their last bits; one shows at the edges.
    rows, classes = np.repeat(row, 101, 0), np.arange(101)
    found = identify(rows, classes, rows, classes)
    assert found.rank(1) == 0.0
    assert set(found.ranks) == {101}
    assert found.roc.tar(1e-2) == 0.0


def test_a_share_of_the_impostors_is_counted_in_whole_ones():
    """0.29 of 100 are 29, although 0.29 * 100 is less in binary."""
    scores = np.round(np.arange(99, -1, -1) / 100, 2)
    found = Roc(np.array([0.705]), 100, scores)
    assert scores[29] == 0.7
    assert found.tar(0.29) == 1.0
    assert found.tar(0.28) == 0.0


def test_the_nearest_point_of_the_roc_equals_that_of_scikit_learn(case, found):
    """As the reference of IJB reads it: the last of the flipped curve's nearest points."""
    from sklearn.metrics import roc_curve

    gallery, names, probes, labels = case
    scores, own = (probes @ gallery.T).ravel(), (labels[:, None] == names[None]).ravel()
    far, tar, _ = roc_curve(own, scores, drop_intermediate=False)
    far, tar = np.flipud(far), np.flipud(tar)
    for target in (0.0, 1e-6, 1.6e-4, 1e-3, 1e-2, 0.1, 0.23):
        at = int(np.argmin(np.abs(far - target)))
        assert found.roc.nearest_tar(target) == pytest.approx((tar[at], far[at]), abs=EXACT)


def test_the_nearest_point_by_hand():
    """Four impostors, two of them equal: FARs of 0, 1/4, 3/4 and 1 can be had, and no others."""
    found = Roc(np.array([0.95, 0.85, 0.75, 0.1]), 4, np.array([0.9, 0.8, 0.8, 0.2]))
    assert found.nearest_tar(0.0) == (0.25, 0.0)
    assert found.nearest_tar(0.2) == (0.5, 0.25)
    assert found.nearest_tar(0.5) == (0.75, 0.75)  # as near as 1/4: the larger one
    assert found.nearest_tar(1.0) == (1.0, 1.0)
    assert found.tar(0.5) == 0.5
    with pytest.raises(ValueError, match="beyond what was kept"):
        Roc(np.array([0.95]), 40, np.array([0.9, 0.8])).nearest_tar(0.5)


def test_open_set_identification_by_hand():
    """Strangers' best scores 0.9, 0.6: at FPIR 1/2 only what exceeds 0.6 counts, and 1st place."""
    ranks = np.array([1, 1, 1, 2, 0, 0])
    best = np.array([[0.95], [0.7], [0.5], [0.99], [0.9], [0.6]])
    none = Roc(np.empty(0), 0, np.empty(0))
    found = Identification(ranks, 3, none, np.zeros((6, 1), int), best)
    assert found.tpir(0.0) == 1 / 4
    assert found.tpir(0.5) == 2 / 4
    assert found.tpir(1.0) == 3 / 4
    assert math.isnan(Identification(ranks[:4], 3, none, none.genuine, best[:4]).tpir(0.5))


def test_an_fa_rate_beyond_what_was_kept_is_refused(case):
    found = identify(*case, max_far=0.01)
    with pytest.raises(ValueError, match="beyond what was kept"):
        found.roc.tar(0.02)
    assert found.roc.tar(1.0) == 1.0


def test_a_far_that_allows_as_many_as_were_kept_is_beyond_them():
    """Of 40 impostors two are kept: the threshold of one of them is known, that of two is not."""
    found = Roc(np.array([0.85]), 40, np.array([0.9, 0.8]))
    assert found.holds(1 / 40) and found.tar(1 / 40) == 1.0
    assert not found.holds(2 / 40) and found.holds(1.0)
    with pytest.raises(ValueError, match="beyond what was kept"):
        found.tar(2 / 40)


def test_memory_of_the_impostors_is_bounded(case):
    found = identify(*case, max_far=0.01)
    assert len(found.roc.highest) == math.floor(0.01 * found.roc.impostors) + 1


def test_nothing_to_compare_is_the_users_mistake(case):
    with pytest.raises(UserError, match="0 gallery entries, 150 probes"):
        identify(case[0][:0], case[1][:0], case[2], case[3])


def have_same_bits(one, other):
    """Whether two results are the same, bit for bit."""
    for name in ("ranks", "nearest", "scores"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name), name)
    np.testing.assert_array_equal(one.roc.highest, other.roc.highest)
    np.testing.assert_array_equal(np.sort(one.roc.genuine), np.sort(other.roc.genuine))
    return one.classes == other.classes and one.roc.impostors == other.roc.impostors


@pytest.fixture(scope="module")
def many():
    """2,500 probes, three bands, of 700 classes, half of them enrolled."""
    rng = np.random.default_rng(1)
    centres, labels = rng.standard_normal((700, 16)), rng.integers(0, 700, 2500)
    names = rng.permutation(np.repeat(np.arange(350), 3))
    rows = [centres[each] + 0.7 * rng.standard_normal((len(each), 16)) for each in (names, labels)]
    return unit(rows[0], float), names, unit(rows[1], float), labels


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2, 3])
def test_workers_and_files_change_no_bit(many, count, tmp_path):
    here = identify(*many)
    assert have_same_bits(here, identify(*many, workers=Processes(count), folder=str(tmp_path)))


def test_a_comparison_goes_on_where_it_was_broken_off(many, tmp_path, monkeypatch):
    made, compare = [], gallery_search.compare_band

    def broken_off(task):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(task.first)
        return compare(task)

    whole = identify(*many)
    monkeypatch.setattr(identification, "compare_band", broken_off)
    with pytest.raises(KeyboardInterrupt):
        identify(*many, folder=str(tmp_path))
    made[:0] = [-1]
    assert have_same_bits(whole, identify(*many, folder=str(tmp_path)))
    assert made == [-1, 0, 1024, 2048]
    monkeypatch.undo()
    other = (many[0], many[1], many[2][::-1].copy(), many[3])
    assert have_same_bits(identify(*other), identify(*other, folder=str(tmp_path)))


@pytest.mark.parametrize("misleading", [False, True])
def test_of_many_pairs_only_the_highest_are_kept_and_none_is_missed(many, misleading, monkeypatch):
    whole = identify(*many, max_far=1e-3)
    monkeypatch.setattr(roc, "SAMPLED", 1 << 14)
    bounds, bound = [], roc.sampled_bound

    def noted(*given):
        bounds.append(0.999 if misleading and not bounds else bound(*given))
        return bounds[-1]

    monkeypatch.setattr(identification, "sampled_bound", noted)
    assert have_same_bits(whole, identify(*many, max_far=1e-3))
    assert len(bounds) == 1 + misleading and bounds[-1] > 0
    monkeypatch.setattr(identification, "KEPT", 50)
    kept = identify(*many).roc
    np.testing.assert_array_equal(kept.highest, whole.roc.highest[:50])
    assert kept.holds(1e-5) and not kept.holds(1e-4)
    far, tar = kept.curve(0.1)
    assert far[-1] == 49 / kept.impostors and np.isfinite(tar).all()


def test_rows_are_scaled_when_they_are_read(case, tmp_path):
    gallery, names, probes, labels = case
    rows = np.concatenate([3 * gallery, 5 * probes]).astype(np.float32)
    unscaled = [
        NormalizedRows(rows, np.arange(len(gallery))),
        NormalizedRows(rows, len(gallery) + np.arange(len(probes))),
    ]
    scaled = normalize_embeddings(rows)
    expected = identify(scaled[: len(gallery)], names, scaled[len(gallery) :], labels)
    found = identify(unscaled[0], names, unscaled[1], labels, folder=str(tmp_path))
    assert have_same_bits(expected, found)
