"""Sharded equals unsharded: every head and margin on 1, 2 and 3 ranks against plain float64."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import product

import pytest
import torch

from mhe_dist.distributed.topology import Topology
from mhe_dist.heads.registry import build_head
from tests.distributed.conftest import RANKS
from tests.support.heads.head_jobs import HEADS, MARGINS, Job, head_config
from tests.support.heads.head_outcomes import check_run, define
from tests.support.heads.head_runs import Found, gathered_state, run, run_cases

TOLERANCE = {torch.float64: 1e-11, torch.float32: 3e-5}
LABELS = ("random", "repeated", "one", "bad")
VARIANTS: dict[str, dict] = {
    "adamw": {"optim": {"kind": "adamw"}},
    "no momentum": {"optim": {"momentum": 0.0}},
    "filter": {"margin": {"filter": 0.2}},
    "warm-up": {"margin": {"warmup_steps": 4}},
    "host": {"bank": {"memory": "host"}},
    "file": {"bank": {"memory": "file"}},
    "correction": {"mhs": {"correction": True}},
    # Of some samples every extra negative is dropped.
    "filter and correction": {
        "margin": {"filter": 0.01},
        "mhs": {"correction": True, "length": 2, "extra_heads": 1},
    },
    "own": {"mhs": {"negatives": "own"}},
    "all extra": {"mhs": {"extra_heads": 50}},
    "one per class": {"partial_fc": {"rate": 1e-9}},
}
ONLY = {  # what a variant is about; elsewhere it is all heads
    "correction": ("route", "gather", "gather_own_plus"),
    "filter and correction": ("route", "gather_own_plus"),
    "own": ("route", "gather"),
    "all extra": ("route", "gather", "gather_own_plus"),
    "one per class": ("partial_fc",),
}
MORE_THAN_ALL = 50  # of 46 classes


def _exact() -> dict[str, list[Job]]:
    found = {}
    for head in HEADS:
        for margin in MARGINS:
            config = head_config(head, margin)
            found[f"{head}-{margin}"] = [Job(config, "short", dtype) for dtype in TOLERANCE]
        for labels in LABELS:
            found[f"{head}-{labels}"] = [Job(head_config(head), labels)]
        for name, changes in VARIANTS.items():
            if head in ONLY.get(name, HEADS):
                found[f"{head}-{name}"] = [Job(head_config(head, **changes))]
        found[f"{head}-in pieces"] = [
            Job(head_config(head, margin), kind, num_classes=401, cramped=True)
            for margin, kind in (("cosface", "short"), ("none", "random"), ("adaface", "repeated"))
        ]
    return found


def _several() -> dict[str, list[Job]]:
    """Any number of labels for a sample, by the heads and objectives that take them."""
    found = {}
    for head, objective in product(HEADS, ("softmax", "multi_label")):
        config = partial(head_config, head, objective=objective)
        jobs = [
            Job(config(), "many"),
            # All labels of a sample in one head; and no negatives at all.
            Job(config(), "many", num_classes=4),
            Job(config(), "all", num_classes=3),
            Job(config("none"), "neighbours", num_classes=401, cramped=True),
            Job(config("arcface"), "many", torch.float32),
            Job(config("cosface", margin={"filter": 0.2}, optim={"kind": "adamw"}), "many"),
        ]
        if objective == "multi_label":
            jobs.append(Job(config(), "short"))
        found[f"{head}-{objective}"] = jobs
    for head in ("full", "route"):
        found[f"{head}-margins"] = [Job(head_config(head, margin), "many") for margin in MARGINS]
        found[f"{head}-banks"] = [
            Job(head_config(head, bank={"memory": memory}), "many") for memory in ("host", "file")
        ]
    for head in ("gather_own_plus", "route"):
        found[f"{head}-correction"] = [
            Job(head_config(head, mhs=changes), "many", num_classes=90)
            for changes in ({"correction": True}, {"correction": True, "extra_heads": 50})
        ]
    for head in ("gather", "route"):
        found[f"{head}-own"] = [Job(head_config(head, mhs={"negatives": "own"}), "many")]
    return {f"several labels-{name}": jobs for name, jobs in found.items()}


EXACT = _exact() | _several()
ROUNDED = {
    f"{head}-bfloat16-{optim}": [
        Job(head_config(head, bank={"dtype": "bfloat16"}, optim={"kind": optim}))
    ]
    for head in HEADS
    for optim in ("sgd", "adamw")
}
PREDICTIONS = {
    f"{head}-{margin}-{k}": [Job(head_config(head, margin), predict=k)]
    for head in HEADS
    for margin in ("cosface", "none")
    for k in (3, MORE_THAN_ALL)
}


@pytest.fixture(scope="module", params=RANKS, ids=lambda size: f"W={size}")
def found(
    request: pytest.FixtureRequest, selected: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Found:
    """What each rank found for the jobs of the selected cases."""
    folder, cases = str(tmp_path_factory.mktemp("rows")), EXACT | ROUNDED | PREDICTIONS
    jobs = {name: [replace(job, folder=folder) for job in cases[name]] for name in selected}
    return run_cases(request.param, jobs)


@pytest.mark.parametrize("case", EXACT)
def test_equals_one_plain_process(case: str, found: Found) -> None:
    for job, ranks in zip(EXACT[case], found[case], strict=True):
        check_run(job, ranks, TOLERANCE[job.dtype])


@pytest.mark.parametrize("case", ROUNDED)
def test_bfloat16_rows_do_not_depend_on_the_ranks_and_stay_near(case: str, found: Found) -> None:
    (job,), (ranks,) = ROUNDED[case], found[case]
    alone, exact = run(Topology(), job), define(job)
    for field in ("units", "weight", *exact.head.state):
        assert torch.equal(gathered_state(ranks, field), gathered_state([alone], field)), field
    losses = sum(rank["losses"] for rank in ranks)
    torch.testing.assert_close(losses, exact.losses, rtol=0.02, atol=0.0)
    assert gathered_state(ranks, "weight").dtype == torch.bfloat16


@pytest.mark.parametrize("case", PREDICTIONS)
def test_best_classes(case: str, found: Found) -> None:
    (job,), (ranks,) = PREDICTIONS[case], found[case]
    layout = build_head(job.spec(), Topology()).layout
    dense = define(job).head
    scores = dense.cosines(job.inputs()[0][-1].flatten(0, 1))
    if job.config.margin.kind != "none":
        scores = scores * job.config.margin.scale
    places = torch.arange(len(dense.rows))
    classes = layout.classes(places // layout.length, places % layout.length)
    scores = scores.masked_fill(classes < 0, float("-inf")).detach()
    best, where = scores.topk(min(job.predict, job.num_classes), dim=1)
    predicted = torch.cat([rank["classes"] for rank in ranks])
    assert predicted[:, : best.shape[1]].tolist() == classes[where].tolist()
    assert (predicted[:, best.shape[1] :] == -1).all()
    torch.testing.assert_close(
        torch.cat([rank["scores"] for rank in ranks])[:, : best.shape[1]], best
    )
