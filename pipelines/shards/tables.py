"""Tables beside the shards: what the classes are called, what was left out.

Tab-separated UTF-8 with a header, a row per line, so that millions of rows can be read one by one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

import numpy as np

from mhe_dist.redact import scrub
from pipelines.shards.index import Fault
from pipelines.shards.shard import Shard
from pipelines.storage.urls import atomic_write

CLASSES_FILE: Final = "classes.tsv"
SKIPPED_FILE: Final = "skipped.tsv"

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


def _escaped(text: str) -> str:
    for character, escape in (("\\", "\\\\"), ("\t", "\\t"), ("\n", "\\n"), ("\r", "\\r")):
        text = text.replace(character, escape)
    return text
