"""Bytes of a shard to samples, one sample at a time by the index.

The index says where each sample begins and ends, so damage stays with the sample that has it, and
a shard that is shorter than it should be is noticed (webdataset ends silently there).
"""

from __future__ import annotations

import io
import tarfile
import zlib
from itertools import pairwise
from typing import Any, Final, NamedTuple

from mhe_dist.config.data import MAX_PIXELS
from pipelines.data.decode import ImageDecodeError, Pixels, decode_image
from pipelines.data.order import ShardSpan
from pipelines.shards.image_format import (
    IMAGE_EXTENSIONS,
    is_apple_metadata,
    list_extensions,
)
from pipelines.shards.index import IndexEntry, ShardIndex
from pipelines.storage.ranges import locate_file, read_range

_BLOCK: Final = 512
_ADLER: Final = 65521  # what each half of an Adler-32 is a remainder by
_PLAIN: Final = b"0\0"  # type flags of an ordinary file


class BadSampleError(Exception):
    """A sample that cannot be used; the message says why."""


class EncodedSample(NamedTuple):
    """A sample whose image is not decoded; `extension` is the image's."""

    key: str
    label: int
    extension: str
    data: bytes


class DecodedSample(NamedTuple):
    """A sample that can be used: its image is uint8 `[side, side, 3]`, grey `[side, side]`."""

    key: str
    label: int
    image: Pixels


def read_span(index: ShardIndex, span: ShardSpan) -> list[memoryview]:
    """The raw bytes of each sample of a span; shorter than they should be after the shard's end.

    Raises:
        RunError: the shard cannot be opened or read.
    """
    return split_samples(
        index, span, read_range(locate_file(index.url(span.shard)), *byte_range(index, span))
    )


def read_sample(index: ShardIndex, number: int) -> EncodedSample:
    """Read a sample by its number through all shards, without decoding.

    Raises:
        BadSampleError: see `extract_sample`.
        RunError: its shard cannot be opened or read.
    """
    shard, position = index.locate(number)
    (raw,) = read_span(index, ShardSpan(shard, position, position + 1))
    return extract_sample(raw, len(raw), index.num_classes, index.entry(shard, position))


def byte_range(index: ShardIndex, span: ShardSpan) -> tuple[int, int]:
    """First and last + 1 byte of a span in its shard."""
    bounds = index.shards[span.shard].bounds(span.start, span.stop)
    return int(bounds[0]), int(bounds[-1])


def split_samples(index: ShardIndex, span: ShardSpan, data: bytes) -> list[memoryview]:
    """The bytes of a span sample by sample."""
    offsets = index.shards[span.shard].bounds(span.start, span.stop)
    inside = [int(offset) for offset in offsets - offsets[0]]
    raw = memoryview(data)
    return [raw[start:stop] for start, stop in pairwise(inside)]


def decode_sample(
    raw: memoryview,
    length: int,
    side: int,
    num_classes: int,
    entry: IndexEntry | None = None,
    into: Pixels | None = None,
    max_pixels: int = MAX_PIXELS,
) -> DecodedSample:
    """Read, check and decode one sample.

    Args:
        raw: its part of the tar.
        length: how many bytes that should be.
        side: of the image to return, in pixels.
        num_classes: labels must be below this.
        entry: what the index holds of it (`ShardIndex.entry`); None: the tar decides.
        into, max_pixels: see `decode_image`.

    Raises:
        BadSampleError: it is truncated, no sample, without image or label, or one of them is bad.
    """
    encoded = extract_sample(raw, length, num_classes, entry)
    try:
        image = decode_image(encoded.data, side, into, max_pixels)
    except ImageDecodeError as error:
        raise BadSampleError(f"{encoded.key}.{encoded.extension}: {error}") from error
    return DecodedSample(encoded.key, encoded.label, image)


def extract_sample(
    raw: memoryview, length: int, num_classes: int, entry: IndexEntry | None = None
) -> EncodedSample:
    """Read and check one sample without decoding; see `decode_sample`.

    Raises:
        BadSampleError: it is truncated, no sample, or without image or label, or the label is bad.
    """
    if len(raw) < length:
        raise BadSampleError(f"the shard ends {length - len(raw)} bytes too early for it")
    # Between samples of somebody else's shard may be what the index left out.
    members = parse_members(raw, alone=entry is None)
    label = _label(members, num_classes) if entry is None else entry.label
    for extension in IMAGE_EXTENSIONS if entry is None else entry.image_extensions:
        if extension in members:
            return EncodedSample(members["__key__"], label, extension, members[extension])
    raise BadSampleError(f"{members['__key__']}: no image among {_extensions(members)}")


def parse_members(raw: memoryview, alone: bool = True) -> dict[str, Any]:
    """The members of one sample by extension, and its `__key__`, by webdataset's grouping.

    Args:
        raw: a part of a tar that begins with the sample.
        alone: there must be nothing else in it.

    Raises:
        BadSampleError: these bytes are not a sample.
    """
    files = _plain_members(raw)
    if files and (sample := _only_sample(files)) is not None:
        return sample
    import webdataset.tariterators as tars  # seconds, as it imports torch; few samples need it

    try:
        if files is None:
            source = {"url": "", "stream": io.BytesIO(raw)}
            files = list(tars.tar_file_expander([source], eof_value=None))
            files = [file for file in files if not is_apple_metadata(file["fname"])]
        samples = tars.group_by_keys({"__url__": "", **file} for file in files)
        first, others = next(samples, None), len(list(samples)) if alone else 0
    except (tarfile.TarError, ValueError, EOFError, OSError) as error:
        raise BadSampleError(
            f"not a sample of a tar ({error.args[0] if error.args else error})"
        ) from error
    if first is None or others:
        raise BadSampleError(f"{others + 1 if first else 0} samples where the index has one")
    return first


def _plain_members(raw: memoryview) -> list[dict[str, Any]] | None:
    """Names and contents of the members if all of them are plain files, or None.

    `tarfile`, which webdataset reads with, takes ten times as long, and more than decoding. Long
    names, sparse files, links and damaged headers are left to it.

    Raises:
        BadSampleError: a member has a negative size.
    """
    files = []
    at = 0
    while at + _BLOCK <= len(raw):
        header = bytes(raw[at : at + _BLOCK])
        if header[156] not in _PLAIN or header[345]:
            return None
        try:
            size = int(header[124:136].strip(b" \0"), 8)
            checksum = int(header[148:156].strip(b" \0"), 8)
            name = header[:100].partition(b"\0")[0].decode()
        except ValueError:
            return None
        # The checksum counts its own field as blanks. The low half of an Adler-32 is the sum of
        # the bytes, plus 1; `sum` takes longer than everything else here.
        counted = (zlib.adler32(header) & 0xFFFF) - 1 - sum(header[148:156]) + 8 * 32
        if (checksum - counted) % _ADLER:
            return None
        if size < 0:  # the next header would not lie behind this one
            raise BadSampleError(f"not a sample of a tar (a member of {size} bytes)")
        at += _BLOCK
        if at + size > len(raw):
            return None
        if not is_apple_metadata(name):
            files.append({"fname": name, "data": bytes(raw[at : at + size])})
        at += -(-size // _BLOCK) * _BLOCK
    return files


def _only_sample(files: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The sample that webdataset would group the members to, or None if that is doubtful.

    The doubtful ones are left to its grouping: folders with dots, names without a dot, two keys, an
    extension that comes twice.
    """
    key = files[0]["fname"].partition(".")[0]
    sample: dict[str, Any] = {"__key__": key, "__url__": ""}
    for file in files:
        stem, _, extension = file["fname"].partition(".")
        extension = extension.lower()
        if stem != key or not stem or not extension or "/" in extension or extension in sample:
            return None
        sample[extension] = file["data"]
    return sample


def _label(members: dict[str, Any], num_classes: int) -> int:
    if "cls" not in members:
        raise BadSampleError(f"{members['__key__']}: no label among {_extensions(members)}")
    try:
        label = int(members["cls"])
    except ValueError:
        raise BadSampleError(
            f"{members['__key__']}.cls: {members['cls'][:20]!r} is no number"
        ) from None
    if not 0 <= label < num_classes:
        raise BadSampleError(
            f"{members['__key__']}.cls: label {label} is not in [0, {num_classes})"
        )
    return label


def _extensions(members: dict[str, Any]) -> str:
    return list_extensions(name for name in members if not name.startswith("__"))


def load_sample(
    index: ShardIndex,
    shard: int,
    position: int,
    raw: memoryview,
    side: int,
    into: Pixels | None = None,
    max_pixels: int = MAX_PIXELS,
) -> DecodedSample:
    """Read, check and decode one sample, and check its label against the index.

    Args:
        index: the data set.
        shard: number of the shard.
        position: number of the sample in the shard.
        raw: the sample's part of the tar.
        side: of the image to return, in pixels.
        into, max_pixels: see `decode_image`.

    Raises:
        BadSampleError: see `decode_sample`; or its label is not the one of the index.
    """
    start, stop = index.shards[shard].bounds(position, position + 1).tolist()
    entry = index.entry(shard, position)
    sample = decode_sample(raw, stop - start, side, index.num_classes, entry, into, max_pixels)
    # What a tar says of itself has no checksum.
    label = None if entry else index.shards[shard].label(position)
    if label is not None and sample.label != label:
        raise BadSampleError(f"{sample.key}.cls: label {sample.label}, the index says {label}")
    return sample
