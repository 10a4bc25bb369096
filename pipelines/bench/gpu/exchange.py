"""NCCL: every collective of the project, at one rank, and at two ranks that share the GPU."""

from __future__ import annotations

import os
from typing import Any, Final

import torch
import torch.distributed as dist

from mhe_dist.distributed.compat import all_gather_single, reduce_scatter_single
from mhe_dist.distributed.spawn import run_ranks
from mhe_dist.distributed.topology import CPU, Topology
from mhe_dist.heads.registry import build_head
from mhe_dist.heads.row_head import HeadSpec
from pipelines.bench.gpu.agreement import BATCH, CLASSES, WIDTH, head_config, relative
from pipelines.bench.gpu.findings import GpuFindings, GpuSettings

HEADS: Final = ("route", "gather", "mhc")
TIMEOUT_S: Final = 20.0
# Newer NCCLs let ranks share a GPU if they are asked to; older ones always refuse.
SHARING: Final = "NCCL_MULTI_RANK_GPU_ENABLE"


def measure(settings: GpuSettings, found: GpuFindings) -> None:
    """Run both groups."""
    os.environ[SHARING] = "1"
    for world_size in (1, 2):
        name = f"{'NCCL' if settings.on_gpu else 'gloo'} at {world_size} ranks"
        try:
            ranks = run_ranks(
                exchange_on_rank, world_size, gpu=settings.on_gpu, shared=True, timeout_s=TIMEOUT_S
            )
        except Exception as error:
            words = str(error)
            if world_size > 1 and "uplicate GPU" in words:
                found.leave_out(name, "this NCCL refuses two ranks on one GPU")
            else:
                found.check(name, False, words.strip().splitlines()[-1])
            continue
        for what in ranks[0]:
            wrong = [str(rank[what]) for rank in ranks if not rank[what] <= 1e-4]
            found.check(f"{name}: {what}", not wrong, ", ".join(wrong))


def exchange_on_rank(topology: Topology) -> dict[str, float]:
    """Relative error of each collective, and of some heads against one process on a CPU."""
    return _collective_errors(topology) | {
        f"the loss of {name}": _head_error(topology, name) for name in HEADS
    }


def _collective_errors(topology: Topology) -> dict[str, float]:
    world, rank, device = topology.world_size, topology.rank, topology.device
    group = topology.device_group
    mine = torch.arange(6.0, device=device).view(3, 2) + 10 * rank
    all_ranks = torch.stack([mine - 10 * rank + 10 * other for other in range(world)])
    errors: dict[str, float] = {}
    summed = mine.clone()
    dist.all_reduce(summed, group=group)
    errors["all_reduce"] = relative(summed, all_ranks.sum(0))
    gathered = mine.new_empty(world * 3, 2)
    all_gather_single(gathered, mine, group)
    errors["all_gather"] = relative(gathered, all_ranks.flatten(0, 1))
    part = mine.new_empty(3, 2)
    reduce_scatter_single(part, mine.repeat(world, 1), group)
    errors["reduce_scatter"] = relative(part, all_ranks.sum(0))
    # Rank r sends r + 1 rows to everybody.
    sent = mine[:1].repeat(world * (rank + 1), 1)
    receive = [other + 1 for other in range(world)]
    arrived = mine.new_empty(sum(receive), 2)
    dist.all_to_all_single(arrived, sent, receive, [rank + 1] * world, group=group)
    expected = torch.cat([all_ranks[other, :1].repeat(other + 1, 1) for other in range(world)])
    errors["all_to_all"] = relative(arrived, expected)
    return errors


def _head_error(topology: Topology, name: str) -> float:
    """Relative error of the mean loss over the ranks, after a step, against one process."""
    labels = torch.randint(
        0, CLASSES, (2, topology.world_size, BATCH), generator=torch.Generator().manual_seed(2)
    )
    alone = _losses(Topology(device=CPU), name, labels, torch.float64)
    losses = _losses(topology, name, labels, torch.float32)
    dist.all_reduce(losses, group=topology.device_group)
    return relative(losses.cpu() / topology.world_size, alone)


def _losses(topology: Topology, name: str, labels: Any, dtype: torch.dtype) -> Any:
    """Mean losses of two steps over this rank's micro-batches, on the topology's device."""
    config = head_config(name, "cosface", "device", "float32", "sgd")
    steps, micro_batches, _ = labels.shape
    head = build_head(HeadSpec(config, CLASSES, WIDTH, 0, micro_batches, dtype), topology)
    random = torch.Generator().manual_seed(3)
    inputs = torch.randn(steps, micro_batches, BATCH, WIDTH, generator=random)
    losses = []
    for step in range(steps):
        head.plan(step, labels[step])
        outputs = []
        for number in topology.share(micro_batches):
            embeddings = inputs[step, number].to(topology.device, dtype).requires_grad_()
            output = head(embeddings, labels[step, number])
            output.loss.backward()
            outputs.append(output.loss.detach())
        head.step(0.1)
        losses.append(torch.stack(outputs).mean())
    return torch.stack(losses)
