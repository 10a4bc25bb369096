"""A trial of a few steps of what one node does in a run, to measure their cost beforehand.

All workers of the node take part, each in a process of its own: they share cores and memory
bandwidth and wait for one another, and the memory of each is that of a worker alone.

Where the run has more workers than the node, the trial has their share of everything that is cut
by workers: of the batch, of the streams, of the groups of heads, and so of the classes. So each of
its workers holds as many rows as one of the run, updates as many in a step, and, where embeddings
travel to their heads (`mhs` with `exchange: route`, `mhc`) or every rank has all rows (`mhp`),
scores as many. Where every rank scores the embeddings of all ranks, the batch that it scores is
that of all workers in the run and that of the node in the trial: the time in the head is measured
by itself, and grows in the run by the ratio of the two at most.
"""

from __future__ import annotations

import importlib
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from typing import Any

import psutil
import torch
from torch import Tensor

from mhe_dist.bank.class_layout import balanced_lengths
from mhe_dist.config.head import HeadConfig
from mhe_dist.config.schema import Config
from mhe_dist.config.write import config_from_dict, config_to_dict
from mhe_dist.distributed.collectives import all_reduce
from mhe_dist.distributed.device import rank_device
from mhe_dist.distributed.spawn import run_ranks
from mhe_dist.distributed.topology import Topology
from mhe_dist.engine.deepspeed_import import import_deepspeed
from mhe_dist.engine.memory_estimate import estimate_memory
from mhe_dist.engine.settings import resolve_precision
from mhe_dist.limits import peak_memory
from mhe_dist.train.batch import StepBatch
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
        head_s: seconds of a step in the head, its gradient and update included.
    """

    step_s: float
    peak_bytes: int
    base_bytes: int
    device_bytes: int
    rows_bytes: int
    head_s: float


def share_of_head(
    head: HeadConfig, classes: int, workers: int, of_workers: int
) -> tuple[HeadConfig, int]:
    """The head of some of the workers and its classes: each holds what the fullest of all holds.

    A group keeps its classes, and a worker its groups; of a cascade, a parent keeps its children.
    Its first level, whose rows are on every rank, is about the root of C; the trial has a share.

    Args:
        head: with numbers where it had `auto`.
        classes: C.
        workers: that take part.
        of_workers: W.
    """
    if workers >= of_workers or head.kind == "mhp":
        return head, classes
    groups = min(head.chosen_groups, workers * -(-head.chosen_groups // of_workers))
    changes: dict[str, Any] = {"groups": groups}
    if head.kind == "mhs" and head.gathers:
        extra = -(-head.mhs.chosen_extra_heads * groups // head.chosen_groups)
        changes["mhs"] = head.mhs.model_copy(update={"extra_heads": extra})
    if head.kind == "mhc":
        lengths = head.mhc.lengths or balanced_lengths(classes, 2)
        changes["mhc"] = head.mhc.model_copy(update={"lengths": lengths})
    return head.model_copy(update=changes), -(-classes * groups // head.chosen_groups)


def share_of_run(
    config: Config, classes: int, workers: int, of_workers: int, folder: str
) -> tuple[Config, int]:
    """The config of a run by some of the workers, whose results go to `folder`; its classes.

    It evaluates nothing, so no checkpoint of it is the best.
    Rows of `head.init_from` are as large as first ones, and no share of the run has their groups.
    """
    head, share = share_of_head(config.head, classes, workers, of_workers)
    values = config_to_dict(config.model_copy(update={"head": head}))
    if share < classes:
        values["head"]["init_from"] = ""
    values["run"]["dir"] = folder
    for section, key in (("train", "global_batch"), ("data", "streams")):
        values[section][key] = values[section][key] * workers // of_workers
    values["scale"] |= {"workers": workers, "min_workers": 0}
    values["tracking"]["mlflow"] = False
    values["evaluate"] = {}
    values["checkpoint"]["keep_best"] = ""
    values["head"]["bank"]["path"] = ""
    return config_from_dict(values), share


def fold_labels(batch: StepBatch, classes: int, share: int) -> StepBatch:
    """The batch with its labels in `[0, C)` folded into fewer classes; others stay as they are."""

    def fold(labels: Tensor) -> Tensor:
        return labels.where((labels < 0) | (labels >= classes), labels % share)

    parts = [replace(part, labels=fold(part.labels)) for part in batch.micro_batches]
    labels = None if batch.labels is None else fold(batch.labels)
    return replace(batch, micro_batches=parts, labels=labels)


def measure_steps(
    topology: Topology, values: dict[str, Any], classes: int, libraries: list[str]
) -> dict[str, Any]:
    """Train some steps and measure them.

    Args:
        topology: this rank's position.
        values: the config that `share_of_run` gave, as a dict.
        classes: of its head.
        libraries: see `dry_run`.

    Returns:
        A `TrialMeasurement` as a dict.
    """
    config = without_first_weights(config_from_dict(values))
    torch.set_num_threads(config.scale.cpus_per_worker)
    for name in libraries:
        importlib.import_module(name)
    import_deepspeed(topology.device)
    on_gpu = topology.device.type == "cuda"
    base = psutil.Process().memory_info().rss
    run = Run(config, topology, ignore_event, classes=classes)
    loader = run.open_loader(run.progress.step, run.total_steps)
    marks, cold = [time.perf_counter()], 0.0
    for _ in run.loop.steps(fold_labels(b, run.index.num_classes, classes) for b in loader):
        marks.append(time.perf_counter())
        if len(marks) == WARM_UP + 1:
            cold = run.loop.head_time.take()
        if _enough(topology, marks):
            break
    head = run.loop.head_time.take()
    warm = marks[WARM_UP:]
    if len(warm) < 2:
        warm, head = marks, head + cold
    steps = max(1, len(warm) - 1)
    return asdict(
        TrialMeasurement(
            step_s=(warm[-1] - warm[0]) / steps,
            peak_bytes=peak_memory(),
            base_bytes=base,
            device_bytes=torch.cuda.max_memory_allocated() if on_gpu else 0,
            rows_bytes=run.head.state().nbytes,
            head_s=head / steps,
        )
    )


def _enough(topology: Topology, marks: list[float]) -> bool:
    """Whether the trial can end; the same on every rank."""
    seconds = all_reduce(torch.tensor([marks[-1] - marks[0]]), topology, "max").item()
    return len(marks) > STEPS or (len(marks) > FEWEST and seconds > LONGEST_S)


def dry_run(config: Config, workers: int, of_workers: int, libraries: list[str]) -> dict[str, Any]:
    """Estimate the memory and measure the steps of the workers that one node has in a run.

    Args:
        config: of the run.
        workers: of the node.
        of_workers: that the run would have; an elastic run may have fewer than `scale.workers`.
        libraries: modules that a worker has loaded and this package does not load, for their
            memory.

    Returns:
        plain values: `footprint` (`mhe_dist.engine.memory_estimate.MemoryEstimate`), `trial` (the
        largest of each figure of the workers' `TrialMeasurement`s), `workers` that took part,
        `samples` of an epoch, and `head`: in a line, what its `auto` has become, or nothing.

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
    estimated = estimate_memory(config, index.num_classes, of_workers, precision)
    with tempfile.TemporaryDirectory(prefix="mhe-trial-") as folder:
        share, classes = share_of_run(config, index.num_classes, workers, of_workers, folder)
        arguments, gpu = (config_to_dict(share), classes, libraries), config.scale.gpu
        seen = run_ranks(measure_steps, workers, *arguments, gpu=gpu, timeout_s=TIMEOUT_S)
    return {
        "footprint": asdict(estimated),
        "trial": {name: max(trial[name] for trial in seen) for name in seen[0]},
        "workers": workers,
        "samples": samples_per_epoch(index),
        "head": head,
    }
