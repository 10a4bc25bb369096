"""Tar shards and their index: what a data set is on a disk or an object store.

A data set is a folder (any fsspec URL) of WebDataset tars and an `index.json`. The index is
written last, so a folder without one is not a data set, only the remains of an attempt.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import shutil
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Final, NamedTuple

import fsspec
import numpy as np
import numpy.typing as npt
from fsspec.implementations.local import LocalFileSystem

from mhe_dist.errors import UserError

Progress = Callable[[int, int], None]
"""Called as `progress(done, total)` while something long is made."""

INDEX: Final = "index.json"
_FORMAT: Final = "mhe-shards-1"
_BLOCK: Final = 512  # a tar is made of blocks of this many bytes


def ignore(done: int, total: int) -> None:
    """The progress callback of those who do not watch."""


class Sample(NamedTuple):
    """One sample of a tar: a key, unique and without a dot, and its members by extension."""

    key: str
    members: dict[str, bytes]


@dataclass(frozen=True)
class Shard:
    """One tar.

    Attributes:
        url: relative to the folder of the index.
        samples: how many samples it holds.
        bytes: its size.
        checksum: `sha256:` and the hexadecimal digest of the file.
        blocks: the offset table, see `pack_offsets`.
    """

    url: str
    samples: int
    bytes: int
    checksum: str
    blocks: str

    @cached_property
    def offsets(self) -> npt.NDArray[np.int64]:
        """int64 `[samples + 1]`: where each sample's first header begins, and the last one ends."""
        return unpack_offsets(self.blocks)


@dataclass(frozen=True)
class ShardIndex:
    """The shards of one data set, in order; samples are numbered through all of them.

    Attributes:
        folder: URL of the folder that holds `index.json` and the tars.
        num_classes: C; every label is in `[0, C)`.
        shards: the tars.
        meta: whatever the writer wants to tell, e.g. the enrolment images of a held-out set.
    """

    folder: str
    num_classes: int
    shards: list[Shard]
    meta: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def starts(self) -> npt.NDArray[np.int64]:
        """int64 `[shards + 1]`: number of the first sample of each shard, and the total."""
        return np.cumsum([0, *(shard.samples for shard in self.shards)], dtype=np.int64)

    @cached_property
    def samples(self) -> int:
        """N: samples in all shards."""
        return int(self.starts[-1])

    @cached_property
    def digest(self) -> str:
        """`sha256:` of the class count and of the shards' order and contents; not of `folder`."""
        content = [self.num_classes, [[s.url, s.samples, s.checksum] for s in self.shards]]
        return "sha256:" + hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def url(self, shard: int) -> str:
        """Full URL of a shard, by its number."""
        return f"{self.folder}/{self.shards[shard].url}"

    @classmethod
    def load(cls, url: str) -> ShardIndex:
        """Read the index of a folder (or the index itself, if `url` names it).

        Raises:
            UserError: there is none, or it is not an index.
        """
        folder = url.removesuffix(INDEX).rstrip("/")
        try:
            with fsspec.open(f"{folder}/{INDEX}", "rt") as stream:
                content = json.load(stream)
        except FileNotFoundError:
            raise UserError(
                f"{folder}: no shards here ({INDEX} is missing); give the folder that holds {INDEX}"
                f", or set data.glyphs to have the glyph data set made"
            ) from None
        except ValueError as error:
            raise UserError(f"{folder}/{INDEX}: not JSON ({error}); make the index again") from None
        if not isinstance(content, dict) or content.get("format") != _FORMAT:
            raise UserError(f"{folder}/{INDEX}: not an index of format {_FORMAT}; make it again")
        try:
            shards = [Shard(**shard) for shard in content["shards"]]
            return cls(folder, int(content["num_classes"]), shards, content["meta"])
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{folder}/{INDEX}: damaged ({error!r}); make it again") from None

    def save(self) -> None:
        """Write `index.json` into the folder, which makes it a data set."""
        content = {
            "format": _FORMAT,
            "num_classes": self.num_classes,
            "samples": self.samples,
            "meta": self.meta,
            "shards": [asdict(shard) for shard in self.shards],
        }
        with fsspec.open(f"{self.folder}/{INDEX}", "wt") as stream:
            json.dump(content, stream, indent=1, ensure_ascii=False)


def exists(url: str) -> bool:
    """Whether a folder holds a data set."""
    filesystem, path = fsspec.core.url_to_fs(url)
    return bool(filesystem.exists(f"{path}/{INDEX}"))


def pack_offsets(offsets: Iterable[int]) -> str:
    """The offset table as text: base64 of zlib of the uint32 (little-endian) differences in blocks.

    Every member of a tar begins at a multiple of 512 bytes. A sample costs about 2 bytes.
    """
    steps = np.diff(np.asarray(list(offsets), np.int64), prepend=0) // _BLOCK
    return base64.b64encode(zlib.compress(steps.astype("<u4").tobytes())).decode()


def unpack_offsets(text: str) -> npt.NDArray[np.int64]:
    """The inverse of `pack_offsets`: int64 byte offsets."""
    steps = np.frombuffer(zlib.decompress(base64.b64decode(text)), "<u4")
    return np.cumsum(steps, dtype=np.int64) * _BLOCK


class ShardWriter:
    """Writes a data set: one call of `write` per tar, then `finish`.

    Locally everything is written to a hidden folder beside the target and renamed as a whole by
    `finish`; what leaves the `with` block without it leaves nothing behind. On an object store,
    where an object appears only when it is complete, the tars go straight to their place and the
    index follows last.
    """

    def __init__(self, folder: str, prefix: str) -> None:
        """Claim the target.

        Args:
            folder: path or URL of the data set, which must not exist.
            prefix: of the tars' names: `prefix-000000.tar` and so on.

        Raises:
            UserError: there is something at `folder` already.
        """
        self._filesystem, self._target = fsspec.core.url_to_fs(folder)
        refuse_existing(folder)
        self._local = isinstance(self._filesystem, LocalFileSystem)
        self.folder = str(_staging(Path(self._target))) if self._local else folder.rstrip("/")
        self._prefix = prefix
        self._shards: list[Shard] = []
        self._finished = False

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._local and not self._finished:
            shutil.rmtree(self.folder, ignore_errors=True)

    def write(self, samples: Iterable[Sample]) -> Shard:
        """Write the next tar; its samples keep their order.

        Raises:
            ValueError: a key that WebDataset would split or skip.
        """
        url = f"{self._prefix}-{len(self._shards):06d}.tar"
        with fsspec.open(f"{self.folder}/{url}", "wb") as stream:
            shard = _write_tar(stream, url, samples)
        self._shards.append(shard)
        return shard

    def finish(self, num_classes: int, meta: dict[str, Any] | None = None) -> ShardIndex:
        """Write the index and give the data set its final name."""
        ShardIndex(self.folder, num_classes, self._shards, meta or {}).save()
        self._finished = True
        if self._local:
            Path(self.folder).rename(self._target)
            self.folder = self._target
        return ShardIndex(self.folder, num_classes, self._shards, meta or {})


def refuse_existing(folder: str) -> None:
    """Raise UserError if there is anything at a path or URL, except an empty folder."""
    filesystem, path = fsspec.core.url_to_fs(folder)
    if filesystem.isfile(path) or (filesystem.exists(path) and filesystem.ls(path, detail=False)):
        raise UserError(f"{folder}: already exists; delete it or choose another output folder")


def _staging(target: Path) -> Path:
    """A new hidden folder beside `target`, on the same file system."""
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent)
    umask = os.umask(0)
    os.umask(umask)
    os.chmod(folder, 0o777 & ~umask)  # mkdtemp's 0700 would keep other users out for ever
    return Path(folder)


class _Counted(io.RawIOBase):
    """Counts and hashes what is written through it."""

    def __init__(self, stream: IO[bytes]) -> None:
        self.stream, self.bytes, self.hash = stream, 0, hashlib.sha256()

    def write(self, data: Any) -> int:
        """Pass `data` on."""
        self.stream.write(data)
        self.hash.update(data)
        self.bytes += len(data)
        return len(data)

    def tell(self) -> int:
        """Bytes written so far: the place in the tar."""
        return self.bytes


def _write_tar(stream: IO[bytes], url: str, samples: Iterable[Sample]) -> Shard:
    """Write one tar, the same bytes for the same samples, and describe it."""
    counted = _Counted(stream)
    offsets = [0]
    with tarfile.open(fileobj=counted, mode="w") as tar:
        for sample in samples:
            if not sample.key or "." in sample.key or sample.key.startswith("__"):
                raise ValueError(f"{sample.key!r} cannot be the key of a WebDataset sample")
            for extension, data in sample.members.items():
                info = tarfile.TarInfo(f"{sample.key}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
            offsets.append(tar.offset)
    checksum = f"sha256:{counted.hash.hexdigest()}"
    return Shard(url, len(offsets) - 1, counted.bytes, checksum, pack_offsets(offsets))
