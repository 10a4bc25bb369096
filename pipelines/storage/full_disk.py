"""A full disk in words: which path, how much is missing, and how it goes on."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mhe_dist.errors import RunError
from pipelines.storage.urls import is_local, resolve_url

_FULL = (errno.ENOSPC, errno.EDQUOT)
_MIB = 1 << 20


@contextmanager
def explain_full_disk(target: str, folder: str, expected: int) -> Iterator[None]:
    """Say what is missing if the disk fills up while a data set is written in the block.

    Args:
        target: path or URL of the data set, as the user named it.
        folder: where its files are until it is finished.
        expected: bytes of the whole data set, about.

    Raises:
        RunError: the disk, or the user's share of it, is full.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise RunError(_describe(target, folder, expected, error)) from error


def _describe(target: str, folder: str, expected: int, error: OSError) -> str:
    what = (
        "the disk is full" if error.errno == errno.ENOSPC else "your quota of the disk is used up"
    )
    filesystem, path = resolve_url(folder)
    again = "Make room there; then the same command goes on, and finished tars are kept."
    if not is_local(filesystem):  # it collects each tar in a temporary file of this machine
        return f"{target}: {what}, where temporary files are collected (TMPDIR). {again}"
    written = sum(file.stat().st_size for file in Path(path).rglob("*") if file.is_file())
    rest, free = max(0, expected - written), shutil.disk_usage(path).free
    missing = rest - free if error.errno == errno.ENOSPC else rest
    return (
        f"{target}: {what}. About {_mib(rest)} are still to be written and {_mib(free)} are free: "
        f"{_mib(max(missing, _MIB))} are missing. {again}"
    )


def _mib(size: int) -> str:
    return f"{-(-size // _MIB):,} MiB"
