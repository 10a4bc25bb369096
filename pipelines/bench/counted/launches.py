"""What a step of each head asks of a GPU, counted on a device that computes nothing.

The shape: rank 3 of 8, 2 M classes, embeddings of 512, 128 images per rank. Rows that are not in
device memory are real; their cases have embeddings of 16, so that they take seconds.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from mhe_dist.config.head import HeadConfig
from mhe_dist.distributed.topology import Topology
from mhe_dist.heads.base import Head
from mhe_dist.heads.registry import build_head
from mhe_dist.heads.row_head import HeadSpec
from pipelines.bench.fake_cuda.autograd import backward, require_driver
from pipelines.bench.fake_cuda.device import FakeCuda, fake_cuda
from pipelines.bench.fake_cuda.lone_rank import lone_rank
from pipelines.bench.fake_cuda.step_cost import StepCost, cost_since
from pipelines.bench.gpu.agreement import head_variants

CUDA: Final = torch.device("cuda", 0)
MHS: Final = {"length": 128, "extra_heads": 321}
HEADS: Final = head_variants(**MHS)
MARGINS: Final[dict[str, dict[str, Any]]] = {
    "none": {"margin": {"kind": "none"}},
    "softmax": {"margin": {"kind": "softmax"}},
    "arcface": {"margin": {"kind": "arcface"}},
    "combined": {"margin": {"kind": "combined", "m1": 1.1, "m2": 0.2, "m3": 0.1}},
    "adaface": {"margin": {"kind": "adaface"}},
    "filter": {"margin": {"kind": "cosface", "filter": 0.4}},
}
BANKS: Final[dict[str, dict[str, Any]]] = {
    "bfloat16": {"bank": {"dtype": "bfloat16"}},
    "host": {"bank": {"memory": "host"}},
    "file": {"bank": {"memory": "file"}},
}
OPTIMIZERS: Final[dict[str, dict[str, Any]]] = {"adamw": {"optim": {"kind": "adamw"}}}
HOST_WIDTH: Final = 16


@dataclass(frozen=True)
class LaunchCase:
    """A head and the shape of a step.

    Attributes:
        head: the head's block of the config.
        classes, width, batch: C, D and B.
        rank, world_size: the rank that is looked at, of how many.
        micro_batches: of a rank and step.
        touched: whether earlier steps have used every row.
        labels: of a sample, for a head that takes several; 0: one, without a dimension of its own.
        tf32: whether products are in TF32, as in bf16 runs.
    """

    head: dict[str, Any]
    classes: int = 2_000_000
    width: int = 512
    batch: int = 128
    rank: int = 3
    world_size: int = 8
    micro_batches: int = 1
    touched: bool = True
    labels: int = 0
    tf32: bool = False


def _case(head: dict[str, Any], labels: int = 0) -> LaunchCase:
    on_device = head.get("bank", {}).get("memory", "device") == "device"
    case = LaunchCase(head, labels=labels)
    return case if on_device else replace(case, width=HOST_WIDTH)


def _cases() -> dict[str, LaunchCase]:
    cases: dict[str, LaunchCase] = {}
    for name, head in HEADS.items():
        cases[name] = LaunchCase(head)
        variants = MARGINS | OPTIMIZERS | ({} if name == "mhp" else BANKS)
        cases |= {f"{name} {key}": _case(head | more) for key, more in variants.items()}
    route, gather = HEADS["route"], HEADS["gather"]
    own_plus = {"mhs": gather["mhs"] | {"negatives": "own_plus", "correction": True}}
    several = {"objective": "multi_label", "margin": {"kind": "none"}}
    return cases | {
        "route host adamw": _case(route | BANKS["host"] | OPTIMIZERS["adamw"]),
        "route correction": LaunchCase(route | {"mhs": MHS | {"correction": True}}),
        "route own": LaunchCase(route | {"mhs": MHS | {"negatives": "own"}}),
        "route 4 micro-batches": LaunchCase(route, micro_batches=4),
        "route 64 groups": LaunchCase(route | {"groups": 64}),
        "route alone": LaunchCase(route, rank=0, world_size=1),
        "gather own_plus": LaunchCase(gather | own_plus),
        "mhc several labels": LaunchCase(HEADS["mhc"] | several, labels=3),
        "full several labels": LaunchCase(HEADS["full"], labels=3),
        "full multi_label": LaunchCase(HEADS["full"] | {"objective": "multi_label"}, labels=3),
        "partial_fc several labels": LaunchCase(HEADS["partial_fc"], labels=3),
        "gather several labels": LaunchCase(gather | own_plus, labels=3),
        "route several labels": LaunchCase(route, labels=3),
        "route multi_label": LaunchCase(route | {"objective": "multi_label"}, labels=3),
        "route several labels correction": LaunchCase(
            route | {"mhs": MHS | {"correction": True}}, labels=3
        ),
        "route several labels host": _case(route | BANKS["host"], labels=3),
        "route 8 labels": LaunchCase(route, labels=8),
        **{
            f"{name} padding": LaunchCase(HEADS[name], classes=1_999_999, rank=7)
            for name in ("route", "gather", "full", "mhc")
        },
        **{
            f"{name} first touch": LaunchCase(HEADS[name], touched=False)
            for name in ("route", "gather", "partial_fc", "mhc")
        },
        **{
            f"{name} tf32": replace(case, tf32=True)
            for name, case in {
                "route": LaunchCase(route),
                "route arcface": LaunchCase(route | MARGINS["arcface"]),
                "route none": LaunchCase(route | MARGINS["none"]),
                "route adamw": LaunchCase(route | OPTIMIZERS["adamw"]),
                "route bfloat16": LaunchCase(route | BANKS["bfloat16"]),
                "route 4 micro-batches": LaunchCase(route, micro_batches=4),
                "route 64 groups": LaunchCase(route | {"groups": 64}),
                "route 8 labels": LaunchCase(route, labels=8),
            }.items()
        },
    }


CASES: Final = _cases()


# One line for each head; `route` moves less where products are in TF32, as they are in bf16 runs.
SUMMARY: Final = [name for head in HEADS for name in (head, f"{head} tf32") if name in CASES]


def count_step(case: LaunchCase) -> StepCost:
    """Count what one step of a case asks of the device.

    Raises:
        UserError: this torch needs a driver for that.
    """
    require_driver()
    topology = Topology(case.rank, case.world_size, CUDA)
    random = torch.Generator().manual_seed(1)
    with _head_of(case, topology, random) as (gpu, head):
        # Where rows are fetched ahead, the second step finds some.
        for step in range(1 if case.width > HOST_WIDTH else 2):
            gpu.clear()
            resident = gpu.allocated
            _run_step(case, head, step)
        return cost_since(gpu, resident)


@contextmanager
def _head_of(
    case: LaunchCase, topology: Topology, random: torch.Generator
) -> Iterator[tuple[FakeCuda, Head]]:
    config = HeadConfig.model_validate({"groups": 8} | case.head)
    with (
        tempfile.TemporaryDirectory(prefix="mhe-bench-") as folder,
        fake_cuda(lambda zeros: _beam(zeros, case.classes, random)) as gpu,
        lone_rank(topology, gpu.ledger),
    ):
        micro_batches = case.world_size * case.micro_batches
        spec = HeadSpec(
            config,
            case.classes,
            case.width,
            0,
            micro_batches,
            folder=Path(folder),
            tf32=case.tf32,
        )
        head = build_head(spec, topology)
        if case.touched:
            _mark_touched(head)
        yield gpu, head


def _run_step(case: LaunchCase, head: Head, step: int) -> None:
    head.plan(step, _labels(case, step))
    head.prefetch(step + 1, _labels(case, step + 1))
    first = case.rank * case.micro_batches
    for labels in _labels(case, step)[first : first + case.micro_batches]:
        embeddings = torch.empty(case.batch, case.width, device=CUDA).requires_grad_()
        backward(head(embeddings, labels).loss)
    head.step(0.1)


def _labels(case: LaunchCase, step: int) -> Tensor:
    shape = [case.world_size * case.micro_batches, case.batch] + [case.labels] * bool(case.labels)
    random = torch.Generator().manual_seed(step)
    return torch.randint(0, case.classes, shape, generator=random)


def _beam(zeros: Tensor, classes: int, random: torch.Generator) -> Tensor:
    """What the cascade reads back: distinct prefixes of the first level; else zeros."""
    if zeros.dtype != torch.int64 or zeros.dim() != 2:
        return zeros
    prefixes = int(classes**0.5)
    rows = [torch.randperm(prefixes, generator=random)[: zeros.shape[1]] for _ in zeros]
    return torch.stack(rows) if rows else zeros


def _mark_touched(head: Any) -> None:
    """Let the banks take every row for used, without the time or the memory to note each."""
    levels = [level.bank for level in getattr(head, "levels", {}).values()]
    for bank in levels or [head.bank]:
        shape = bank._touched.shape
        bank._touched = np.lib.stride_tricks.as_strided(np.ones(1, bool), shape, (0,) * len(shape))
