"""A head's classifier answers what scoring all classes in float64 does, traced or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mhe_dist.backbone.traced import write_onnx, write_program
from mhe_dist.bank.class_layout import digits
from mhe_dist.config.head import HeadConfig
from mhe_dist.distributed.topology import Topology
from mhe_dist.errors import UserError
from mhe_dist.heads import classifier
from mhe_dist.heads.base import Head
from mhe_dist.heads.classifier import build_classifier, classifier_bytes
from mhe_dist.heads.multilevel.cascade import MultiHeadCascade
from mhe_dist.heads.multilevel.product import MultiHeadProduct
from mhe_dist.heads.registry import build_head
from mhe_dist.heads.row_head import HeadSpec, RowHead

CLASSES, DIM, IMAGES, K = 997, 24, 300, 7
HEADS: dict[str, dict[str, Any]] = {
    "full": {"kind": "full"},
    "partial_fc": {"kind": "partial_fc"},
    "mhs": {"kind": "mhs", "mhs": {"length": 10, "extra_heads": 8}},
    "mhp": {"kind": "mhp", "mhp": {"lengths": [8, 13, 11]}},
    "mhc": {"kind": "mhc", "mhc": {"lengths": [32, 32], "candidates": 3}},
    "mhc of three": {"kind": "mhc", "mhc": {"lengths": [8, 13, 11], "candidates": 4}},
    "mhc of labels": {"kind": "mhc", "mhc": {"lengths": [32, 32], "multi_label": True}},
}


def config_of(name: str, margin: str) -> HeadConfig:
    scale = {} if margin == "none" else {"scale": 16.0}
    values = {"groups": 8, **HEADS[name], "margin": {"kind": margin, **scale}}
    return HeadConfig.model_validate(values)


def head_of(
    name: str,
    margin: str = "cosface",
    classes: int = CLASSES,
    dtype: torch.dtype = torch.float32,
) -> Head:
    """A head whose rows were never trained, biases included."""
    spec = HeadSpec(config_of(name, margin), classes, DIM, 5, 1, dtype=dtype)
    head = build_head(spec, Topology())
    if margin == "none":  # biases begin as 0
        banks = [head.bank] if isinstance(head, RowHead) else []
        if isinstance(head, (MultiHeadProduct, MultiHeadCascade)):
            banks = [part.bank for part in (head.levels | head.projections).values()]
        for seed, bank in enumerate(banks):
            bank.touch(bank.units)
            rows = bank.read(bank.units)
            draw = torch.Generator().manual_seed(seed)
            noise = torch.randn(rows.shape[:2], generator=draw).to(rows)
            bank.write(bank.units, {"weight": torch.cat([rows[..., :-1], noise[..., None]], 2)}, 0)
    return head


def embeddings() -> Tensor:
    return torch.randn(IMAGES, DIM, generator=torch.Generator().manual_seed(0)) * 3


def features(margin: str) -> Tensor:
    x = embeddings().double()
    return F.pad(x, (0, 1), value=1.0) if margin == "none" else 16 * F.normalize(x)


def all_scores(head: Head, margin: str) -> Tensor:
    """Scores of every class in float64 `[N, C]`."""
    every = torch.arange(CLASSES)

    def unit(rows: Tensor) -> Tensor:
        return rows.double() if margin == "none" else F.normalize(rows.double(), dim=-1)

    if isinstance(head, RowHead):
        units, slots = head.layout.locate(every)
        return features(margin) @ unit(head.bank.read(head.bank.units)[units, slots]).T
    assert isinstance(head, MultiHeadProduct)
    total = torch.zeros(IMAGES, CLASSES, dtype=torch.float64)
    for level, own in zip(
        head.levels.values(), digits(every, head.radix.lengths).unbind(1), strict=True
    ):
        rows = unit(level.bank.read(torch.zeros(1).long())[0])
        total += (features(margin) @ rows.T).log_softmax(1)[:, own]
    return total


@pytest.mark.parametrize("margin", ["cosface", "none"])
@pytest.mark.parametrize("name", ["full", "partial_fc", "mhs", "mhp"])
def test_it_answers_the_best_of_all_classes(
    name: str, margin: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = head_of(name, margin)
    best, expected = all_scores(head, margin).topk(K)
    for piece in (100, 1 << 16):
        monkeypatch.setattr(classifier, "PIECE", piece)
        classes, scores = build_classifier(head, K)(embeddings())
        assert torch.equal(classes, expected)
        torch.testing.assert_close(scores.double(), best, rtol=1e-4, atol=1e-4)
    single, _ = build_classifier(head, 1)(embeddings())
    assert torch.equal(single, expected[:, :1])


@pytest.mark.parametrize("k", [1, K, 40])
@pytest.mark.parametrize("margin", ["cosface", "none"])
@pytest.mark.parametrize("name", ["mhc", "mhc of three", "mhc of labels"])
def test_a_cascade_answers_what_its_beam_finds(name: str, margin: str, k: int) -> None:
    head = head_of(name, margin, dtype=torch.float64)  # in which no two paths are equal
    expected = head.predict(embeddings(), k)
    classes, scores = build_classifier(head, k)(embeddings().double())
    assert torch.equal(classes, expected.classes)
    torch.testing.assert_close(scores, expected.scores)


def test_a_beam_of_fewer_classes_than_wanted_ends_in_none() -> None:
    """All classes are named, the last parent has two children only."""
    head = head_of("mhc", classes=66)
    assert isinstance(head, MultiHeadCascade)
    classes, _ = build_classifier(head, 66)(embeddings())
    assert torch.equal(classes.sort(dim=1).values, torch.arange(66).expand(IMAGES, -1))


@pytest.mark.parametrize("name", ["mhs", "mhp", "mhc of three"])
def test_it_can_be_traced_for_any_number_of_images(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(classifier, "PIECE", 500)
    module = build_classifier(head_of(name), K)
    traced = write_program(module, embeddings()[:2], f"{tmp_path}/classifier.pt2", {})
    for inputs in (embeddings().repeat(20, 1), embeddings()[:1]):
        classes, scores = module(inputs)
        found = traced(inputs)
        assert torch.equal(found[0], classes)
        torch.testing.assert_close(found[1], scores)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mhp", "mhc"])
def test_an_onnx_file_answers_the_same(name: str, tmp_path: Path) -> None:
    """The other heads: tests/distributed/test_classification.py."""
    module = build_classifier(head_of(name), K)
    path = str(tmp_path / "classifier.onnx")
    run = write_onnx(module, embeddings()[:2], path, ["classes", "scores"], {})
    for inputs in (embeddings(), embeddings()[:1]):
        classes, scores = module(inputs)
        found = run(inputs)
        assert torch.equal(found[0], classes)
        torch.testing.assert_close(found[1], scores, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("margin", ["cosface", "none"])
@pytest.mark.parametrize("name", HEADS)
def test_its_size_is_known_before_it_is_built(name: str, margin: str) -> None:
    head = head_of(name, margin)
    module = build_classifier(head, K)
    size = sum(part.nbytes for part in module.state_dict().values())
    assert size == classifier_bytes(config_of(name, margin), CLASSES, DIM)
    half = build_classifier(head, K).half()
    assert sum(part.nbytes for part in half.state_dict().values()) == size // 2
    assert half(embeddings())[1].dtype == torch.float32


def test_a_million_classes_of_two_digits_are_two_thousand_rows() -> None:
    product = HeadConfig.model_validate({"kind": "mhp", "mhp": {"lengths": [1000, 1000]}})
    assert classifier_bytes(product, 10**6, 512) == 2000 * 512 * 4
    assert classifier_bytes(HeadConfig(kind="full"), 10**6, 512) == 10**6 * 512 * 4


def test_more_classes_than_there_are_cannot_be_named() -> None:
    with pytest.raises(UserError, match="998 best classes: the run has 997 classes"):
        build_classifier(head_of("mhs"), CLASSES + 1)
