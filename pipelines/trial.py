"""A few steps of one worker's share of a run, to see what a step costs before the run begins.

It wants a process of its own, so that its memory is that of a worker and of nothing else.
"""

from __future__ import annotations

import resource
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import psutil
import torch

from mhe_dist import config_load, footprint, topology
from mhe_dist.config import Config
from mhe_dist.engine_settings import resolve_precision
from pipelines import view
from pipelines.pretrain import Run
from pipelines.recorder import ignore

STEPS, WARM_UP = 12, 4
LONGEST_S = 8.0


@dataclass(frozen=True)
class Trial:
    """What was seen.

    Attributes:
        step_s: seconds of a step of one worker that has the machine for itself.
        compute_s: CPU seconds of a step, of the worker.
        loader_s: CPU seconds of a step, of its loader processes.
        peak_bytes: largest memory of the worker's process.
        base_bytes: memory of that process before it had a model: libraries.
        device_bytes: largest memory of the GPU's allocator; 0 on a CPU.
        rows_bytes: memory of the rows that the trial met.
    """

    step_s: float
    compute_s: float
    loader_s: float
    peak_bytes: int
    base_bytes: int
    device_bytes: int
    rows_bytes: int


def share(config: Config, folder: str) -> Config:
    """One worker's share of a run as a run of one worker, which leaves its results in `folder`."""
    values = config_load.to_dict(config)
    workers = config.scale.workers
    values["run"]["dir"] = folder
    values["scale"]["workers"] = 1
    values["train"]["global_batch"] //= workers
    values["data"]["streams"] //= workers
    values["tracking"]["mlflow"] = False
    values["evaluate"]["shards"] = ""
    values["head"]["bank"]["path"] = ""
    return Config.model_validate(values)


def measure(config: Config) -> Trial:
    """Run the share of a config for some steps."""
    _import_what_a_worker_does()
    base = psutil.Process().memory_info().rss
    with tempfile.TemporaryDirectory(prefix="mhe-trial-") as folder:
        run = Run(share(config, folder), topology.connect(config.scale.timeout_s), ignore)
        marks = [_Mark.now()]
        for _ in run.loop.steps(run.loader()):
            marks.append(_Mark.now())
            if len(marks) > STEPS or (
                len(marks) > WARM_UP + 2 and marks[-1].wall - marks[0].wall > LONGEST_S
            ):
                break
        steps = [after.since(before) for before, after in pairwise(marks[WARM_UP:])]
        touched = sum(t.numel() * t.element_size() for t in run.head.state().values())
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        device = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    topology.disconnect()
    wall, compute, loader = (statistics.median(values) for values in zip(*steps, strict=True))
    return Trial(wall, compute, loader, peak, base, device, touched)


class _Mark:
    """Clocks between two steps."""

    def __init__(self, wall: float, compute: float, loader: float) -> None:
        self.wall, self.compute, self.loader = wall, compute, loader

    @classmethod
    def now(cls) -> _Mark:
        """The clocks as they stand; loader processes are this process's children."""
        children = psutil.Process().children(recursive=True)
        loaders = sum(sum(child.cpu_times()[:2]) for child in children)
        return cls(time.perf_counter(), time.process_time(), loaders)

    def since(self, before: _Mark) -> tuple[float, float, float]:
        """Seconds of wall clock, of this process and of the loaders since another mark."""
        return (
            self.wall - before.wall,
            self.compute - before.compute,
            self.loader - before.loader,
        )


def _import_what_a_worker_does() -> None:
    """Load the libraries of a worker, for their memory."""
    import mlflow  # noqa: F401

    from mhe_dist.engine import import_deepspeed

    import_deepspeed(topology.default_device())


def predicted(config: Config) -> dict[str, Any]:
    """What is known of a worker's share of a run.

    Returns:
        plain values: `footprint` (`mhe_dist.footprint.Footprint`), `trial` (`Trial`) and `samples`
        of an epoch.
    """
    torch.set_num_threads(config.scale.cpus_per_worker)
    index = view.open_data(config.data, config.run.seed)
    precision = resolve_precision(config.train.precision, topology.default_device())
    counted = footprint.count(config, index.num_classes, config.scale.workers, precision)
    return {
        "footprint": asdict(counted),
        "trial": asdict(measure(config)),
        "samples": view.epoch_samples(index),
    }
