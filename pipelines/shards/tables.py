"""Tables beside the shards: what the classes are called, what was left out.

Tab-separated UTF-8 with a header, a row per line, so that millions of rows can be read one by one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Final

import numpy as np

from mhe_dist.redact import scrub
from pipelines.shards.index import Fault
from pipelines.shards.shard import Shard
from pipelines.storage.urls import atomic_write

CLASSES_FILE: Final = "classes.tsv"
SKIPPED_FILE: Final = "skipped.tsv"

_PLAIN: Final = {r"\\": "\\", r"\t": "\t", r"\n": "\n", r"\r": "\r"}  # the first one first
_ESCAPE: Final = re.compile(r"\\[\\tnr]")

Table = tuple[Sequence[str], Iterable[Sequence[str]]]
"""Header and rows."""


def class_table(names: Sequence[str], shards: Iterable[Shard]) -> Table:
    """A row per class, in order: its number, its samples, what the source calls it."""
    counts = np.zeros(len(names), np.int64)
    for shard in shards:
        labels = shard.labels
        if labels is not None:  # of a shard only its own classes are touched
            classes, samples = np.unique(labels, return_counts=True)
            counts[classes] += samples
    rows = ((str(n), str(counts[n]), name) for n, name in enumerate(names))
    return ["class", "samples", "name"], rows


def skipped_table(faults: Sequence[Fault]) -> dict[str, Table]:
    """A row for everything that was left out, if anything was; without secrets of URLs."""
    rows = ([scrub(text) for text in fault] for fault in faults)
    return {SKIPPED_FILE: (["place", "reason"], rows)} if faults else {}


def write_table(url: str, table: Table) -> None:
    """Write a table; it appears complete or not at all."""
    header, rows = table
    with atomic_write(url) as stream:
        stream.write(encode_row(header))
        for row in rows:
            stream.write(encode_row(row))


def encode_row(row: Sequence[str]) -> bytes:
    r"""A row; `\`, tab and line breaks become `\\`, `\t`, `\n`, `\r`."""
    return ("\t".join(map(_escaped, row)) + "\n").encode(errors="backslashreplace")


def decode_row(line: str) -> list[str]:
    """The cells of a row that `encode_row` made, without its end."""
    return [decode_cell(cell) for cell in line.split("\t")]


def decode_cell(text: str) -> str:
    """The text that `encode_row` wrote so."""
    return _ESCAPE.sub(lambda found: _PLAIN[found[0]], text) if "\\" in text else text


def _escaped(text: str) -> str:
    for escape, character in _PLAIN.items():
        text = text.replace(character, escape)
    return text
