"""A folder of embeddings: a row for each sample of a data set, in its order, mapped into memory.

    embeddings.npy     the rows, float32 or float16 `[N, D]`; each process maps the pages it needs
    embeddings.json    of which data set and which model they are, and which parts are complete

A part is some whole shards. Parts are written in place, in any order, by any number of processes,
and what they hold does not depend on that (`write_folder.py`). docs/formats.md describes the files.
"""

from __future__ import annotations

import hashlib
import io
import json
import mmap
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from mhe_dist.errors import UserError
from pipelines.embedding.made_by import MadeBy
from pipelines.shards.index import ShardIndex
from pipelines.shards.manifest import read_manifest
from pipelines.shards.shard import MappedShard
from pipelines.storage.urls import atomic_write, is_local, resolve_url

MANIFEST: Final = "embeddings.json"
ROWS_FILE: Final = "embeddings.npy"
FORMAT: Final = "mhe-embeddings-1"
DTYPES: Final = ("float32", "float16")
PLACES: Final = ("source", "checkpoint", "step")
"""Fields of a recipe that say where things are; their digests say what they are."""
PART_ROWS: Final = 1 << 14
"""A part ends with the shard that brings it to so many rows; parts are part of the format."""

_CHUNK: Final = 1 << 23  # bytes that are hashed at a time


@dataclass(frozen=True)
class EmbeddingsRecipe:
    """Everything that decides what is in the rows.

    Attributes:
        source: absolute path or URL of the data set.
        index_digest: see `ShardIndex.digest`.
        checkpoint: absolute path or URL of the model's checkpoint.
        step: its completed steps.
        model_digest: `sha256:...` of its weights.
        image_size: width and height of the images.
        flip: the embedding of the mirrored image is added.
        normalize: rows have length 1.
        dtype: `float32` or `float16`.
        samples, dim: N and D.
    """

    source: str
    index_digest: str
    checkpoint: str
    step: int
    model_digest: str
    image_size: int
    flip: bool
    normalize: bool
    dtype: str
    samples: int
    dim: int

    @property
    def made_by(self) -> MadeBy:
        """Which model makes them, and how."""
        return MadeBy(*(getattr(self, name) for name in MadeBy._fields))

    @property
    def header(self) -> bytes:
        """How the file of the rows begins."""
        stream = io.BytesIO()
        about = {
            "descr": np.lib.format.dtype_to_descr(self.stored),
            "fortran_order": False,
            "shape": (self.samples, self.dim),
        }
        np.lib.format.write_array_header_1_0(stream, about)
        return stream.getvalue()

    @property
    def stored(self) -> np.dtype[Any]:
        """The dtype as it is in the file, little-endian."""
        return np.dtype(self.dtype).newbyteorder("<")

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return self.dim * self.stored.itemsize

    @property
    def file_bytes(self) -> int:
        """Bytes of the file of the rows."""
        return len(self.header) + self.samples * self.row_bytes

    def refuse_other(self, made: EmbeddingsRecipe, folder: str) -> None:
        """Raise UserError, which names what differs, if the rows of a folder are of another recipe.

        Where data set and checkpoint lie does not matter.

        Args:
            made: recipe of the rows.
            folder: that holds them.
        """
        words = {
            "index_digest": ("data set", made.source, self.source),
            "model_digest": ("model", made.made_by.model, self.made_by.model),
        }
        for key, before in asdict(made).items():
            now = getattr(self, key)
            if key in PLACES or before == now:
                continue
            name, old, new = words.get(key, (key, before, now))
            raise UserError(
                f"{folder}: holds embeddings with {name} {old}, not {new}; type what made it to go "
                "on with it, delete it, or choose another --out"
            )


class EmbeddingsPart(NamedTuple):
    """A complete part.

    Attributes:
        first, rows: which rows it holds.
        checksum: `sha256:...` of their bytes in the file.
    """

    first: int
    rows: int
    checksum: str


@dataclass(frozen=True)
class EmbeddingsFolder:
    """A folder of embeddings; what is pickled is where it is, never its rows.

    Attributes:
        path: of the folder.
        recipe: what it holds.
        parts: those that are complete, in order.
    """

    path: str
    recipe: EmbeddingsRecipe
    parts: Sequence[EmbeddingsPart]

    @classmethod
    def open(cls, path: str) -> EmbeddingsFolder:
        """Open a complete folder; no row is read.

        Raises:
            UserError: there is none, it is not complete or damaged, or another version wrote it.
        """
        folder = cls.read(path)
        done = sum(part.rows for part in folder.parts)
        if done != folder.recipe.samples:
            raise UserError(
                f"{path}: {folder.recipe.samples - done:,} of {folder.recipe.samples:,} embeddings "
                "are missing: type the mhe embed that made it, and it goes on"
            )
        folder.rows  # noqa: B018, its file is checked by this
        return folder

    @classmethod
    def read(cls, path: str) -> EmbeddingsFolder:
        """Read the manifest of a folder, which may be incomplete.

        Raises:
            UserError: see `open`.
        """
        path = local_folder(path)
        content = read_manifest(
            path,
            MANIFEST,
            (FORMAT,),
            missing=lambda: (
                f"no embeddings here ({MANIFEST} is missing); mhe embed RUN --images SHARDS "
                "--out FOLDER makes them"
            ),
            foreign=f"not embeddings of format {FORMAT}; make them again",
            again="make the embeddings again",
        )
        try:
            recipe = EmbeddingsRecipe(**content["recipe"])
            parts = [EmbeddingsPart(**part) for part in content["parts"]]
            if recipe.dtype not in DTYPES:
                raise ValueError(f"dtype {recipe.dtype}")
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path}/{MANIFEST}: damaged ({error!r}); make it again") from None
        return cls(path, recipe, parts)

    def save(self) -> None:
        """Write the manifest; a line for each part."""
        about = {"format": FORMAT, "recipe": asdict(self.recipe)}
        head = json.dumps(about, indent=1, ensure_ascii=False).removesuffix("\n}")
        lines = ",\n  ".join(json.dumps(part._asdict()) for part in self.parts)
        with atomic_write(f"{self.path}/{MANIFEST}") as stream:
            stream.write(f'{head},\n "parts": [\n  {lines}\n ]\n}}\n'.encode(errors="replace"))

    @property
    def rows_path(self) -> str:
        """Path of the file of the rows."""
        return f"{self.path}/{ROWS_FILE}"

    @cached_property
    def rows(self) -> npt.NDArray[Any]:
        """float32 or float16 `[N, D]`, mapped when they are asked for first; not to be written to.

        Raises:
            UserError: the file is missing, or is not the one of the manifest.
        """
        recipe = self.recipe
        with self._open() as stream:
            size, header = os.fstat(stream.fileno()).st_size, recipe.header
            if size != recipe.file_bytes:
                raise self._damaged(f"has {size} bytes, {MANIFEST} says {recipe.file_bytes}")
            if stream.read(len(header)) != header:
                raise self._damaged(f"is no {recipe.dtype} [{recipe.samples}, {recipe.dim}]")
            if not recipe.samples:
                return np.empty((0, recipe.dim), recipe.stored)
            mapped = mmap.mmap(stream.fileno(), size, access=mmap.ACCESS_READ)
        flat = np.frombuffer(mapped, recipe.stored, recipe.samples * recipe.dim, len(header))
        return flat.reshape(recipe.samples, recipe.dim)

    @cached_property
    def index(self) -> ShardIndex:
        """The index of the data set.

        Raises:
            UserError: it is not there, or is not the one that was embedded.
        """
        found = ShardIndex.load(self.recipe.source)
        if found.digest != self.recipe.index_digest:
            raise UserError(
                f"{self.recipe.source}: this data set has digest {found.digest}, {self.path} was "
                f"made of {self.recipe.index_digest}: embed it again into another folder"
            )
        return found

    @cached_property
    def labels(self) -> npt.NDArray[Any]:
        """Integers `[N]`: the class of each row, as the index has it; mapped where that is mapped.

        Raises:
            UserError: see `index`; or the tars alone know the labels.
        """
        index = self.index
        first = index.shards[0] if index.shards else None
        if isinstance(first, MappedShard) and first.columns.labels is not None:
            return first.columns.labels.values
        parts = [shard.labels for shard in index.shards]
        known = [part for part in parts if part is not None]
        if len(known) < len(parts):
            raise UserError(
                f"{index.folder}: its index holds no labels, only its tars do; make an index with "
                "labels: mhe data index --out FOLDER"
            )
        return np.concatenate([np.empty(0, np.int64), *known])

    def find_faults(self) -> list[EmbeddingsPart]:
        """The parts whose bytes are not those of the manifest; all rows are read."""
        return [
            part for part in self.parts if self.checksum(part.first, part.rows) != part.checksum
        ]

    def checksum(self, first: int, rows: int) -> str:
        """`sha256:...` of some rows as they are in the file, which may be too short."""
        digest, width = hashlib.sha256(), self.recipe.row_bytes
        with self._open() as stream:
            stream.seek(len(self.recipe.header) + first * width)
            left = rows * width
            while left and (data := stream.read(min(left, _CHUNK))):
                digest.update(data)
                left -= len(data)
        return f"sha256:{digest.hexdigest()}"

    def _open(self) -> BinaryIO:
        try:
            return open(self.rows_path, "rb")
        except FileNotFoundError:
            raise self._damaged("is missing") from None

    def _damaged(self, reason: str) -> UserError:
        return UserError(
            f"{self.rows_path}: {reason}; type the mhe embed that made it, and it is mended"
        )

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("path", "recipe", "parts")}


def holds_rows(path: str) -> bool:
    """Whether a path is a folder that `mhe embed` has filled, or fills."""
    return Path(path, MANIFEST).exists()


def local_folder(path: str) -> str:
    """The absolute path of a folder of embeddings.

    Raises:
        UserError: it is in a store, whose files can neither be written in place nor mapped.
    """
    filesystem, name = resolve_url(path)
    if not is_local(filesystem):
        raise UserError(
            f"{path}: a folder of embeddings is written in place and mapped, which a store cannot; "
            "name a folder of this machine, or of a file system that all nodes mount; "
            "mhe embed --format parquet can fill one in a store"
        )
    return str(Path(name))
