"""Runs of a head: as the loop would make them on any number of ranks, and by the definition."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import lru_cache
from unittest import mock

import torch
from torch import Tensor

from mhe_dist.config.head import BankConfig, HeadConfig, MarginConfig
from mhe_dist.distributed.topology import Topology
from mhe_dist.heads.base import NO_SAMPLE
from mhe_dist.heads.registry import build_head
from mhe_dist.heads.row_head import HeadSpec, RowHead
from tests.conftest import run_ranks
from tests.support.heads.reference import DenseHead

CLASSES = 46  # of 12 heads of 4, with two padding slots
STEPS, MICRO_BATCHES, BATCH, WIDTH = 3, 6, 4, 5
LR, SEED = 0.1, 3

MARGINS: dict[str, dict] = {
    "cosface": {"kind": "cosface", "m": 0.3, "scale": 8.0},
    "arcface": {"kind": "arcface", "m": 0.5, "scale": 8.0},
    "combined": {"kind": "combined", "m1": 1.1, "m2": 0.2, "m3": 0.1, "scale": 8.0},
    "softmax": {"kind": "softmax", "scale": 8.0},
    "adaface": {"kind": "adaface", "m": 0.4, "ema": 0.9, "scale": 8.0},
    "none": {"kind": "none"},
}
HEADS: dict[str, dict] = {
    "full": {"kind": "full"},
    "partial_fc": {"kind": "partial_fc", "partial_fc": {"rate": 0.4}},
    "route": {"mhs": {"exchange": "route"}},
    "gather": {"mhs": {"exchange": "gather", "negatives": "batch"}},
    "gather_own_plus": {"mhs": {"exchange": "gather", "negatives": "own_plus"}},
}


def head_config(head: str, margin: str = "cosface", /, **changes: object) -> HeadConfig:
    """A small head of `HEADS` with a margin of `MARGINS`; blocks in `changes` are merged."""
    values: dict = {
        "kind": "mhs",
        "margin": MARGINS[margin],
        "optim": {"weight_decay": 0.01},
        "groups": 3,
        "on_bad_label": "ignore",
    }
    if HEADS[head].get("kind", "mhs") == "mhs":
        values["mhs"] = {"length": 4, "extra_heads": 2}
    for key, value in [*HEADS[head].items(), *changes.items()]:
        values[key] = values.get(key, {}) | value if isinstance(value, dict) else value
    return HeadConfig.model_validate(values)


CRAMPED = {
    "bank.bank.HOST_CHUNK_BYTES": 800,
    "bank.repartition.MOVED_BYTES": 800,
    "bank.saved_rows.SAVED_CHUNK_BYTES": 400,
    "heads.gathered.scores.LOGITS_BYTES": 2000,
    "heads.multilevel.exchange.LOGITS_BYTES": 2000,
    "heads.routed.softmax.LOGITS_BYTES": 2000,
    "heads.routed.several_labels.LOGITS_BYTES": 2000,
    "heads.routed.extra_gradient.LOGITS_BYTES": 200,
}


@dataclass(frozen=True)
class Job:
    """One run of a head; see `run`.

    Attributes:
        config: of the head.
        labels: how labels are drawn, see `inputs`.
        dtype: in which the head computes.
        num_classes: C.
        steps: which are run, of the `STEPS` of a run.
        micro_batches: n; the samples of a step are the same for any number.
        cramped: make every buffer so small that rows and logits come in many pieces.
        state: to start from.
        folder: of a bank in file memory.
        predict: k; 0: predict nothing.
        epoch_steps: steps of an epoch.
        on_lists: give each label as a list of one.
    """

    config: HeadConfig
    labels: str = "random"
    dtype: torch.dtype = torch.float64
    num_classes: int = CLASSES
    steps: tuple[int, int] = (0, STEPS)
    micro_batches: int = MICRO_BATCHES
    cramped: bool = False
    state: dict[str, Tensor] = field(default_factory=dict)
    folder: str | None = None
    predict: int = 0
    epoch_steps: float = 0.0
    on_lists: bool = False

    def spec(self) -> HeadSpec:
        """What the head is built from."""
        return HeadSpec(
            self.config,
            self.num_classes,
            WIDTH,
            SEED,
            self.micro_batches,
            self.dtype,
            self.folder,
            self.epoch_steps,
        )

    def inputs(self) -> tuple[Tensor, Tensor]:
        """Embeddings `[STEPS, n, B, D]`, float64, and labels `[STEPS, n, B, ...]`, global."""
        embeddings, labels = inputs(self.labels, self.num_classes)
        labels = labels.unsqueeze(-1) if self.on_lists else labels
        shape = (STEPS, self.micro_batches, -1)
        return embeddings.view(*shape, WIDTH), labels.view(*shape, *labels.shape[3:])


def inputs(kind: str, num_classes: int) -> tuple[Tensor, Tensor]:
    """Embeddings and labels of a run.

    Kinds: random; repeated (three classes); one (class); short (a micro-batch without a sample, one
    with a single sample); bad (some labels are outside `[0, C)`); many (up to three labels
    a sample); neighbours (three labels with the same parent); all (every class is a label).
    """
    rng = torch.Generator().manual_seed(7)
    embeddings = torch.randn(STEPS, MICRO_BATCHES, BATCH, WIDTH, generator=rng, dtype=torch.float64)
    labels = torch.randint(0, num_classes, (STEPS, MICRO_BATCHES, BATCH), generator=rng)
    if kind == "repeated":
        labels = labels % 3
    elif kind == "one":
        labels = torch.full_like(labels, 5)
    elif kind == "short":
        labels[:, -1, 1:] = NO_SAMPLE
        labels[:, 0] = NO_SAMPLE
    elif kind == "bad":
        labels[:, 1, 2], labels[:, 3, 0], labels[:, 4] = -1, num_classes, num_classes + 9
    elif kind == "many":
        labels = torch.randint(-1, num_classes, (*labels.shape, 3), generator=rng)
        labels[:, 1, 0], labels[:, 2, :, 1], labels[:, 5, 1:] = -1, labels[:, 2, :, 0], NO_SAMPLE
        labels[:, 3, 0, 0], labels[:, 3, 1] = num_classes, num_classes + 1
    elif kind == "neighbours":
        labels = (labels % 7 * 6).unsqueeze(-1) + torch.arange(3)
    elif kind == "all":
        labels = torch.arange(num_classes).expand(*labels.shape, num_classes)
    return embeddings, labels


def run(topology: Topology, job: Job) -> dict[str, Tensor]:
    """Run a job on this rank's micro-batches as the loop would, the engine's scaling included.

    Returns:
        `losses` `[steps]`, whose sum over ranks is the loss; `grads` `[n / W, steps, B, D]` of the
        embeddings; `classes_seen` and `accuracy`; the head's state; what it predicts.
    """
    with ExitStack() as patches:
        if job.cramped:
            for name, size in CRAMPED.items():
                patches.enter_context(mock.patch(f"mhe_dist.{name}", size))
        return _run(topology, job)


def _run(topology: Topology, job: Job) -> dict[str, Tensor]:
    torch.manual_seed(0)
    embeddings, labels = job.inputs()
    head = build_head(job.spec(), topology)
    if job.state:
        head.load_state({name: t for name, t in job.state.items() if head.loads(name)})
    k = job.micro_batches // topology.world_size
    losses, grads, classes_seen, accuracy = [], [], [], []
    for step in range(*job.steps):
        head.plan(step, labels[step])
        outputs, step_grads = [], []
        for index in topology.share(job.micro_batches):
            there = (labels[step, index] != NO_SAMPLE).view(embeddings.shape[2], -1).any(1)
            x = embeddings[step, index][there].to(job.dtype).requires_grad_()
            output = head(x, labels[step, index][there])
            (output.loss / k).backward()
            outputs.append(output)
            step_grads.append(torch.zeros(len(there), WIDTH, dtype=job.dtype))
            step_grads[-1][there] = x.grad / topology.world_size
        head.step(LR)
        losses.append(torch.stack([o.loss.detach() for o in outputs]).mean() / topology.world_size)
        seen = torch.stack([o.metrics["classes_seen"] for o in outputs])
        classes_seen.append(seen.mean() / topology.world_size)
        correct = torch.stack([o.metrics["accuracy"] for o in outputs])
        accuracy.append(correct.mean() / topology.world_size)
        grads.append(torch.stack(step_grads))
    result = {
        "losses": torch.stack(losses),
        "grads": torch.stack(grads, 1),
        "classes_seen": torch.stack(classes_seen),
        "accuracy": torch.stack(accuracy),
        **{name: tensor for name, tensor in head.state().tensors.items() if head.loads(name)},
    }
    if job.predict:
        mine = embeddings[-1, topology.share(job.micro_batches)].flatten(0, 1)
        result["classes"], result["scores"] = head.predict(mine.to(job.dtype), job.predict)
    return result


def run_all(topology: Topology, jobs: list[Job]) -> list[dict[str, Tensor]]:
    """Run several jobs, to pay for the start of the ranks once."""
    return [run(topology, job) for job in jobs]


def run_on(world_size: int, jobs: list[Job]) -> list[list[dict[str, Tensor]]]:
    """What each rank found, for each job; one rank needs no process of its own."""
    ranks = [run_all(Topology(), jobs)] if world_size == 1 else run_ranks(run_all, world_size, jobs)
    return list(map(list, zip(*ranks, strict=True)))


Found = dict[str, list[list[dict[str, Tensor]]]]


def run_cases(world_size: int, cases: dict[str, list[Job]]) -> Found:
    """What the ranks found: by case, then by job, then by rank; they are started once."""
    by_job = iter(run_on(world_size, [job for jobs in cases.values() for job in jobs]))
    return {name: [next(by_job) for _ in jobs] for name, jobs in cases.items()}


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


def gathered_state(ranks: list[dict[str, Tensor]], field: str) -> Tensor:
    """A field of the state, of all ranks and groups in order."""
    names = [(rank, name) for rank in ranks for name in sorted(rank) if name.endswith("/" + field)]
    return torch.cat([rank[name] for rank, name in names])


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
