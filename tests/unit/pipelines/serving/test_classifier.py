"""What an export with the head is compared with, and when there is none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from launcher.verbs.results import Format, _formats
from mhe_dist.config.head import HeadConfig
from mhe_dist.errors import RunError, UserError
from mhe_dist.heads.base import TopK
from pipelines.serving.classifier import compare_answers, refuse_large_classifier, write_names
from tests.support.config_sections import config

MB = 1_000_000


def answers(images: int = 40) -> TopK:
    scores = torch.tensor([[8.0, 6.0, 4.0]]) + torch.linspace(0, 1, images)[:, None]
    return TopK(torch.arange(3).repeat(images, 1), scores)


def change(part: Tensor, where: tuple[slice | int, slice | int], value: float) -> Tensor:
    changed = part.clone()
    changed[where] += value
    return changed


def test_equal_answers_pass_and_the_largest_difference_is_told() -> None:
    expected = answers()
    found = expected._replace(scores=change(expected.scores, (3, 1), 1e-3))
    assert compare_answers(expected, expected, "file") == 0
    assert compare_answers(found, expected, "file") == pytest.approx(1e-3, rel=0.01)


@pytest.mark.parametrize("value", [0.02, float("nan"), float("-inf")])
def test_a_score_that_differs_is_refused(value: float) -> None:
    expected = answers()
    found = expected._replace(scores=change(expected.scores, (3, 1), value))
    with pytest.raises(RunError, match="file: a score differs from the head's by"):
        compare_answers(found, expected, "file")


def test_other_classes_are_refused_but_for_ties() -> None:
    expected = answers()
    swapped = expected.classes.clone()
    swapped[5, :2] = torch.tensor([1, 0])
    with pytest.raises(RunError, match="file: 1 of 40 images get other classes than by the head"):
        compare_answers(expected._replace(classes=swapped), expected, "file")
    tie = expected.scores.clone()
    tie[5, 1] = tie[5, 0] - 1e-4
    compare_answers(TopK(swapped, tie), TopK(expected.classes, tie), "file")


def test_few_images_may_have_another_class_at_the_last_place() -> None:
    """The score of the class that comes next is not known there."""
    expected = answers()
    for count, refused in ((2, False), (3, True)):
        found = expected._replace(classes=change(expected.classes, (slice(count), 2), 7))
        if refused:
            with pytest.raises(RunError, match="3 of 40 images"):
                compare_answers(found, expected, "file")
        else:
            compare_answers(found, expected, "file")


def test_classes_that_are_not_there_are_equal() -> None:
    expected = answers()
    none = TopK(
        torch.where(expected.classes == 2, -1, expected.classes),
        expected.scores.masked_fill(expected.classes == 2, float("-inf")),
    )
    assert compare_answers(none, none, "file") == 0
    with pytest.raises(RunError, match="a score differs"):
        compare_answers(expected, none, "file")


def test_a_head_that_is_too_large_is_refused_with_the_sizes() -> None:
    settings = config(head={"kind": "mhs"})
    with pytest.raises(UserError) as refused:
        refuse_large_classifier("onnx", settings, 1_500_000, 100 * MB, half=False)
    for words in (
        "--classify, --to onnx: the rows of head.kind=mhs with 1,500,000 classes take 3.1 GB",
        "3.2 GB would be written, with the backbone; at most 2.1 GB are",
        "--fp16 makes 1.6 GB of it; --to torch-export holds it; mhe classify names",
    ):
        assert words in str(refused.value)
    refuse_large_classifier("onnx", settings, 1_500_000, 100 * MB, half=True)
    refuse_large_classifier("onnx", settings, 900_000, 100 * MB, half=False)
    product = config(head={"kind": "mhp", "mhp": {"lengths": [10_000, 10_000]}})
    refuse_large_classifier("onnx", product, 10**8, 100 * MB, half=False)
    with pytest.raises(UserError, match=r"at most 8\.6 GB are: mhe classify names"):
        refuse_large_classifier("torch-export", settings, 10**8, 100 * MB, half=True)


def test_the_default_head_has_rows_of_512() -> None:
    assert config().model.embedding_dim == 512 and HeadConfig().margin.kind != "none"


def test_formats_with_the_head() -> None:
    assert _formats(None, 0, True) == [Format.TIMM, Format.ONNX]
    assert _formats(None, 5, False) == [Format.ONNX]
    both = [Format.TORCH_EXPORT, Format.MLFLOW, Format.TORCH_EXPORT]
    assert _formats(both, 5, False) == both[:2]
    with pytest.raises(UserError, match="--to timm holds the backbone alone"):
        _formats([Format.ONNX, Format.TIMM], 5, False)
    with pytest.raises(UserError, match="--normalize is for embeddings"):
        _formats(None, 5, True)


def test_the_mlflow_model_reads_the_names_that_were_written(tmp_path: Path) -> None:
    from pipelines.serving.image_model import read_names

    names = {0: "a\\b", 2: "a\tb", 3: "a\nb", 4: "a\\tb", 5: "é"}
    write_names(f"{tmp_path}/names.tsv", names)
    assert read_names(f"{tmp_path}/names.tsv") == names
    assert len((tmp_path / "names.tsv").read_text().splitlines()) == 6
