"""A whole audit of planted faults: what is found, and that it does not depend on how it was run."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from mhe_dist.errors import UserError
from pipelines.audit.cure import cure_labels
from pipelines.audit.evaluation_sets import EvaluationSet
from pipelines.audit.findings import Findings
from pipelines.audit.images.scores import ImageScores
from pipelines.audit.job import AuditJob
from pipelines.audit.record import SampleNames, list_figures, list_findings
from pipelines.audit.settings import AuditSettings
from pipelines.clustering.rows import UnitRows
from pipelines.shards.index import ShardIndex
from tests.support import tiny
from tests.support.data.rows import unit

CLASSES, IMAGES, DIM = 200, 12, 32
SPLIT, MERGED, RELABELLED, FOREIGN = 10, 12, 200, 40
REPEATED = 30  # times that the images are there where there shall be many


class Planted(NamedTuple):
    """Embeddings of a data set, and labels with faults."""

    index: ShardIndex
    rows: np.ndarray
    labels: np.ndarray
    before: np.ndarray
    relabelled: np.ndarray
    foreign: np.ndarray


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    """A class is a direction with noise; one image in 50 is far from it."""
    shards = tiny.write_shards(tmp_path_factory.mktemp("data") / "shards", CLASSES)
    index = ShardIndex.load(shards)
    labels = index.labels_of(np.arange(index.samples))
    assert labels is not None
    rng = np.random.default_rng(0)
    noise = np.where(rng.random(len(labels)) < 0.02, 2.0, 0.8)[:, None]
    rows = unit(rng.normal(size=(CLASSES, DIM)))[labels]
    rows = unit(rows + noise * rng.normal(size=rows.shape) / DIM**0.5)
    none = np.empty(0, np.int64)
    return Planted(index, rows, labels.astype(np.int32), labels, none, none)


@pytest.fixture(scope="module")
def dirty(clean: Planted) -> Planted:
    """5 % of classes cut in two, 5 % put together, 8 % of the images relabelled, 2 % of none."""
    rng, labels, rows = np.random.default_rng(1), clean.labels.copy(), clean.rows.copy()
    for number in range(SPLIT):  # class n becomes n and C + n
        labels[np.flatnonzero(labels == number)[::2]] = CLASSES + number
    for number in range(SPLIT, SPLIT + MERGED, 2):
        labels[labels == number + 1] = number
    before = labels.copy()
    chosen = rng.permutation(len(labels))
    relabelled, foreign = chosen[:RELABELLED], chosen[RELABELLED : RELABELLED + FOREIGN]
    labels[relabelled] = before[rng.permutation(len(labels))[:RELABELLED]]
    relabelled = relabelled[labels[relabelled] != before[relabelled]]
    rows[foreign] = unit(rng.normal(size=(FOREIGN, DIM)))
    return Planted(clean.index, rows, labels, before, relabelled, foreign)


def job(data: Planted, out: Path, sets: tuple[EvaluationSet, ...] = ()) -> AuditJob:
    return AuditJob(
        *(str(out), data.index, data.rows, lambda start, stop: data.labels[start:stop]),
        *(int(data.labels.max()) + 1, sets, {"data": data.index.digest}),
        *(AuditSettings(), tiny.SIDE),
    )


def audited(
    data: Planted,
    out: Path,
    workers: int = 1,
    watch: Callable[[str, int, int], None] = lambda *_: None,
    sets: tuple[EvaluationSet, ...] = (),
) -> tuple[Findings, dict[str, object]]:
    with job(data, out, sets) as running:
        result = running.run(watch, workers)
        assert result is not None, "it was not finished before"
        others = {each.name: (each.index, lambda wanted: {}) for each in sets}
        names = SampleNames(data.index, lambda wanted: {n: f"name {n}" for n in wanted}, others)
        findings = list_findings(result, names)
        figures = list_figures(result, findings)
        figures["totals"].pop("seconds")
        running.publish()
    return findings, figures


@pytest.fixture(scope="module")
def found(
    dirty: Planted, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Findings, dict[str, object]]:
    return audited(dirty, tmp_path_factory.mktemp("audit") / "audit")


def assert_same(
    one: tuple[Findings, dict[str, object]], other: tuple[Findings, dict[str, object]]
) -> None:
    for name, values in one[0].columns.items():
        assert (values == other[0][name]).all(), name
    assert one[1] == other[1]


def of(findings: Findings, kind: str) -> Findings:
    return findings.of(findings["kind"] == kind)


def test_planted_faults_are_found(
    dirty: Planted, found: tuple[Findings, dict[str, object]]
) -> None:
    pairs = of(found[0], "duplicate_classes")
    planted = {(number, CLASSES + number) for number in range(SPLIT)}
    named = set(zip(pairs["class"].tolist(), pairs["neighbour_class"].tolist(), strict=True))
    assert named <= planted and len(named) >= 0.8 * SPLIT
    assert (pairs["probability"] > 0.5).all() and len(set(pairs["group"].tolist())) == len(named)
    mixed = set(of(found[0], "mixed_class")["class"].tolist())
    assert mixed == set(range(SPLIT, SPLIT + MERGED, 2))
    wrong = of(found[0], "wrong_label")["sample"]
    assert np.isin(wrong, dirty.relabelled).mean() >= 0.95
    assert np.isin(dirty.relabelled, wrong).mean() >= 0.85
    foreign = of(found[0], "foreign")["sample"]
    assert np.isin(dirty.foreign, foreign).mean() >= 0.8
    is_right = ~np.isin(foreign, np.concatenate([dirty.foreign, dirty.relabelled]))
    assert is_right.sum() <= 0.01 * len(dirty.labels)  # those far from their class


def test_images_get_their_class_back(
    dirty: Planted, found: tuple[Findings, dict[str, object]]
) -> None:
    cured = cure_labels(
        *(dirty.labels, CLASSES + SPLIT, found[0], ("merge", "split", "relabel", "drop"))
    )
    clean = dirty.index.labels_of(np.arange(len(dirty.labels)))
    kept = (cured.labels >= 0) & ~np.isin(np.arange(len(clean)), dirty.foreign)
    assert abs(cured.num_classes - CLASSES) <= 0.2 * SPLIT + 1
    pairs, counts = np.unique(
        np.stack([cured.labels[kept], clean[kept]]), axis=1, return_counts=True
    )
    largest = np.zeros(cured.num_classes, np.int64)
    np.maximum.at(largest, pairs[0], counts)
    assert largest.sum() / kept.sum() > 0.985


def test_findings_have_names_keys_and_figures(
    dirty: Planted, found: tuple[Findings, dict[str, object]]
) -> None:
    findings, figures = found
    wrong = of(findings, "wrong_label")
    assert wrong["class_name"][0] == f"name {wrong['class'][0]}"
    assert wrong["neighbour_name"][0] == f"name {wrong['neighbour_class'][0]}"
    samples = wrong["sample"][:5]
    keys = [int(key) % CLASSES for key in wrong["key"][:5]]  # as tiny.write_shards names them
    assert keys == dirty.index.labels_of(samples).tolist()
    assert (np.diff(wrong["probability"]) <= 0).all()
    kinds = figures["kinds"]
    assert kinds["wrong_label"]["count"] == len(wrong)
    assert kinds["wrong_label"]["examined"] == len(dirty.labels)
    assert sum(kinds["wrong_label"]["histogram"]["counts"]) == len(dirty.labels)
    assert kinds["duplicate_classes"]["recall"] == 1
    mixed = of(findings, "mixed_class")  # a row for each image of a part
    doubts = dict(zip(mixed["class"].tolist(), (1 - mixed["probability"]).tolist(), strict=True))
    assert len(mixed) > len(doubts) == kinds["mixed_class"]["count"]
    assert kinds["mixed_class"]["expected_false"] == pytest.approx(sum(doubts.values()), rel=1e-5)
    assert figures["totals"]["images"] == len(dirty.labels)


def test_nearly_nothing_is_accused_where_nothing_is_wrong(clean: Planted, tmp_path: Path) -> None:
    _, figures = audited(clean, tmp_path / "audit")
    totals = figures["totals"]
    assert totals["images_doubted"] <= 0.015 * len(clean.labels)
    assert totals["classes_doubted"] <= 0.015 * CLASSES


def test_figures_of_many_images_take_little_memory(
    dirty: Planted,
    found: tuple[Findings, dict[str, object]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("pipelines.audit.record._PART", 500)
    with job(dirty, tmp_path / "audit") as running:
        result = running.run(lambda *_: None)
    assert result is not None

    def repeat(values: np.ndarray) -> np.ndarray:
        return np.tile(values, (REPEATED, *[1] * (values.ndim - 1)))

    many = result._replace(
        labels=repeat(result.labels),
        parted=repeat(result.parted),
        scores=ImageScores(*map(repeat, result.scores)),
        strays=result.strays._replace(kind=repeat(result.strays.kind)),
    )
    tracemalloc.start()
    try:
        figures = list_figures(many, found[0])
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 60 * len(many.labels)
    for kind in ("wrong_label", "foreign"):
        once = found[1]["kinds"][kind]
        counts = [REPEATED * count for count in once["histogram"]["counts"]]
        assert figures["kinds"][kind]["histogram"] == once["histogram"] | {"counts": counts}
        assert figures["kinds"][kind]["examined"] == REPEATED * once["examined"]


KILLED = "first_cut", "centres", "class_pairs", "strays", "mixed", "recall"


class Killed(BaseException):
    """What ends an audit in the middle."""


SMALL_PARTS = {
    "audit.classes.mixed._PART": 500,
    "audit.classes.pairs._PART": 50,
    "audit.classes.pairs._TESTED": 16,
    "audit.evaluation_sets._PART": 50,
    "audit.evaluation_sets._TESTED": 16,
    "audit.images.neighbours._BLOCK": 700,
    "audit.images.neighbours._PART": 500,
    "audit.images.repeats._PART": 50,
    "audit.images.scores._PART": 50,
    "audit.images.strays._PART": 500,
    "audit.images.strays._TESTED": 16,
    "audit.job._PART": 500,
    "audit.record._PART": 500,
    "clustering.settings.CHUNK_BYTES": 0,  # the least: 1024 images
}


def test_findings_depend_neither_on_threads_nor_on_parts_nor_on_being_killed(
    dirty: Planted,
    found: tuple[Findings, dict[str, object]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, size in SMALL_PARTS.items():
        monkeypatch.setattr(f"pipelines.{name}", size)
    stages: list[str] = []

    def kill(stage: str, done: int, total: int) -> None:
        if stage in KILLED and stage not in stages:
            stages.append(stage)
            raise Killed

    for _ in range(len(KILLED) + 1):
        try:
            findings, figures = audited(dirty, tmp_path / "audit", 2, kill)
            break
        except Killed:
            assert not (tmp_path / "audit").exists()
    assert stages == list(KILLED)
    assert_same((findings, figures), found)


@pytest.mark.parametrize("kept", ["", ".npz"])
def test_an_audit_whose_files_are_gone_begins_anew(
    dirty: Planted, found: tuple[Findings, dict[str, object]], tmp_path: Path, kept: str
) -> None:
    """Its journal says that every stage is done, and their files are not there, or not all."""
    with pytest.raises(Killed), job(dirty, tmp_path / "audit") as running:
        running.run(lambda *_: None)
        raise Killed
    state = tmp_path / ".audit.partial" / "state"
    for file in state.iterdir():
        if not kept or file.suffix != kept:
            file.unlink()
    if not kept:
        state.rmdir()
    assert_same(audited(dirty, tmp_path / "audit"), found)


def test_killed_before_it_has_its_name_it_only_gets_that(
    dirty: Planted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("pipelines.storage.staging.Staging.publish", die)
        audited(dirty, tmp_path / "audit")
    assert not (tmp_path / ".audit.partial" / "state").exists()
    with job(dirty, tmp_path / "audit") as running:
        assert running.run(lambda *_: None) is None
        running.publish()
    assert not list((tmp_path / "audit").iterdir())  # nothing but what was written into it


def test_a_set_shares_pictures_and_identities(
    clean: Planted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two identities of a set are training classes; another set is a part of the training set."""
    for name, size in SMALL_PARTS.items():
        monkeypatch.setattr(f"pipelines.{name}", size)
    shards = tiny.write_shards(tmp_path / "heldout", 12, first=CLASSES * IMAGES)
    index = ShardIndex.load(shards)
    labels = index.labels_of(np.arange(index.samples))
    rng = np.random.default_rng(2)
    rows = unit(
        unit(rng.normal(size=(12, DIM)))[labels] + 0.8 * rng.normal(size=(144, DIM)) / DIM**0.5
    )
    for identity in (3, 7):
        theirs = clean.rows[clean.labels == 20 + identity].mean(0)
        count = int((labels == identity).sum())
        rows[labels == identity] = unit(theirs + 0.8 * rng.normal(size=(count, DIM)) / DIM**0.5)
    other = EvaluationSet("heldout", index, UnitRows(rows), labels.astype(np.int32))
    part = clean.index.cut(0, 3)
    same = EvaluationSet(
        "train", part, UnitRows(clean.rows[: part.samples]), clean.labels[: part.samples]
    )
    findings, figures = audited(clean, tmp_path / "audit", sets=(other, same))
    leaks = of(findings, "leak")
    identities = leaks.of(leaks["sample"] < 0)
    assert identities["neighbour_set"].tolist() == ["heldout"] * 2
    assert sorted(identities["class"].tolist()) == [23, 27]
    assert sorted(identities["neighbour_key"].tolist()) == ["3", "7"]
    shown = labels[identities["neighbour_sample"]]
    assert [str(number) for number in shown] == identities["neighbour_key"].tolist()
    pictures = leaks.of(leaks["sample"] >= 0)
    assert (pictures["neighbour_set"] == "train").all() and (pictures["score"] == 1).all()
    assert (pictures["sample"] == pictures["neighbour_sample"]).all()
    assert (pictures["key"] == pictures["neighbour_key"]).all() and pictures["key"][0]
    assert len(pictures) > 0.97 * part.samples
    assert figures["identities_shared_by_design"]["train"] > 100


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rows": np.zeros((3, DIM), np.float32)}, "3 embeddings for the 2,400 images"),
        ({"labels": np.zeros(CLASSES * IMAGES, np.int32)}, "there are not two"),
    ],
)
def test_what_does_not_fit_is_refused(
    clean: Planted, tmp_path: Path, change: dict[str, np.ndarray], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        job(clean._replace(**change), tmp_path / "audit")
    with pytest.raises(UserError, match=r"--false-rate 0: .* such as 0\.01"):
        AuditSettings(0).validate()
