"""Where a command writes: what the system would refuse after the work is refused before it."""

from __future__ import annotations

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
