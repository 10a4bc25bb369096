"""Room on a disk for files that are written through a mapping.

A mapped file may be sparse. Where the disk is full, the first write of a page that has no room on
it ends the process with SIGBUS, without a word.
"""

from __future__ import annotations

import os
from pathlib import Path

from mhe_dist.errors import RunError


def reserve_room(
    descriptor: int,
    path: str | Path,
    start: int,
    stop: int,
    cure: str = "make room on its disk; then type the command again",
) -> None:
    """Let a file have room for bytes before they are written through a mapping; it holds its bytes.

    Args:
        descriptor: of the file, open to be written; its size is at least `stop` afterwards.
        path: what a message calls it.
        start, stop: range of the bytes; it may be empty.
        cure: what a message tells to do.

    Raises:
        RunError: the disk, or the user's share of it, is full.
    """
    if start == stop or not hasattr(os, "posix_fallocate"):  # macOS
        return
    try:
        os.posix_fallocate(descriptor, start, stop - start)
    except OSError as error:
        raise RunError(
            f"{path}: {stop - start:,} bytes cannot be reserved: {error.strerror}; {cure}"
        ) from error
