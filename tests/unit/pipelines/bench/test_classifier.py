"""The benchmark of exported classifiers checks them against a search of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from launcher.verbs.bench.classifier import _table
from mhe_dist.distributed.topology import Topology
from pipelines.bench import classifier
from pipelines.bench.classifier import (
    KINDS,
    ClassifierCase,
    ClassifierCost,
    best_of_all,
    class_embeddings,
    fits_in_memory,
    random_classifier,
)


@pytest.mark.parametrize("kind", KINDS)
def test_the_search_finds_what_the_classifier_answers(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(classifier, "PIECE", 100)
    case = ClassifierCase(kind, 60, 24)  # the beam holds all prefixes
    network = random_classifier(case)
    embeddings = class_embeddings(network, case, 50)
    best = best_of_all(network, embeddings)
    assert torch.equal(network(embeddings)[0][:, 0], best)
    assert len(best.unique()) > 20


def test_a_narrow_beam_misses_some() -> None:
    case = ClassifierCase("mhc", 10_000, 12)
    network = random_classifier(case)
    embeddings = class_embeddings(network, case, 200)
    same = network(embeddings)[0][:, 0] == best_of_all(network, embeddings)
    assert 0.5 < same.double().mean() < 1


@pytest.mark.slow
def test_a_file_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    monkeypatch.setattr(classifier, "_SECONDS", 0.1)
    case = ClassifierCase("mhp", 400, 16, checked=64, formats=("torch-export",))
    (found,) = classifier._measure(Topology(), case, str(tmp_path))
    cost = ClassifierCost(**found)
    assert (cost.kind, cost.format) == ("mhp", "torch-export")
    assert cost.file_bytes > case.row_bytes == 40 * 16 * 4
    assert cost.seconds.keys() == {1, 64} and min(cost.seconds.values()) > 0
    assert cost.same > 0.9
    assert not list(tmp_path.iterdir())
    assert _table([cost], "400 classes").row_count == 1


def test_what_does_not_fit_is_known_beforehand() -> None:
    assert ClassifierCase("full").row_bytes == 10**6 * 512 * 4
    assert ClassifierCase("mhp").row_bytes == 2_000 * 512 * 4
    assert fits_in_memory(ClassifierCase("mhp")) and not fits_in_memory(
        ClassifierCase("full", 10**11)
    )
