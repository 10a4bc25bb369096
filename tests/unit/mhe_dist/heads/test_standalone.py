"""A head in one's own loop, in one process: its state, and steps that are begun again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mhe_dist.errors import UserError
from mhe_dist.heads.row_head import NormTracker
from mhe_dist.heads.standalone import StandaloneHead, create_head

CLASSES, WIDTH, BATCH = 60, 16, 8
MOVING = {"repartition_every": 1, "steps_per_epoch": 4}
KINDS: dict[str, dict[str, Any]] = {
    "mhs": {"length": 4, "extra_heads": 2},
    "full": {},
    "mhp": {},
    "mhc": {},
}


def made(kind: str = "mhs", **options: Any) -> StandaloneHead:
    blocks = KINDS[kind] | {"groups": 2} | options
    return create_head(kind, num_classes=CLASSES, dim=WIDTH, device="cpu", **blocks)


def batch(step: int) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(step)
    embeddings = 3 * torch.randn(BATCH, WIDTH, generator=rng)
    return embeddings, torch.randint(0, CLASSES, (BATCH,), generator=rng)


def train(head: StandaloneHead, steps: range) -> None:
    for step in steps:
        head(*batch(step)).loss.backward()
        head.step(0.1)


def answers(head: StandaloneHead) -> tuple[Tensor, Tensor]:
    found = head.predict(batch(99)[0], 5)
    return found.classes, found.scores


def assert_equal(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


def test_rows_mean_the_same_classes_where_no_repartition_is_asked_for() -> None:
    """A head that only predicts knows nothing of the schedule of the one that was trained."""
    trained, other = made(**MOVING), made()
    train(trained, range(6))
    other.load_state_dict(trained.state_dict())
    assert_equal(answers(other), answers(trained))
    again = made()
    again.load_state_dict(other.state_dict())
    assert_equal(answers(again), answers(trained))
    train(other, range(6, 7))
    back = made(**MOVING)
    back.load_state_dict(other.state_dict())
    assert_equal(answers(back), answers(other))


@pytest.mark.parametrize(
    ("saved", "margin", "named"),
    [
        ("cosface", "adaface", "margin.kind=arcface, cosface or combined, this one.*adaface"),
        ("cosface", "none", "margin.kind=arcface, cosface or combined, this one.*none"),
        ("adaface", "arcface", "margin.kind=adaface, this one"),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_a_refused_state_changes_nothing(kind: str, saved: str, margin: str, named: str) -> None:
    before, head = made(kind, margin=saved), made(kind, margin=margin)
    train(before, range(2))
    train(head, range(2, 4))
    kept = answers(head)
    with pytest.raises(UserError, match=named):
        head.load_state_dict(before.state_dict())
    assert_equal(answers(head), kept)


def test_the_state_of_one_rank_of_two_changes_nothing() -> None:
    head = made()
    train(head, range(2))
    kept, state = answers(head), made().state_dict()
    del state["tensors"]["rows/00001/units"]
    with pytest.raises(UserError, match="rows/00001/units is missing: another number of ranks"):
        head.load_state_dict(state)
    assert_equal(answers(head), kept)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_that_is_begun_again_counts_its_norms_once(kind: str) -> None:
    """As after running out of memory: the pass that was dropped had other norms."""
    once, again = made(kind, margin="adaface"), made(kind, margin="adaface")
    embeddings, labels = batch(0)
    again.plan([labels])
    again(embeddings * float("nan"), labels)
    for head in (once, again):
        head.plan([labels])
        head(embeddings, labels).loss.backward()
        head.step(0.1)
    assert torch.equal(norms_of(again).running, norms_of(once).running)


def norms_of(head: StandaloneHead) -> NormTracker:
    norms = getattr(head._head, "norms", None)
    assert isinstance(norms, NormTracker)
    return norms


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_type_without_room_for_a_margin_is_refused(dtype: torch.dtype) -> None:
    with pytest.raises(UserError, match=r'computes in torch.float32 .*bank=\{"dtype"'):
        made(dtype=dtype)
