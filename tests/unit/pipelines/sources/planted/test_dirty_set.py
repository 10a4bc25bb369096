"""A dirty copy of a small data set of glyphs: its shards, its labels, its plan."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mhe_dist.errors import UserError
from pipelines.data.sequential import read_in_order
from pipelines.shards.index import ShardIndex
from pipelines.shards.label_report import read_class_names
from pipelines.shards.label_set import LabelSet
from pipelines.shards.tables import CLASSES_FILE, write_table
from pipelines.shards.writer import Sample, ShardWriter
from pipelines.sources.glyphs.build import matplotlib_fonts
from pipelines.sources.planted.dirty_set import plant_faults
from pipelines.sources.planted.faults import FaultRates
from pipelines.sources.planted.unseen_glyphs import ForeignImage, draw_unseen_glyphs
from tests.support.data.images import encoded

SIDE, CLASSES, EACH = 8, 40, 6
RATES = FaultRates(leaked=0.1)


def jpeg(number: int) -> bytes:
    return encoded(Image.new("L", (SIDE, SIDE), number % 256), "JPEG")


def write_clean(folder: str, prefix: str, classes: int, each: int, first_code: int) -> ShardIndex:
    """Two tars of grey squares, classes that are named as those of glyph sets are."""
    samples = [
        Sample(f"{prefix}{n}", {"jpg": jpeg(n), "cls": str(n % classes).encode()})
        for n in range(classes * each)
    ]
    names = [f"U+{first_code + n:04X}" for n in range(classes)]
    with ShardWriter(folder, prefix) as writer:
        writer.write(samples[: classes + 1])
        writer.write(samples[classes + 1 :])
        rows = ((str(n), str(each), name) for n, name in enumerate(names))
        write_table(f"{writer.folder}/{CLASSES_FILE}", (["class", "samples", "name"], rows))
        writer.finish(classes, {"class_names": CLASSES_FILE, "settings": {"image_size": SIDE}})
    return ShardIndex.load(folder)


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> tuple[ShardIndex, ShardIndex]:
    folder = tmp_path_factory.mktemp("clean")
    return (
        write_clean(f"{folder}/train", "t", CLASSES, EACH, 0x41),
        write_clean(f"{folder}/heldout", "h", 10, 3, 0x3B1),
    )


STRANGERS = [ForeignImage(f"stranger{n}", jpeg(200 + n)) for n in range(5)]


def plant(clean: tuple[ShardIndex, ShardIndex], out: Path, seed: int = 0) -> LabelSet:
    return plant_faults(*clean, STRANGERS, str(out), seed, RATES)


@pytest.fixture(scope="module")
def dirty(
    clean: tuple[ShardIndex, ShardIndex], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, LabelSet]:
    out = tmp_path_factory.mktemp("dirty")
    return out, plant(clean, out)


def test_the_index_holds_the_clean_tars_where_they_lie_and_the_new_images(
    clean: tuple[ShardIndex, ShardIndex], dirty: tuple[Path, LabelSet]
) -> None:
    index = ShardIndex.load(f"{dirty[0]}/train")
    assert index.samples == CLASSES * EACH + 5 + 3
    assert [index.url(n) for n in (0, 1)] == [clean[0].url(n) for n in (0, 1)]
    images, labels, keys = read_in_order(index, 0, index.samples, SIDE)
    assert np.array_equal(labels[:-8].numpy() % CLASSES, np.arange(CLASSES * EACH) % CLASSES)
    assert keys[:2] == ["t0", "t1"] and keys[-1] == "new-000007"
    assert index.meta["settings"] == {"image_size": SIDE}
    assert len(images) == index.samples


def test_a_set_at_a_relative_path_is_found_from_the_new_folder(
    clean: tuple[ShardIndex, ShardIndex], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(clean[0].folder).parent)
    near = ShardIndex.load("train"), clean[1]
    plant(near, tmp_path)
    index = ShardIndex.load(f"{tmp_path}/train")
    images, _, _ = read_in_order(index, 0, index.samples, SIDE)
    assert len(images) == CLASSES * EACH + 5 + 3


def test_the_label_set_has_the_faults_and_the_plan_says_each_of_them(
    dirty: tuple[Path, LabelSet],
) -> None:
    out, labels = dirty
    index = ShardIndex.load(f"{out}/train")
    labels.require_index(index)
    given = labels.single_labels(0, labels.samples)
    plan = pq.read_table(out / "plan.parquet").to_pylist()
    assert labels.num_classes == 40 + 2 - 1
    true = index.labels_of(np.arange(index.samples))
    assert true is not None
    for row in plan:
        if row["sample"] >= 0:
            assert given[row["sample"]] == row["planted_class"]
        if row["kind"] == "relabelled":
            assert true[row["sample"]] == row["true_class"]
            assert given[row["sample"]] != row["second_planted_class"]
        if row["kind"] == "split":
            here = given[: CLASSES * EACH][true[: CLASSES * EACH] == row["true_class"]]
            assert {row["planted_class"], row["second_planted_class"]} <= set(here)
    counts = {kind: sum(row["kind"] == kind for row in plan) for kind in {r["kind"] for r in plan}}
    assert counts == {"split": 2, "merged": 1, "relabelled": 24, "foreign": 5, "leak": 3}
    assert json.loads((out / "plan.json").read_text())["counts"] == counts
    assert len(read_class_names(labels)) == labels.num_classes


def test_copies_of_heldout_images_are_those_of_the_plan_bit_for_bit(
    clean: tuple[ShardIndex, ShardIndex], dirty: tuple[Path, LabelSet]
) -> None:
    index = ShardIndex.load(f"{dirty[0]}/train")
    heldout, _, keys = read_in_order(clean[1], 0, clean[1].samples, SIDE)
    by_key = dict(zip(keys, heldout, strict=True))
    leaks = [r for r in pq.read_table(dirty[0] / "plan.parquet").to_pylist() if r["kind"] == "leak"]
    for row in leaks:
        image, _, key = read_in_order(index, row["sample"], row["sample"] + 1, SIDE)
        assert key == [row["key"]]
        assert (image[0] == by_key[row["source"]]).all()


def test_the_same_seed_makes_the_same_set_and_what_is_there_is_kept(
    clean: tuple[ShardIndex, ShardIndex], dirty: tuple[Path, LabelSet], tmp_path: Path
) -> None:
    again = plant(clean, tmp_path / "again")
    assert again.digest == dirty[1].digest
    assert plant(clean, tmp_path / "again", seed=5).digest == again.digest
    assert plant(clean, tmp_path / "other", seed=5).digest != again.digest


@pytest.fixture(scope="module")
def fonts(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with one small typeface of matplotlib."""
    folder = tmp_path_factory.mktemp("fonts")
    (folder / "a.ttf").symlink_to(Path(matplotlib_fonts(), "DejaVuSansDisplay.ttf"))
    return str(folder)


def test_foreign_images_are_of_characters_in_no_class(
    clean: tuple[ShardIndex, ShardIndex], fonts: str
) -> None:
    found = draw_unseen_glyphs(clean, fonts, SIDE, 9, 0)
    codes = {int(image.name[1:6], 16) for image in found}
    assert len(codes) == 9
    assert not codes & {*range(0x41, 0x41 + CLASSES), *range(0x3B1, 0x3B1 + 10)}
    assert draw_unseen_glyphs(clean, fonts, SIDE, 9, 0) == found
    with Image.open(io.BytesIO(found[0].data)) as image:
        assert image.size == (SIDE, SIDE)


def test_more_foreign_images_than_there_are_characters_are_refused(
    clean: tuple[ShardIndex, ShardIndex], fonts: str
) -> None:
    with pytest.raises(UserError, match="plant fewer, or give more fonts"):
        draw_unseen_glyphs(clean, fonts, SIDE, 10_000, 0)
