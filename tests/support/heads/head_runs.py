"""Runs of a head as the loop would make them, on any number of ranks."""

from __future__ import annotations

from contextlib import ExitStack
from unittest import mock

import torch
from torch import Tensor

from mhe_dist.distributed.topology import Topology
from mhe_dist.heads.base import NO_SAMPLE
from mhe_dist.heads.registry import build_head
from tests.conftest import run_ranks
from tests.support.heads.head_jobs import LR, WIDTH, Job

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


def gathered_state(ranks: list[dict[str, Tensor]], field: str) -> Tensor:
    """A field of the state, of all ranks and groups in order."""
    names = [(rank, name) for rank in ranks for name in sorted(rank) if name.endswith("/" + field)]
    return torch.cat([rank[name] for rank, name in names])
