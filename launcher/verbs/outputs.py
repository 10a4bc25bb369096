"""Where a command writes: what the system would refuse after the work is refused before it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pipelines.storage.unusable_path import require_usable


def usable_folder(path: str) -> str:
    """The callback of an option that names a folder, which may exist.

    Raises:
        OSError: it cannot be made, or not be written.
    """
    require_usable(path, is_folder=True)
    return path


def usable_file(path: str) -> str:
    """The callback of an option that names a file, which may exist.

    Raises:
        OSError: it cannot be made, or not be written.
    """
    require_usable(path, is_folder=False)
    return path


@contextmanager
def scratch_folder(parent: str) -> Iterator[Path]:
    """A new folder for a measurement; it goes in the end, and so do folders made to hold it."""
    path = Path(parent)
    made = [each for each in (path, *path.parents) if not each.exists()]
    path.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix="mhe-bench-", dir=path) as temporary:
            yield Path(temporary)
    finally:
        with suppress(OSError):  # someone else has put something there
            for folder in made:
                folder.rmdir()
