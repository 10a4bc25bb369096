"""The budgets: `budget.csv` of the heads, `engine_budget.csv` of the engine.

`python -m tests.gpu.fake.budgets` writes both anew. Nobody raises a figure without a reason in the
commit; who lowers one writes the tables anew.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path

from pipelines.bench.counted.launches import CASES, count_step
from pipelines.bench.fake_cuda.engine_step import ENGINE_CASES, count_engine_step
from pipelines.bench.fake_cuda.step_cost import StepCost

TABLE = Path(__file__).with_name("budget.csv")
ENGINE_TABLE = Path(__file__).with_name("engine_budget.csv")


def figures(cost: StepCost) -> dict[str, int]:
    """What is held by a head's budget, in whole units."""
    return {
        "launches": cost.launches,
        "syncs": cost.syncs,
        "moved_mb": -(-cost.moved // 10**6),
        "gflop": -(-cost.flops // 10**9),
        "peak_mb": -(-cost.peak // 10**6),
    }


def engine_figures(counted: Mapping[str, int]) -> dict[str, int]:
    """What is held by the engine's budget, of what `engine_step` prints of a case."""
    return {
        "launches": counted["launches"],
        "syncs": counted["syncs"],
        "moved_kb": -(-counted["moved"] // 10**3),
        "peak_kb": -(-counted["peak"] // 10**3),
    }


def read(table: Path = TABLE) -> dict[str, dict[str, int]]:
    """Case -> the most of each figure that it may need."""
    with table.open() as file:
        return {
            row.pop("case"): {k: int(v) for k, v in row.items()} for row in csv.DictReader(file)
        }


def record() -> None:
    """Write the tables of today's figures."""
    _write(TABLE, {name: figures(count_step(case)) for name, case in CASES.items()})
    engine = {name: vars(count_engine_step(case)) for name, case in ENGINE_CASES.items()}
    _write(ENGINE_TABLE, {name: engine_figures(counted) for name, counted in engine.items()})


def _write(table: Path, rows: Mapping[str, dict[str, int]]) -> None:
    lines = [{"case": name} | row for name, row in rows.items()]
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(lines[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)


if __name__ == "__main__":
    record()
