"""`mhe data index FOLDER` on a data set that has an index: columns are made, the digest stays."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from mhe_dist.errors import UserError
from pipelines.shards.index import ShardIndex
from pipelines.shards.writer import Sample, ShardWriter
from pipelines.sources.renew_index import renew_index
from pipelines.sources.webdataset import index_shards
from tests.support.data.images import jpeg
from tests.support.data.shard_sets import PACKED, tables
from tests.support.data.tars import tar
from tests.support.files import contents
from tests.unit.pipelines.sources.test_webdataset import pair, save


@pytest.mark.parametrize("name", ["own", "foreign"])
def test_an_index_of_before_gets_columns_without_a_tar(tmp_path: Path, name: str) -> None:
    folder = shutil.copytree(PACKED / name, tmp_path / "set")  # there are no tars
    before = ShardIndex.load(str(folder))
    made = renew_index(f"{folder}/index.json")
    assert made is not None
    assert made.notes == ["its index has columns now; no tar was read, and its digest is the same"]
    assert not made.index.is_packed
    assert (made.index.digest, tables(made.index)) == (before.digest, tables(before))
    assert made.index == ShardIndex.load(str(folder))
    assert renew_index(str(folder)) is None


def own(folder: Path) -> str:
    with ShardWriter(str(folder), "part") as writer:
        for first in (0, 3):
            numbers = range(first, first + 3)
            writer.write(
                Sample(f"k{n}", {"jpg": jpeg(n), "cls": str(n % 4).encode()}) for n in numbers
            )
        return writer.finish(4).folder


def foreign(folder: Path) -> str:
    bad = [("b1.jpg", b""), ("b1.cls", b"dog")]
    url = save(
        folder, tar(*pair("a0", 0, "cat"), *bad, *pair("a2", 2, "dog")), tar(*pair("a3", 3, "cat"))
    )
    return index_shards([url], max_bad=0.5).index.folder


def numbered(folder: Path) -> str:
    return index_shards([save(folder, tar(*pair("a0", 0, "1"), *pair("a1", 1, "0")))]).index.folder


@pytest.mark.parametrize("make", [own, foreign, numbered])
@pytest.mark.parametrize("name", ["begins.npy", "labels.npy"])
@pytest.mark.parametrize("is_missing", [True, False])
def test_columns_are_made_again_from_the_tars(
    tmp_path: Path, make: Callable[[Path], str], name: str, is_missing: bool
) -> None:
    folder = make(tmp_path / "set")
    before = contents(Path(folder))
    assert renew_index(folder) is None
    if is_missing:
        Path(folder, name).unlink()
    else:
        Path(folder, name).write_bytes(before[name][:-1] + b"\x7f")
    made = renew_index(folder)
    assert made is not None
    fault = "missing" if is_missing else "damaged"
    assert made.notes == [f"its columns are made again ({name}: {fault})"]
    assert contents(Path(folder)) == before


def test_other_tars_do_not_make_its_columns(tmp_path: Path) -> None:
    folder = own(tmp_path / "set")
    Path(folder, "labels.npy").unlink()
    shutil.copy(f"{folder}/part-000001.tar", f"{folder}/part-000000.tar")
    with pytest.raises(UserError, match=r"part-000000\.tar: its checksum .* the tar was changed"):
        renew_index(folder)
    assert not Path(folder, "labels.npy").exists()


def test_an_index_that_the_tars_do_not_lead_to_is_refused(tmp_path: Path) -> None:
    folder = own(tmp_path / "set")
    content = json.loads(Path(folder, "index.json").read_text())
    content["columns"]["labels"]["checksum"] = f"sha256:{0:064x}"
    Path(folder, "index.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"labels\.npy: what the tars give is not the column of"):
        renew_index(folder)


def test_where_there_is_no_index_there_is_nothing_to_renew(tmp_path: Path) -> None:
    assert renew_index(str(tmp_path)) is None
    assert renew_index(f"{tmp_path}/{{000..099}}.tar") is None
