"""Getting data in from and to an object store and a web server, both on loopback."""

from __future__ import annotations

import functools
import http.server
import re
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from mhe_dist.errors import UserError
from pipelines.data.verify import verify_dataset
from pipelines.shards.index import ShardIndex, index_exists
from pipelines.sources.convert import ImportOptions
from pipelines.sources.image_folder import import_folder
from pipelines.sources.insightface import import_recordio
from pipelines.sources.webdataset import index_shards
from pipelines.storage.file_listing import list_files
from pipelines.storage.staging import Journal
from pipelines.storage.worker_pool import Processes
from tests.support.data.images import jpeg
from tests.support.data.recordio_files import content, items, layout, save
from tests.support.faults import interrupt_at
from tests.support.servers.stores import s3_bucket, serving

SMALL = ImportOptions(shard_bytes=50_000)


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """URL of a bucket of an S3 server of this process; credentials come from the environment."""
    with s3_bucket("bucket") as url:
        yield url


@pytest.mark.slow
def test_records_from_and_to_a_store(s3: str, tmp_path: Path) -> None:
    rec, idx = layout(items(5, 8), "classic")
    filesystem = fsspec.filesystem("s3")
    filesystem.pipe({"bucket/in/train.rec": rec, "bucket/in/train.idx": idx})

    out = f"{s3}/out"
    with pytest.raises(KeyboardInterrupt):
        import_recordio(f"{s3}/in/train.rec", out, options=SMALL, writing=interrupt_at(1))
    assert not index_exists(out)
    seen: list[int] = []
    two = SMALL._replace(workers=Processes(2))
    made = import_recordio(
        f"{s3}/in/train.rec", out, options=two, writing=lambda done, _: seen.append(done)
    )
    assert seen[0] == 1
    local = import_recordio(save(tmp_path / "in", rec, idx), str(tmp_path / "out"), options=SMALL)
    assert made.index.digest == local.index.digest
    assert len(content(out)) == 40
    assert not filesystem.exists("bucket/out/.partial")
    with pytest.raises(UserError, match="already exists"):
        import_recordio(f"{s3}/in/train.rec", out, options=SMALL)


def test_a_store_is_indexed_and_verified(s3: str, tmp_path: Path) -> None:
    rec = save(tmp_path / "in", *layout(items()))
    import_recordio(rec, f"{s3}/theirs", options=SMALL)
    fsspec.filesystem("s3").rm([f"bucket/theirs/{name}" for name in ("index.json", "classes.tsv")])
    index = index_shards([f"{s3}/theirs/*.tar"]).index
    assert [shard.url for shard in index.shards] == ["recordio-000000.tar"]
    assert verify_dataset(index, Journal(str(tmp_path / "journal"), 0)).is_good
    assert len(content(f"{s3}/theirs")) == 12


def test_a_store_lists_what_a_disk_lists(s3: str, tmp_path: Path) -> None:
    """Consoles make empty objects that stand for folders; they are no files of a class."""
    filesystem = fsspec.filesystem("s3")
    names = ["a/1.jpg", "a-b/1.jpg", "a/b/2.jpg", "c.jpg", "d/" + "x" * 200 + ".jpg"]
    filesystem.pipe({f"bucket/photos/{name}": jpeg(number) for number, name in enumerate(names)})
    for folder in ("photos/", "photos/a/", "photos/e/"):
        filesystem.call_s3("put_object", Bucket="bucket", Key=folder, Body=b"")
    filesystem.get("bucket/photos", str(tmp_path / "photos"), recursive=True)
    files = [name for name, _ in list_files(f"{s3}/photos") if not name.endswith("/")]
    assert files == sorted(names) == [name for name, _ in list_files(str(tmp_path / "photos"))]
    filesystem.pipe("bucket/photos//odd.jpg", b"1")
    with pytest.raises(UserError, match="bucket/photos//: a folder without a name"):
        list(list_files(f"{s3}/photos"))


class Web(http.server.SimpleHTTPRequestHandler):
    """Files, and parts of them if `ranges`."""

    ranges = True

    def log_message(self, *_: object) -> None:
        """Silence."""

    def send_head(self):
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        path = Path(self.translate_path(self.path))
        if not (self.ranges and wanted and path.is_file()):
            return super().send_head()
        data = path.read_bytes()
        start, stop = int(wanted[1]), min(int(wanted[2] or len(data)) + 1, len(data))
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(data)}")
        self.send_header("Content-Length", str(stop - start))
        self.end_headers()
        self.wfile.write(data[start:stop])
        return None


@pytest.fixture
def web(tmp_path: Path) -> Iterator[str]:
    """URL of a web server for `tmp_path`."""
    handler = functools.partial(Web, directory=str(tmp_path))
    with serving(http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)) as url:
        yield url


def test_records_from_the_web(web: str, tmp_path: Path) -> None:
    save(tmp_path / "in", *layout(items(), "classic"))
    made = import_recordio(f"{web}/in/train.rec", str(tmp_path / "out"))
    assert (made.index.samples, made.warnings) == (12, [])
    assert len(content(str(tmp_path / "out"))) == 12
    with pytest.raises(UserError, match=r"none\.rec: cannot be opened"):
        import_recordio(f"{web}/in/none.rec", str(tmp_path / "other"))


def test_a_server_without_parts_is_told(
    web: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Web, "ranges", False)
    save(tmp_path / "in", *layout(items()))
    with pytest.raises(UserError, match="whole files only, no parts of them: download it first"):
        import_recordio(f"{web}/in/train.rec", str(tmp_path / "out"))


def test_shards_and_lists_on_the_web(web: str, tmp_path: Path) -> None:
    import_recordio(save(tmp_path / "in", *layout(items())), str(tmp_path / "theirs"))
    tar = f"{web}/theirs/recordio-000000.tar"
    with pytest.raises(UserError, match="choose another --out"):
        index_shards([tar])
    (tmp_path / "theirs" / "index.json").unlink()
    index_shards([tar], str(tmp_path / "index"))
    assert ShardIndex.load(str(tmp_path / "index")).shards[0].url == tar
    assert len(content(str(tmp_path / "index"))) == 12

    (tmp_path / "root" / "a b").mkdir(parents=True)
    (tmp_path / "root" / "a b" / "1#.jpg").write_bytes(jpeg(1))
    (tmp_path / "train.lst").write_text("0\t3\ta b/1#.jpg\n1\t4\tgone.jpg\n")
    made = import_folder(
        f"{web}/root", str(tmp_path / "out"), f"{web}/train.lst", ImportOptions(max_bad=0.5)
    )
    assert (made.index.samples, len(made.faults)) == (1, 1)
