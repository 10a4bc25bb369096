"""Where a data set or an export lies while it is made, and which parts of it are finished.

Locally a data set is made in a hidden folder beside its target and renamed as a whole at the end.
On an object store, where an object appears only when it is complete, its files go straight to
their place, and the index follows last. With a *recipe*, a description of everything that decides
the content, an interrupted attempt is kept, and the next one with the same recipe goes on with it.
An attempt that made every part and was refused for what is in them is kept, too, until another
recipe takes its place: that is the user's cure.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

from mhe_dist.atomic_file import TEMPORARY_SUFFIX
from mhe_dist.errors import RunError, UserError
from mhe_dist.redact import masked
from mhe_dist.storage_retry import path_exists, remove_if_exists, with_retries
from pipelines.storage.urls import (
    atomic_write,
    is_local,
    list_folder,
    require_absent,
    resolve_url,
)

JOURNAL: Final = ".partial"
_RECIPE: Final = "recipe.json"
_ENDED: Final = "ended.json"
_BEFORE: Final = ".before"
_NAMED, _SHOWN = 4, 40  # differences that a message names, and letters of each value


class Journal:
    """Results of finished pieces of work by number, each a JSON value, until the whole is done."""

    def __init__(self, url: str, recipe: Any) -> None:
        """Begin, or go on with an earlier attempt.

        Args:
            url: folder for the results; it is made.
            recipe: JSON-able; results belong to it alone.

        Raises:
            UserError: the folder holds an interrupted attempt with another recipe.
        """
        self.url = url
        self._filesystem, self._path = resolve_url(url)
        self._known: set[int] = set()
        if ended_with_other_recipe(url, recipe):
            self._filesystem.rm_file(f"{self._path}/{_RECIPE}")
        if not path_exists(self._filesystem, f"{self._path}/{_RECIPE}"):
            self._clear()
            self._write(_RECIPE, {"digest": _digest(recipe), "recipe": masked(recipe)})
            return
        if not _is_recipe(url, recipe):
            raise UserError(
                f"{url}: an interrupted attempt with another source or other settings"
                f"{self._describe_other(recipe)}; repeat that command to go on with it, or delete "
                f"{url.removesuffix('/' + JOURNAL)}"
            )
        self._filesystem.invalidate_cache()
        names = (name.rpartition("/")[2] for name in self._filesystem.ls(self._path, detail=False))
        stems = (name.removesuffix(".json") for name in names)
        self._known = {int(stem) for stem in stems if stem.isdecimal()}

    def __len__(self) -> int:
        return len(self._known)

    def get(self, number: int) -> Any | None:
        """The result of a piece, or None if it is not finished."""
        if number not in self._known:
            return None
        content = _parse(self._filesystem.cat_file(f"{self._path}/{number:06d}.json"))
        return content.get("result")

    def record(self, number: int, result: Any) -> None:
        """Keep the result of a piece, also for a later attempt."""
        self._write(f"{number:06d}.json", {"result": result})
        self._known.add(number)

    def mark_ended(self) -> None:
        """Note that every piece is made. If the whole is refused now, nothing was interrupted."""
        self._write(_ENDED, {})

    def remove(self) -> None:
        """Delete all results: the whole is done."""
        remove_if_exists(self._filesystem, self._path)

    def _describe_other(self, recipe: Any) -> str:
        """In brackets, what differs between the recipe of an earlier attempt and this one."""
        before = _parse(self._filesystem.cat_file(f"{self._path}/{_RECIPE}")).get("recipe")
        now = json.loads(json.dumps(masked(recipe)))
        named = "; ".join(islice(_differences(before, now), _NAMED))
        return f" ({named})" if named else ""

    def _clear(self) -> None:
        """Remove what has no recipe: results of an attempt that was being removed when it ended."""
        for path in list_folder(self.url):
            if path.endswith(".json"):  # the lock of a `Staging` stays
                self._filesystem.rm_file(path)
        self._filesystem.invalidate_cache()

    def _write(self, name: str, content: dict[str, Any]) -> None:
        with atomic_write(f"{self.url}/{name}") as stream:
            stream.write(json.dumps(content).encode())


def _parse(text: bytes) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except ValueError:  # cut off when the machine crashed: treated as missing
        return {}
    return content if isinstance(content, dict) else {}


def _differences(before: Any, now: Any, name: str = "it") -> Iterator[str]:
    """Yield the name of each value that differs, and both of them."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in {**before, **now}:
            yield from _differences(before.get(key), now.get(key), str(key))
    elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        for number, pair in enumerate(zip(before, now, strict=True)):
            yield from _differences(*pair, f"{name}[{number}]")
    elif before != now:
        yield f"{name} was {str(before)[:_SHOWN]}, is {str(now)[:_SHOWN]}"


def _digest(recipe: Any) -> str:
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()


def _is_recipe(journal: str, recipe: Any) -> bool:
    """Whether a journal belongs to a recipe; one whose recipe was cut off belongs to none."""
    filesystem, path = resolve_url(journal)
    return _parse(filesystem.cat_file(f"{path}/{_RECIPE}")).get("digest") == _digest(recipe)


def ended_with_other_recipe(journal: str, recipe: Any) -> bool:
    """Whether a journal is of another recipe's attempt that came to its end, and was refused."""
    filesystem, path = resolve_url(journal)
    if not all(path_exists(filesystem, f"{path}/{name}") for name in (_RECIPE, _ENDED)):
        return False
    return not _is_recipe(journal, recipe)


def is_begun(journal: str, recipe: Any) -> bool:
    """Whether there is an attempt with a recipe, to go on with."""
    filesystem, path = resolve_url(journal)
    return path_exists(filesystem, f"{path}/{_RECIPE}") and _is_recipe(journal, recipe)


def require_absent_or_resumable(target: str) -> None:
    """Raise UserError if a path or URL exists, unless it is an attempt that can go on."""
    filesystem, path = resolve_url(target)
    filesystem.invalidate_cache()
    if not is_local(filesystem) and path_exists(filesystem, f"{path}/{JOURNAL}/{_RECIPE}"):
        return
    names = [name.rpartition("/")[2] for name in list_folder(target)]
    # In a store, what is left of a journal without a recipe was being removed.
    if is_local(filesystem) or names != [JOURNAL]:
        require_absent(target)


class Staging:
    """The place where one data set is made.

    Attributes:
        folder: path or URL that its files are written to.
        journal: what is finished; None without a recipe.
    """

    def __init__(self, target: str, recipe: Any | None = None) -> None:
        """Claim the target.

        Raises:
            UserError: the target exists, an interrupted attempt has another recipe, or another
                process is making it.
        """
        self._filesystem, self._path = resolve_url(target)
        self._local = is_local(self._filesystem)
        self._lock: int | None = None
        self.journal: Journal | None = None
        self.folder = target.rstrip("/")
        (require_absent if recipe is None else require_absent_or_resumable)(target)
        if self._local:
            self.folder = str(_make_hidden_folder(Path(self._path), recipe is not None))
        if recipe is None:
            return
        if self._local:
            self._lock = lock_folder(Path(self.folder) / JOURNAL, target)
            remove_temporary_files(Path(self.folder))
        try:
            if ended_with_other_recipe(f"{self.folder}/{JOURNAL}", recipe):
                self._remove_parts()
            self.journal = Journal(f"{self.folder}/{JOURNAL}", recipe)
        except BaseException:
            self._unlock()
            raise

    def size(self, name: str) -> int:
        """Bytes of a file of the data set; -1 if it is not there."""
        filesystem, path = resolve_url(f"{self.folder}/{name}")
        return int(filesystem.size(path)) if path_exists(filesystem, path) else -1

    def _remove_parts(self) -> None:
        """Remove what a refused attempt has made; its journal goes afterwards."""
        filesystem, path = resolve_url(self.folder)
        for name in filesystem.ls(path, detail=False):
            if name.rstrip("/").rpartition("/")[2] != JOURNAL:
                remove_if_exists(filesystem, name)

    def publish(self) -> None:
        """Give the finished data set its final name."""
        if self._local:
            Path(self.folder).rename(self._path)
            self.folder = self._path
        if self.journal is not None:
            remove_if_exists(self._filesystem, f"{self._path}/{JOURNAL}")
        self._unlock()

    def abort(self) -> None:
        """Stop before the end; with a recipe, finished parts are kept for the next attempt."""
        if self.journal is not None and len(self.journal):
            self._unlock()
            return
        if self._local:
            shutil.rmtree(self.folder, ignore_errors=True)
        elif self.journal is not None:
            self.journal.remove()
        self._unlock()

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _make_hidden_folder(target: Path, lasting: bool) -> Path:
    """A hidden folder beside `target`, on the same file system; its name says whether it lasts."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if lasting:
        folder = target.parent / f".{target.name}{JOURNAL}"
        folder.mkdir(exist_ok=True)
        return folder
    name = tempfile.mkdtemp(prefix=f".{target.name}.", suffix=JOURNAL, dir=target.parent)
    umask = os.umask(0)
    os.umask(umask)
    os.chmod(name, 0o777 & ~umask)  # mkdtemp's 0700 would keep other users out for ever
    return Path(name)


def lock_folder(folder: Path, target: str) -> int | None:
    """A file lock that the system drops with this process; None where there are no file locks.

    Args:
        folder: of the lock's file; it is made.
        target: what is made, for the message.

    Returns:
        A descriptor; to close it ends the lock.

    Raises:
        UserError: another process has it.
    """
    folder.mkdir(exist_ok=True)
    descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise UserError(f"{target}: another process is making it right now") from None
    except OSError:  # some network file systems
        os.close(descriptor)
        return None
    return descriptor


def remove_temporary_files(folder: Path) -> None:
    """Remove the half-written files of an attempt that was killed."""
    for path in folder.rglob(f".*{TEMPORARY_SUFFIX}"):
        path.unlink(missing_ok=True)


@contextmanager
def staged_output(folder: str, name: str, whole: bool = False) -> Iterator[str]:
    """A path of this machine for a writer that takes no URL; in the end its files are in `folder`.

    They are made in a hidden folder beside their place, or, of a store, in a temporary one, and
    take their place when the block ends without an error. Until then what was there stays as it is.

    Args:
        folder: path or URL; it is made.
        name: of the file or folder in it; the path ends so. What is made beside it is not kept.
        whole: of a folder: nothing of before stays in it.

    Raises:
        RunError: of the block; it names the place, not the hidden folder.
    """
    filesystem, path = resolve_url(folder)
    local = is_local(filesystem)
    with _hidden_beside(Path(path)) if local else TemporaryDirectory(prefix="mhe-") as scratch:
        try:
            yield f"{scratch}/{name}"
        except RunError as error:
            raise RunError(str(error).replace(scratch, folder)) from error
        if local:
            _move_into_place(Path(scratch, name), Path(path, name), whole)
        else:
            _send(filesystem, Path(scratch, name), f"{path}/{name}", whole)


@contextmanager
def _hidden_beside(folder: Path) -> Iterator[str]:
    """A hidden folder in `folder`; those that killed processes left there are removed."""
    folder.mkdir(parents=True, exist_ok=True)
    for lock in folder.glob(f".*{TEMPORARY_SUFFIX}/lock"):
        with suppress(UserError):  # another process is making something in it
            if (descriptor := lock_folder(lock.parent, str(folder))) is not None:
                _put_back(lock.parent, folder)
                shutil.rmtree(lock.parent)
                os.close(descriptor)
    with TemporaryDirectory(prefix=".", suffix=TEMPORARY_SUFFIX, dir=folder) as scratch:
        descriptor = lock_folder(Path(scratch), str(folder))
        try:
            yield scratch
        finally:
            _put_back(Path(scratch), folder)
            if descriptor is not None:
                os.close(descriptor)


def _put_back(scratch: Path, folder: Path) -> None:
    """Give back its name to what was replaced, if that was broken off between the two renames."""
    for before in scratch.glob(f"{_BEFORE}/*"):
        if not (target := folder / before.name).exists():
            before.rename(target)


def _move_into_place(made: Path, target: Path, whole: bool) -> None:
    """Give what was made its name; other files stay in a folder that is not replaced as a whole."""
    if made.is_dir() and not whole:
        for file in _files_below(made):
            destination = target / file.relative_to(made)
            destination.parent.mkdir(parents=True, exist_ok=True)
            file.replace(destination)
        return
    if whole and target.exists():
        before = made.with_name(_BEFORE)  # which goes with the hidden folder
        before.mkdir()
        target.rename(before / target.name)
    made.replace(target)


def _send(filesystem: Any, made: Path, target: str, whole: bool) -> None:
    """Send what was made; of before, files of other names go last."""
    filesystem.invalidate_cache()
    old = set(with_retries(lambda: filesystem.find(target), target)) if whole else set()
    for file in _files_below(made) if made.is_dir() else [made]:
        destination = f"{target}{str(file).removeprefix(str(made))}"
        with_retries(partial(filesystem.put_file, str(file), destination), destination)
        old.discard(destination)
    for file in old:
        remove_if_exists(filesystem, file)


def _files_below(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]
