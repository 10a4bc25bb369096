"""Embeds images, and writes the embeddings to a file with the key and the class of each."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt
import torch.distributed as dist
from torch import Tensor

from mhe_dist.distributed.topology import Topology
from mhe_dist.errors import UserError
from pipelines.data.mixture.class_list import names_of
from pipelines.embedding.embeddings import (
    Embed,
    ShardImages,
    block_embedder,
    map_images,
    normalize_in_place,
)
from pipelines.embedding.image_files import list_images
from pipelines.embedding.made_by import MadeBy
from pipelines.shards.index import UNLABELLED, ShardIndex, index_exists
from pipelines.storage.csv_table import spell_out
from pipelines.storage.urls import atomic_write, resolve_url, to_url

_KEY, _CLASS, _VECTOR = "key", "class", "vector"  # columns of a Parquet file
_MADE_BY: Final = "made_by"  # array of a .npz file, and key of a Parquet file's metadata
_FORMATS: Final = (".npz", ".parquet")


class EmbeddedImages(NamedTuple):
    """Embeddings of a folder of images or of a set of shards.

    Attributes:
        source: folder or URL of the images.
        rows: float32 `[N, D]`, with their norms.
        keys: path of each image below the folder, or its key in the shards.
        classes: name of the class of each; empty where it has none.
        labels: int64 `[N]` of shards; None: of a folder.
        skipped: paths of images that could not be read.
        made_by: what a file says of their model; None: nothing, or they are of no file.
    """

    source: str
    rows: npt.NDArray[np.float32]
    keys: list[str]
    classes: list[str]
    labels: npt.NDArray[np.int64] | None
    skipped: list[str]
    made_by: MadeBy | None = None


class EmbeddingsFile(NamedTuple):
    """Size of a written file, and the paths of images that could not be read."""

    rows: int
    dim: int
    skipped: list[str]


def embed_source(
    embed: Embed, source: str, topology: Topology, image_size: int, flip: bool = False
) -> EmbeddedImages | None:
    """Embed a folder of images, or a set of shards; all ranks must call.

    A file that cannot be decoded is left out; a bad sample of a shard is an error. The class of a
    file is its top folder.

    Args:
        embed: see `embeddings.Embed`.
        source: folder or URL.
        topology, image_size, flip: see `embeddings.embed_images`.

    Returns:
        The embeddings on rank 0, None elsewhere.

    Raises:
        UserError: there is no image.
    """
    return map_source(block_embedder(embed, flip), source, topology, image_size)


def map_source(
    function: Callable[[Tensor], Tensor], source: str, topology: Topology, image_size: int
) -> EmbeddedImages | None:
    """As `embed_source`, with the rows of any function of a block; see `embeddings.map_images`."""
    source = to_url(*resolve_url(source))  # which is there from any working directory
    if index_exists(source):
        return _map_shards(function, source, topology, image_size)
    files = list_images(source, skip_bad=True)
    rows = map_images(function, files, topology, image_size)
    if topology.world_size > 1:  # each rank knows those that it read
        dist.reduce(files.bad, 0, group=topology.host_group)
    if rows is None:
        return None
    good = (files.bad == 0).numpy()
    keys = [files.paths[number] for number in np.flatnonzero(good).tolist()]
    skipped = [files.paths[number] for number in np.flatnonzero(~good).tolist()]
    classes = [key.partition("/")[0] if "/" in key else "" for key in keys]
    kept = rows if good.all() else rows[good]  # without a copy, where all are good
    return EmbeddedImages(source, kept, keys, classes, None, skipped)


def _map_shards(
    function: Callable[[Tensor], Tensor], source: str, topology: Topology, image_size: int
) -> EmbeddedImages | None:
    images = ShardImages(ShardIndex.load(source))
    rows = map_images(function, images, topology, image_size)
    labels = images.join_labels(topology)
    found = [images.keys]
    if topology.world_size > 1:
        found = [{} for _ in range(topology.world_size)]
        dist.gather_object(
            images.keys, found if topology.is_first else None, group=topology.host_group
        )
    if rows is None:
        return None
    keys = {number: key for each in found for number, key in each.items()}
    is_labelled = not images.index.meta.get(UNLABELLED)
    classes = class_names(source, labels) if is_labelled else [""] * len(labels)
    return EmbeddedImages(source, rows, [keys[n] for n in range(len(labels))], classes, labels, [])


def class_names(source: str, labels: npt.NDArray[np.int64]) -> list[str]:
    """The name of the class of each sample of a set of shards; its number, where it has none."""
    names = names_of(source, set(labels.tolist()))
    return [names.get(label, str(label)) for label in labels.tolist()]


def write_embeddings(
    embed: Embed,
    source: str,
    out: str,
    topology: Topology,
    made_by: MadeBy,
    normalize: bool = False,
) -> EmbeddingsFile | None:
    """Embed a folder of images, or a set of shards, into a file; all ranks must call.

    A `.npz` file holds `embeddings` float32 `[N, D]`, `classes` and `source`, and, of a folder,
    `paths` below it, sorted; of shards, `keys` and `labels` int64 in the order of the index. A
    `.parquet` file has the columns `key`, `class` and `vector`. Both say what they were made by.

    Args:
        embed, source, topology: see `embed_source`.
        out: path or URL of the file.
        made_by: whose `embed` is called, and how.
        normalize: scale the embeddings to length 1.

    Returns:
        Size of the file on rank 0, None elsewhere.

    Raises:
        UserError: there is no image, or the file's name ends otherwise.
    """
    if not out.endswith(_FORMATS):
        raise UserError(f"--out {out}: let the name end with {' or '.join(_FORMATS)}")
    found = embed_source(embed, source, topology, made_by.image_size, made_by.flip)
    if found is None:
        return None
    if normalize:
        normalize_in_place(found.rows)
    with atomic_write(out) as stream:
        (_write_parquet if out.endswith(".parquet") else _write_npz)(found, made_by, stream)
    count, dim = found.rows.shape
    return EmbeddingsFile(count, dim, found.skipped)


def _write_npz(found: EmbeddedImages, made_by: MadeBy, stream: Any) -> None:
    arrays: dict[str, Any] = {
        "embeddings": found.rows,
        "classes": np.array(found.classes, str),
        "source": np.array(found.source),
        _MADE_BY: np.array(json.dumps(made_by._asdict())),
    }
    if found.labels is None:
        arrays["paths"] = np.array(found.keys, str)
    else:
        arrays |= {"keys": np.array(found.keys, str), "labels": found.labels}
    np.savez(stream, **arrays)


def _write_parquet(found: EmbeddedImages, made_by: MadeBy, stream: Any) -> None:
    from pyarrow import parquet

    table = as_parquet_table(found.source, found.keys, found.classes, found.rows, made_by)
    parquet.write_table(table, stream)


def as_parquet_table(
    source: str,
    keys: Sequence[str],
    classes: Sequence[str],
    rows: npt.NDArray[Any],
    made_by: MadeBy,
) -> Any:
    """The table that a Parquet file of embeddings holds; see `EmbeddedImages`.

    Bytes of a file name that are no UTF-8 are written as in a CSV file here, `\\udcff`.
    """
    import pyarrow as pa

    flat = pa.array(np.ascontiguousarray(rows).reshape(-1))
    columns = {
        _KEY: pa.array(map(spell_out, keys), pa.string()),
        _CLASS: pa.array([spell_out(name) or None for name in classes], pa.string()),
        _VECTOR: pa.FixedSizeListArray.from_arrays(flat, rows.shape[1]),
    }
    about = {"source": spell_out(source), _MADE_BY: json.dumps(made_by._asdict())}
    return pa.table(columns).replace_schema_metadata(about)


def read_embeddings(path: str) -> EmbeddedImages:
    """The embeddings of a file that `write_embeddings` wrote.

    Raises:
        UserError: it is no such file.
    """
    filesystem, name = resolve_url(path)
    try:
        with filesystem.open(name, "rb") as stream:
            return (_read_parquet if path.endswith(".parquet") else _read_npz)(stream)
    except FileNotFoundError:
        raise UserError(f"{path}: does not exist") from None
    except (ValueError, TypeError, KeyError, OSError, EOFError, BadZipFile, zlib.error) as error:
        raise UserError(f"{path}: not a file that mhe embed wrote ({error})") from error


def _read_npz(stream: Any) -> EmbeddedImages:
    loaded = np.load(stream)
    if not isinstance(loaded, np.lib.npyio.NpzFile):
        raise ValueError("it holds one array")
    with loaded as arrays:
        keys = arrays["keys" if "keys" in arrays else "paths"].tolist()
        labels = arrays.get("labels")
        source, classes = str(arrays["source"]), arrays["classes"].tolist()
        made_by = _read_made_by(str(arrays[_MADE_BY]) if _MADE_BY in arrays else "")
        return EmbeddedImages(source, arrays["embeddings"], keys, classes, labels, [], made_by)


def _read_parquet(stream: Any) -> EmbeddedImages:
    from pyarrow import parquet

    table = parquet.read_table(stream)
    vectors = table.column(_VECTOR).combine_chunks()
    rows = vectors.flatten().to_numpy().reshape(len(vectors), -1).astype(np.float32)
    classes = [name or "" for name in table.column(_CLASS).to_pylist()]
    about = table.schema.metadata or {}
    source = about.get(b"source", b"").decode()
    made_by = _read_made_by(about.get(_MADE_BY.encode(), b"").decode())
    return EmbeddedImages(source, rows, table.column(_KEY).to_pylist(), classes, None, [], made_by)


def _read_made_by(text: str) -> MadeBy | None:
    """What a file says; None: it is of a version that said nothing."""
    return MadeBy(**json.loads(text)) if text else None
