"""The files below a folder, in memory that does not grow with their number.

A store is listed a folder at a time, some ahead. What fsspec returns takes a kilobyte for each
file, and it would keep that: a file system of its own is asked, which keeps nothing.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Any, Final

import fsspec

from mhe_dist.errors import UserError
from pipelines.storage.urls import is_local, is_web, resolve_url, url_exists

_AHEAD: Final = 16  # folders of a store that are listed together


def list_files(root: str) -> Iterator[tuple[str, int]]:
    """Path below `root` and size of every file there, by path; hidden ones are left out.

    Raises:
        UserError: a file, no such folder, or one that cannot be listed.
    """
    filesystem, path = resolve_url(root)
    if is_web(filesystem):
        raise UserError(f"{root}: a web server does not list its folders; name the files by --lst")
    if not url_exists(root):
        raise UserError(f"{root}: no such folder")
    if not filesystem.isdir(path):
        within = root.rstrip("/").rpartition("/")[0] or "."
        raise UserError(f"{root}: is a file, and a folder is needed: {within} holds it")
    if is_local(filesystem):
        yield from _list_local_files(path)
    else:
        forgetful, _ = fsspec.core.url_to_fs(root, use_listings_cache=False)
        yield from _list_stored_files(forgetful, path.rstrip("/"))


def _list_stored_files(filesystem: Any, root: str) -> Iterator[tuple[str, int]]:
    """See `list_files`; the folders in `root` are listed whole, each by itself."""
    entries = iter(_list_root(filesystem, root))
    waiting: deque[Future[list[tuple[str, int]]]] = deque()
    with ThreadPoolExecutor(_AHEAD) as threads:

        def _begin(count: int) -> None:
            for name, size in islice(entries, count):
                waiting.append(threads.submit(_list_entry, filesystem, root, name, size))

        _begin(_AHEAD)
        while waiting:
            found = waiting.popleft()
            _begin(1)
            yield from found.result()


def _list_root(filesystem: Any, root: str) -> list[tuple[str, int]]:
    """Files and folders in a folder of a store, as whole paths are sorted; a folder as `name/`."""
    entries = []
    for found in filesystem.ls(root, detail=True):
        is_folder = found["type"] == "directory"
        name = found["name"].rstrip("/")[len(root) :].lstrip("/")
        if not name and is_folder:
            raise UserError(
                f"{root}//: a folder without a name; give it one, or name what is below"
            )
        if name and not name.startswith("."):
            entries.append((f"{name}/" if is_folder else name, int(found["size"] or 0)))
    return sorted(entries)


def _list_entry(filesystem: Any, root: str, name: str, size: int) -> list[tuple[str, int]]:
    """Path below `root` and size of a file, or of all files in a folder (`name/`)."""
    if not name.endswith("/"):
        return [(name, size)]
    found = filesystem.find(f"{root}/{name}", detail=True)
    below = (
        (path[len(root) :].lstrip("/"), int(info["size"] or 0)) for path, info in found.items()
    )
    return sorted((path, size) for path, size in below if not _is_hidden(path))


def _is_hidden(path: str) -> bool:
    return any(part.startswith(".") for part in path.split("/"))


def _list_local_files(root: str) -> Iterator[tuple[str, int]]:
    """See `list_files`; links are followed, and each folder is entered once.

    Held are the names of the folders on the way to a file, sorted as in whole paths.
    """
    entered: set[tuple[int, int]] = set()

    def _walk(folder: str, below: str) -> Iterator[tuple[str, int]]:
        try:
            status, found = os.stat(folder), os.listdir(folder)
        except OSError:  # as os.walk: what cannot be read is passed over
            return
        if (status.st_dev, status.st_ino) in entered:
            return
        entered.add((status.st_dev, status.st_ino))
        shown = (name for name in found if not name.startswith("."))
        names = sorted(
            f"{name}/" if os.path.isdir(os.path.join(folder, name)) else name for name in shown
        )
        del found
        for name in names:
            path = os.path.join(folder, name)
            if name.endswith("/"):
                yield from _walk(path.rstrip("/"), f"{below}{name}")
            elif os.path.isfile(path):
                yield f"{below}{name}", os.path.getsize(path)

    yield from _walk(root, "")
