"""What a run needs on a cluster that is not here: memory, traffic and checkpoints of each rank.

The backbone's memory is that of `preflight`, the head's step that of `mhe bench launches`, on a
device that computes nothing; traffic of gradients and sizes of checkpoints are formulas. Nothing
predicts a time, beside that of writing a checkpoint at a stated rate.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from mhe_dist.config.auto.head_sizes import resolve_sizes
from mhe_dist.config.schema import Config
from mhe_dist.engine.exact_reduce import sum_dtype
from mhe_dist.engine.memory_estimate import (
    FLOAT,
    MemoryEstimate,
    count_moments,
    estimate_memory,
    row_bytes,
    unallocated_backbone,
)
from mhe_dist.engine.settings import resolve_head_matmul
from pipelines.bench.counted.launches import CUDA, LaunchCase, count_step
from pipelines.bench.fake_cuda.step_cost import StepCost
from pipelines.bench.scale.index import PER_SHARD

GB = 1e9
# Of an index, measured by `mhe bench index`: docs/scale.md.
_SHARD_BYTES, _COLUMN_BYTES = 700, 8


class RunCost(NamedTuple):
    """A line of the table.

    Attributes:
        name: what is needed.
        figure: how much, with its unit.
        source: how it was found: counted, by a formula, or measured elsewhere.
    """

    name: str
    figure: str
    source: str


def cost_of_run(
    config: Config, num_classes: int, samples: int, per_node: int, write_gb_s: float
) -> dict[str, list[RunCost]]:
    """What each GPU, each node, each step and each checkpoint of a run need, by these titles.

    Args:
        config: of the run, on `scale.workers` GPUs.
        num_classes: C.
        samples: N, in tars of 10,000.
        per_node: GPUs of a node.
        write_gb_s: what a node writes into the store of the checkpoints, GB a second.

    Raises:
        UserError: the backbone is unknown, or refuses its arguments.
    """
    config = resolve_sizes(config, num_classes)
    workers = config.scale.workers
    per_node = min(per_node, workers)
    precision = "bf16" if config.train.precision == "auto" else config.train.precision
    estimate = estimate_memory(config, num_classes, workers, precision)
    step = count_step(case_of_run(config, num_classes, precision))
    numel = sum(parameter.numel() for parameter in unallocated_backbone(config).parameters())
    rows = row_bytes(config.head, num_classes, config.model.embedding_dim)
    return {
        "a GPU holds": _device_lines(config, estimate),
        "a node holds": _node_lines(config, estimate, rows // workers, samples, per_node),
        "a step of a rank": _step_lines(config, step, _sent_bytes(config, numel, precision)),
        "a checkpoint": _checkpoint_lines(config, rows, numel, per_node, write_gb_s),
    }


def case_of_run(config: Config, num_classes: int, precision: str) -> LaunchCase:
    """A step of the head of one of a run's ranks.

    Args:
        config: of the run, with numbers for the head's sizes.
        num_classes: C.
        precision: "bf16" or "float32".
    """
    workers = config.scale.workers
    return LaunchCase(
        config.head.model_dump(),
        classes=num_classes,
        width=config.model.embedding_dim,
        batch=config.train.micro_batch,
        rank=min(3, workers - 1),
        world_size=workers,
        micro_batches=config.train.global_batch // (config.train.micro_batch * workers),
        labels=config.data.labels_per_sample,
        tf32=resolve_head_matmul(config.head.matmul, precision, CUDA),
    )


def _device_lines(config: Config, estimate: MemoryEstimate) -> list[RunCost]:
    parts = estimate.parts_on_gpu(config)
    lines = [RunCost(name, _size(size), "as in preflight") for name, size in parts.items() if size]
    return [*lines, RunCost("together", _size(estimate.on_gpu(config)), "sum")]


def _node_lines(
    config: Config, estimate: MemoryEstimate, rows: int, samples: int, ranks: int
) -> list[RunCost]:
    processes = ranks * (1 + config.data.loader_workers)
    shards = -(-samples // PER_SHARD)
    saved = rows + estimate.weights + estimate.optimizer
    lines = [
        RunCost(
            f"table of shards, in {processes} processes",
            _size(processes * shards * _SHARD_BYTES),
            "measured: docs/scale.md",
        ),
        RunCost("columns of the index, mapped", _size(samples * _COLUMN_BYTES), "formula"),
        RunCost("images that wait", _size(ranks * estimate.images), "formula"),
        RunCost("copy of what is saved", _size(ranks * saved), "formula, at most"),
    ]
    if (memory := config.head.bank.memory) != "device":
        name = "rows and their state" + (", in files" if memory == "file" else "")
        lines.append(RunCost(name, _size(ranks * rows), "formula"))
    return lines


def _sent_bytes(config: Config, numel: int, precision: str) -> float:
    """Bytes that a rank sends for the backbone: gradients and, with ZeRO, weights, by rings."""
    workers, stage = config.scale.workers, int(config.scale.zero_stage)
    gradient, weights = numel * sum_dtype(precision).itemsize, numel * FLOAT
    rings = {0: 2 * gradient, 1: gradient + weights, 2: gradient + weights}
    return (workers - 1) / workers * rings.get(stage, gradient + 2 * weights)


def _step_lines(config: Config, step: StepCost, sent: float) -> list[RunCost]:
    workers = config.scale.workers
    exchanged = {"all_to_all": 0, "all_gather": 0, "reduce_scatter": 0, "all_reduce": 0}
    for event in step.ledger.of("kernel"):
        if (name := event.op.removeprefix("nccl.")) in exchanged:
            exchanged[name] += event.read
    rounds = math.ceil(math.log2(workers)) if workers > 1 else 0
    return [
        RunCost("backbone: gradients and weights sent, by rings", _size(sent), "formula"),
        *(
            RunCost(f"head: {name} sends", _size(size), "counted")
            for name, size in exchanged.items()
            if size
        ),
        RunCost("labels and requests: messages", f"{rounds} of 8 bytes", "formula"),
        RunCost("head: kernels and copies", f"{step.launches:,}", "counted, at least"),
        RunCost("head: waits of the host", f"{step.syncs:,}", "counted"),
        RunCost("head: device memory read and written", _size(step.moved), "counted"),
        RunCost("head: products", f"{step.flops / 1e9:,.0f} GFLOP", "counted"),
        RunCost("head: memory beyond its rows, at the peak", _size(step.peak), "counted"),
    ]


def _checkpoint_lines(
    config: Config, rows: int, numel: int, ranks: int, write_gb_s: float
) -> list[RunCost]:
    copies = 1 + count_moments(config.optim) + bool(config.optim.ema)
    backbone = copies * numel * FLOAT
    nodes, groups = -(-config.scale.workers // ranks), config.head.chosen_groups
    seconds = (backbone + rows) / nodes / (write_gb_s * GB)
    return [
        RunCost("backbone and its optimizer", _size(backbone), "formula"),
        RunCost(f"rows and their state, in {groups:,} groups", _size(rows), "formula"),
        RunCost(
            f"written by {nodes:,} nodes at {write_gb_s:g} GB/s each, beside the training",
            f"{seconds:,.1f} s",
            "formula",
        ),
    ]


def _size(size: float) -> str:
    """Bytes in MB or GB."""
    return f"{size / GB:,.2f} GB" if size >= 0.1 * GB else f"{size / 1e6:,.2f} MB"
