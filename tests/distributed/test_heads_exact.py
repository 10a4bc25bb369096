"""Sharded equals unsharded: every head and margin on 1, 2 and 3 ranks against plain float64."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch

from mhe_dist.topology import Topology
from tests.conftest import run_ranks
from tests.distributed.head_runs import HEADS, MARGINS, Job, check, head_config, run_all

TOLERANCE = {torch.float64: 1e-11, torch.float32: 3e-5}
LABELS = ("random", "repeated", "one", "short", "bad")
VARIANTS = {
    "adamw": {"optim": {"kind": "adamw"}},
    "no momentum": {"optim": {"momentum": 0.0}},
    "filter": {"margin": {"filter": 0.2}},
    "correction": {"mhs": {"correction": True}},
    "own": {"mhs": {"negatives": "own"}},
    "all extra": {"mhs": {"extra_heads": 50}},
    "one per class": {"partial_fc": {"rate": 1e-9}},
}
ONLY = {  # what a variant is about
    "correction": ("route", "gather", "gather_own_plus"),
    "own": ("route", "gather"),
    "all extra": ("route", "gather", "gather_own_plus"),
    "one per class": ("partial_fc",),
}


def cases() -> dict[str, list[Job]]:
    """Jobs by name."""
    found = {}
    for head in HEADS:
        for margin in MARGINS:
            labels = LABELS if margin == "cosface" else ("short",)
            config = head_config(head, margin)
            found[f"{head}-{margin}"] = [Job(config, kind, d) for kind in labels for d in TOLERANCE]
        for name, changes in VARIANTS.items():
            if head in ONLY.get(name, HEADS):
                config = head_config(head, **changes)
                found[f"{head}-{name}"] = [Job(config, "random", dtype) for dtype in TOLERANCE]
        found[f"{head}-in pieces"] = [
            Job(head_config(head, margin), kind, num_classes=401, cramped=True)
            for margin, kind in (("cosface", "short"), ("none", "random"), ("adaface", "repeated"))
        ]
    return found


@lru_cache(maxsize=3)
def results(world_size: int) -> list[list[dict]]:
    """What each rank found for all jobs."""
    jobs = [job for jobs in cases().values() for job in jobs]
    if world_size == 1:
        return [run_all(Topology(), jobs)]
    return run_ranks(run_all, world_size, jobs)


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("case", cases())
def test_equals_one_plain_process(case: str, world_size: int) -> None:
    first = 0
    for name, jobs in cases().items():
        if name == case:
            for number, job in enumerate(jobs, first):
                ranks = [rank[number] for rank in results(world_size)]
                check(job, ranks, TOLERANCE[job.dtype])
        first += len(jobs)
