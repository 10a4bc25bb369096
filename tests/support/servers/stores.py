"""Stores to test with: one in this process that counts, and servers on loopback that fail."""

from __future__ import annotations

import io
import multiprocessing
import random
import tarfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import HTTPServer
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
from werkzeug.serving import WSGIRequestHandler, make_server
from werkzeug.utils import send_file
from werkzeug.wrappers import Request, Response

from pipelines.shards.index import ShardIndex
from pipelines.shards.packing import pack_labels, pack_offsets
from pipelines.shards.shard import Shard
from tests.support.data.images import jpeg
from tests.support.data.tars import add_members

Content = Callable[[str, int, int], bytes]


def from_disk(path: str, start: int, stop: int) -> bytes:
    with open(path, "rb") as stream:
        stream.seek(start)
        return stream.read(stop - start)


class Counted(fsspec.AbstractFileSystem):
    """`counted:///path` is a local file that counts as a remote one."""

    protocol = "counted"
    content: ClassVar[Content] = staticmethod(from_disk)
    bytes: ClassVar[Any] = multiprocessing.Value("q")  # served, to all processes
    threads: ClassVar[set[str]] = set()  # that asked, in this process

    @classmethod
    def begin(cls, content: Content = from_disk) -> None:
        """Count from zero, and serve something else."""
        cls.content = staticmethod(content)
        cls.bytes.value = 0
        cls.threads.clear()

    def cat_file(self, path: str, start: int = 0, end: int = 0, **_: Any) -> bytes:
        self.threads.add(threading.current_thread().name.partition("_")[0])
        data = type(self).content(path, start, end)
        with self.bytes.get_lock():
            self.bytes.value += len(data)
        return data

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        return {"name": path, "size": Path(path).stat().st_size, "type": "file"}


fsspec.register_implementation("counted", Counted, clobber=True)


class Synthetic:
    """A data set of any size that is nowhere: samples are made when they are read."""

    def __init__(self, shards: int, samples: int, sample_bytes: int, classes: int = 10) -> None:
        """`samples` in each of the shards, `sample_bytes` (a multiple of 1024) each."""
        self.each, self.size, self.classes = samples, sample_bytes, classes
        labels = [number % classes for number in range(samples)]
        offsets = pack_offsets(range(0, (samples + 1) * sample_bytes, sample_bytes))
        about = (samples, samples * sample_bytes, "", offsets, pack_labels(labels))
        tars = [Shard(f"counted:///{number}.tar", *about) for number in range(shards)]
        self.index = ShardIndex("counted:///", classes, tars)
        self._image = jpeg(0)

    def content(self, path: str, start: int, stop: int) -> bytes:
        """Bytes of a shard; whole samples only."""
        assert start % self.size == stop % self.size == 0
        shard = int(Path(path).stem)
        return b"".join(
            self._sample(shard, n) for n in range(start // self.size, stop // self.size)
        )

    def _sample(self, shard: int, number: int) -> bytes:
        stream = io.BytesIO()
        filling = self.size - 3 * 512 - 512 - -(-len(self._image) // 512) * 512
        members = {
            "cls": str(number % self.classes).encode(),
            "jpg": self._image,
            "bin": bytes(filling),
        }
        with tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            key = f"{shard:03d}-{number:05d}"
            add_members(tar, ((f"{key}.{extension}", data) for extension, data in members.items()))
            assert tar.offset == self.size
            return stream.getvalue()[: self.size]


class Faulty:
    """A web application whose answers to GET are 503 or cut off now and then, by a seed."""

    def __init__(self, app: Any, share: float = 0.05, seed: int = 0) -> None:
        self._app, self._share = app, share
        self._draws, self._lock = random.Random(seed), threading.Lock()
        self.requests = self.faults = 0
        self.is_on = True

    def __call__(self, environ: dict[str, Any], start: Any) -> Any:
        if not self.is_on or environ["REQUEST_METHOD"] != "GET":
            return self._app(environ, start)
        with self._lock:
            self.requests += 1
            fails, unavailable = self._draws.random() < self._share, self._draws.random() < 0.5
            self.faults += fails
        if not fails:
            return self._app(environ, start)
        if unavailable:
            return Response("busy", 503)(environ, start)
        return self._cut_off(b"".join(self._app(environ, start)))

    def _cut_off(self, body: bytes) -> Iterator[bytes]:
        yield body[: len(body) // 2]
        raise ConnectionResetError


class _Silent(WSGIRequestHandler):
    def log(self, *_: Any, **__: Any) -> None:
        """Nothing."""


@contextmanager
def served(app: Any) -> Iterator[str]:
    """URL of a server of this process for a web application."""
    with serving(make_server("127.0.0.1", 0, app, threaded=True, request_handler=_Silent)) as url:
        yield url


@contextmanager
def serving(server: HTTPServer) -> Iterator[str]:
    """URL of a server that a thread of this process runs inside the block."""
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def files(folder: Path) -> Any:
    """A web application: the files of a folder, and parts of them."""

    @Request.application
    def app(request: Request) -> Response:
        path = folder / request.path.lstrip("/")
        if not path.is_file():
            return Response("not found", 404)
        return send_file(path, request.environ, mimetype="application/x-tar", conditional=True)

    return app


@contextmanager
def s3_bucket(name: str) -> Iterator[str]:
    """URL of an empty bucket of an S3 server of this process, which the environment names.

    What s3fs keeps of a store it keeps under no address: another test would ask this server.
    """
    server = pytest.importorskip("moto.server").ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    s3fs = pytest.importorskip("s3fs")
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for variable in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(variable, "testing")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        s3fs.S3FileSystem.clear_instance_cache()
        fsspec.filesystem("s3").mkdir(name)
        yield f"s3://{name}"
        s3fs.S3FileSystem.clear_instance_cache()
    server.stop()
