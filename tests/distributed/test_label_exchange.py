"""Every rank learns the labels of a step: gathered, or known beforehand, substitutes included."""

from __future__ import annotations

import pytest
import torch

from mhe_dist.distributed.topology import Topology
from mhe_dist.errors import RunError
from mhe_dist.heads.base import NO_SAMPLE
from mhe_dist.train.batch import MicroBatch, StepBatch
from mhe_dist.train.label_exchange import ExchangedLabels, Request, exchange_labels

MICRO_BATCHES, SIZE = 6, 4
LABELS = torch.arange(MICRO_BATCHES * SIZE).view(MICRO_BATCHES, SIZE) ** 2
SEVERAL = torch.stack([LABELS, LABELS + 1, torch.full_like(LABELS, -1)], 2)
IMAGES = torch.empty(0)


def batch_of(topology: Topology, labels: torch.Tensor, known: torch.Tensor | None) -> StepBatch:
    parts = [
        MicroBatch(number, IMAGES, labels[number], [f"{number}-{n}" for n in range(SIZE)])
        for number in topology.share(MICRO_BATCHES)
    ]
    return StepBatch(3, parts, labels=known)


def exchange(topology: Topology) -> list[dict[str, object]]:
    """One rank's view of some exchanges, with one label per sample and with several."""
    return [exchange_of(topology, labels) for labels in (LABELS, SEVERAL)]


def exchange_of(topology: Topology, known_labels: torch.Tensor) -> dict[str, object]:
    before, replaced = known_labels.clone(), known_labels.clone()
    replaced[0, 1], replaced[5, 3], replaced[5, 0] = 2**40, 0, -7
    requests = [Request.SAVE, Request.NOTHING, Request.STOP][topology.rank]
    pairs = {
        name: [
            plain_values(
                exchange_labels(batch_of(topology, labels, known), SIZE, request, topology)
            )
            for known in (None, known_labels)
        ]
        for name, labels, request in (
            ("plain", known_labels, Request.NOTHING),
            ("replaced", replaced, requests),
        )
    }
    # One rank has another column; none may go on.
    other = known_labels.clone()
    other[2, 1] += topology.rank == 1
    with pytest.raises(RunError, match="the ranks read different labels for step 3"):
        exchange_labels(batch_of(topology, known_labels, other), SIZE, Request.NOTHING, topology)
    assert torch.equal(known_labels, before)
    return pairs | {"expected": replaced}


def plain_values(found: ExchangedLabels) -> tuple[torch.Tensor, str, int]:
    return found.labels, found.samples, int(found.requested)


def assert_alike(found: list, labels: torch.Tensor, requested: Request) -> None:
    for each in found:
        assert torch.equal(each[0], labels)
        assert each[1:] == (found[0][1], requested)


def test_known_labels_say_what_gathered_ones_say(run_distributed) -> None:
    for labels, *ranks in zip((LABELS, SEVERAL), *run_distributed(exchange, 3), strict=True):
        plain = [found for rank in ranks for found in rank["plain"]]
        assert_alike(plain, labels, Request.NOTHING)
        replaced = [found for rank in ranks for found in rank["replaced"]]
        assert_alike(replaced, ranks[0]["expected"], Request.SAVE | Request.STOP)
        assert plain[0][1] == replaced[0][1], "the keys are the same"


def test_samples_are_counted_with_and_without_labels() -> None:
    labels = SEVERAL.clone()
    labels[1, 2:], labels[4, 0] = NO_SAMPLE, -1
    assert ExchangedLabels(labels, "", Request.NOTHING).images == MICRO_BATCHES * SIZE - 2
    assert ExchangedLabels(labels[..., 0], "", Request.NOTHING).images == MICRO_BATCHES * SIZE - 2


def test_short_micro_batches_have_no_samples_behind_their_labels() -> None:
    parts = [MicroBatch(0, IMAGES, SEVERAL[0, :2], ["a", "b"])]
    found = exchange_labels(StepBatch(0, parts), SIZE, Request.NOTHING, Topology())
    assert torch.equal(found.labels[:, :2], SEVERAL[:1, :2])
    assert (found.labels[:, 2:] == NO_SAMPLE).all() and found.images == 2


def test_a_rank_alone_knows_its_labels() -> None:
    topology = Topology()
    pair = [
        plain_values(
            exchange_labels(batch_of(topology, LABELS, known), SIZE, Request.STOP, topology)
        )
        for known in (None, LABELS)
    ]
    assert_alike(pair, LABELS, Request.STOP)
