"""Turns the steps of the loop into records: metrics.jsonl, MLflow, and events for whoever watches.

Nothing here waits for the device but `flush`, once per window of `train.log_every` steps.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from mhe_dist.config.schema import Config
from mhe_dist.distributed.topology import Topology
from mhe_dist.engine.settings import explain_slow_precision, resolve_precision
from mhe_dist.redact import masked, scrub
from mhe_dist.tracking.base import HELDOUT, TrackedDataset, Tracker
from mhe_dist.train.loop import StepInfo
from mhe_dist.train.metrics import MetricsAccumulator, memory
from mhe_dist.train.stopwatch import Stopwatch
from pipelines.data.bad_samples import BadSampleTally
from pipelines.shards.index import ShardIndex

logger = logging.getLogger(__name__)

Event = dict[str, Any]
EventHandler = Callable[[Event], None]

_DIGEST_DIGITS = 12  # hexadecimal; 48 bits are exact in a float


def ignore_event(event: Event) -> None:
    """The event handler of a run that nobody watches."""


class DoubtWindow:
    """The share of images whose class is doubted, over `every` steps or more.

    An image's class is doubted if another class that it is compared with has a higher cosine,
    without margin; the heads count the others as `accuracy`, negatives that `head.margin.filter`
    leaves out included. So nothing is computed, communicated or waited for here.
    """

    def __init__(self, every: int) -> None:
        """Args: every: steps; 0: there is nothing to record."""
        self._every = every
        self._doubted, self._steps = 0.0, 0

    def add(self, steps: list[int], accuracy: float) -> dict[str, float]:
        """Add a window of consecutive steps.

        Args:
            steps: their numbers, from 0.
            accuracy: the mean over them.

        Returns:
            What is recorded with the last of them: `doubted`, or nothing if no multiple of `every`
            steps is complete.
        """
        if not self._every:
            return {}
        self._doubted += (1 - accuracy) * len(steps)
        self._steps += len(steps)
        if (steps[-1] + 1) // self._every == steps[0] // self._every:
            return {}
        share = self._doubted / self._steps
        self._doubted, self._steps = 0.0, 0
        return {"doubted": share}


class Recorder:
    """Collects what happened until the window is full; all ranks must record the same steps.

    Args:
        topology: the ranks.
        tracker: where records go; it keeps nothing on ranks other than the first.
        on_event: called on the first rank with each event.
        head_time: the loop's stopwatch.
        audit_every: steps between two records of the share of doubted labels; 0: none.
    """

    def __init__(
        self,
        topology: Topology,
        tracker: Tracker,
        on_event: EventHandler,
        head_time: Stopwatch,
        audit_every: int = 0,
    ) -> None:
        self._topology, self._tracker, self._head_time = topology, tracker, head_time
        self._on_event = on_event
        self._window = MetricsAccumulator(topology)
        self._step_values: dict[int, dict[str, float]] = {}
        self._doubt = DoubtWindow(audit_every)
        self._begin = time.perf_counter()
        self._images = 0
        self.phases: dict[str, float] = {}
        self.images = 0
        self.last: dict[str, float] = {}
        self.warnings: list[str] = []
        self._scored: tuple[int, dict[str, float]] = (-1, {})

    def add_step(self, info: StepInfo) -> None:
        """Add a step to the window."""
        metrics = dict(info.metrics)
        self._window.add_loss(info.step, metrics.pop("loss"))
        self._window.add(metrics)
        self._window.add({"_wait": info.wait_s})
        digest = int(info.samples[:_DIGEST_DIGITS], 16)
        self._step_values[info.step] = {"lr": info.lr, "sample_digest": float(digest)}
        self._images += info.images

    def flush(self) -> list[tuple[int, dict[str, float]]]:
        """Close the window: one reduction, one record per step, one event; all ranks must call.

        Nothing happens when no step was added.

        Returns:
            (step, record) of each step, the same losses and metrics on all ranks.
        """
        if not self._step_values:
            return []
        steps = len(self._step_values)
        self._window.add({"head_time": self._head_time.take() / steps})
        self._window.add(memory(self._topology.device), kind="max")
        seconds = time.perf_counter() - self._begin
        window = self._window.drain()
        wait = window.metrics.pop("_wait", 0.0)
        rates = {"images_per_s": self._images / seconds, "data_wait": wait * steps / seconds}
        records = window.records()
        if "accuracy" in window.metrics:
            doubted = self._doubt.add([step for step, _ in records], window.metrics["accuracy"])
            records[-1][1].update(doubted)
        for step, record in records:
            record.update(self._step_values[step])
            if step == records[-1][0]:
                record.update(rates)
            self._tracker.log(step, record)
        step, self.last = records[-1]
        self.emit("metrics", step=step, **self.last)
        self._add_phase("train", seconds)
        self.images += self._images
        self._step_values, self._images, self._begin = {}, 0, time.perf_counter()
        return records

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time something that is not training; it does not count in images/s."""
        begin = time.perf_counter()
        yield
        seconds = time.perf_counter() - begin
        self._begin += seconds
        self._add_phase(name, seconds)

    def record_evaluation(
        self, step: int, metrics: dict[str, float], known: dict[str, float]
    ) -> None:
        """Record an evaluation after `step` steps, unless these figures are on record already."""
        self._scored = step, metrics
        figures = {f"{HELDOUT}{k}": v for k, v in metrics.items()}
        if figures != known:
            self.record_state(step, figures)
        self.emit("evaluation", step=step, **metrics)

    def scores(self, step: int) -> dict[str, float]:
        """What the evaluation after `step` steps found; empty if there was none."""
        return self._scored[1] if self._scored[0] == step else {}

    def record_state(self, step: int, metrics: dict[str, float]) -> None:
        """Record values of the state after `step` steps, beside those of the last of them."""
        self._tracker.log(max(0, step - 1), metrics)

    def record_bad_samples(self, step: int, faults: BadSampleTally) -> None:
        """Record how many bad samples there were in the first `step` steps."""
        self.record_state(step, {"bad_samples": float(faults.count)})
        if faults.count:
            self.emit("bad_samples", step=step, count=faults.count)

    def warn(self, step: int, message: str) -> None:
        """Say what went wrong, or looks wrong, although the run goes on; the summary says it too.

        Args:
            step: completed steps.
            message: the same on all ranks, or from the first rank alone.
        """
        message = scrub(message)
        self.warnings.append(message)
        if self._topology.is_first:
            logger.warning("%s", message)
        self.emit("warning", step=step, message=message)

    def emit(self, name: str, **values: Any) -> None:
        """Hand an event without secrets to whoever watches, on the first rank."""
        if self._topology.is_first:
            self._on_event(masked({"event": name, **values}))

    def _add_phase(self, name: str, seconds: float) -> None:
        self.phases[name] = self.phases.get(name, 0.0) + seconds


def doubtful_settings(
    config: Config, classes: int, device: torch.device, before: str | None, precision: str
) -> Iterator[str]:
    """What a run warns of before its first step, though it goes on.

    Args:
        config: of the run.
        classes: C.
        device: of the first rank.
        before: "bf16" or "float32", in which the run was trained so far; None: nobody knows.
        precision: in which it is trained now.
    """
    setting = config.train.precision
    if slow := explain_slow_precision(setting, device):
        yield slow
    if resolve_precision(setting, device) != precision:
        yield "train.precision=auto: float32, since a rank has no bf16 instructions; others have"
    if setting == "auto" and before not in (None, precision):
        yield (
            f"train.precision=auto: {precision} on these workers, {before} so far; to go on with "
            f"that: train.precision={before} 'resume.allow=[train.precision]'"
        )
    if classes == 1:
        shards = config.data.shards
        yield f"data.shards={shards}: there is one class only, and nothing to tell it from"


def tracked_datasets(config: Config, index: ShardIndex, samples: int) -> Iterator[TrackedDataset]:
    """What a run trains on and is evaluated on.

    Args:
        config: of the run.
        index: of what it trains on.
        samples: of an epoch.
    """
    source = config.data.shards
    yield TrackedDataset(
        *(_name_of(source), "training", index.digest),
        *(source, samples, index.num_classes),
    )
    if heldout := config.evaluate.shards:
        held = ShardIndex.load(heldout)
        yield TrackedDataset(
            *(_name_of(heldout), "evaluation", held.digest),
            *(heldout, held.samples, held.num_classes),
        )


def _name_of(shards: str) -> str:
    """The last two parts of a path, which tell sets apart."""
    return "/".join([part for part in shards.split("/") if part.strip(".")][-2:]) or "data"
