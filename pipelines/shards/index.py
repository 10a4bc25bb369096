"""Tar shards and their index: what a data set is on a disk or an object store.

A data set is a folder (any fsspec URL) of WebDataset tars and an index: `index.json`, the table of
shards, and columns with a value per sample (`columns.py`). `index.json` is written last, so a
folder without one is not a data set, only the remains of an attempt.
"""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from mhe_dist.errors import UserError
from pipelines.shards.columns import Column
from pipelines.shards.manifest import read_manifest
from pipelines.shards.shard import (
    IndexColumns,
    MappedShard,
    Shard,
    describe_shard,
    write_columns,
)
from pipelines.shards.shard_list import ShardTable, digest_text, shard_sizes, shard_urls
from pipelines.storage.urls import (
    atomic_write,
    is_absolute_url,
    is_local_url,
    list_folder,
    url_exists,
)

INDEX_FILE: Final = "index.json"
FORMAT: Final = "mhe-shards-2"
_LOOKED_INTO: Final = 20  # folders in which a data set is looked for
PACKED_FORMAT: Final = "mhe-shards-1"  # its tables are inside index.json
UNLABELLED: Final = "unlabelled"
"""Key of `meta` that is true where the images are in no class; and the name of their one class."""


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
class ShardIndex:
    """The shards of one data set, in order; samples are numbered through all of them.

    Attributes:
        folder: URL of the folder that holds `index.json` and the tars.
        num_classes: C; every label is in `[0, C)`.
        shards: the tars.
        meta: more about the data, e.g. the enrolment images of a held-out set.
        recorded_digest: see `digest`; what a file of format 2 says, of shards that somebody else
            wrote: packed labels are part of it, which no two versions of zlib need make the same.
    """

    folder: str
    num_classes: int
    shards: Sequence[Shard]
    meta: dict[str, Any] = field(default_factory=dict)
    recorded_digest: str = field(default="", kw_only=True, compare=False)

    @cached_property
    def starts(self) -> npt.NDArray[np.int64]:
        """int64 `[shards + 1]`: number of the first sample of each shard, and the total."""
        return np.cumsum(np.append(0, self.sizes), dtype=np.int64)

    @cached_property
    def sizes(self) -> npt.NDArray[np.int64]:
        """int64 `[shards]`: samples of each shard."""
        return shard_sizes(self.shards)

    @cached_property
    def samples(self) -> int:
        """N: samples in all shards."""
        return int(self.starts[-1])

    @cached_property
    def digest(self) -> str:
        """`sha256:` of the class count and of the shards' order and contents; not of `folder`.

        It is the same in every format of the index.
        """
        if self.recorded_digest:
            return self.recorded_digest
        content = [json.dumps(self.num_classes), digest_text(self.shards)]
        if self.image_extensions is not None:
            content.append(json.dumps([s.packed_labels for s in self.shards]))
        text = f"[{', '.join(content)}]"
        return "sha256:" + hashlib.sha256(text.encode()).hexdigest()

    def url(self, shard: int) -> str:
        """Full URL of a shard, by its number."""
        url = self.shards[shard].url
        return url if is_absolute_url(url) else f"{self.folder}/{url}"

    @property
    def is_local(self) -> bool:
        """Whether all its shards are on this machine; none of them is looked at."""
        urls = shard_urls(self.shards)
        folders = {url.rpartition("/")[0] if is_absolute_url(url) else self.folder for url in urls}
        return all(map(is_local_url, folders))

    def locate(self, number: int) -> tuple[int, int]:
        """Shard of a sample by its number through all shards, and its position there."""
        shard = int(np.searchsorted(self.starts, number, side="right")) - 1
        return shard, number - int(self.starts[shard])

    def cut(self, begin: int, end: int) -> ShardIndex:
        """An index of the shards `[begin, end)` alone, for a process that need not know the others.

        Their samples are numbered anew, and of `meta` it keeps how samples are read.
        """
        meta = {key: value for key, value in self.meta.items() if key == "fields"}
        return ShardIndex(self.folder, self.num_classes, self.shards[begin:end], meta)

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
        if self.image_extensions is None:
            return None
        label = self.shards[shard].label(position)
        return None if label is None else IndexEntry(label, self.image_extensions)

    def labels_of(self, numbers: npt.NDArray[np.int64]) -> npt.NDArray[np.int64] | None:
        """The labels of samples by their numbers through all shards, int64; nothing is kept.

        None: they are in no column; the tars alone know them, or tables in memory.
        """
        labels = self.label_column
        return None if labels is None else labels[numbers].astype(np.int64)

    @property
    def label_column(self) -> npt.NDArray[np.integer] | None:
        """The labels of all samples `[samples]`, mapped, as they are stored; None: see above."""
        first = self.shards[0] if self.shards else None
        column = first.columns.labels if isinstance(first, MappedShard) else None
        return None if column is None else column.values

    @property
    def has_label_columns(self) -> bool:
        """Whether `labels_of` finds the labels of all samples; none is looked up."""
        return self.label_column is not None

    @property
    def knows_labels(self) -> bool:
        """Whether the images are in classes, and a column tells in which."""
        return not self.meta.get(UNLABELLED) and self.label_column is not None

    @property
    def label_shape(self) -> tuple[int, ...]:
        """Shape of a sample's labels in a run: `()`, one, or `(K,)`, up to K and then -1."""
        return ()

    @property
    def draws_labels(self) -> bool:
        """Whether a sample may have more classes than it shows in an epoch, or fewer than K."""
        return False

    def labels_in_epoch(
        self, numbers: npt.NDArray[np.int64], epoch: int
    ) -> npt.NDArray[np.int64] | None:
        """The labels of samples in an epoch, int64 `[n, *label_shape]`; None: see `labels_of`."""
        return self.labels_of(numbers)

    @property
    def is_packed(self) -> bool:
        """Whether its tables are in memory, as in an index of format 1, and not in columns."""
        if isinstance(self.shards, ShardTable):
            return False
        return not all(isinstance(shard, MappedShard) for shard in self.shards)

    @property
    def columns(self) -> list[Column]:
        """The columns that all its shards share; none in an index of format 1."""
        first = self.shards[0] if self.shards else None
        return first.columns.known if isinstance(first, MappedShard) else []

    def map_columns(self) -> None:
        """Open the columns now, if there are any; those of a store are fetched first.

        Raises:
            UserError, RunError: see `Column.values`.
        """
        for column in self.columns:
            column.values  # noqa: B018, it is opened by this

    @classmethod
    def load(cls, url: str, cache_dir: str = "") -> ShardIndex:
        """Read the index of a folder (or the index itself, if `url` names it).

        Local columns are mapped now, which reads none of their values. Those of a store are fetched
        when they are used first.

        Args:
            url: of the folder.
            cache_dir: folder of this node for columns of a store; empty: see `default_cache_dir`.

        Raises:
            UserError: there is none, or it is not an index, or a column is missing or damaged.
        """
        index = cls.read_table(url, cache_dir)
        if is_local_url(index.folder):
            index.map_columns()
        return index

    @classmethod
    def read_table(cls, url: str, cache_dir: str = "") -> ShardIndex:
        """Read `index.json` alone, see `load`; its columns may be missing."""
        folder = url.removesuffix(INDEX_FILE).rstrip("/")
        content = _read_json(folder)
        try:
            return cls._parse(folder, content, cache_dir)
        except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
            raise UserError(f"{folder}/{INDEX_FILE}: damaged ({error!r}); make it again") from None

    @classmethod
    def _parse(cls, folder: str, content: dict[str, Any], cache_dir: str) -> ShardIndex:
        num_classes, meta = int(content["num_classes"]), dict(content["meta"])
        if content["format"] == PACKED_FORMAT:
            packed = [Shard(**shard) for shard in content["shards"]]
            index = cls(folder, num_classes, packed, meta)
            index.digest, index.image_extensions, index.samples  # noqa: B018, computed once, now
            return index
        columns = IndexColumns.parse(folder, content["columns"], cache_dir)
        shards = ShardTable(columns, content["shards"])
        index = cls(folder, num_classes, shards, meta)
        if index.image_extensions is None:
            return index
        return cls(folder, num_classes, shards, meta, recorded_digest=str(content["digest"]))

    def save(self) -> None:
        """Write the columns and then `index.json` into the folder, which makes it a data set.

        Shard by shard, so the tables of all shards are never in memory together.
        """
        self.write_table(write_columns(self.folder, self.shards))

    def write_table(self, columns: dict[str, dict[str, Any]]) -> None:
        """Write `index.json` alone; `columns` is what it says of the columns that are there."""
        about = {
            "format": FORMAT,
            "num_classes": self.num_classes,
            "samples": self.samples,
            "digest": self.digest,
            "meta": self.meta,
            "columns": columns,
        }
        # A line for each shard, so that the table is short and can be read by people.
        rows = ",\n  ".join(
            json.dumps(describe_shard(shard), ensure_ascii=False) for shard in self.shards
        )
        head = json.dumps(about, indent=1, ensure_ascii=False).removesuffix("\n}")
        with atomic_write(f"{self.folder}/{INDEX_FILE}") as stream:
            text = f'{head},\n "shards": [\n  {rows}\n ]\n}}\n'
            # What is no UTF-8 in a file's name becomes an escape of JSON.
            stream.write(text.encode(errors="backslashreplace"))


def _read_json(folder: str) -> dict[str, Any]:
    return read_manifest(
        folder,
        INDEX_FILE,
        (FORMAT, PACKED_FORMAT),
        missing=lambda: f"no shards here ({INDEX_FILE} is missing); {_other_folder(folder)}",
        foreign=f"not an index of format {PACKED_FORMAT} or {FORMAT}; make it again",
        again="make the index again",
    )


def _other_folder(folder: str) -> str:
    """What to do where a folder is no data set, from what lies in it."""
    if named := name_data_sets(folder):
        return named
    if any(name.endswith(".tar") for name in list_folder(folder)):
        return f"its tars get one with: mhe data index {shlex.quote(folder)}"
    return f"give the folder that holds {INDEX_FILE}"


def name_data_sets(folder: str) -> str:
    """Which data sets lie side by side in a folder, such as `train` and `heldout`; empty: none."""
    names = (name.rpartition("/")[2] for name in list_folder(folder)[:_LOOKED_INTO])
    found = [f"{folder}/{name}" for name in names if index_exists(f"{folder}/{name}")]
    return f"give one of the folders in it that are data sets: {', '.join(found)}" if found else ""


def index_exists(url: str) -> bool:
    """Whether a folder holds a data set; raises as `url_exists`."""
    return url_exists(f"{url.rstrip('/')}/{INDEX_FILE}")
