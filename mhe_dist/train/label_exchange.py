"""What ranks tell one another before a step: labels, a digest of the samples, requests.

Where the labels of the whole step are known already, because the order of the samples is a pure
function, what travels is a number for each micro-batch, in log2(W) rounds. Only a step in which a
sample was replaced by another one takes a second exchange. Otherwise all labels are gathered.
"""

from __future__ import annotations

import hashlib
import zlib
from enum import IntFlag
from functools import reduce
from math import prod
from operator import or_
from typing import Final, NamedTuple

import torch
from torch import Tensor

from mhe_dist.distributed.collectives import all_reduce, gather_rows, sum_small
from mhe_dist.distributed.topology import Topology
from mhe_dist.errors import RunError
from mhe_dist.heads.base import NO_SAMPLE
from mhe_dist.train.batch import StepBatch

_SAVES, _STOPS, _REPLACED, _LABELS, _DIGESTS = range(5)  # where each number of a message stands


class Request(IntFlag):
    """What a rank may request of all ranks; it travels before each step."""

    NOTHING = 0
    SAVE = 1
    STOP = 2


_SLOTS: Final = {Request.SAVE: _SAVES, Request.STOP: _STOPS}


class ExchangedLabels(NamedTuple):
    """What a rank knows of a whole step.

    Attributes:
        labels: int64 `[n, B]`, or `[n, B, K]`, on the host; `NO_SAMPLE` where there is none.
        samples: digest of the samples' keys, the same for any W.
        requested: what any rank requested.
    """

    labels: Tensor
    samples: str
    requested: Request

    @property
    def images(self) -> int:
        """Samples of the step, those without a label too."""
        first = self.labels if self.labels.dim() == 2 else self.labels[..., 0]
        return int((first != NO_SAMPLE).sum())


def exchange_labels(
    batch: StepBatch, micro_batch: int, request: Request, topology: Topology
) -> ExchangedLabels:
    """Learn the labels of a global batch, and what the ranks request; all ranks must call.

    Args:
        batch: this rank's part of it.
        micro_batch: B.
        request: of this rank.
        topology: the ranks.

    Raises:
        RunError: the ranks have read different labels for the step.
    """
    if batch.labels is None:
        return _gather(batch, micro_batch, request, topology)
    labels = batch.labels.clone()
    message = torch.zeros(_DIGESTS + len(labels), dtype=torch.int64)
    for flag, slot in _SLOTS.items():
        message[slot] = flag in request
    message[_LABELS] = known = zlib.crc32(labels.numpy().tobytes())
    for part in batch.micro_batches:
        message[_REPLACED] += int((labels[part.index] != part.labels).sum())
        message[_DIGESTS + part.index] = _digest(part.keys)
    sum_small(message, topology)
    if int(message[_LABELS]) != known * topology.world_size:
        raise RunError(
            f"the ranks read different labels for step {batch.step}: their nodes have different "
            "columns of the index or of the label set; compare them with `mhe data verify`"
        )
    if message[_REPLACED]:
        _replace(labels, batch, topology)
    requested = [flag for flag, slot in _SLOTS.items() if message[slot]]
    samples = _digest_of_step(message[_DIGESTS:])
    return ExchangedLabels(labels, samples, reduce(or_, requested, Request.NOTHING))


def _replace(labels: Tensor, batch: StepBatch, topology: Topology) -> None:
    """Put the labels of substitutes where they belong, on all ranks."""
    changes = torch.zeros_like(labels)
    for part in batch.micro_batches:
        changes[part.index] = part.labels - labels[part.index]
    labels += all_reduce(changes, topology)


def _gather(
    batch: StepBatch, micro_batch: int, request: Request, topology: Topology
) -> ExchangedLabels:
    """The exchange where nobody knows the labels of others; a micro-batch may be short."""
    shape = batch.micro_batches[0].labels.shape[1:]
    rows = torch.full((len(batch.micro_batches), prod((micro_batch, *shape)) + 2), NO_SAMPLE)
    rows[:, 0] = request
    for row, part in zip(rows, batch.micro_batches, strict=True):
        row[1] = _digest(part.keys)
        row[2 : part.labels.numel() + 2] = part.labels.flatten()
    rows = gather_rows(rows, topology)
    requested = Request(reduce(or_, rows[:, 0].tolist()))
    labels = rows[:, 2:].unflatten(1, (micro_batch, *shape))
    return ExchangedLabels(labels, _digest_of_step(rows[:, 1]), requested)


def _digest(keys: list[str]) -> int:
    # Names of files need not be UTF-8; Python keeps their bytes as surrogates.
    names = "\n".join(keys).encode(errors="surrogateescape")
    digest = hashlib.blake2b(names, digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def _digest_of_step(digests: Tensor) -> str:
    """Of the digests of its micro-batches `[n]`."""
    return hashlib.blake2b(digests.numpy().tobytes(), digest_size=8).hexdigest()
