"""With another permutation rows and their state move to other heads, bit for bit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mhe_dist.bank.repartition import Permutations
from mhe_dist.distributed.topology import Topology
from mhe_dist.heads.registry import build_head
from tests.support.heads.head_jobs import CLASSES, STEPS, Job, head_config
from tests.support.heads.head_runs import gathered_state, run, run_on

HEADS = ("route", "gather")
VARIANTS: dict[str, dict] = {
    "sgd": {},
    "adamw": {"optim": {"kind": "adamw"}},
    "bfloat16": {"bank": {"dtype": "bfloat16"}},
    "file": {"bank": {"memory": "file"}},
    "in pieces": {},
}
CASES = [(head, variant) for head in HEADS for variant in VARIANTS]


def job(head: str, variant: str, every: int, steps: tuple[int, int], folder: str = "") -> Job:
    changes = VARIANTS[variant] | {"mhs": {"repartition_every": every}}
    config = head_config(head, **changes)
    cramped = variant == "in pieces"
    return Job(config, steps=steps, folder=folder or None, epoch_steps=1.0, cramped=cramped)


def by_class(results: list[dict[str, Tensor]], field: str, permutation: int) -> Tensor:
    """Rows `[C, columns]` of a run; zeros for those that no step met."""
    layout = Permutations(CLASSES, 4, 3, 3, 1).layout(permutation)
    units, rows = gathered_state(results, "units"), gathered_state(results, field)
    classes = layout.classes(units[:, None], torch.arange(layout.length)).flatten()
    found = torch.zeros(CLASSES, rows.shape[-1], dtype=rows.dtype)
    found[classes[classes >= 0]] = rows.flatten(0, 1)[classes >= 0]
    return found


@pytest.fixture(scope="module", params=[1, 2, 3], ids=lambda size: f"W={size}")
def found(
    request: pytest.FixtureRequest,
    selected: list[tuple[str, str]],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[tuple[str, str], list[dict[str, Tensor]]]:
    """What each rank found for the selected cases."""
    folder = str(tmp_path_factory.mktemp("rows"))
    jobs = [job(*case, 1, (0, STEPS), folder) for case in selected]
    return dict(zip(selected, run_on(request.param, jobs), strict=True))


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_a_run_that_moves_its_rows_is_the_same_on_any_ranks(
    case: tuple[str, str],
    found: dict[tuple[str, str], list[dict[str, Tensor]]],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    whole = job(*case, 1, (0, STEPS), str(tmp_path_factory.mktemp("rows")))
    alone = run(Topology(), replace(whole, cramped=False))
    ranks = found[case]
    assert {int(rank["permutation"]) for rank in ranks} == {STEPS - 1}
    assert torch.equal(gathered_state(ranks, "units"), gathered_state([alone], "units"))
    rows, expected = gathered_state(ranks, "weight"), gathered_state([alone], "weight")
    close = {"rtol": 1e-11, "atol": 1e-11} if rows.dtype == torch.float64 else {}
    torch.testing.assert_close(rows, expected, **close)
    torch.testing.assert_close(sum(rank["losses"] for rank in ranks), alone["losses"])


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_moving_alone_changes_no_bit(
    case: tuple[str, str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    start = job(*case, STEPS, (0, STEPS), str(tmp_path_factory.mktemp("rows")))
    before = run(Topology(), start)
    head = build_head(start.spec(), Topology())
    head.load_state(before)
    head.plan(STEPS, torch.full((6, 4), torch.iinfo(torch.int64).min))
    after = head.state().tensors
    assert int(after["permutation"]) == 1
    fields = [name.split("/")[-1] for name in before if name.startswith("rows/00000/")]
    for field in set(fields) - {"units"}:
        old, new = by_class([before], field, 0), by_class([after], field, 1)
        trained = old.any(1)
        assert trained.any()
        assert torch.equal(new[trained], old[trained]), field
        if field != "weight":
            assert not new[~trained].any(), field


@pytest.mark.parametrize(
    ("steps", "numbers"),
    [(0, [0, 0, 0, 1, 1, 1, 2, 2, 2, 3]), (10, [0, 0, 0, 1, 1, 1, 2, 2, 2, 2]), (2, [0, 0])],
)
def test_the_last_permutation_holds_for_a_whole_period(steps: int, numbers: list[int]) -> None:
    permutations = Permutations(CLASSES, 4, 3, 3, 3, steps)
    assert [permutations.number(step) for step in range(len(numbers))] == numbers


@pytest.mark.parametrize("head", HEADS)
def test_a_resumed_run_goes_on_with_its_permutation(head: str) -> None:
    whole = run(Topology(), job(head, "sgd", 2, (0, STEPS)))
    saved = run(Topology(), job(head, "sgd", 2, (0, STEPS - 1)))
    resumed = run(Topology(), replace(job(head, "sgd", 2, (STEPS - 1, STEPS)), state=saved))
    for name in whole:
        if name.startswith("rows/"):
            assert torch.equal(resumed[name], whole[name]), name
