"""Cost of one step of a head: time, memory, traffic; see `mhe bench head`.

Every step is run twice with the same labels and draws. The first run initialises rows that no step
has used before; the second run shows what a step costs in a long training. Each case has processes
of its own, so that its peak memory is its own. Other load on a machine changes over minutes, so
times whose ratio matters are measured again in turn, step by step.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mhe_dist.config.head import HeadConfig
from mhe_dist.distributed.collectives import all_reduce
from mhe_dist.distributed.spawn import run_ranks
from mhe_dist.distributed.topology import Topology
from mhe_dist.heads.base import Head
from mhe_dist.heads.registry import build_head
from mhe_dist.heads.routed.mhs import MhsRoute
from mhe_dist.heads.row_head import HeadSpec
from mhe_dist.limits import available_memory, peak_memory
from pipelines.bench.products import BareProducts
from pipelines.bench.traffic import TrafficCounter

KINDS: Final[dict[str, dict[str, Any]]] = {
    "full": {"kind": "full"},
    "partial_fc": {"kind": "partial_fc", "partial_fc": {"rate": 0.1}},
    "mhs": {"kind": "mhs", "mhs": {"exchange": "route"}},
    "mhs_gather": {"kind": "mhs", "mhs": {"exchange": "gather", "negatives": "batch"}},
}
PHASES: Final = ("plan", "forward", "backward", "update")
LR: Final = 0.1
REPEATS: Final = 3  # times that a step is repeated where steps take turns


@dataclass(frozen=True)
class HeadCase:
    """A head and the sizes that it is measured at.

    Attributes:
        kind: a name in `KINDS`.
        classes: C.
        memory, dtype: of the bank.
        world_size: W.
        batch: samples per rank.
        width: D.
        length, extra_heads: L and m of `mhs`.
        labels: of a sample.
        steps: at most this many.
        seconds: no further step is begun after this long.
    """

    kind: str
    classes: int
    memory: str = "device"
    dtype: str = "float32"
    world_size: int = 2
    batch: int = 256
    width: int = 128
    length: int = 1000
    extra_heads: int = 8
    labels: int = 1
    steps: int = 10
    seconds: float = 30.0

    def spec(self, folder: str) -> HeadSpec:
        """The description that the head is built from."""
        values = dict(KINDS[self.kind])
        if values["kind"] == "mhs":
            own = {"length": self.length, "extra_heads": self.extra_heads}
            values["mhs"] = own | values["mhs"]
        values["bank"] = {"memory": self.memory, "dtype": self.dtype}
        values["groups"] = self.world_size
        config = HeadConfig.model_validate(values)
        return HeadSpec(config, self.classes, self.width, 0, self.world_size, folder=folder)

    def draw_labels(self, rng: torch.Generator) -> Tensor:
        """Labels of a step, `[W, B]`, or `[W, B, K]` for several."""
        lists = (self.labels,) if self.labels > 1 else ()
        return torch.randint(0, self.classes, (self.world_size, self.batch, *lists), generator=rng)

    @property
    def bank_bytes(self) -> int:
        """Bytes of all rows and their momentum."""
        return 2 * self.classes * self.width * (2 if self.dtype == "bfloat16" else 4)

    @property
    def needed_bytes(self) -> int:
        """Approximate main memory of the case: rows, and what a step allocates."""
        if self.memory == "file":
            return 3 << 30
        gradient = {"full": self.bank_bytes // 2, "partial_fc": self.bank_bytes // 20}
        return self.bank_bytes + gradient.get(self.kind, 0) + (1 << 30)


def measure_case(case: HeadCase, gpu: bool = False) -> dict[str, float]:
    """Measure a case on fresh ranks.

    Returns:
        `step` and each of `PHASES`: seconds, medians over steps of the slowest rank;
        `first_touch`: additional seconds of a step that uses its rows for the first time;
        `peak`: bytes that the head added to the processes, after every row was used unless rows
        are in a file; `bank`: bytes of all rows and their state; `sent`: bytes per rank and step;
        `classes_seen`: per sample; `steps`: number of steps that count.
    """
    with tempfile.TemporaryDirectory(prefix="mhe-bench-") as folder:
        ranks = run_ranks(_measure_rank, case.world_size, case, folder, gpu=gpu, timeout_s=900.0)
    slowest = {
        name: float(np.median(np.max([rank[name] for rank in ranks], axis=0)))
        for name in (*PHASES, "step", "first")
    }
    first = slowest.pop("first")
    return slowest | {
        "first_touch": max(0.0, first - slowest["step"]),
        "peak": sum(rank["peak"] for rank in ranks),
        "bank": sum(rank["bank"] for rank in ranks),
        "sent": max(rank["sent"] for rank in ranks),
        "classes_seen": sum(rank["classes_seen"] for rank in ranks) / len(ranks),
        "steps": len(ranks[0]["step"]),
    }


class TurnFigures(NamedTuple):
    """A case that took turns with others; medians over its steps.

    Attributes:
        seconds: of a step on the slowest rank.
        heads: whose rows a step reads and updates, on the rank that has the most.
    """

    seconds: float
    heads: float


def measure_in_turn(cases: Sequence[HeadCase], gpu: bool = False) -> list[TurnFigures]:
    """Figures of a routed step of each case, while the cases take turns."""
    with tempfile.TemporaryDirectory(prefix="mhe-bench-") as folder:
        args = (list(cases), folder)
        world_size = cases[0].world_size
        ranks = run_ranks(_time_in_turn, world_size, *args, gpu=gpu, timeout_s=900.0)
    # Figures of one case have a length of their own: steps are repeated, their heads are not.
    return [
        TurnFigures(
            *(float(np.median(np.max(figures, axis=0))) for figures in zip(*rank, strict=True))
        )
        for rank in zip(*ranks, strict=True)
    ]


def measure_bare_products(case: HeadCase) -> dict[str, float]:
    """A routed step on one rank beside the bare products of its shapes, in turn.

    Returns:
        Median seconds of `step` and of `bare`.
    """
    (result,) = run_ranks(_time_bare_products, 1, case, timeout_s=900.0)
    return {name: float(np.median(values)) for name, values in result.items()}


def _measure_rank(topology: Topology, case: HeadCase, folder: str) -> dict[str, Any]:
    before = _peak_memory(topology)
    head = build_head(case.spec(folder), topology)
    rng = torch.Generator().manual_seed(1)
    first, again, sent, seen = [], [], [], 0.0
    begin = time.perf_counter()
    for step in range(case.steps):
        labels = case.draw_labels(rng)
        x = torch.randn(topology.world_size, case.batch, case.width, generator=rng)[topology.rank]
        first.append(_time_step(head, step, labels, x, topology)[0])
        with TrafficCounter() as traffic:
            seconds, seen = _time_step(head, step, labels, x, topology)
        again.append(seconds)
        sent.append(traffic.bytes)
        if _is_over(time.perf_counter() - begin, case.seconds, topology):
            break
    if case.memory != "file":
        _touch_all_rows(head)
    settled = np.array(again[1:] or again)  # the first step warms up
    return {
        **{name: settled[:, i].tolist() for i, name in enumerate(PHASES)},
        "step": settled.sum(1).tolist(),
        "first": np.array(first[1:] or first).sum(1).tolist(),
        "peak": _peak_memory(topology) - before,
        "bank": _bank_bytes(head),
        "sent": float(np.median(sent)),
        "classes_seen": seen,
    }


def _time_in_turn(
    topology: Topology, cases: list[HeadCase], folder: str
) -> list[tuple[list[float], list[float]]]:
    """Seconds of the steps, and how many heads they touch on this rank, by case."""
    heads = [build_head(case.spec(f"{folder}/{i}"), topology) for i, case in enumerate(cases)]
    rng = torch.Generator().manual_seed(1)
    figures: list[tuple[list[float], list[float]]] = [([], []) for _ in cases]
    begin = time.perf_counter()
    for step in range(cases[0].steps):
        for case, head, (taken, touched) in zip(cases, heads, figures, strict=True):
            labels = case.draw_labels(rng)
            assert isinstance(head, MhsRoute)
            touched.append(int(head.bank.held(head.units_of_step(step, labels)).sum()))
            x = torch.randn(case.batch, case.width, generator=rng)
            _time_step(head, step, labels, x, topology)
            taken.extend(
                sum(_time_step(head, step, labels, x, topology)[0]) for _ in range(REPEATS)
            )
        if _is_over(time.perf_counter() - begin, cases[0].seconds, topology):
            break
    return figures


def _time_bare_products(topology: Topology, case: HeadCase) -> dict[str, list[float]]:
    head = build_head(case.spec(""), topology)
    assert isinstance(head, MhsRoute)
    rng = torch.Generator().manual_seed(1)
    steps, bare = [], []
    for step in range(case.steps):
        labels = torch.randint(0, case.classes, (1, case.batch), generator=rng)
        x = torch.randn(case.batch, case.width, generator=rng)
        _time_step(head, step, labels, x, topology)
        products = BareProducts(head, step, labels)
        products.run()
        for _ in range(REPEATS):
            begin = time.perf_counter()
            products.run()
            bare.append(time.perf_counter() - begin)
            steps.append(sum(_time_step(head, step, labels, x, topology)[0]))
    return {"step": steps, "bare": bare}


def _time_step(
    head: Head, step: int, labels: Tensor, embeddings: Tensor, topology: Topology
) -> tuple[list[float], float]:
    """Seconds of each phase of a step, and the classes that a sample saw."""
    x = embeddings.to(topology.device).requires_grad_()
    topology.barrier()
    marks = [_now(topology)]
    head.plan(step, labels)
    marks.append(_now(topology))
    output = head(x, labels[topology.rank])
    marks.append(_now(topology))
    output.loss.backward()
    marks.append(_now(topology))
    head.step(LR)
    marks.append(_now(topology))
    return np.diff(marks).tolist(), float(output.metrics["classes_seen"])


def _now(topology: Topology) -> float:
    if topology.device.type == "cuda":
        torch.cuda.synchronize(topology.device)
    return time.perf_counter()


def _is_over(seconds: float, limit: float, topology: Topology) -> bool:
    return bool(all_reduce(torch.tensor([seconds]), topology, "max") > limit)


def _peak_memory(topology: Topology) -> float:
    """Bytes of memory of this process at its peak: the GPU's where it computes on one."""
    if topology.device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(topology.device))
    return float(peak_memory())


def _bank_bytes(head: Any) -> float:
    return float(head.bank.bytes)


def _touch_all_rows(head: Any) -> None:
    """Make all rows and their state resident, as they are in a long run."""
    bank = head.bank
    for start in range(bank.units.start, bank.units.stop, bank.units_per_chunk):
        units = range(start, min(start + bank.units_per_chunk, bank.units.stop))
        bank.touch(units)
        bank.write(units, {name: bank.read(units, name).clone() for name in bank.fields}, step=0)


def fit_in_memory(cases: Sequence[HeadCase]) -> bool:
    """Whether all cases together fit into the memory that is free now."""
    return sum(case.needed_bytes for case in cases) < available_memory()
