"""An error in one line, whatever it says."""

from __future__ import annotations

import pytest

from mhe_dist.errors import describe_error, first_line, last_line


@pytest.mark.parametrize("silent", [AssertionError(), ValueError(" \n")])
def test_an_error_that_says_nothing_is_told_by_its_kind(silent: Exception) -> None:
    kind = type(silent).__name__
    assert first_line(silent) == last_line(silent) == describe_error(silent) == kind
    assert describe_error(silent, last=True) == kind


def test_of_many_lines_there_is_the_first_or_the_last() -> None:
    error = RuntimeError("\nTraceback\n  File\nno memory\n")
    assert first_line(error) == first_line(str(error)) == "Traceback"
    assert last_line(error) == last_line(str(error)) == "no memory"
    assert describe_error(error) == "RuntimeError: Traceback"
    assert describe_error(error, last=True) == "RuntimeError: no memory"


def test_text_that_says_nothing_is_empty() -> None:
    assert first_line(" \n") == last_line("") == ""
