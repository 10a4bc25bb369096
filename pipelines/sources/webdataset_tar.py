"""One tar that somebody else wrote: its samples by WebDataset's rules, and their labels as text."""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Iterator
from typing import Any, Final, NamedTuple

from mhe_dist.errors import UserError
from pipelines.shards.image_format import (
    IMAGE_EXTENSIONS,
    is_apple_metadata,
    list_extensions,
)
from pipelines.shards.index import Fault
from pipelines.shards.packing import pack_labels, pack_offsets
from pipelines.sources.tar import DamagedTarError, TarMember, read_members, rest_is_empty
from pipelines.storage.csv_table import class_text
from pipelines.storage.unusable_path import explain_fault
from pipelines.storage.urls import RetryingStream, open_stream

INTEGER: Final = re.compile(r"-?\d{1,18}")
# WebDataset's own rules: what is the key, what the extension, and what is no sample at all.
_NAME: Final = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)")
_META: Final = re.compile(r"__[^/]*__($|/)")
_LONGEST_LABEL: Final = 200
_LONGEST_REASON: Final = 400
_MOST_MEMBERS: Final = 1000  # of a sample that are kept by name
MOST_NAMED: Final = 100_000  # bad samples that are kept by name; others are counted
_MOST_PARTS: Final = 1_000_000  # keys of incomplete samples that are remembered
_SORT: Final = (
    "the members of a sample must be adjacent; pack the tar anew with tar --sort=name -cf"
)


class SampleLayout(NamedTuple):
    """Where a sample has its image and its label.

    Attributes:
        images: extensions of the image, the best first.
        label: extension of the label, or `extension:key` for a value in JSON (`json:a.b`).
        num_classes: C, if the labels are numbers in `[0, C)` already; 0: find out.
    """

    images: tuple[str, ...] = IMAGE_EXTENSIONS
    label: str = "cls"
    num_classes: int = 0


DEFAULT_LAYOUT: Final = SampleLayout()


class ScanTask(NamedTuple):
    """A tar to read, and the layout of its samples."""

    url: str
    layout: SampleLayout


class _HashingReader(io.RawIOBase):
    """Hashes and counts what is read through it."""

    def __init__(self, stream: RetryingStream) -> None:
        self.stream, self.bytes, self.hash = stream, 0, hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        """See `io.RawIOBase`."""
        data = self.stream.read(size)
        self.hash.update(data)
        self.bytes += len(data)
        return data


def scan_tar(task: ScanTask) -> dict[str, Any]:
    """Read one tar.

    Returns:
        What JSON can hold: samples, bytes, checksum and blocks as in `shards.Shard`; `values`, the
        distinct labels as text, and `codes`, which one each sample has (`packing.pack_labels`);
        `faults`, at most `MOST_NAMED`, and `unnamed`, how many there are beside; `damage`, what
        ended the reading before the tar's end.

    Raises:
        UserError: it cannot be opened.
    """
    try:
        with open_stream(task.url) as raw:
            stream: Any = _HashingReader(raw)
            contents = _TarContents(task)
            damage = ""
            try:
                for sample in _samples(read_members(stream), task.layout):
                    contents.add(sample)
            except DamagedTarError as error:
                damage = str(error)
            if not rest_is_empty(stream) and not damage:
                damage = "data behind its end marker, which no reader sees: several tars in one?"
    except (FileNotFoundError, IsADirectoryError) as error:
        raise UserError(f"{task.url}: cannot be opened: {explain_fault(error)}") from error
    about = {"bytes": stream.bytes, "checksum": f"sha256:{stream.hash.hexdigest()}"}
    return about | contents.result() | {"damage": damage}


class _TarContents:
    """The samples and faults found in a tar so far."""

    def __init__(self, task: ScanTask) -> None:
        self._task = task
        self._number: dict[str, int] = {}
        self._codes: list[int] = []
        self._starts: list[int] = []
        self._end = 0
        self._faults: list[Fault] = []
        self._unnamed = 0
        self._parts: dict[str, int] = {}  # key of an incomplete sample -> its fault

    def add(self, sample: _SampleMembers) -> None:
        """Take a sample, or count it as a fault."""
        label = sample.label()
        if isinstance(label, Fault):
            self._add_fault(sample, label)
            return
        self._codes.append(self._number.setdefault(label, len(self._number)))
        self._starts.append(sample.start)
        self._end = sample.stop

    def _add_fault(self, sample: _SampleMembers, fault: Fault) -> None:
        """Count a fault; parts of one sample that are not adjacent are one."""
        location = f"{self._task.url} {fault.location}"
        if (first := self._parts.get(sample.key)) is not None:
            if first < MOST_NAMED:
                reason = f"it is in several places of the tar: {_SORT}"
                self._faults[first] = Fault(location, reason)
            return
        number = len(self._faults) + self._unnamed
        if len(self._parts) < _MOST_PARTS:
            self._parts[sample.key] = number
        if number < MOST_NAMED:
            self._faults.append(Fault(location, fault.reason))
        else:
            self._unnamed += 1

    def result(self) -> dict[str, Any]:
        """The part of `scan_tar`'s result that is about samples."""
        return {
            "samples": len(self._codes),
            "blocks": pack_offsets([*self._starts, self._end]),
            "values": list(self._number),
            "codes": pack_labels(self._codes),
            "faults": self._faults,
            "unnamed": self._unnamed,
        }


class _SampleMembers:
    """Neighbouring members of one key."""

    def __init__(self, key: str, start: int, layout: SampleLayout) -> None:
        self.key, self.start, self.stop = key, start, start
        self._layout = layout
        self._members: dict[str, bytes | None] = {}
        self._twice = ""
        self._links: dict[str, str] = {}

    def add(self, extension: str, member: TarMember) -> None:
        """Take the next member of the sample."""
        if extension in self._members:
            self._twice = extension
        self.stop = member.stop
        is_label = extension == self._layout.label.partition(":")[0]
        is_image = extension in self._layout.images
        if len(self._members) >= _MOST_MEMBERS and not (is_label or is_image):
            return
        if member.link and (is_label or is_image):
            self._links[extension] = member.link
        # Of what is not the label it is enough to know that it is there.
        self._members[extension] = member.data if is_label or not member.data else b"there"

    def label(self) -> str | Fault:
        """Its label as text, or what is wrong with it."""
        try:
            self._check()
            return self._label()
        except (ValueError, KeyError, IndexError, TypeError, RecursionError) as error:
            reason = str(error) or repr(error)
            return Fault(self.key[:_LONGEST_LABEL], reason[:_LONGEST_REASON])

    def _check(self) -> None:
        if self.key.startswith("/") or ".." in self.key.split("/"):
            raise ValueError("its name leaves the folder")
        if self._twice:
            raise ValueError(f"{self._twice[:_LONGEST_LABEL]} is there twice")
        for extension, link in self._links.items():
            raise ValueError(
                f"its {extension} is a {link}; pack the tar anew with the files themselves: "
                "tar --dereference --hard-dereference --sort=name -cf"
            )
        if not any(self._members.get(extension) for extension in self._layout.images):
            raise ValueError(f"no image among {self._found()}{self._image_advice()}")

    def _label(self) -> str:
        extension, _, path = self._layout.label.partition(":")
        data = self._members.get(extension)
        if data is None:
            raise ValueError(f"no {extension} among {self._found()}{self._label_advice()}")
        # Some editors begin a file with a byte order mark.
        text = (
            data.decode("utf-8-sig").strip() if not path else _json_text_at(json.loads(data), path)
        )
        text = class_text(text)
        if not text or len(text) > _LONGEST_LABEL:
            raise ValueError(f"its label {text[:20]!r} is no class")
        is_integer = bool(INTEGER.fullmatch(text))
        if is_integer and int(text) < 0:
            raise ValueError(f"its label {text} is negative")
        num_classes = self._layout.num_classes
        if num_classes and not (is_integer and int(text) < num_classes):
            raise ValueError(f"its label {text[:20]!r} is not in [0, {num_classes})")
        return text

    def _found(self) -> str:
        return list_extensions(self._members)

    def _image_advice(self) -> str:
        """What to type if a member looks like an image; a name ends at its first dot."""
        for name in self._members:
            if "." in name and name.rpartition(".")[2] in IMAGE_EXTENSIONS:
                return (
                    f"; a sample's name ends at its first dot: --image {name[:40]} if all images "
                    "are called so, else pack the tar anew with names without dots"
                )
        return ""

    def _label_advice(self) -> str:
        """What to type if there are other members that may be the label."""
        others = [name for name in self._members if name not in self._layout.images]
        if not others:
            return ""
        label = "json:KEY" if "json" in others else others[0][:40]
        return f"; say which is the label: --label {label}"


def _json_text_at(value: Any, path: str) -> str:
    """The text at a path `a.b` of JSON."""
    for key in path.split("."):
        value = value[int(key)] if isinstance(value, list) else value[key]
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise ValueError(f"its label {value!r:.40} is neither a number nor a text")
    return str(value).strip()


def _samples(found: Iterator[TarMember], layout: SampleLayout) -> Iterator[_SampleMembers]:
    """Group neighbouring members, as WebDataset does.

    Raises:
        DamagedTar: the tar ends in a damage; a sample that was complete before it comes first.
    """
    current: _SampleMembers | None = None
    try:
        for member in found:
            match = _NAME.fullmatch(member.name)
            if match is None or _META.match(member.name) or is_apple_metadata(member.name):
                continue
            if current is None or current.key != match[1]:
                if current is not None:
                    yield current
                current = _SampleMembers(match[1], member.start, layout)
            current.add(match[2].lower(), member)
    except DamagedTarError:
        if current is not None and isinstance(current.label(), str):
            yield current
        raise
    if current is not None:
        yield current
