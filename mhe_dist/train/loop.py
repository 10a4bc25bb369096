"""The loop: one optimizer step per global batch, over any batches, engine and head.

It yields a `StepInfo` per step and has no other side effect: the caller records, evaluates and
writes checkpoints between two steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from mhe_dist.distributed.topology import Topology
from mhe_dist.heads.base import Head, LabelError
from mhe_dist.train.batch import MicroBatch, StepBatch
from mhe_dist.train.label_exchange import ExchangedLabels, Request, exchange_labels
from mhe_dist.train.stopwatch import Stopwatch

T = TypeVar("T")


class Trainable(Protocol):
    """What the loop needs of `engine.Engine`."""

    def forward(self, images: Tensor, step: int, micro_batch: int) -> Tensor:
        """uint8 images `[B, 3, H, W]` -> embeddings `[B, D]`."""

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradients of a micro-batch."""

    def step(self, lr: float) -> None:
        """Apply them."""

    def grad_norm(self) -> Tensor | None:
        """Norm of the last step's gradient."""


@dataclass(frozen=True)
class StepInfo:
    """What happened in one step, as one rank saw it.

    Attributes:
        step: its number, from 0.
        lr: learning rate of the backbone.
        metrics: name -> device scalar, or number, whose mean over ranks is that of the step.
        samples: digest of the keys of the global batch, the same for any W.
        images: images of the global batch.
        wait_s: seconds this rank waited for data.
        requested: what any rank requested since the step before, the same on all ranks.
    """

    step: int
    lr: float
    metrics: dict[str, Tensor | float]
    samples: str
    images: int
    wait_s: float
    requested: Request = Request.NOTHING


def _no_request() -> Request:
    return Request.NOTHING


@dataclass
class Loop:
    """The parts of a step.

    Attributes:
        engine: the backbone.
        head: the classifier.
        topology: the ranks.
        micro_batch: B.
        lr_schedule: step -> learning rate.
        request: what this rank requests of all ranks; called once per step.
        head_time: seconds that the head takes.
    """

    engine: Trainable
    head: Head
    topology: Topology
    micro_batch: int
    lr_schedule: Callable[[int], float]
    request: Callable[[], Request] = _no_request
    head_time: Stopwatch = field(init=False)
    _requested: Request = field(init=False, default=Request.NOTHING)
    _activity: str = field(init=False, default="nothing")

    def __post_init__(self) -> None:
        self.head_time = Stopwatch(self.topology.device)

    def steps(self, batches: Iterable[StepBatch]) -> Iterator[StepInfo]:
        """Train on `batches`, one step each; the labels of the next one are exchanged before it."""
        labelled = ((batch, self._exchange_labels(batch)) for batch in batches)
        for (batch, exchanged), following in with_next(labelled):
            self._now("the head's plan", batch.step)
            self._plan(batch, exchanged.labels)
            if following is not None:
                next_batch, next_exchanged = following
                self.head.prefetch(next_batch.step, next_exchanged.labels)
            outputs = [self._micro_batch(batch.step, part) for part in batch.micro_batches]
            lr = self.lr_schedule(batch.step)
            self._now("the reduction of the gradients", batch.step)
            self.engine.step(lr)
            self._now("the update of the head's rows", batch.step)
            with self.head_time.running():
                self.head.step(lr)
            metrics: dict[str, Tensor | float] = {**_mean(outputs), **self.head.host_metrics()}
            if (norm := self.engine.grad_norm()) is not None:
                metrics["grad_norm"] = norm.detach()
            requested, self._requested = self._requested, Request.NOTHING
            self._now("what follows the end", batch.step)
            yield StepInfo(
                *(batch.step, lr, metrics, exchanged.samples, exchanged.images),
                *(batch.wait_s, requested),
            )

    def activity(self) -> str:
        """What this rank does now, for messages."""
        return self._activity

    def _now(self, activity: str, step: int) -> None:
        self._activity = f"{activity} of step {step}"

    def _micro_batch(self, step: int, part: MicroBatch) -> dict[str, Tensor]:
        self._now(f"micro-batch {part.index}", step)
        embeddings = self.engine.forward(part.images, step, part.index)
        with self.head_time.running():
            output = self.head(embeddings, part.labels)
        self.engine.backward(output.loss)
        return {"loss": output.loss.detach(), **output.metrics}

    def _exchange_labels(self, batch: StepBatch) -> ExchangedLabels:
        """The labels of the global batch; the ranks' requests travel with them."""
        self._now("the exchange of labels", batch.step)
        found = exchange_labels(batch, self.micro_batch, self.request(), self.topology)
        self._requested |= found.requested
        return found

    def _plan(self, batch: StepBatch, labels: Tensor) -> None:
        with self.head_time.running():
            try:
                self.head.plan(batch.step, labels)
            except LabelError as error:
                raise error.with_key(_key_of(batch, error)) from None


def with_next(items: Iterable[T]) -> Iterator[tuple[T, T | None]]:
    """Each item and the one that follows it; None after the last."""
    items = iter(items)
    item = next(items, None)
    while item is not None:
        following = next(items, None)
        yield item, following
        item = following


def _mean(outputs: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([o[name] for o in outputs]).mean() for name in outputs[0]}


def _key_of(batch: StepBatch, error: LabelError) -> str | None:
    """Key of the sample that `error` means, if it is on this rank."""
    for part in batch.micro_batches:
        if part.index == error.micro_batch:
            return part.keys[error.position]
    return None
