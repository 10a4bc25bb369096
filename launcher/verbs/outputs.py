"""Where a command writes: what the system would refuse after the work is refused before it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mhe_dist.config.schema import RunConfig
from mhe_dist.config.section import local_path
from mhe_dist.errors import UserError
from pipelines.runs.folder import why_not_writable
from pipelines.storage.unusable_path import require_usable
from pipelines.storage.urls import is_local_url


def usable_folder(url: str) -> str:
    """The callback of an option that names a folder, which may exist; a `file://` URL is its path.

    Raises:
        OSError: it cannot be made, or not be written.
        UserError: it is that of a web server, or of a store that takes no file there.
    """
    return _usable(url, is_folder=True)


def usable_file(url: str) -> str:
    """The callback of an option that names a file, which may exist; a `file://` URL is its path.

    Raises:
        OSError: it cannot be made, or not be written.
        UserError: it is that of a web server, or of a store that takes no file there.
    """
    return _usable(url, is_folder=False)


def _usable(url: str, is_folder: bool) -> str:
    path = local_path(url)
    if "://" in path:
        refuse_unwritable_store(path if is_folder else path.rpartition("/")[0])
    require_usable(path, is_folder=is_folder)
    return path


def usable_folder_here(url: str) -> str:
    """Like `usable_folder`, of a command whose files are made on this machine alone.

    Raises:
        OSError: it cannot be made, or not be written.
        UserError: it is in a store.
    """
    if not is_local_url(url):
        raise UserError(f"--out {url}: is made in files of this machine; name a folder here")
    return usable_folder(url)


def run_words(path: str, option: str) -> list[str]:
    """`run.dir` and `run.name` of the run at a path or URL, as one types them.

    Args:
        path: of the run.
        option: that names it.

    Raises:
        UserError: no run may be called so.
    """
    folder, slash, name = path.rstrip("/").rpartition("/")
    try:
        RunConfig(name=name)
    except ValueError:
        raise UserError(
            f"{option} {path}: a run cannot be called {name!r}; let the last part begin with a "
            "letter or digit, and hold only these, '.', '_' and '-'"
        ) from None
    return [f"run.dir={folder or slash or '.'}", f"run.name={name}"]


def refuse_unwritable_store(folder: str) -> None:
    """Refuse, before the work, a URL at which nothing could be written after it.

    Raises:
        UserError: it is that of a web server, or of a store that takes no file there.
    """
    if reason := why_not_writable(folder):
        raise UserError(
            f"{folder}: cannot be written ({reason}); name another folder, or one here, with --out"
        )


@contextmanager
def scratch_folder(parent: str) -> Iterator[Path]:
    """A new folder for a measurement; it goes in the end, and so do folders made to hold it.

    Raises:
        UserError: it would not be on this machine.
    """
    if not is_local_url(parent):
        raise UserError(f"--folder {parent}: is measured in files of this machine; name one here")
    path = Path(local_path(parent))
    made = [each for each in (path, *path.parents) if not each.exists()]
    path.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix="mhe-bench-", dir=path) as temporary:
            yield Path(temporary)
    finally:
        with suppress(OSError):  # someone else has put something there
            for folder in made:
                folder.rmdir()
