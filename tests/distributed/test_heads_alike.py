"""Heads that must agree with one another, or with themselves in other pieces; in one process."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mhe_dist.config.head import HeadConfig
from mhe_dist.distributed.topology import Topology
from mhe_dist.heads.registry import build_head
from mhe_dist.heads.row_head import HeadSpec
from tests.support.heads.head_jobs import (
    CLASSES,
    HEADS,
    LR,
    MARGINS,
    STEPS,
    WIDTH,
    Job,
    head_config,
)
from tests.support.heads.head_runs import gathered_state, run

ALL = {"mhs": {"extra_heads": 50}}


def same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def by_class(job: Job, result: dict[str, Tensor], field: str) -> Tensor:
    """Rows `[C, columns]` of a run on one rank, each at the number of its class."""
    layout = build_head(job.spec(), Topology()).layout
    units = gathered_state([result], "units")
    assert len(units) == layout.heads
    rows = gathered_state([result], field).flatten(0, 1)
    classes = layout.classes(units[:, None], torch.arange(layout.length)).flatten()
    return rows[classes >= 0][classes[classes >= 0].argsort()]


@pytest.mark.parametrize("margin", MARGINS)
@pytest.mark.parametrize(
    ("head", "changes"),
    [("partial_fc", {"partial_fc": {"rate": 1.0}}), ("gather", ALL), ("gather_own_plus", ALL)],
)
def test_with_all_classes_selected_every_head_is_full(
    head: str, changes: dict, margin: str
) -> None:
    jobs = [Job(head_config("full", margin)), Job(head_config(head, margin, **changes))]
    full, other = (run(Topology(), job) for job in jobs)
    for name in ("losses", "grads", "accuracy", "classes_seen"):
        same(other[name], full[name])
    assert (full["classes_seen"] - CLASSES).abs().max() < 1e-9
    for field in ("weight", "momentum"):
        same(by_class(jobs[1], other, field), by_class(jobs[0], full, field))


@pytest.mark.parametrize("margin", MARGINS)
@pytest.mark.parametrize("head", HEADS)
def test_a_list_of_one_label_is_a_label(head: str, margin: str) -> None:
    job = Job(head_config(head, margin), "bad", on_lists=True)
    one, listed = (run(Topology(), each) for each in (replace(job, on_lists=False), job))
    assert listed.keys() == one.keys()
    for name in one:
        same(listed[name], one[name])


@pytest.mark.parametrize("head", ["mhp", "mhc"])
def test_heads_that_learn_one_label_refuse_lists(head: str) -> None:
    config = HeadConfig.model_validate({"kind": head, "groups": 8})
    built = build_head(HeadSpec(config, 46, 5, 0, 1), Topology())
    with pytest.raises(ValueError, match=r"labels \(1, 2, 3\): this head takes one per sample"):
        built.plan(0, torch.zeros(1, 2, 3, dtype=torch.int64))


@pytest.mark.parametrize("labels", ["random", "many"])
@pytest.mark.parametrize("margin", ["cosface", "adaface", "none"])
@pytest.mark.parametrize("head", HEADS)
def test_four_micro_batches_are_one_of_four_times_the_size(
    head: str, margin: str, labels: str
) -> None:
    config = head_config(head, margin)
    four, one = (run(Topology(), Job(config, labels, micro_batches=n)) for n in (4, 1))
    four["grads"], one["grads"] = (
        r["grads"].transpose(0, 1).reshape(STEPS, -1, WIDTH) for r in (four, one)
    )
    assert four.keys() == one.keys()
    for name in four:
        same(four[name], one[name])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("margin", MARGINS)
@pytest.mark.parametrize("head", HEADS)
def test_cosines_of_one_and_minus_one_are_finite(
    head: str, margin: str, dtype: torch.dtype
) -> None:
    built = build_head(HeadSpec(head_config(head, margin), CLASSES, WIDTH, 3, 1, dtype), Topology())
    labels = torch.arange(8)
    units, slots = built.layout.locate(labels)
    rows = built.initial_rows(units)[torch.arange(8), slots, :WIDTH]
    signs = torch.tensor([1, -1]).repeat(4).unsqueeze(1)
    x = (rows * signs * 3).requires_grad_()
    built.plan(0, labels.unsqueeze(0))
    output = built(x, labels)
    output.loss.backward()
    built.step(LR)
    state = [tensor for tensor in built.state().tensors.values() if tensor.is_floating_point()]
    assert all(t.isfinite().all() for t in (output.loss, x.grad, *state))


@pytest.mark.parametrize("head", HEADS)
def test_a_loss_without_gradient_leaves_the_rows_alone(head: str) -> None:
    built = build_head(HeadSpec(head_config(head), CLASSES, WIDTH, 3, 1, torch.float64), Topology())
    labels = torch.arange(6)
    built.plan(0, labels.unsqueeze(0))
    units = built.bank.touched
    before = built.bank.read(units).clone()
    loss = built(torch.randn(6, WIDTH, dtype=torch.float64), labels).loss
    assert loss.isfinite()
    assert torch.equal(built.bank.read(units), before)
