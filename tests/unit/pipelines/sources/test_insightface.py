"""InsightFace data sets become shards: every image byte for byte, under its own label."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from mhe_dist.errors import RunError, UserError
from pipelines.shards.index import ShardIndex, index_exists
from pipelines.sources.convert import ImportOptions
from pipelines.sources.insightface import import_recordio
from pipelines.sources.recordio import MAGIC
from pipelines.storage.worker_pool import Processes
from tests.support.data.images import jpeg
from tests.support.data.recordio_files import Item, content, items, layout, save
from tests.support.faults import interrupt_at
from tests.support.servers.stores import files, served


def images_of(url: str) -> list[tuple[int, bytes]]:
    return [(label, image) for _, (label, image, _) in sorted(content(url).items())]


@pytest.mark.parametrize("kind", ["flat", "classic"])
@pytest.mark.parametrize("with_index", [True, False])
def test_every_image_byte_for_byte(tmp_path: Path, kind: str, with_index: bool) -> None:
    images = items()
    rec = save(tmp_path / "faces", *layout(images, kind))
    assert MAGIC in b"".join(image for _, image in images)
    made = import_recordio(rec, str(tmp_path / "out"), with_index)
    assert images_of(str(tmp_path / "out")) == [(int(labels[0]), image) for labels, image in images]
    assert (made.faults, made.warnings, made.index.num_classes) == ([], [], 3)


def test_label_arrays_are_kept(tmp_path: Path) -> None:
    images: list[Item] = [([2.0, 0.25, 17.0], jpeg(0)), ([5.0], jpeg(1)), ([2.0, 1e9], jpeg(2))]
    import_recordio(save(tmp_path / "a", *layout(images)), str(tmp_path / "out"))
    found = content(str(tmp_path / "out"))
    assert [found[key][0] for key in sorted(found)] == [0, 1, 0]
    assert [found[key][2] and json.loads(found[key][2]) for key in sorted(found)] == [
        {"labels": [2.0, 0.25, 17.0]},
        b"",
        {"labels": [2.0, 1e9]},
    ]


def test_classes_are_dense_and_their_names_are_kept(tmp_path: Path) -> None:
    images: list[Item] = [([label], jpeg(n)) for n, label in enumerate([9.0, 3.0, 9.0, 16777215.0])]
    made = import_recordio(save(tmp_path / "a", *layout(images)), str(tmp_path / "out"))
    assert [label for label, _ in images_of(str(tmp_path / "out"))] == [1, 0, 1, 2]
    assert (tmp_path / "out" / "classes.tsv").read_text() == (
        "class\tsamples\tname\n0\t1\t3\n1\t2\t9\n2\t1\t16777215\n"
    )
    assert made.index.meta["class_names"] == "classes.tsv"


def test_shards_are_shuffled_and_of_equal_size(tmp_path: Path) -> None:
    rec = save(tmp_path / "a", *layout(items(10, 10)))
    import_recordio(rec, str(tmp_path / "out"), options=ImportOptions(shard_bytes=50_000))
    index = ShardIndex.load(str(tmp_path / "out"))
    sizes = [shard.bytes for shard in index.shards]
    assert len(sizes) > 3
    assert max(sizes) - min(sizes) <= 10240  # the block that a tar is filled up to
    for shard in index.shards:
        assert shard.labels is not None
        assert len(set(shard.labels.tolist())) > 5
    two = ImportOptions(shard_bytes=50_000, workers=Processes(2))
    import_recordio(rec, str(tmp_path / "again"), options=two)
    assert ShardIndex.load(str(tmp_path / "again")).digest == index.digest
    import_recordio(rec, str(tmp_path / "sorted"), options=ImportOptions(shuffle=False))
    labels = ShardIndex.load(str(tmp_path / "sorted")).shards[0].labels
    assert labels is not None
    assert labels.tolist() == sorted(labels.tolist())


def test_an_interrupted_import_goes_on(tmp_path: Path) -> None:
    rec, out = save(tmp_path / "a", *layout(items(10, 10))), str(tmp_path / "out")
    small = ImportOptions(shard_bytes=50_000)

    with pytest.raises(KeyboardInterrupt):
        import_recordio(rec, out, options=small, writing=interrupt_at(2))
    assert not index_exists(out)
    with pytest.raises(UserError, match="other settings"):
        import_recordio(rec, out)
    seen: list[int] = []
    import_recordio(rec, out, options=small, writing=lambda done, _: seen.append(done))
    assert seen[0] == 2
    assert len(content(out)) == 100
    with pytest.raises(UserError, match="already exists"):
        import_recordio(rec, out)


def test_shards_and_records_behind_urls(tmp_path: Path) -> None:
    import fsspec

    rec, idx = layout(items(), "classic")
    filesystem = fsspec.filesystem("memory")
    filesystem.pipe({"/faces/train.rec": rec, "/faces/train.idx": idx, "/faces/property": b"3,8,8"})
    made = import_recordio("memory://faces/train.rec", "memory://made/faces")
    assert made.index.samples == 12
    assert made.warnings == []
    assert ShardIndex.load("memory://made/faces").digest == made.index.digest
    assert not filesystem.exists("/made/faces/.partial")


@pytest.mark.parametrize(
    ("images", "prop", "words"),
    [
        ([([16777216.0], jpeg(0)), ([0.0], jpeg(1))], None, "float32"),
        (items(), b"4,112,112", "property says 4 classes, the images have 3"),
        (items(), b"20000000,112,112", "float32"),
        (items(), b"three", None),
    ],
)
def test_numbers_that_do_not_fit_are_told(
    tmp_path: Path, images: list[Item], prop: bytes | None, words: str | None
) -> None:
    rec = save(tmp_path / "a", *layout(images, "classic"))
    if prop is not None:
        (tmp_path / "a" / "property").write_bytes(prop)
    warnings = import_recordio(rec, str(tmp_path / "out")).warnings
    assert words in warnings[0] if words else warnings == []


def test_lost_identities_and_images_are_told(tmp_path: Path) -> None:
    rec, idx = layout(items(), "classic")
    lines = idx.splitlines(keepends=True)
    rec_path = save(tmp_path / "a", rec, b"".join(lines[:9] + lines[13:]))
    warnings = import_recordio(rec_path, str(tmp_path / "out")).warnings
    assert "3 identity records, but the images have 2 classes" in warnings[0]
    assert "header announces 12 images, the file has 8" in warnings[1]


def test_bad_records_are_named_and_bounded(tmp_path: Path) -> None:
    images: list[Item] = [*items(), ([0.5], jpeg(0)), ([1.0], b"no image"), ([1.0], b"")]
    rec = save(tmp_path / "a", *layout(images))
    with pytest.raises(RunError, match=r"2 of 15 samples are bad(?s:.*)train\.rec record 12 at"):
        import_recordio(rec, str(tmp_path / "out"))
    assert not index_exists(str(tmp_path / "out"))
    made = import_recordio(rec, str(tmp_path / "out"), options=ImportOptions(max_bad=0.5))
    assert [fault.reason for fault in made.faults] == [
        "its label 0.5 is no class",
        "no image",
        "no image of a known format (it begins with b'no image')",
    ]
    table = (tmp_path / "out" / "skipped.tsv").read_text().splitlines()
    assert table[0] == "place\treason"
    assert len(table) == 4
    assert made.index.meta["skipped"] == 3
    assert len(content(str(tmp_path / "out"))) == 12


@pytest.mark.parametrize("rec", ["nowhere.rec", "memory://nowhere.rec", "nope://a.rec"])
def test_a_missing_file_is_a_mistake(tmp_path: Path, rec: str) -> None:
    with pytest.raises(UserError, match=r"nowhere|nope"):
        import_recordio(rec, str(tmp_path / "out"))


def test_no_image_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no image here"):
        import_recordio(save(tmp_path / "a", b"", b""), str(tmp_path / "out"))


def test_a_single_class_is_a_mistake(tmp_path: Path) -> None:
    rec = save(tmp_path / "a", *layout([([7.0], jpeg(0)), ([7.0], jpeg(1))]))
    with pytest.raises(UserError, match=r"train\.rec: its images are all of one class, '7', and"):
        import_recordio(rec, str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


IMAGES = items()
REC, IDX = layout(IMAGES, "classic")


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@example(changes=[(4007, 64)], index_changes=[], length=4808)  # a label
@given(
    st.lists(st.tuples(st.integers(0, len(REC) - 1), st.integers(0, 255)), max_size=4),
    st.lists(st.tuples(st.integers(0, len(IDX) - 1), st.integers(0, 255)), max_size=2),
    st.integers(len(REC) // 2, len(REC)),
)
def test_damaged_files_give_errors_or_true_samples(
    tmp_path_factory: pytest.TempPathFactory,
    changes: list[tuple[int, int]],
    index_changes: list[tuple[int, int]],
    length: int,
) -> None:
    rec, idx = bytearray(REC), bytearray(IDX)
    for position, value in changes:
        rec[position] = value
    for position, value in index_changes:
        idx[position] = value
    folder = tmp_path_factory.mktemp("fuzz")
    path = save(folder / "a", bytes(rec[:length]), bytes(idx))
    try:
        made = import_recordio(path, str(folder / "out"), options=ImportOptions(max_bad=1.0))
    except UserError:
        return
    names = [line.split("\t")[2] for line in _lines(folder / "out" / "classes.tsv")]
    truth = {image: labels[0] for labels, image in IMAGES}
    for label, image, _ in content(str(folder / "out")).values():
        if image in truth and float(names[label]) != truth[image]:
            assert _label_was_changed(changes, image), "a wrong label"
    assert made.index.samples + len(made.faults) >= 1


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines()[1:]


def _label_was_changed(changes: list[tuple[int, int]], image: bytes) -> bool:
    """Whether a change hit the 32 bytes before the image, which is cut where it holds `MAGIC`."""
    at = REC.index(image.partition(MAGIC)[0])
    return any(at - 32 <= position < at for position, _ in changes)


def test_the_index_keeps_no_signature_of_a_url(tmp_path: Path) -> None:
    images = items()
    images[3] = (images[3][0], b"no image")
    save(tmp_path / "in", *layout(images))
    with served(files(tmp_path / "in")) as url:
        signed = f"{url}/train.rec?X-Amz-Signature=planted"
        import_recordio(signed, str(tmp_path / "out"), False, ImportOptions(max_bad=0.5))
    for file in (tmp_path / "out").iterdir():
        assert b"planted" not in file.read_bytes(), file.name
