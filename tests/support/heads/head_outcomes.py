"""What a run of a head must lead to by the plain definition, and whether a run did."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from mhe_dist.config.head import BankConfig, HeadConfig, MarginConfig
from mhe_dist.distributed.topology import Topology
from mhe_dist.heads.base import NO_SAMPLE
from mhe_dist.heads.registry import build_head
from mhe_dist.heads.row_head import RowHead
from tests.support.heads.head_jobs import LR, STEPS, Job
from tests.support.heads.head_runs import gathered_state
from tests.support.heads.reference import DenseHead


@dataclass(frozen=True)
class Outcome:
    """What a run must lead to.

    Attributes:
        losses, grads: by step; `grads` `[steps, n, B, D]`.
        classes_seen, accuracy: means over samples, by step.
        head: the rows after the last step.
        touched: units that ever were in a softmax.
    """

    losses: Tensor
    grads: Tensor
    classes_seen: Tensor
    accuracy: Tensor
    head: DenseHead
    touched: list[int]


@lru_cache(maxsize=256)
def _define(config: str, labels: str, num_classes: int) -> Outcome:
    job = Job(HeadConfig.model_validate_json(config), labels, num_classes=num_classes)
    head = build_head(job.spec(), Topology())
    assert isinstance(head, RowHead)
    layout = head.layout
    dense = DenseHead(
        job.config, head.initial_rows(torch.arange(layout.heads)).flatten(0, 1).requires_grad_()
    )
    embeddings, drawn = job.inputs()
    losses, grads, classes_seen, accuracy, ever = [], [], [], [], set()
    for step in range(STEPS):
        x = embeddings[step].clone().requires_grad_()
        several = drawn.dim() == 4 or job.config.objective == "multi_label"
        valid = counting(drawn[step], num_classes, job.config.objective)
        own, slot = layout.locate(drawn[step][valid])
        bias, touched = softmax_of(head, step, own)
        targets = own * layout.length + slot
        dense.config = job.config.model_copy(update={"margin": grown(job.config.margin, step)})
        if several:
            rows = torch.where(own < 0, -1, targets).view(len(targets), -1, 1)
            targets = (rows == torch.arange(len(dense.rows))).any(1)
        loss = (dense.labels_loss if several else dense.loss)(x[valid], targets, bias)
        loss.backward()
        losses.append(loss.detach())
        grads.append(x.grad)
        score = dense.labels_accuracy if several else dense.accuracy
        accuracy.append(score(x[valid], targets, bias))
        classes_seen.append((bias > float("-inf")).sum(1).double().mean())
        rows = [h * layout.length + j for h in touched for j in range(layout.length)]
        dense.update(dense.rows.grad, rows, LR)
        there = (drawn[step] != NO_SAMPLE).view(*valid.shape, -1).any(-1)
        dense.count_norms(embeddings[step][there])
        ever |= set(touched)
    by_step = map(torch.stack, (losses, grads, classes_seen, accuracy))
    return Outcome(*by_step, dense, sorted(ever))


def counting(labels: Tensor, num_classes: int, objective: str) -> Tensor:
    """Which samples count in the mean: those with a good label.

    With `multi_label` and lists of labels also those with an empty list, -1 alone.
    """
    good = (labels >= 0) & (labels < num_classes)
    if labels.dim() == 2:
        return good
    empty = (labels == -1).all(-1) & (objective == "multi_label")
    return good.any(-1) | empty


def grown(margin: MarginConfig, step: int) -> MarginConfig:
    """The margin as it is after some steps of its warm-up."""
    if not margin.warmup_steps:
        return margin
    part = min(1.0, step / margin.warmup_steps)
    return margin.model_copy(
        update={
            "m": part * margin.m,
            "m1": 1 + part * (margin.m1 - 1),
            "m2": part * margin.m2,
            "m3": part * margin.m3,
        }
    )


def define(job: Job) -> Outcome:
    """The outcome of a job by the plain definition; of all its steps from the start."""
    config = job.config.model_copy(update={"bank": BankConfig()})
    return _define(config.model_dump_json(), job.labels, job.num_classes)


def softmax_of(head: RowHead, step: int, own: Tensor) -> tuple[Tensor, list[int]]:
    """Which rows are in each sample's softmax, by the definition of the head's kind.

    Args:
        own: unit of each sample's class `[n]`, or of its labels `[n, K]`, -1 for none.

    Returns:
        `[n, rows]`, -inf for rows that are not seen, else what is added to a negative's logit; and
        the units that are in the step.
    """
    config, layout = head.spec.config, head.layout
    own = own.view(len(own), -1)
    is_own = (own.unsqueeze(2) == torch.arange(layout.heads)).any(1)
    present = is_own.any(0)
    drawn = torch.zeros_like(is_own)
    if config.kind == "full":
        drawn[:] = True
    elif config.kind == "partial_fc":
        for group in range(layout.groups):
            units = torch.tensor(list(layout.group_heads(group)))
            drawn[:, head.draw(step, group, units[present[units]])] = True
    elif config.mhs.exchange == "gather":
        drawn[:, head.draw(step)] = True
    else:
        for row, groups in zip(drawn, layout.group_of(own).tolist(), strict=True):
            for group in set(groups) - {-1}:
                row[head.draw(step, group)] = True
    certain = present.expand_as(is_own) if config.mhs.negatives == "batch" else is_own
    seen = certain | drawn
    bias = torch.where(seen, 0.0, float("-inf")).double()
    if config.kind == "mhs" and config.mhs.correction:
        sampled = seen & ~certain
        rate = sampled.double().sum(1, keepdim=True) / (~certain).double().sum(1, keepdim=True)
        bias = torch.where(sampled, bias - rate.log(), bias)
    rows = bias.repeat_interleave(layout.length, 1)
    rows[:, head.spec.num_classes :] = -math.inf
    return rows, torch.nonzero(seen.any(0)).squeeze(1).tolist()


def comparison(job: Job, tolerance: float) -> Callable[[str, Tensor, Tensor], None]:
    """`near(name, found, expected)`: asserts that they agree, and names the job if not."""

    def near(name: str, found: Tensor, expected: Tensor) -> None:
        torch.testing.assert_close(
            found.double(),
            expected.double(),
            rtol=tolerance,
            atol=tolerance,
            msg=lambda text: f"{name}, {job.labels}, {job.dtype}: {text}",
        )

    return near


def check_run(job: Job, ranks: list[dict[str, Tensor]], tolerance: float) -> None:
    """Compare what the ranks found, with all that a run leaves behind, to the definition."""
    wanted = define(job)
    steps = slice(*job.steps)

    near = comparison(job, tolerance)
    near("losses", sum(rank["losses"] for rank in ranks), wanted.losses[steps])
    seen = sum(rank["classes_seen"] for rank in ranks)
    near("classes seen", seen, wanted.classes_seen[steps])
    near("accuracy", sum(rank["accuracy"] for rank in ranks), wanted.accuracy[steps])
    grads = torch.cat([rank["grads"] for rank in ranks]).transpose(0, 1)
    near("embeddings", grads.flatten(1, 2), wanted.grads[steps].flatten(1, 2))
    units = gathered_state(ranks, "units")
    assert units.tolist() == wanted.touched
    fields = {"weight": wanted.head.rows.detach(), **wanted.head.state}
    if not job.config.optim.momentum:
        del fields["momentum"]
    for name, values in fields.items():
        rows = gathered_state(ranks, name)
        length = rows.shape[1]
        expected = values.view(-1, length, values.shape[-1])[units][..., : rows.shape[-1]]
        near(name, rows, expected)
        beyond = units[-1] * length + length - job.num_classes
        assert beyond <= 0 or (name == "age") or not rows[-1, -beyond:].any(), "padding was trained"
    if job.config.margin.kind == "adaface":
        near("norms", ranks[0]["norms"], wanted.head.norms)
