"""Sizes in bytes: the units, and how much heads and banks compute with at a time."""

from __future__ import annotations

from typing import Final

MIB: Final = 1 << 20
GIB: Final = 1 << 30
# Logits of a rank that are kept between the two passes over them; those beyond are made again.
LOGITS_BYTES: Final = 256 * MIB
# Rows that make a chunk: they fit in a core's share of the cache, and keep a device busy.
HOST_CHUNK_BYTES: Final = 4 * MIB
DEVICE_CHUNK_BYTES: Final = 256 * MIB


def format_mib(size: int) -> str:
    """Bytes as whole MiB, rounded up."""
    return f"{-(-size // MIB):,} MiB"
