"""A whole clustering: what it writes, and that it is the same however often it was killed."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mhe_dist.errors import UserError
from pipelines.clustering import settings as sizes
from pipelines.clustering.build import Clustering, ClusterJob
from pipelines.clustering.settings import ClusterSettings
from pipelines.shards.label_set import LabelSet
from pipelines.shards.similarities import decode_similarities
from tests.support.files import contents

CLASSES, IMAGES, DIM = 60, 2600, 16
TRUTH = np.random.default_rng(0).zipf(1.6, IMAGES) % CLASSES
SETTINGS = ClusterSettings(
    50, labels_per_image=4, max_size=2, duplicates=0.999, outliers=0.02, seed=3
)


class Killed(BaseException):
    """What ends a process stands for it: nothing may catch it."""


def make_rows() -> np.ndarray[Any, Any]:
    """Clouds of very different sizes, off the origin; equal images, one without a direction."""
    rng = np.random.default_rng(1)
    rows = rng.standard_normal((CLASSES, DIM))[TRUTH] + 0.3 * rng.standard_normal((IMAGES, DIM))
    rows[300:330] = rows[300]
    rows[7] = 0
    return (rows + 0.5 * (np.arange(IMAGES) != 7)[:, None]).astype(np.float16)


ROWS = make_rows()
INDEX: Any = SimpleNamespace(digest="sha256:0", samples=IMAGES, folder="data/set")


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cells, three parts of images, and a record of every piece of work."""
    monkeypatch.setattr(sizes, "ONE_LEVEL", 10)
    monkeypatch.setattr(sizes, "CHUNK_BYTES", 0)  # the least: 1024 images
    monkeypatch.setattr(sizes, "ITERATIONS", 4)
    monkeypatch.setattr("pipelines.clustering.state._EVERY_S", -1.0)


def cluster(
    target: Path,
    settings: ClusterSettings = SETTINGS,
    workers: int = 1,
    kill_at: int = -1,
    rows: Any = ROWS,
) -> tuple[LabelSet | None, Clustering | None, int]:
    """Label set, what was made, and how often it calls of progress; killed at that time."""
    calls = 0

    def watch(stage: str, done: int, total: int) -> None:
        nonlocal calls
        if calls == kill_at:
            raise Killed
        calls += 1

    try:
        with ClusterJob(str(target), INDEX, rows, {"rows": "1"}, settings) as job:
            made = job.run(watch, workers, lambda numbers: TRUTH[numbers])
            job.publish()
        return LabelSet.load(str(target)), made, calls
    except Killed:
        return None, None, calls


def test_the_label_set_holds_what_was_asked_for(tmp_path: Path, small_parts: None) -> None:
    labels, made, _ = cluster(tmp_path / "set")
    assert labels is not None and made is not None
    figures = labels.meta["figures"]
    lists = labels.lists(0, IMAGES)
    assert labels.samples == IMAGES and labels.max_labels == 4
    counts = np.bincount(lists.class_ids, minlength=labels.num_classes)
    assert counts.min() > 0 and counts.max() == figures["largest"]
    assert counts.max() <= 2 * figures["labels"] / labels.num_classes + 1
    assert 45 <= labels.num_classes <= 50
    assert len(lists.of(7)) == 0 and figures["broken"] == 1
    assert sum(bool(len(lists.of(n))) for n in range(300, 330)) <= 1
    assert figures["duplicates"] >= 29 and figures["outliers"] == pytest.approx(0.02 * 2570, abs=2)
    assert (lists.counts > 0).sum() == figures["labelled"] == labels.labelled
    assert figures["purity"] > 0.8 and figures["recall"] == 1.0
    assert labels.similarities is not None
    cosines = decode_similarities(labels.similarities.values)
    ends = np.cumsum(lists.counts)
    within = np.ones(len(cosines), bool)
    within[ends[ends < len(cosines)]] = False
    assert (np.diff(cosines) <= 1e-6)[within[1:]].all()  # the nearest class comes first
    table = (tmp_path / "set" / "clusters.tsv").read_text().splitlines()
    assert len(table) == labels.num_classes + 1
    for shown in (each for group in made.shown.values() for each in group):
        firsts = {int(lists.of(n)[0]) for n in shown.images.tolist()}
        assert firsts == {shown.number}
    assert not (tmp_path / ".set.partial").exists()


def test_the_classes_depend_on_nothing_but_the_recipe(tmp_path: Path, small_parts: None) -> None:
    cluster(tmp_path / "one")
    cluster(tmp_path / "two", workers=3)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    other = ClusterSettings(**{**SETTINGS.as_dict(), "seed": 4})
    cluster(tmp_path / "other", other)
    assert contents(tmp_path / "one") != contents(tmp_path / "other")


def test_killed_at_any_point_it_ends_with_the_same_bytes(tmp_path: Path, small_parts: None) -> None:
    _, _, calls = cluster(tmp_path / "whole")
    expected = contents(tmp_path / "whole")
    assert calls > 30
    # Each attempt gets a few pieces further; a piece that was done and not recorded is done twice.
    attempts, finished = 0, None
    while finished is None:
        attempts += 1
        finished = cluster(tmp_path / "killed", kill_at=2 + attempts % 3)[0]
    assert attempts >= 10
    assert contents(tmp_path / "killed") == expected


@pytest.mark.parametrize("kept", ["", ".npz"])
def test_a_clustering_whose_files_are_gone_begins_anew(
    tmp_path: Path, small_parts: None, kept: str
) -> None:
    _, _, calls = cluster(tmp_path / "whole")
    cluster(tmp_path / "set", kill_at=calls - 1)
    for file in (tmp_path / ".set.partial" / "state").iterdir():
        if not kept or file.suffix != kept:
            file.unlink()
    cluster(tmp_path / "set")
    assert contents(tmp_path / "set") == contents(tmp_path / "whole")


def test_killed_before_it_has_its_name_it_only_gets_that(
    tmp_path: Path, small_parts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster(tmp_path / "whole")

    def die(*_: object, **__: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("pipelines.storage.staging.Staging.publish", die)
        assert cluster(tmp_path / "set")[0] is None
    labels, made, _ = cluster(tmp_path / "set")
    assert labels is not None and made is None
    assert contents(tmp_path / "set") == contents(tmp_path / "whole")


def test_one_kmeans_finds_few_classes(tmp_path: Path) -> None:
    labels, _, _ = cluster(tmp_path / "set", ClusterSettings(20, 1, max_size=0, center=False))
    assert labels is not None
    assert labels.max_labels == 1 and labels.num_classes == 20
    assert labels.labelled == IMAGES - 1  # the image without a direction has none


def test_fewer_different_images_than_classes_make_fewer_classes(tmp_path: Path) -> None:
    rows = np.repeat(ROWS[:5], IMAGES // 5, axis=0)
    labels, _, _ = cluster(tmp_path / "set", ClusterSettings(20, 2, max_size=0), rows=rows)
    assert labels is not None
    assert labels.num_classes <= 5 and labels.max_labels <= 2


def test_another_recipe_does_not_go_on(tmp_path: Path, small_parts: None) -> None:
    cluster(tmp_path / "set", kill_at=6)
    with pytest.raises(UserError, match=r"an interrupted attempt with .* other settings"):
        cluster(tmp_path / "set", ClusterSettings(40))
    cluster(tmp_path / "set")
    with pytest.raises(UserError, match=r"set: .*exists"):
        cluster(tmp_path / "set")


def test_what_cannot_be_clustered_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--out s3://b/x: .* name a folder here"):
        ClusterJob("s3://b/x", INDEX, ROWS, {}, SETTINGS)
    with pytest.raises(UserError, match=r"5 embeddings for the 2,600 images of data/set"):
        cluster(tmp_path / "set", rows=ROWS[:5])
    with pytest.raises(UserError, match="--classes 2601"):
        cluster(tmp_path / "set", ClusterSettings(2601))
    assert list(tmp_path.iterdir()) == []
