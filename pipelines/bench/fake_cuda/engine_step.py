"""What a step of the engine asks of a GPU at each ZeRO stage, counted where nothing is computed.

Rank 3 of 8, with two micro-batches and a small network: what is looked at is the engine's part,
not the backbone's. DeepSpeed chooses its accelerator when it is imported: count in a process of its
own, `python -m pipelines.bench.fake_cuda.engine_step`, which prints JSON.
"""

from __future__ import annotations

import gc
import json
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import product
from typing import Any, Final
from unittest import mock

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from mhe_dist.config.schema import OptimConfig, TrainConfig
from mhe_dist.distributed.topology import connect
from mhe_dist.engine.deepspeed_import import import_deepspeed
from mhe_dist.engine.engine import Engine, leave_process_group
from pipelines.bench.fake_cuda.autograd import require_driver
from pipelines.bench.fake_cuda.device import fake_cuda
from pipelines.bench.fake_cuda.driver import fake_driver
from pipelines.bench.fake_cuda.lone_rank import lone_rank
from pipelines.bench.fake_cuda.step_cost import StepCost, cost_since
from pipelines.bench.gpu.waits import conv_network

CUDA: Final = torch.device("cuda", 0)
RANK: Final = 3
RANKS: Final = 8
MICRO_BATCHES: Final = 2
BATCH, SIDE = 8, 16
MANY_IMAGES: Final = 96  # more bytes than the driver takes at once from pageable memory
# At stage 3 DeepSpeed learns the order of the modules in the first step, checks it in the next.
STEPS: Final = 3
SAME_ON_ALL_RANKS: Final = (
    "deepspeed.runtime.zero.partitioned_param_coordinator.assert_ints_same_as_other_ranks"
)


@dataclass(frozen=True)
class EngineCase:
    """A ZeRO stage, 0 to 3, a precision, the optimizer's block of the config, and B."""

    stage: int
    precision: str
    optim: dict[str, Any] = field(default_factory=dict)
    batch: int = BATCH


def _cases() -> dict[str, EngineCase]:
    # Before stage 3: from then on DeepSpeed's own product stands in for torch's, and copies more.
    cases = {"ZeRO 0 images": EngineCase(0, "bf16", batch=MANY_IMAGES)}
    for stage, precision in product(range(4), ("float32", "bf16")):
        cases[f"ZeRO {stage} {precision}"] = EngineCase(stage, precision)
    for stage in range(4):
        cases[f"ZeRO {stage} adamw"] = EngineCase(stage, "bf16", {"kind": "adamw", "lr": 1e-3})
    return cases | {"ZeRO 1 ema": EngineCase(1, "bf16", {"ema": 0.999})}


ENGINE_CASES: Final = _cases()


def count_engine_step(case: EngineCase) -> StepCost:
    """Count what one step of a case asks of the device, in a process without another engine.

    Raises:
        UserError: this torch needs a driver for that.
    """
    require_driver()
    gc.collect()  # an earlier engine, whose parts know one another
    with fake_cuda() as gpu, _process_group():
        topology = connect(device=CUDA)
        batch = case.batch
        sizes = {"micro_batch": batch, "global_batch": batch * RANKS * MICRO_BATCHES}
        train = TrainConfig.model_validate(sizes | {"precision": case.precision})
        optim = OptimConfig.model_validate({"clip_norm": 1.0} | case.optim)
        with lone_rank(topology, gpu.ledger):
            network = conv_network(64, 512)  # 1.6 million weights, most of them in one matrix
            engine = Engine(network, optim, train, topology, case.stage)
            with mock.patch(SAME_ON_ALL_RANKS, lambda integers: None):
                for step in range(STEPS):
                    gpu.clear()
                    resident = gpu.allocated
                    _run_step(engine, step, batch)
            return cost_since(gpu, resident)


@contextmanager
def _process_group() -> Iterator[None]:
    """That of rank 3, without the others: `connect` makes it of torch's backend for that."""
    begin = dist.init_process_group

    def join(backend: str, timeout: Any) -> None:
        begin("fake", store=FakeStore(), rank=RANK, world_size=RANKS)

    variables = {"RANK": str(RANK), "WORLD_SIZE": str(RANKS), "LOCAL_RANK": "0"}
    with ExitStack() as stack:
        stack.enter_context(fake_driver())
        stack.enter_context(mock.patch.dict(os.environ, variables))
        # It keeps the collectives that it finds first, and would count with an earlier ledger.
        communication = import_deepspeed(CUDA).comm.comm
        stack.enter_context(mock.patch.object(communication, "cdb", None))
        stack.enter_context(mock.patch.object(dist, "init_process_group", join))
        # Of gloo, or of all ranks: the same, since nobody is there.
        stack.enter_context(mock.patch.object(dist, "new_group", lambda *_, **__: dist.group.WORLD))
        stack.callback(leave_process_group)
        yield


def _run_step(engine: Engine, step: int, batch: int) -> None:
    """Images come as a loader gives them, in pageable memory."""
    images = torch.zeros(batch, 3, SIDE, SIDE, dtype=torch.uint8)
    for part in range(MICRO_BATCHES):
        engine.backward(engine.forward(images, step, part).square().mean())
    engine.step(0.1)


def waits_by_library(cost: StepCost) -> dict[str, int]:
    """How often each function of DeepSpeed makes the host wait; "": a line of this project."""
    return dict(Counter(event.library for event in cost.ledger.of("sync")))


def main() -> None:
    """Print, of each case, the figures and who waits, as JSON."""
    found = {}
    for name, case in ENGINE_CASES.items():
        cost = count_engine_step(case)
        figures = {key: getattr(cost, key) for key in ("launches", "syncs", "moved", "peak")}
        found[name] = figures | {"waits": waits_by_library(cost)}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
