"""Which checkpoints go and which stay."""

from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import given

from mhe_dist.retention import to_delete


def test_keeps_the_newest_complete_ones() -> None:
    assert to_delete({100: True, 200: True, 300: True}, keep_last=2) == [100]


def test_remains_of_a_dead_process_go_but_not_one_in_the_making() -> None:
    assert to_delete({100: False, 200: True, 300: False}, keep_last=2) == [100]


def test_nothing_goes_while_nothing_is_complete() -> None:
    assert to_delete({100: False, 200: False}, keep_last=1) == []


def test_incomplete_ones_do_not_count_as_kept() -> None:
    assert to_delete({100: True, 200: False, 300: True}, keep_last=2) == [200]


@given(st.dictionaries(st.integers(0, 50), st.booleans()), st.integers(1, 5))
def test_never_the_newest_complete_one(history: dict[int, bool], keep_last: int) -> None:
    gone = to_delete(history, keep_last)
    complete = [step for step, done in history.items() if done]
    assert len(set(complete) - set(gone)) == min(keep_last, len(complete))
    if complete:
        assert max(complete) not in gone
        assert all(step < max(complete) for step in gone)
    else:
        assert gone == []
