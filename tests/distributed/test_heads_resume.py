"""A head that was saved on two ranks goes on alike on one and on three."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from mhe_dist.distributed.topology import Topology
from mhe_dist.heads.registry import build_head
from tests.support.heads.head_jobs import HEADS, STEPS, Job, head_config
from tests.support.heads.head_outcomes import check_run
from tests.support.heads.head_runs import run, run_on

SAVED = STEPS - 1
VARIANTS: dict[str, dict] = {
    "adaface": {},
    "adamw": {"optim": {"kind": "adamw"}},
    "bfloat16": {"bank": {"dtype": "bfloat16"}},
}
CASES = [f"{head}-{variant}" for head in HEADS for variant in VARIANTS]


def job(case: str, *steps: int, state: dict[str, Tensor] | None = None) -> Job:
    head, variant = case.split("-")
    config = head_config(head, "adaface", **VARIANTS[variant])
    return Job(config, "short", steps=steps, state=state or {})


@pytest.fixture(scope="module")
def saved(selected: list[str]) -> dict[str, dict[str, Tensor]]:
    """State after `SAVED` steps on two ranks, of the selected cases; each tensor by name."""
    found = run_on(2, [job(case, 0, SAVED) for case in selected])
    return {case: first | second for case, (first, second) in zip(selected, found, strict=True)}


@pytest.fixture(scope="module", params=[1, 3], ids=lambda size: f"W={size}")
def found(
    request: pytest.FixtureRequest, saved: dict[str, dict[str, Tensor]]
) -> dict[str, list[dict[str, Tensor]]]:
    """What each rank found after it went on."""
    jobs = [job(case, SAVED, STEPS, state=state) for case, state in saved.items()]
    return dict(zip(saved, run_on(request.param, jobs), strict=True))


@pytest.mark.parametrize("case", CASES)
def test_goes_on_alike(case: str, found: dict[str, list[dict[str, Tensor]]]) -> None:
    if not case.endswith("bfloat16"):
        check_run(job(case, SAVED, STEPS), found[case], 1e-11)
        return
    alone = run(Topology(), job(case, 0, STEPS))
    rows = [name for name in alone if name.startswith("rows/")]
    merged = {name: rank[name] for rank in found[case] for name in rank}
    assert rows
    assert all(torch.equal(merged[name], alone[name]) for name in rows)


@pytest.mark.parametrize("case", CASES)
def test_ranges_of_groups_cover_all_rows_once(case: str) -> None:
    head = build_head(job(case, 0, 1).spec(), Topology())
    ranges = head.row_ranges()
    names = {name.rsplit("/", 1)[0] for name in head.state().owned}
    assert names == set(ranges)
    bounds = [ranges[name] for name in sorted(ranges)]
    assert bounds[0][0] == 0
    assert all(before[1] == after[0] for before, after in itertools.pairwise(bounds))
    assert bounds[-1][1] >= 46 > bounds[-1][0]
