"""A full disk in words: which path, how much is missing, and how it goes on."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import gettempdir

from mhe_dist.errors import RunError
from mhe_dist.sizes import MIB, format_mib
from pipelines.storage.urls import is_local, resolve_url

_FULL = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "your quota of the disk is used up"}


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


@contextmanager
def full_disk_borne() -> Iterator[None]:
    """Go on where a full disk refuses a log: no run ends for the want of a line."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise


def _describe(target: str, folder: str, expected: int, error: OSError) -> str:
    what = _FULL[error.errno or errno.ENOSPC]
    filesystem, path = resolve_url(folder)
    again = "Make room there; then the same command goes on, and finished tars are kept."
    if not is_local(filesystem):  # it collects each tar in a temporary file of this machine
        return f"{target}: {what}, where temporary files are collected (TMPDIR). {again}"
    written = sum(file.stat().st_size for file in Path(path).rglob("*") if file.is_file())
    rest, free = max(0, expected - written), shutil.disk_usage(path).free
    missing = rest - free if error.errno == errno.ENOSPC else rest
    return (
        f"{target}: {what}. About {format_mib(rest)} are still to be written and "
        f"{format_mib(free)} are free: {format_mib(max(missing, MIB))} are missing. {again}"
    )


def describe_full_disk(error: OSError, words: Sequence[str]) -> str:
    """A full disk in words, where nothing is known of what was being written.

    The system names the file only if it was being opened. Else each disk is named that the command
    may have written to, with what is free there, the fullest first.

    Args:
        error: any error of the system.
        words: of the command; paths among them, and values of its settings, name disks.

    Returns:
        The message; empty: it is another error.
    """
    if error.errno not in _FULL:
        return ""
    named = [word.rpartition("=")[2] for word in words]
    disks: dict[int, tuple[int, str]] = {}
    for path in [error.filename] if error.filename else [*named, os.curdir, gettempdir()]:
        folder = existing_folder(str(path))
        device, size = _disk_of(folder)
        disks.setdefault(device, (size, folder))
    free = ", ".join(f"{format_mib(size)} in {folder}" for size, folder in sorted(disks.values()))
    said = f"{error.filename}: " if error.filename else ""
    return f"{said}{_FULL[error.errno]}. Free: {free}. Make room; then type the command again."


def existing_folder(path: str) -> str:
    """The folder itself, or the nearest one around the path that is there."""
    while not os.path.isdir(path):
        path = os.path.dirname(path) or os.curdir
    return os.path.abspath(path)


def _disk_of(folder: str) -> tuple[int, int]:
    """Number of the disk, and bytes that are free on it."""
    return os.stat(folder).st_dev, shutil.disk_usage(folder).free
