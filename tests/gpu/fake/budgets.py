"""The budget of each case, `budget.csv`; `python -m tests.gpu.fake.budgets` writes it anew.

Nobody raises a figure without a reason in the commit; who lowers one writes the table anew.
"""

from __future__ import annotations

import csv
from pathlib import Path

from pipelines.bench.launches import CASES, StepCost, count_step

TABLE = Path(__file__).with_name("budget.csv")


def figures(cost: StepCost) -> dict[str, int]:
    """What is held by the budget, in whole units."""
    return {
        "launches": cost.launches,
        "syncs": cost.syncs,
        "moved_mb": -(-cost.moved // 10**6),
        "gflop": -(-cost.flops // 10**9),
        "peak_mb": -(-cost.peak // 10**6),
    }


def read() -> dict[str, dict[str, int]]:
    """Case -> the most of each figure that it may need."""
    with TABLE.open() as file:
        return {
            row.pop("case"): {k: int(v) for k, v in row.items()} for row in csv.DictReader(file)
        }


def record() -> None:
    """Write the table of today's figures."""
    rows = [{"case": name} | figures(count_step(case)) for name, case in CASES.items()]
    with TABLE.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    record()
