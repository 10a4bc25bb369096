"""A trial of a few steps of what one node does in a run, to measure their cost beforehand.

All workers of the node take part, each in a process of its own: they share cores and memory
bandwidth and wait for one another, and the memory of each is that of a worker alone.
"""

from __future__ import annotations

import importlib
import resource
import tempfile
import time
from dataclasses import asdict, dataclass
from typing import Any

import psutil
import torch

from mhe_dist.config.schema import Config
from mhe_dist.config.write import config_to_dict
from mhe_dist.distributed.collectives import all_reduce
from mhe_dist.distributed.device import rank_device
from mhe_dist.distributed.spawn import run_ranks
from mhe_dist.distributed.topology import Topology
from mhe_dist.engine.deepspeed_import import import_deepspeed
from mhe_dist.engine.memory_estimate import estimate_memory
from mhe_dist.engine.settings import resolve_precision
from pipelines.data.mixture.index import open_training_index, samples_per_epoch
from pipelines.evaluate.in_training import refuse_unusable_sets
from pipelines.pretrain.recorder import ignore_event
from pipelines.pretrain.run import Run
from pipelines.runs.auto_sizes import explain_settled, settle_sizes
from pipelines.runs.first_model import make_tried_model, without_first_weights
from pipelines.runs.folder import newest_checkpoint

STEPS, WARM_UP, FEWEST = 24, 8, 12
LONGEST_S = 12.0
TIMEOUT_S = 60.0  # of a collective


@dataclass(frozen=True)
class TrialMeasurement:
    """What one worker measured.

    Attributes:
        step_s: seconds of a step, all workers of the node taking part.
        peak_bytes: largest memory of the worker's process.
        base_bytes: memory of that process before it had a model: libraries.
        device_bytes: largest memory of the GPU's allocator; 0 on a CPU.
        rows_bytes: memory of the rows that the trial touched.
    """

    step_s: float
    peak_bytes: int
    base_bytes: int
    device_bytes: int
    rows_bytes: int


def share_of_run(config: Config, workers: int, folder: str) -> Config:
    """The config of a run by some of the workers, whose results go to `folder`."""
    values = config_to_dict(config)
    values["run"]["dir"] = folder
    for section, key in (("train", "global_batch"), ("data", "streams")):
        values[section][key] = values[section][key] * workers // config.scale.workers
    values["scale"]["workers"] = workers
    values["tracking"]["mlflow"] = False
    values["evaluate"]["shards"] = ""
    values["head"]["bank"]["path"] = ""
    return Config.model_validate(values)


def measure_steps(
    topology: Topology, values: dict[str, Any], libraries: list[str]
) -> dict[str, Any]:
    """Train some steps and measure them.

    Args:
        topology: this rank's position.
        values: the config that `share_of_run` gave, as a dict.
        libraries: see `dry_run`.

    Returns:
        A `TrialMeasurement` as a dict.
    """
    config = without_first_weights(Config.model_validate(values))
    torch.set_num_threads(config.scale.cpus_per_worker)
    for name in libraries:
        importlib.import_module(name)
    import_deepspeed(topology.device)
    on_gpu = topology.device.type == "cuda"
    base = psutil.Process().memory_info().rss
    run = Run(config, topology, ignore_event)
    marks = [time.perf_counter()]
    for _ in run.loop.steps(run.open_loader(run.progress.step, run.total_steps)):
        marks.append(time.perf_counter())
        if _enough(topology, marks):
            break
    warm = marks[WARM_UP:] if len(marks) > WARM_UP + 1 else marks
    return asdict(
        TrialMeasurement(
            step_s=(warm[-1] - warm[0]) / max(1, len(warm) - 1),
            peak_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            base_bytes=base,
            device_bytes=torch.cuda.max_memory_allocated() if on_gpu else 0,
            rows_bytes=run.head.state().nbytes,
        )
    )


def _enough(topology: Topology, marks: list[float]) -> bool:
    """Whether the trial can end; the same on every rank."""
    seconds = all_reduce(torch.tensor([marks[-1] - marks[0]]), topology, "max").item()
    return len(marks) > STEPS or (len(marks) > FEWEST and seconds > LONGEST_S)


def dry_run(config: Config, workers: int, libraries: list[str]) -> dict[str, Any]:
    """Estimate the memory and measure the steps of the workers that one node has in a run.

    Args:
        config: of the run.
        workers: of the node.
        libraries: modules that a worker has loaded and this package does not load, for their
            memory.

    Returns:
        plain values: `footprint` (`mhe_dist.engine.memory_estimate.MemoryEstimate`), `trial` (the
        largest of each figure of the workers' `TrialMeasurement`s), `samples` of an epoch, and
        `head`: in a line, what its `auto` has become, or nothing.

    Raises:
        UserError: the backbone cannot train, or an evaluation could not work.
    """
    seed, index = config.run.seed, open_training_index(config.data, config.run.seed)
    refuse_unusable_sets(config.evaluate, config.data, seed, Topology(), index.num_classes)
    head = explain_settled(config, index.num_classes)
    config = settle_sizes(config, index.num_classes)
    device = rank_device(config.scale.gpu)
    resumes = newest_checkpoint(config.run.path) is not None
    first = without_first_weights(config) if resumes else config
    # Here, where its error is not one of a rank.
    make_tried_model(first, Topology(device=device), index)
    precision = resolve_precision(config.train.precision, device)
    estimated = estimate_memory(config, index.num_classes, config.scale.workers, precision)
    with tempfile.TemporaryDirectory(prefix="mhe-trial-") as folder:
        values = config_to_dict(share_of_run(config, workers, folder))
        arguments, gpu = (values, libraries), config.scale.gpu
        seen = run_ranks(measure_steps, workers, *arguments, gpu=gpu, timeout_s=TIMEOUT_S)
    return {
        "footprint": asdict(estimated),
        "trial": {name: max(trial[name] for trial in seen) for name in seen[0]},
        "samples": samples_per_epoch(index),
        "head": head,
    }
