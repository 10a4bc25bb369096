"""Damaged files thrown at every reader: an error that says so or a counted skip, no wrong label.

Unlike the tests beside each reader, which change single bytes, these also cut pieces out, put some
in, and move some elsewhere. A tar has no checksum of what is in it, so a label that was damaged to
another one is only noticed by the index, which knows them all.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mhe_dist.config.schema import Config
from mhe_dist.errors import RunError, UserError
from pipelines.data.decode import decode_image
from pipelines.data.sample import BadSampleError, extract_sample, parse_members
from pipelines.data.sequential import read_in_order
from pipelines.data.verify import verify_dataset
from pipelines.shards.index import ShardIndex
from pipelines.shards.writer import Sample, ShardWriter
from pipelines.sources import recordio
from pipelines.sources.convert import ImportOptions
from pipelines.sources.insightface import import_recordio
from pipelines.sources.tar import DamagedTarError, read_members
from pipelines.sources.webdataset import index_shards
from pipelines.storage.staging import Journal
from tests.support.data.images import jpeg
from tests.support.data.loading import loader_of
from tests.support.data.recordio_files import content, items, layout, save

CLASSES, COUNT, SIDE = 7, 24, 8
IMAGES = {jpeg(number): number % CLASSES for number in range(COUNT)}
PIXELS = {decode_image(image, SIDE).tobytes(): label for image, label in IMAGES.items()}
few = settings(
    max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)


@st.composite
def damages(draw: st.DrawFn) -> list[tuple[str, float, float, bytes]]:
    """What to do, from where to where (as shares of the file), with which bytes."""
    share = st.floats(0, 1)
    what = st.sampled_from(["overwrite", "remove", "insert", "double", "swap", "cut off"])
    some = st.one_of(
        st.binary(min_size=1, max_size=40),
        st.sampled_from([bytes(512), recordio.MAGIC, b"\xff" * 600, b"3", b"9" * 30]),
    )
    return draw(st.lists(st.tuples(what, share, share, some), min_size=1, max_size=3))


def damaged(data: bytes, damage: list[tuple[str, float, float, bytes]], unit: int = 1) -> bytes:
    """Apply damages; what moves other bytes does so by multiples of `unit`."""
    for what, one, other, some in damage:
        units = len(data) // unit
        start, stop = (int(at * units) * unit for at in sorted((one, other)))
        part = data[start:stop]
        data = {
            "overwrite": data[:start] + some + data[start + len(some) :],
            "remove": data[:start] + data[min(stop, start + 20 * unit) :],
            "insert": data[:start] + (some * unit)[: -(-len(some) // unit) * unit] + data[start:],
            "double": data[:stop] + part + data[stop:],
            "swap": part + data[:start] + data[stop:],
            "cut off": data[:stop],
        }[what]
    return data


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    """One tar of ours."""
    with ShardWriter(str(tmp_path_factory.mktemp("fuzz") / "set"), "part") as writer:
        writer.write(
            Sample(f"s{number:03d}", {"jpg": image, "cls": str(label).encode()})
            for number, (image, label) in enumerate(IMAGES.items())
        )
        return writer.finish(CLASSES)


def configure() -> Config:
    return Config(
        data={
            "shards": "unused",
            "streams": 4,
            "shuffle_window": 6,
            "image_size": SIDE,
            "loader_workers": 0,
            "max_bad_fraction": 1,
        },
        train={"global_batch": 8, "micro_batch": 8},
    )


def labels_are_true(images: Any, labels: Any) -> None:
    """No image that is one of ours has another's label."""
    for image, label in zip(images, labels.tolist(), strict=True):
        pixels = image.permute(1, 2, 0).contiguous().numpy().tobytes()
        assert PIXELS.get(pixels, label) == label


@few
@given(damages(), st.sampled_from([1, 512]))
def test_training_meets_a_damaged_tar(index: ShardIndex, damage: Any, unit: int) -> None:
    path = Path(index.url(0))
    before = path.read_bytes()
    path.write_bytes(damaged(before, damage, unit))
    try:
        loader = loader_of(index, configure(), range(1), 0, 3)
        for batch in loader:
            labels_are_true(batch.micro_batches[0].images, batch.micro_batches[0].labels)
        assert loader.faults.seen == COUNT
        assert len(loader.faults.samples) == loader.faults.count
    except RunError as error:
        assert "can be used" in str(error)
    try:
        labels_are_true(*read_in_order(index, 0, COUNT, SIDE)[:2])
    except RunError as error:
        assert str(path) in str(error)
    finally:
        path.write_bytes(before)


@few
@given(damages(), st.sampled_from([1, 512]))
def test_verifying_meets_a_damaged_tar(
    index: ShardIndex, tmp_path_factory: pytest.TempPathFactory, damage: Any, unit: int
) -> None:
    path = Path(index.url(0))
    before = path.read_bytes()
    after = damaged(before, damage, unit)
    path.write_bytes(after)
    try:
        report = verify_dataset(index, Journal(str(tmp_path_factory.mktemp("journal") / "j"), 0))
        assert report.is_good == (after == before)
    finally:
        path.write_bytes(before)


@few
@given(damages(), st.sampled_from([1, 512]))
def test_indexing_meets_a_damaged_tar(
    index: ShardIndex, tmp_path_factory: pytest.TempPathFactory, damage: Any, unit: int
) -> None:
    folder = tmp_path_factory.mktemp("theirs")
    (folder / "a.tar").write_bytes(damaged(Path(index.url(0)).read_bytes(), damage, unit))
    try:
        made = index_shards([str(folder)], skip_damaged=True, max_bad=1.0)
        images, labels, _ = read_in_order(made.index, 0, made.index.samples, SIDE)
    except (UserError, RunError) as error:
        assert str(folder) in str(error)
        return
    names = list(range(made.index.num_classes))
    if (folder / "classes.tsv").exists():
        rows = (folder / "classes.tsv").read_text().splitlines()[1:]
        names = [row.split("\t")[2] for row in rows]
    for image, label in zip(images, labels.tolist(), strict=True):
        # The tar alone says which class it is.
        true = PIXELS.get(image.permute(1, 2, 0).contiguous().numpy().tobytes())
        is_moved = any(what != "cut off" for what, *_ in damage)
        assert is_moved or true is None or str(names[label]) == str(true)


@few
@given(damages(), st.sampled_from([1, 512]))
def test_bytes_of_a_sample_are_damaged(index: ShardIndex, damage: Any, unit: int) -> None:
    offsets = index.shards[0].offsets
    data = Path(index.url(0)).read_bytes()
    raw = memoryview(damaged(data[: int(offsets[1])], damage, unit))
    for attempt in (
        lambda: parse_members(raw),
        lambda: parse_members(raw, alone=False),
        lambda: extract_sample(raw, int(offsets[1]), CLASSES),
    ):
        try:
            attempt()
        except BadSampleError as error:
            assert str(error)
    try:
        found = list(read_members(io.BytesIO(damaged(data, damage, unit))))
        assert all(member.stop > member.start for member in found)
    except DamagedTarError as error:
        assert "byte" in str(error)


LAYOUTS = {kind: layout(items(), kind) for kind in ("classic", "flat")}
TRUTH = {image: labels[0] for labels, image in items()}


@few
@given(
    st.sampled_from(list(LAYOUTS)),
    damages(),
    st.one_of(st.none(), damages()),
    st.sampled_from([1, 4]),
    st.booleans(),
)
def test_importing_meets_damaged_records(
    tmp_path_factory: pytest.TempPathFactory,
    kind: str,
    damage: Any,
    damage_of_index: Any,
    unit: int,
    with_index: bool,
) -> None:
    rec, idx = LAYOUTS[kind]
    idx = idx if damage_of_index is None else damaged(idx, damage_of_index)
    folder = tmp_path_factory.mktemp("records")
    path = save(folder / "in", damaged(rec, damage, unit), idx if with_index else None)
    try:
        made = import_recordio(path, str(folder / "out"), options=ImportOptions(max_bad=1.0))
    except (UserError, RunError) as error:
        assert str(folder) in str(error)
        return
    rows = (folder / "out" / "classes.tsv").read_text().splitlines()[1:]
    names = [float(row.split("\t")[2]) for row in rows]
    is_moved = any(what == "overwrite" for what, *_ in damage)  # a label has no checksum
    for label, image, _ in content(str(folder / "out")).values():
        assert is_moved or names[label] == TRUTH.get(image, names[label])
    assert made.index.samples + len(made.faults) >= 1
