"""What a step of each head asks of a GPU stays within `budget.csv`.

A mix of host and device tensors raises in `count_step` itself.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from pipelines.bench.counted.launches import CASES, HEADS, count_step
from tests.gpu.fake import budgets

BUDGET = budgets.read()


def test_the_table_names_every_case() -> None:
    assert list(BUDGET) == list(CASES)


@pytest.mark.parametrize(
    "name", [n if n in HEADS else pytest.param(n, marks=pytest.mark.slow) for n in CASES]
)
def test_a_step_stays_within_its_budget(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    cost = count_step(CASES[name])
    needed, allowed = budgets.figures(cost), BUDGET[name]
    exceeded = {key: (needed[key], allowed[key]) for key in allowed if needed[key] > allowed[key]}
    assert not exceeded, (
        f"{name}: (needed, allowed) {exceeded}\nwaits:\n{cost.ledger.waits()}"
        f"\nmoves the most:\n{cost.ledger.heaviest()}"
    )
    spare = {key: allowed[key] - needed[key] for key in allowed if needed[key] < allowed[key]}
    if spare:
        with capsys.disabled():
            print(f"\n{name}: the budget can be lowered by {spare}")


@pytest.mark.parametrize("name", CASES)
def test_the_budget_allows_no_wait(name: str) -> None:
    """None but that of the cascade, which must know its candidates before the second level."""
    assert BUDGET[name]["syncs"] == (1 if CASES[name].head["kind"] == "mhc" else 0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "batch"), [("route", 8448), ("gather own_plus", 1152), ("full", 1152)]
)
def test_the_tables_of_a_large_batch_are_not_waited_for_either(name: str, batch: int) -> None:
    """They are more than the driver takes from pageable memory at once."""
    cost = count_step(replace(CASES[name], batch=batch, classes=200_000))
    assert not cost.syncs, cost.ledger.waits()


def test_groups_are_launched_together() -> None:
    assert BUDGET["route"]["launches"] <= 120
    assert BUDGET["route 64 groups"]["launches"] <= 1.3 * BUDGET["route"]["launches"]


def test_a_routed_step_in_tf32_moves_a_gigabyte_at_most() -> None:
    route, groups = BUDGET["route tf32"], BUDGET["route 64 groups tf32"]
    assert route["moved_mb"] <= 1000
    assert route["launches"] <= 120
    assert groups["launches"] <= 1.3 * route["launches"]


def test_eight_labels_move_at_most_two_and_a_half_times_the_bytes_of_one() -> None:
    assert BUDGET["route 8 labels"]["moved_mb"] <= 2.5 * BUDGET["route"]["moved_mb"]
