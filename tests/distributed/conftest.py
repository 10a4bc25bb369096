"""What tests over ranks share: the cases to start ranks for are those that were selected."""

from __future__ import annotations

from collections.abc import Hashable

import pytest

# Uneven parts are the harder case; two ranks are tried by `make long`.
RANKS = [1, pytest.param(2, marks=pytest.mark.long), 3]


@pytest.fixture(scope="module")
def selected(request: pytest.FixtureRequest) -> list[Hashable]:
    """Each `case` of this module's tests that pytest is going to run, once, in their order.

    A module starts its ranks once, for the jobs of all selected cases: one case that is named with
    `-k` or by its id takes seconds, and the whole matrix pays for one start.
    """
    calls = [
        getattr(item, "callspec", None)
        for item in request.session.items
        if item.path == request.path
    ]
    return list(
        dict.fromkeys(call.params["case"] for call in calls if call and "case" in call.params)
    )
