"""The sweep over timm's families: what it keeps, what it leaves out, what its table says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm

from mhe_dist.backbone.model import Backbone
from mhe_dist.config.schema import ModelConfig
from mhe_dist.errors import UserError
from pipelines.bench import zoo
from pipelines.bench.zoo_models import FAMILIES


def test_every_family_is_one_that_timm_has() -> None:
    assert len(FAMILIES) >= 60
    assert all(timm.is_model(model) for model, _ in FAMILIES.values())


def test_a_sweep_that_was_stopped_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[str] = []

    def try_apart(family: str) -> dict[str, Any]:
        tried.append(family)
        if len(tried) == 3:
            raise KeyboardInterrupt
        return {"family": family, "model": "m", "side": 9, "versions": v, "status": "trains"}

    v = zoo.versions()
    monkeypatch.setattr(zoo, "try_apart", try_apart)
    record = tmp_path / "zoo" / "rows.jsonl"
    families = ["resnet", "vgg", "eva"]
    with pytest.raises(KeyboardInterrupt):
        zoo.sweep(families, record)
    assert [row["family"] for row in zoo.sweep(families, record)] == families
    assert tried == ["resnet", "vgg", "eva", "eva"]
    v = "torch 1"  # what other versions did is history
    assert list(zoo.read_rows(record)) == families
    record.write_text(record.read_text().replace(zoo.versions(), v))
    assert zoo.read_rows(record) == {}


def test_the_page_counts_and_names_what_does_not_train() -> None:
    base = {"side": 128, "versions": zoo.versions()}
    rows = [
        {"family": "a", "model": "am", "status": "trains", **base, "neck": "batchnorm"}
        | {"parameters": 5_200_000, "grad_norm": 12.0, "timm": 1e-6, "onnx": 2e-6, "seconds": 9.2},
        {"family": "b", "model": "bm", "status": "refused", "message": "too | small", **base},
    ]
    text = zoo.page(rows)
    assert f"2 of {len(FAMILIES)} families were tried: 1 train, 1 are refused before" in text
    assert "| a | `am` | 128 | 5.2 | batchnorm | trains | 12 | 1e-06 | 2e-06 | 9 |" in text
    assert "| b | `bm` | 128 |  |  | refused: too \\| small |  |  |  |  |" in text


@pytest.mark.long
@pytest.mark.parametrize("family", ["fastvit", "mlp_mixer", "eva"])
def test_families_that_did_not_train_before(family: str) -> None:
    row = zoo.try_apart(family)
    assert row["status"] == "trains", row


def test_a_model_is_tried_without_a_neck_where_it_can_have_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    refusals = [UserError("model.neck=batchnorm: use model.neck=none"), UserError("too\nsmall")]
    seen: list[str] = []

    def build(config: ModelConfig, side: int) -> Backbone:
        seen.append(config.neck)
        raise refusals[len(seen) - 1]

    monkeypatch.setattr(zoo, "build_backbone", build)
    row = zoo.try_model("levit_128s", 64)
    assert row == {"status": "refused", "message": "too", "neck": "none"}
    assert seen == ["batchnorm", "none"]


def test_what_is_refused_after_training_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def restore(*given: object) -> Backbone:
        raise UserError("does not fit the weights")

    monkeypatch.setattr(zoo, "restore_backbone", restore)
    row = zoo.try_model("resnet10t", 32)
    assert row["status"] == "fails"
    assert row["message"] == "UserError: does not fit the weights"
