"""Shards of other writers: indexed where they lie, labels as numbers, nothing written anew."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path

import fsspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mhe_dist.config.schema import Config
from mhe_dist.errors import RunError, UserError
from pipelines.data.decode import decode_image
from pipelines.data.sequential import read_in_order
from pipelines.shards.index import ShardIndex
from pipelines.sources import webdataset, webdataset_tar
from pipelines.sources.webdataset import expand_tars, index_shards
from pipelines.sources.webdataset_tar import SampleLayout
from pipelines.storage.worker_pool import Processes
from tests.support.data.images import jpeg
from tests.support.data.loading import loader_of
from tests.support.data.tars import tar
from tests.support.faults import interrupt_at

Files = Sequence[tuple[str, bytes]]


def pair(key: str, number: int, label: str) -> Files:
    return [(f"{key}.jpg", jpeg(number)), (f"{key}.cls", label.encode())]


def save(folder: Path, *tars: bytes) -> str:
    folder.mkdir(exist_ok=True)
    for number, data in enumerate(tars):
        (folder / f"other-{number:03d}.tar").write_bytes(data)
    return str(folder)


def read(url: str) -> dict[str, int]:
    """Key -> label as an evaluation reads them; the images are those of the keys' numbers."""
    index = ShardIndex.load(url)
    images, labels, keys = read_in_order(index, 0, index.samples, 8)
    for key, image in zip(keys, images, strict=True):
        number = int("".join(c for c in key if c.isdigit()))
        assert (image.permute(1, 2, 0).numpy() == decode_image(jpeg(number), 8)).all()
    return dict(zip(keys, labels.tolist(), strict=True))


def test_labels_that_are_numbers_stay(tmp_path: Path) -> None:
    one, two = tar(*pair("k0", 0, "2"), *pair("k1", 1, "0")), tar(*pair("k2", 2, " 1\n"))
    folder = save(tmp_path / "set", one, two)
    made = index_shards([folder])
    assert (made.index.num_classes, made.faults) == (3, [])
    assert read(folder) == {"k0": 2, "k1": 0, "k2": 1}
    assert sorted(path.name for path in Path(folder).iterdir()) == [
        "begins.npy",
        "index.json",
        "labels.npy",
        "other-000.tar",
        "other-001.tar",
    ]
    assert (tmp_path / "set" / "other-000.tar").read_bytes() == one


def test_a_whole_number_is_one_class_however_it_is_written(tmp_path: Path) -> None:
    labels = ["0.0", "1", "0", "\ufeff1", "1.000"]
    one = tar(*(entry for n, label in enumerate(labels) for entry in pair(f"k{n}", n, label)))
    made = index_shards([save(tmp_path / "set", one)])
    assert (made.index.num_classes, made.faults) == (2, [])
    assert read(made.index.folder) == {"k0": 0, "k1": 1, "k2": 0, "k3": 1, "k4": 1}
    assert not (tmp_path / "set" / "classes.tsv").exists()


@pytest.mark.parametrize(
    ("labels", "expected", "names"),
    [
        (["100", "20", "100"], [1, 0, 1], ["20", "100"]),
        (["n02", "cat", "n02"], [1, 0, 1], ["cat", "n02"]),
        (["7", "007", "1"], [2, 0, 1], ["007", "1", "7"]),
        (["00", "01", "00"], [0, 1, 0], None),
        (["ä\tb", "x", "x"], [1, 0, 0], ["x", "ä\\tb"]),
    ],
)
def test_other_labels_are_mapped_and_the_map_is_kept(
    tmp_path: Path, labels: list[str], expected: list[int], names: list[str] | None
) -> None:
    files = [file for n, label in enumerate(labels) for file in pair(f"k{n}", n, label)]
    made = index_shards([save(tmp_path / "set", tar(*files))])
    assert list(read(str(tmp_path / "set")).values()) == expected
    assert made.index.num_classes == len(set(expected))
    table = tmp_path / "set" / "classes.tsv"
    assert table.exists() == (names is not None)
    if names:
        rows = [line.split("\t") for line in table.read_text().splitlines()]
        assert rows[0] == ["class", "samples", "name"]
        assert [row[2] for row in rows[1:]] == names
        assert sum(int(row[1]) for row in rows[1:]) == 3


def test_numbers_keep_their_meaning_if_the_number_of_classes_is_given(tmp_path: Path) -> None:
    folder = save(tmp_path / "set", tar(*pair("k0", 0, "70"), *pair("k1", 1, "3")))
    made = index_shards([folder], layout=SampleLayout(num_classes=100))
    assert made.index.num_classes == 100
    assert read(folder) == {"k0": 70, "k1": 3}


def test_any_image_and_label_field(tmp_path: Path) -> None:
    about = [json.dumps({"meta": {"ids": [0, label]}, "label": label}) for label in (5, 9.0, "x")]
    files = [
        file
        for n, text in enumerate(about)
        for file in [
            (f"d.v1/k{n}.Crop.JPG", jpeg(n)),
            (f"d.v1/k{n}.full.jpg", b"another"),
            (f"d.v1/k{n}.json", text.encode()),
        ]
    ]
    for name, path in (("a", "json:label"), ("b", "json:meta.ids.1")):
        folder = save(tmp_path / name, tar(*files))
        index_shards([folder], layout=SampleLayout(("crop.jpg",), path))
        assert [v for _, v in sorted(_labels(folder).items())] == [0, 1, 2]
        assert "5\n1\t1\t9\n2\t1\tx" in (tmp_path / name / "classes.tsv").read_text()


def _labels(folder: str) -> dict[str, int]:
    index = ShardIndex.load(folder)
    _, labels, keys = read_in_order(index, 0, index.samples, 8)
    return dict(zip(keys, labels.tolist(), strict=True))


def test_what_lies_between_samples_is_passed_over(tmp_path: Path) -> None:
    files: Files = [
        ("README", b"read me"),
        ("./", b""),
        *pair("k0", 0, "0"),
        ("dir/", b""),
        (".hidden.jpg", b"x"),
        ("__index__", b"meta"),
        *pair("../k8", 8, "0"),
        ("k9.jpg", jpeg(9)),
        *pair("x" * 150 + "1", 1, "1"),
        ("note.txt", b"no sample"),
    ]
    folder = save(tmp_path / "set", tar(*files))
    made = index_shards([folder], max_bad=0.6)
    assert read(folder) == {"k0": 0, "x" * 150 + "1": 1}
    assert [(f.location.rpartition(" ")[2], f.reason) for f in made.faults] == [
        ("../k8", "its name leaves the folder"),
        ("k9", "no cls among jpg"),
        ("note", "no image among txt"),
    ]
    assert (tmp_path / "set" / "skipped.tsv").read_text().count("\n") == 4
    loader = loader_of(made.index, _config(folder), range(1), 0, 2)
    assert [sorted(step.micro_batches[0].labels.tolist()) for step in loader] == [[0, 1]] * 2
    assert loader.faults.count == 0


Entry = tuple[str, bytes] | tuple[str, str, str]


def tar_with_links(*entries: Entry) -> bytes:
    """Files, and links by (name, target, type flag)."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as writer:
        for name, content, *kind in entries:
            info = tarfile.TarInfo(name)
            if kind:
                info.type, info.linkname = str(kind[0]).encode(), str(content)
            info.size = 0 if kind else len(content)
            writer.addfile(info, None if kind else io.BytesIO(bytes(content)))  # type: ignore[arg-type]
    return stream.getvalue()


IMAGE = jpeg(0)


@pytest.mark.parametrize(
    ("entries", "reason"),
    [
        ([("img.0001.jpg", IMAGE), ("img.0001.cls", b"0")], "--image 0001.jpg if all"),
        (
            [("a.jpg", IMAGE), ("b.jpg", IMAGE), ("a.cls", b"0"), ("b.cls", b"1")],
            "in several places of the tar: .* tar --sort=name",
        ),
        ([("a.jpg", "b.jpg", "1"), ("a.cls", b"0")], "its jpg is a hard link; .* --hard-deref"),
        ([("a.jpg", "b.jpg", "2"), ("a.cls", b"0")], "its jpg is a symbolic link; .* --deref"),
        ([("a.jpg", IMAGE), ("a.json", b"{}"), ("a.txt", b"x")], "--label json:KEY"),
        ([("a.jpg", IMAGE), ("a.label", b"0")], "no cls among jpg, label; .* --label label"),
    ],
)
def test_tars_of_others_are_refused_with_what_to_type(
    tmp_path: Path, entries: list[Entry], reason: str
) -> None:
    folder = save(tmp_path / "set", tar_with_links(*entries))
    with pytest.raises(RunError, match=reason) as caught:
        index_shards([folder])
    assert len(str(caught.value)) < 2000


def test_ten_thousand_members_of_one_name_make_a_short_message(tmp_path: Path) -> None:
    names = [(f"img.{number:05d}.{'x' * 90}", b"x") for number in range(10_000)]
    with pytest.raises(RunError, match=r"and 995 more") as caught:
        index_shards([save(tmp_path / "set", tar_with_links(*names))])
    assert len(str(caught.value)) < 1000


def test_a_folder_of_compressed_tars_says_how_to_unpack_them(tmp_path: Path) -> None:
    (tmp_path / "a.tar.gz").write_bytes(b"x")
    with pytest.raises(UserError, match=r"no tars here, but 1 \*\.tar\.gz; .*: gunzip "):
        index_shards([str(tmp_path)])


def test_apples_files_are_passed_over(tmp_path: Path) -> None:
    entries: Files = []
    for number in range(2):
        for name, data in pair(f"k{number}", number, str(number)):
            entries = [*entries, (f"d/._{name}", b"apple"), (f"d/{name}", data)]
    folder = save(tmp_path / "set", tar(*entries))
    made = index_shards([folder])
    assert made.faults == []
    assert read(folder) == {"d/k0": 0, "d/k1": 1}


def _config(folder: str) -> Config:
    data = {"shards": folder, "image_size": 8, "streams": 1, "loader_workers": 0}
    return Config.model_validate({"data": data, "train": {"global_batch": 2, "micro_batch": 2}})


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ([("a.jpg", b""), ("a.cls", b"1")], "no image among jpg, cls"),
        ([("a.cls", b"1"), ("a.cls", b"2"), ("a.jpg", b"x")], "cls is there twice"),
        ([("a.jpg", b"x"), ("a.cls", b"-1")], "its label -1 is negative"),
        ([("a.jpg", b"x"), ("a.cls", b" ")], "its label '' is no class"),
        ([("a.jpg", b"x"), ("a.cls", b"\xff")], "can't decode"),
        ([("a.jpg", b"x"), ("a.cls", b"9" * 300)], "is no class"),
        ([("/a.jpg", b"x"), ("/a.cls", b"1")], "leaves the folder"),
    ],
)
def test_a_sample_without_image_or_label_is_counted(
    tmp_path: Path, files: list[tuple[str, bytes]], reason: str
) -> None:
    folder = save(tmp_path / "set", tar(*files, *pair("k0", 0, "0")))
    with pytest.raises(RunError, match="1 of 2 samples are bad"):
        index_shards([folder])
    assert not (tmp_path / "set" / "index.json").exists()
    made = index_shards([folder], max_bad=0.5)
    assert reason in made.faults[0].reason
    assert read(folder) == {"k0": 0}


@pytest.mark.parametrize("text", ["[", "[1]", '{"label": null}', '{"label": true}', '{"a": 1}'])
def test_a_label_that_is_not_in_the_json_is_counted(tmp_path: Path, text: str) -> None:
    files: Files = [("a.jpg", jpeg(0)), ("a.json", text.encode())]
    good: Files = [("b.jpg", jpeg(1)), ("b.json", b'{"label": "x"}')]
    folder = save(tmp_path / "set", tar(*files, *good))
    made = index_shards([folder], layout=SampleLayout(label="json:label"), max_bad=0.5)
    assert len(made.faults) == 1


def test_of_very_many_bad_samples_the_first_are_named_and_all_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (webdataset, webdataset_tar):
        monkeypatch.setattr(module, "MOST_NAMED", 2)
    bad: Files = [(f"bad{number}.jpg", jpeg(0)) for number in range(3)]
    folder = save(tmp_path / "set", tar(*bad, *pair("k0", 0, "0")), tar(*bad, *pair("k1", 1, "1")))
    with pytest.raises(RunError, match="6 of 8 samples are bad"):
        index_shards([folder], max_bad=0.7)
    made = index_shards([folder], max_bad=0.75)
    assert [fault.reason for fault in made.faults] == [
        "no cls among jpg",
        "no cls among jpg",
        "4 more bad samples, which are not named",
    ]
    assert made.index.meta["skipped"] == 6


def test_of_very_many_damaged_tars_a_message_names_some(tmp_path: Path) -> None:
    folder = save(tmp_path / "set", *[b"no tar"] * 30)
    with pytest.raises(UserError, match=r"30 of 30 tars are damaged(?s:.*)and 10 more$") as refused:
        index_shards([folder])
    assert len(str(refused.value).splitlines()) == 22


def test_a_damaged_tar_is_refused_or_read_as_far_as_it_goes(tmp_path: Path) -> None:
    good = tar(*pair("k0", 0, "0"), *pair("k1", 1, "1"), *pair("k2", 2, "0"))
    folder = save(tmp_path / "set", good, good[:2600])
    with pytest.raises(UserError, match=r"1 of 2 tars(?s:.*)other-001\.tar: byte 2560: it ends"):
        index_shards([folder])
    made = index_shards([folder], skip_damaged=True, max_bad=0.5)
    assert [shard.samples for shard in made.index.shards] == [3, 1]
    assert len(made.faults) == 1
    assert not (tmp_path / "set" / ".index.partial").exists()


def test_an_interrupted_index_goes_on(tmp_path: Path) -> None:
    folder = save(tmp_path / "set", *(tar(*pair(f"k{n}", n, str(n))) for n in range(4)))

    with pytest.raises(KeyboardInterrupt):
        index_shards([folder], progress=interrupt_at(2))
    (tmp_path / "set" / "other-000.tar").write_bytes(tar(*pair("k0", 0, "0"), *pair("k9", 9, "1")))
    seen: list[int] = []
    index_shards([folder], progress=lambda done, _: seen.append(done))
    assert seen == [1, 2, 3, 4] or seen[0] == 2
    assert read(folder).keys() >= {"k0", "k1", "k2", "k3"}
    with pytest.raises(UserError, match=r"index\.json: already exists"):
        index_shards([folder])


def test_an_index_that_was_interrupted_while_it_was_written_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own table of classes stood in its way: "already exists; delete it"."""
    folder = save(tmp_path / "set", *(tar(*pair(f"k{n}", n, f"c{n}")) for n in range(3)))

    def stop(self: ShardIndex) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ShardIndex, "save", stop)
        with pytest.raises(KeyboardInterrupt):
            index_shards([folder])
    assert (tmp_path / "set" / "classes.tsv").exists()
    seen: list[int] = []
    index_shards([folder], progress=lambda done, _: seen.append(done))
    assert seen == [3], "no tar is read again"
    assert read(folder) == {f"k{n}": n for n in range(3)}
    (tmp_path / "set" / "index.json").unlink()
    with pytest.raises(UserError, match=r"classes\.tsv: already exists"):
        index_shards([folder])


def test_processes_find_what_one_would(tmp_path: Path) -> None:
    folder = save(tmp_path / "set", *(tar(*pair(f"k{n}", n, f"c{n}")) for n in range(3)))
    one = index_shards([folder], str(tmp_path / "one")).index
    two = index_shards([folder], str(tmp_path / "two"), workers=Processes(2)).index
    assert one.digest == two.digest
    assert _labels(str(tmp_path / "one")) == {"k0": 0, "k1": 1, "k2": 2}


def test_tars_in_several_folders_and_patterns(tmp_path: Path) -> None:
    a = save(tmp_path / "a", tar(*pair("k0", 0, "0")), tar(*pair("k1", 1, "1")))
    b = save(tmp_path / "a" / "b", tar(*pair("k2", 2, "0")))
    given = [f"{a}/other-{{000..001}}.tar", f"{a}/other-*.tar", b]
    with pytest.raises(UserError, match="2 folders: say where the index goes with --out"):
        index_shards(given)
    made = index_shards(given, str(tmp_path / "a"))
    assert [s.url for s in made.index.shards] == [
        "other-000.tar",
        "other-001.tar",
        "b/other-000.tar",
    ]
    elsewhere = index_shards(given, "memory://indexed")
    assert elsewhere.index.shards[2].url == f"{b}/other-000.tar"
    assert read("memory://indexed") == {"k0": 0, "k1": 1, "k2": 0}


@pytest.mark.parametrize("protocol", ["", "file://"])
def test_the_name_of_a_file_stands_for_itself(tmp_path: Path, protocol: str) -> None:
    """After `file://` braces and `*` in a name were a pattern that named other files, or none."""
    for name in ("x{1..2}.tar", "x*.tar", "xy.tar"):
        (tmp_path / name).symlink_to("nowhere")
    for name in ("x{1..2}.tar", "x*.tar"):
        assert expand_tars([f"{protocol}{tmp_path}/{name}"]) == [f"{tmp_path}/{name}"]
    assert len(expand_tars([f"{protocol}{tmp_path}/xy*.tar"])) == 1


def test_tars_behind_a_url() -> None:
    filesystem = fsspec.filesystem("memory")
    filesystem.pipe("/bucket/x-0.tar", tar(*pair("k0", 0, "b"), *pair("k1", 1, "a")))
    index_shards(["memory://bucket"])
    assert read("memory://bucket") == {"k0": 1, "k1": 0}


@pytest.mark.parametrize("given_", ["{0..", "nowhere", "nowhere/a.tar", "*.tar", "nope://a.tar"])
def test_no_tars_is_a_mistake(tmp_path: Path, given_: str) -> None:
    with pytest.raises(UserError):
        index_shards([given_ if "://" in given_ else f"{tmp_path}/{given_}"], str(tmp_path / "out"))


ORIGINAL = tar(*(file for n in range(5) for file in pair(f"k{n}", n, f"c{n % 2}")))


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.lists(st.tuples(st.integers(0, len(ORIGINAL) - 1), st.integers(0, 255)), max_size=4),
    st.integers(0, len(ORIGINAL)),
)
def test_damaged_tars_give_errors_or_true_labels(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[int, int]], length: int
) -> None:
    data = bytearray(ORIGINAL)
    for position, value in changes:
        data[position] = value
    folder = save(tmp_path_factory.mktemp("fuzz") / "set", bytes(data[:length]))
    try:
        made = index_shards([folder], skip_damaged=True, max_bad=1.0)
    except UserError:
        return
    shard = made.index.shards[0]
    names = ["c0", "c1"]
    if (Path(folder) / "classes.tsv").exists():
        rows = (Path(folder) / "classes.tsv").read_text().splitlines()[1:]
        names = [row.split("\t")[2] for row in rows]
    assert shard.labels is not None
    for begin, end, label in zip(
        shard.offsets[:-1].tolist(), shard.offsets[1:].tolist(), shard.labels.tolist(), strict=True
    ):
        if not any(begin <= position < end for position, _ in changes):
            number = ORIGINAL[begin : begin + 2].decode()
            assert names[label] == f"c{int(number[1]) % 2}"
