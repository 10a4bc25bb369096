"""When a rank looks for garbage."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from mhe_dist.tracking.base import NullTracker
from pipelines.pretrain import garbage
from pipelines.pretrain import run as run_module
from pipelines.pretrain.main import run_pretraining
from tests.support import tiny


class Circle:
    """What only the collector frees."""

    def __init__(self) -> None:
        self.itself = self


@pytest.fixture
def thawed() -> Iterator[None]:
    """As a user's process is: pytest's has taken its objects out."""
    gc.unfreeze()
    yield
    gc.freeze()


def test_nothing_is_collected_while_it_is_put_off() -> None:
    with garbage.put_off():
        assert not gc.isenabled()
        with garbage.put_off():
            pass
        assert not gc.isenabled()
    assert gc.isenabled()


@pytest.mark.usefixtures("thawed")
def test_only_new_objects_are_looked_at() -> None:
    lost = weakref.ref(Circle())
    with garbage.of_new_objects():
        assert lost() is None, "what is garbage already is not kept"
        assert gc.get_freeze_count()
        old_objects = len(gc.get_objects())
        lost = weakref.ref(Circle())
        gc.collect()
        assert lost() is None
    assert not gc.get_freeze_count()
    assert old_objects < len(gc.get_objects()) / 10


@pytest.mark.usefixtures("thawed")
def test_what_python_itself_took_out_is_no_reason_to_look_at_the_rest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gc, "get_freeze_count", lambda: 375)  # as Python 3.12 begins
    before = len(gc.get_objects())
    with garbage.of_new_objects():
        assert len(gc.get_objects()) < before / 10


def test_a_program_that_took_its_objects_out_keeps_them_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gc.freeze()
    assert gc.get_freeze_count()
    # Not their number: what is taken out may end by itself, in another thread too.
    changes = mock.Mock()
    for name in ("freeze", "unfreeze", "collect"):
        monkeypatch.setattr(gc, name, getattr(changes, name))
    with garbage.of_new_objects():
        assert gc.get_freeze_count()
    assert gc.get_freeze_count() and not changes.mock_calls


@pytest.mark.slow
@pytest.mark.usefixtures("thawed")
def test_a_rank_starts_without_collections_and_trains_with_those_of_new_objects(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: dict[str, Any] = {}

    def open_tracker(*_: Any) -> NullTracker:
        found["starting"] = gc.isenabled(), gc.get_freeze_count() > 0
        return NullTracker()

    def note(event: dict[str, Any]) -> None:
        found[event["event"]] = gc.isenabled(), gc.get_freeze_count() > 0

    monkeypatch.setattr(run_module, "open_tracker", open_tracker)
    config = tiny.config(
        tmp_path,
        tiny.write_shards(tmp_path / "train"),
        train={"max_steps": 2, "global_batch": 8, "micro_batch": 8, "log_every": 1},
        export={"formats": []},
    )
    run_pretraining(config, note)
    assert found["starting"] == (False, False)
    assert found["metrics"] == (True, True)
    assert found["end"] == (True, False)
