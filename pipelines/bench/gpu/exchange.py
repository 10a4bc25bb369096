"""NCCL: every collective of the project, heads and the engine, at one rank and at several.

Where there are several GPUs each rank has its own; else two ranks share the one, if NCCL lets them.
"""

from __future__ import annotations

import os
from typing import Final

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mhe_dist.backbone.normalization import normalize_images
from mhe_dist.config.schema import OptimConfig, TrainConfig
from mhe_dist.distributed.compat import all_gather_single, reduce_scatter_single
from mhe_dist.distributed.spawn import run_ranks
from mhe_dist.distributed.topology import CPU, Topology
from mhe_dist.engine.engine import Engine
from mhe_dist.engine.settings import make_optimizer
from mhe_dist.errors import last_line
from mhe_dist.heads.registry import build_head
from mhe_dist.heads.row_head import HeadSpec
from pipelines.bench.gpu.agreement import (
    BATCH,
    CLASSES,
    WIDTH,
    head_config,
    labels_of,
    random_labels,
    relative,
)
from pipelines.bench.gpu.findings import GpuFindings, GpuSettings

HEADS: Final = ("route", "gather", "full", "mhc", "route several labels", "gather several labels")
STEPS: Final = 3  # of the engine
TIMEOUT_S: Final = 60.0  # ranks compile kernels meanwhile
CLOSE: Final = {"float32": 1e-4, "bf16": 0.1}
MOST_RANKS: Final = 8
# Newer NCCLs let ranks share a GPU if they are asked to; older ones always refuse.
SHARING: Final = "NCCL_MULTI_RANK_GPU_ENABLE"


def measure(settings: GpuSettings, found: GpuFindings) -> None:
    """Run all groups of ranks."""
    os.environ[SHARING] = "1"
    gpus = torch.cuda.device_count() if settings.on_gpu else 1
    for world_size in group_sizes(gpus):
        name = f"{'NCCL' if settings.on_gpu else 'gloo'} at {world_size} ranks"
        shared = gpus == 1
        try:
            ranks = run_ranks(
                *(exchange_on_rank, world_size, settings.small),
                gpu=settings.on_gpu,
                shared=shared,
                timeout_s=TIMEOUT_S,
            )
        except Exception as error:
            words = str(error)
            if shared and world_size > 1 and "uplicate GPU" in words:
                found.leave_out(name, "this NCCL refuses two ranks on one GPU")
            else:
                found.check(name, False, last_line(error))
            continue
        check_ranks(found, name, ranks)


def group_sizes(gpus: int) -> list[int]:
    """Ranks of each group: one and two on a single GPU, else two and one on each GPU."""
    return [1, 2] if gpus == 1 else sorted({2, min(gpus, MOST_RANKS)})


def check_ranks(found: GpuFindings, name: str, ranks: list[dict[str, float]]) -> None:
    """A check for each thing that the ranks of a group looked at."""
    for what in ranks[0]:
        limit = CLOSE["bf16" if "bf16" in what else "float32"]
        wrong = [f"rank {r}: {rank[what]:.1e}" for r, rank in enumerate(ranks)]
        passed = all(rank[what] <= limit for rank in ranks)
        found.check(f"{name}: {what}", passed, "" if passed else ", ".join(wrong))


def exchange_on_rank(topology: Topology, small: bool) -> dict[str, float]:
    """Relative error of each collective, and of heads and engine against one process on a CPU."""
    errors = _collective_errors(topology)
    errors |= {f"the loss of {name}": _head_error(topology, name) for name in HEADS}
    errors["the loss of route, host memory"] = _head_error(topology, "route", "host")
    for precision in ("float32",) if small else ("float32", "bf16"):
        for stage in (1,) if small else (0, 1, 2, 3):
            name = f"the weights at ZeRO {stage} in {precision}"
            errors[name] = _engine_error(topology, stage, precision)
    if topology.device.type == "cuda":
        errors["contexts on GPUs of other ranks"] = _strange_contexts(topology.device)
    return errors


def _strange_contexts(device: torch.device) -> float:
    """On how many other GPUs this process takes memory."""
    others = set(range(torch.cuda.device_count())) - {device.index}
    has_context = torch._C._cuda_hasPrimaryContext  # type: ignore[attr-defined]
    return float(sum(has_context(number) for number in others))


def _collective_errors(topology: Topology) -> dict[str, float]:
    world, rank, device = topology.world_size, topology.rank, topology.device
    group = topology.device_group
    mine = torch.arange(6.0, device=device).view(3, 2) + 10 * rank
    all_ranks = torch.stack([mine - 10 * rank + 10 * other for other in range(world)])
    errors: dict[str, float] = {}
    for op, expected in (("SUM", all_ranks.sum(0)), ("MAX", all_ranks.amax(0))):
        reduced = mine.clone()
        dist.all_reduce(reduced, getattr(dist.ReduceOp, op), group)
        errors[f"all_reduce {op}"] = relative(reduced, expected)
    gathered = mine.new_empty(world * 3, 2)
    all_gather_single(gathered, mine, group)
    errors["all_gather"] = relative(gathered, all_ranks.flatten(0, 1))
    # Micro-batches are summed over the ranks in both types.
    for dtype in (torch.float32, torch.float64):
        part = mine.new_empty(3, 2, dtype=dtype)
        reduce_scatter_single(part, mine.to(dtype).repeat(world, 1), group)
        errors[f"reduce_scatter {dtype}"] = relative(part, all_ranks.sum(0))
        errors[f"all_to_all {dtype}"] = _all_to_all_error(topology, all_ranks.to(dtype))
    return errors


def _all_to_all_error(topology: Topology, all_ranks: Tensor) -> float:
    """Of rows of which rank r sends `(r + s + 1) % (W + 1)` to rank s: to some ranks none."""
    world, rank = topology.world_size, topology.rank
    counts = [[(sender + to + 1) % (world + 1) for to in range(world)] for sender in range(world)]
    sent = all_ranks[rank, :1].repeat(sum(counts[rank]), 1)
    receive = [counts[sender][rank] for sender in range(world)]
    arrived = sent.new_empty(sum(receive), 2)
    dist.all_to_all_single(arrived, sent, receive, counts[rank], group=topology.device_group)
    expected = [all_ranks[sender, :1].repeat(count, 1) for sender, count in enumerate(receive)]
    return relative(arrived, torch.cat(expected))


def _head_error(topology: Topology, name: str, memory: str = "device") -> float:
    """Relative error of the mean losses of two steps over the ranks, against one process."""
    alone = _losses(Topology(device=CPU), topology.world_size, name, "device", torch.float64)
    losses = _losses(topology, topology.world_size, name, memory, torch.float32)
    dist.all_reduce(losses, group=topology.device_group)
    return relative(losses.cpu() / topology.world_size, alone)


def _losses(
    topology: Topology, micro_batches: int, name: str, memory: str, dtype: torch.dtype
) -> Tensor:
    """Mean losses of two steps over this rank's micro-batches, on the topology's device."""
    config = head_config(name, "cosface", memory, "float32", "sgd", MOST_RANKS)
    head = build_head(HeadSpec(config, CLASSES, WIDTH, 0, micro_batches, dtype), topology)
    random = torch.Generator().manual_seed(3)
    labels = random_labels((2, micro_batches, BATCH), labels_of(name), random)
    inputs = torch.randn(2, micro_batches, BATCH, WIDTH, generator=random)
    losses = []
    for step in range(2):
        head.plan(step, labels[step])
        head.prefetch(step + 1, labels[-1])
        outputs = []
        for number in topology.share(micro_batches):
            embeddings = inputs[step, number].to(topology.device, dtype).requires_grad_()
            output = head(embeddings, labels[step, number])
            output.loss.backward()
            outputs.append(output.loss.detach())
        head.step(0.1)
        losses.append(torch.stack(outputs).mean())
    return torch.stack(losses)


def _engine_error(topology: Topology, stage: int, precision: str) -> float:
    """Of what some steps change in the weights, against torch alone on a CPU in float64."""
    world, batch = topology.world_size, 8
    random = torch.Generator().manual_seed(4)
    images = torch.randint(0, 256, (STEPS, world, batch, 3, 16, 16), generator=random)
    images = images.to(torch.uint8)
    optim = OptimConfig.model_validate({"lr": 0.05})
    sizes = {"global_batch": batch * world, "micro_batch": batch, "precision": precision}
    engine = Engine(_network(), optim, TrainConfig.model_validate(sizes), topology, stage)
    for step in range(STEPS):
        embeddings = engine.forward(images[step, topology.rank], step, topology.rank)
        engine.backward(embeddings.square().mean())
        engine.step(optim.lr)
    state, first = engine.state(), _network().state_dict()
    expected = _trained_by_torch(images, optim)
    found = torch.cat([(state[f"model.{name}"] - first[name]).flatten() for name in first])
    return relative(found, torch.cat([(expected[name] - first[name]).flatten() for name in first]))


def _trained_by_torch(images: Tensor, optim: OptimConfig) -> dict[str, Tensor]:
    """The weights after the same steps, each over the micro-batches of all ranks."""
    net = _network().double().train()
    optimizer = make_optimizer(net, optim)
    for step in images:
        for part in step:
            outputs = net(normalize_images(part).double())
            (outputs.square().mean() / len(step)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return net.state_dict()


def _network() -> nn.Module:
    """The same weights each time; an odd number of them, so that shares are padded."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = (nn.Conv2d(3, 7, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(343, 5))
        return nn.Sequential(*layers)
