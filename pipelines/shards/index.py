"""Tar shards and their index: what a data set is on a disk or an object store.

A data set is a folder (any fsspec URL) of WebDataset tars and an `index.json`. The index is
written last, so a folder without one is not a data set, only the remains of an attempt.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, Final, NamedTuple, TypeVar

import fsspec
import numpy as np
import numpy.typing as npt

from mhe_dist.errors import UserError
from pipelines.shards.packing import unpack_labels, unpack_offsets
from pipelines.storage.retry import describe_error, with_retries
from pipelines.storage.urls import atomic_write, is_absolute_url, resolve_url

T = TypeVar("T")
Unpack = Callable[[str, int], npt.NDArray[np.int64]]

INDEX_FILE: Final = "index.json"
_FORMAT: Final = "mhe-shards-1"


class Fault(NamedTuple):
    """Something bad in the data: where it is, and what is wrong with it."""

    location: str
    reason: str


class IndexEntry(NamedTuple):
    """What the index holds of a sample; it counts, whatever the tar says.

    Attributes:
        label: in `[0, C)`.
        image_extensions: extensions of its image, the best first.
    """

    label: int
    image_extensions: tuple[str, ...]


@dataclass(frozen=True)
class Shard:
    """One tar.

    Attributes:
        url: relative to the folder of the index, or a whole URL.
        samples: how many samples it holds.
        bytes: its size.
        checksum: `sha256:` and the hexadecimal digest of the file.
        blocks: the offset table, see `pack_offsets`.
        classes: the labels, see `pack_labels`; empty: only the tar knows them.
    """

    url: str
    samples: int
    bytes: int
    checksum: str
    blocks: str
    classes: str = ""

    def __post_init__(self) -> None:
        texts = (self.url, self.checksum, self.blocks, self.classes)
        counts = (self.samples, self.bytes)
        if not all(isinstance(text, str) for text in texts) or not all(
            isinstance(count, int) and count >= 0 for count in counts
        ):
            raise ValueError(f"not a shard: {self}")

    @cached_property
    def offsets(self) -> npt.NDArray[np.int64]:
        """int64 `[samples + 1]`: where each sample's first header begins, and the last one ends.

        Raises:
            UserError: the table is damaged; so for `labels`.
        """
        return self._table(unpack_offsets, self.blocks, self.samples + 1)

    @cached_property
    def labels(self) -> npt.NDArray[np.int64] | None:
        """int64 `[samples]`, or None if the index does not hold them."""
        return self._table(unpack_labels, self.classes, self.samples) if self.classes else None

    def _table(self, unpack: Unpack, text: str, count: int) -> npt.NDArray[np.int64]:
        try:
            return unpack(text, count)
        except (ValueError, zlib.error) as error:
            raise UserError(
                f"{INDEX_FILE}: the entry of {self.url} is damaged ({error}); make it again"
            ) from None


@dataclass(frozen=True)
class ShardIndex:
    """The shards of one data set, in order; samples are numbered through all of them.

    Attributes:
        folder: URL of the folder that holds `index.json` and the tars.
        num_classes: C; every label is in `[0, C)`.
        shards: the tars.
        meta: more about the data, e.g. the enrolment images of a held-out set.
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
        shards = [[s.url, s.samples, s.checksum] for s in self.shards]
        content: list[Any] = [self.num_classes, shards]
        if self.image_extensions is not None:
            content.append([s.classes for s in self.shards])
        return "sha256:" + hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def url(self, shard: int) -> str:
        """Full URL of a shard, by its number."""
        url = self.shards[shard].url
        return url if is_absolute_url(url) else f"{self.folder}/{url}"

    def sample_name(self, shard: int, position: int) -> str:
        """The name of a sample in messages."""
        return f"sample {position} of {self.url(shard)}"

    @cached_property
    def image_extensions(self) -> tuple[str, ...] | None:
        """Extensions of the images, the best first, of shards that somebody else wrote.

        None for our own shards.
        """
        fields = self.meta.get("fields")
        return None if fields is None else tuple(fields["image"])

    def entry(self, shard: int, position: int) -> IndexEntry | None:
        """Label and image of a sample of shards that somebody else wrote; None for our own."""
        labels = self.shards[shard].labels
        if self.image_extensions is None or labels is None:
            return None
        return IndexEntry(int(labels[position]), self.image_extensions)

    @classmethod
    def load(cls, url: str) -> ShardIndex:
        """Read the index of a folder (or the index itself, if `url` names it).

        Raises:
            UserError: there is none, or it is not an index.
        """
        folder = url.removesuffix(INDEX_FILE).rstrip("/")
        filesystem, path = resolve_url(f"{folder}/{INDEX_FILE}")
        try:
            content = json.loads(with_retries(lambda: filesystem.cat_file(path), folder))
        except FileNotFoundError:
            raise UserError(
                f"{folder}: no shards here ({INDEX_FILE} is missing); give the folder that holds "
                f"{INDEX_FILE}, or set data.glyphs to have the glyph data set made"
            ) from None
        except OSError as error:
            raise UserError(
                f"{folder}/{INDEX_FILE}: cannot be read ({describe_error(error)})"
            ) from error
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{folder}/{INDEX_FILE}: not JSON ({error}); make the index again"
            ) from None
        if not isinstance(content, dict) or content.get("format") != _FORMAT:
            raise UserError(
                f"{folder}/{INDEX_FILE}: not an index of format {_FORMAT}; make it again"
            )
        try:
            shards = [Shard(**shard) for shard in content["shards"]]
            index = cls(folder, int(content["num_classes"]), shards, dict(content["meta"]))
            index.digest, index.image_extensions, index.samples  # noqa: B018, computed once, now
            return index
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise UserError(f"{folder}/{INDEX_FILE}: damaged ({error!r}); make it again") from None

    def save(self) -> None:
        """Write `index.json` into the folder, which makes it a data set."""
        content = {
            "format": _FORMAT,
            "num_classes": self.num_classes,
            "samples": self.samples,
            "meta": self.meta,
            "shards": [asdict(shard) for shard in self.shards],
        }
        with atomic_write(f"{self.folder}/{INDEX_FILE}") as stream:
            stream.write(json.dumps(content, indent=1, ensure_ascii=False).encode())


def index_exists(url: str) -> bool:
    """Whether a folder holds a data set."""
    filesystem, path = fsspec.core.url_to_fs(url)
    return bool(with_retries(lambda: filesystem.exists(f"{path}/{INDEX_FILE}"), url))
