"""Journals of interrupted attempts: whose results they hold, whatever moment ended the attempt."""

from __future__ import annotations

import itertools
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from mhe_dist.errors import StorageUnavailable, UserError
from pipelines.storage.staging import JOURNAL, Journal, Staging
from pipelines.storage.urls import require_absent

PARTS = 5


def ended(folder: Path) -> str:
    """The journal of an attempt with recipe `A` that made every part and was refused."""
    journal = Journal(str(folder / "journal"), "A")
    for number in range(PARTS):
        journal.record(number, f"A{number}")
    journal.mark_ended()
    return journal.url


@pytest.mark.parametrize("removals", range(PARTS + 2))
def test_results_of_a_recipe_are_never_those_of_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, removals: int
) -> None:
    """Killed while it removes a refused attempt: what was left counted as results of the next."""
    url, count = ended(tmp_path), itertools.count()
    remove = LocalFileSystem.rm_file

    def stop_after_some(self: LocalFileSystem, path: str) -> None:
        if next(count) == removals:
            raise KeyboardInterrupt
        remove(self, path)

    with monkeypatch.context() as patch:
        patch.setattr(LocalFileSystem, "rm_file", stop_after_some)
        with pytest.raises(KeyboardInterrupt):
            Journal(url, "B")
    begun = Journal(url, "B")
    assert len(begun) == 0
    begun.record(2, "B2")
    again = Journal(url, "B")
    assert [again.get(number) for number in range(PARTS)] == [None, None, "B2", None, None]
    with pytest.raises(UserError, match="interrupted attempt with another source"):
        Journal(url, "A")


def test_the_refusal_of_another_recipe_names_what_differs_without_secrets(tmp_path: Path) -> None:
    url = f"{tmp_path}/{JOURNAL}"
    model = {"step": 24, "digest": "sha256:" + "a" * 64}
    Journal(url, {"models": [model, {"dim": 8}], "api_key": "old", "seed": 1})
    other = model | {"step": 30, "digest": "sha256:" + "b" * 64}
    with pytest.raises(UserError) as refused:
        Journal(url, {"models": [other, {"dim": 8}], "api_key": "new", "seed": 1, "flip": True})
    differ = f"step was 24, is 30; digest was sha256:{'a' * 33}, is sha256:{'b' * 33}"
    assert f"other settings ({differ}; flip was None, is True); repeat" in str(refused.value)


def test_what_is_left_of_a_removal_in_a_store_stands_in_nobody_s_way() -> None:
    """It said that the target exists, and to delete it."""
    target = "memory://sets/new"
    filesystem = fsspec.filesystem("memory")
    filesystem.pipe({f"/sets/new/{JOURNAL}/{number:06d}.json": b"{}" for number in range(3)})
    staging = Staging(target, "B")
    assert staging.journal is not None and len(staging.journal) == 0
    staging.abort()
    filesystem.pipe({f"/sets/new/{JOURNAL}/000000.json": b"{}", "/sets/new/theirs.tar": b"x"})
    with pytest.raises(UserError, match="already exists"):
        Staging(target, "B")


def test_an_ended_attempt_stays_for_its_own_recipe(tmp_path: Path) -> None:
    again = Journal(ended(tmp_path), "A")
    assert [again.get(number) for number in range(PARTS)] == [f"A{n}" for n in range(PARTS)]


@pytest.mark.usefixtures("waits")
def test_a_store_that_fails_neither_loses_parts_nor_is_written_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The journal of a conversion that was interrupted was emptied, and a data set written over."""
    url = "memory://moment/journal"
    Journal(url, "A").record(0, "A0")
    fsspec.filesystem("memory").pipe_file("/moment/set/index.json", b"{}")
    real, left = MemoryFileSystem.info, []

    def failing(self: MemoryFileSystem, path: str, **more: object) -> object:
        if left:
            raise left.pop()
        return real(self, path, **more)

    monkeypatch.setattr(MemoryFileSystem, "info", failing)
    left += [TimeoutError("slow")] * 2
    assert Journal(url, "A").get(0) == "A0"
    left += [TimeoutError("slow")] * 2
    with pytest.raises(UserError, match="already exists"):
        require_absent("memory://moment/set")
    left += [TimeoutError("slow")] * 99
    for call in (lambda: Journal(url, "A"), lambda: require_absent("memory://moment/set")):
        with pytest.raises(StorageUnavailable):
            call()
    left.clear()
    assert Journal(url, "A").get(0) == "A0"


def test_a_name_in_a_store_is_no_pattern() -> None:
    """The journal of what the name matched was deleted, and that of the data set stayed."""
    store = fsspec.filesystem("memory")
    for name in ("set1", "set[1]"):
        staging = Staging(f"memory://patterns/{name}", "A")
        assert staging.journal is not None
        staging.journal.record(0, 1)
        store.pipe_file(f"/patterns/{name}/part", b"1")
    staging.publish()
    assert [each for each in store.find("/patterns") if "[" in each] == ["/patterns/set[1]/part"]
    begun = Staging("memory://patterns/set1", "A").journal
    assert begun is not None and len(begun) == 1
