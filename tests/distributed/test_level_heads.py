"""Multi-Head Product and Cascade, sharded, against plain float64 on 1, 2 and 3 ranks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mhe_dist.distributed.topology import Topology
from mhe_dist.errors import UserError
from mhe_dist.heads.base import LabelError
from mhe_dist.heads.registry import build_head
from tests.conftest import run_ranks
from tests.distributed.conftest import RANKS
from tests.support.heads.head_jobs import Job
from tests.support.heads.head_runs import Found, run, run_all, run_cases
from tests.support.heads.level_jobs import CASES, level_config
from tests.support.heads.level_runs import check_levels

TOLERANCE = {torch.float64: 1e-10, torch.float32: 5e-5}


@pytest.fixture(scope="module", params=RANKS, ids=lambda size: f"W={size}")
def found(request: pytest.FixtureRequest, selected: list[str]) -> Found:
    """What each rank found for the jobs of the selected cases."""
    return run_cases(request.param, {name: CASES[name] for name in selected})


@pytest.mark.parametrize("case", CASES)
def test_equals_one_plain_process(case: str, found: Found) -> None:
    for job, ranks in zip(CASES[case], found[case], strict=True):
        check_levels(job, ranks, TOLERANCE[job.dtype])


@pytest.mark.parametrize("kind", ["mhp", "mhc"])
def test_few_micro_batches_equal_many(kind: str) -> None:
    for micro_batches in (1, 2, 3):
        job = Job(level_config(kind), "short", micro_batches=micro_batches)
        whole = run(Topology(), job)
        grads = whole.pop("grads").transpose(0, 1).flatten(1, 2)
        other = run(Topology(), Job(level_config(kind), "short"))
        torch.testing.assert_close(grads, other.pop("grads").transpose(0, 1).flatten(1, 2))
        torch.testing.assert_close(whole, other)


SAVED = {
    "mhp": level_config("mhp", "padded", "adaface"),
    "mhc": level_config("mhc", "three", "adaface", optim={"kind": "adamw"}),
    "mhc, sgd": level_config("mhc", "balanced", "none"),
}


def test_a_state_continues_on_any_number_of_ranks() -> None:
    jobs = [Job(config, steps=(0, 2)) for config in SAVED.values()]
    halves = run_ranks(run_all, 2, jobs)
    states = [merge([rank[number] for rank in halves]) for number in range(len(jobs))]
    rest = [replace(j, steps=(2, 3), state=s) for j, s in zip(jobs, states, strict=True)]
    for ranks in ([run_all(Topology(), rest)], run_ranks(run_all, 3, rest)):
        for number, job in enumerate(rest):
            check_levels(job, [rank[number] for rank in ranks], TOLERANCE[torch.float64])


def merge(ranks: list[dict]) -> dict[str, torch.Tensor]:
    """The checkpoint of all ranks; what is replicated must be the same on all of them."""
    state: dict[str, torch.Tensor] = {}
    for rank in ranks:
        for name, tensor in rank.items():
            if name.startswith("rows/"):
                assert name not in state, f"two ranks own {name}"
            elif "/" in name or name == "norms":
                assert torch.equal(state.setdefault(name, tensor), tensor), name
            else:
                continue
            state[name] = tensor
    return state


def test_names_and_ranges_do_not_depend_on_the_ranks() -> None:
    job = Job(level_config("mhc", "three"))
    heads = [build_head(job.spec(), Topology(rank, 2)) for rank in range(2)]
    alone = build_head(job.spec(), Topology())
    names = [set(head.state().tensors) for head in heads]
    assert names[0] | names[1] == set(alone.state().tensors)
    assert names[0] & names[1] == {n for n in names[0] if not n.startswith("rows/")}
    assert names[0] & names[1] == set(heads[0].state().replicated)
    assert all(head.loads(name) for head, own in zip(heads, names, strict=True) for name in own)
    assert not any(heads[0].loads(name) for name in names[1] - names[0])
    ranges = heads[0].row_ranges()
    assert ranges == heads[1].row_ranges() == alone.row_ranges()
    assert {name.rsplit("/", 1)[0] for name in alone.state().owned} == set(ranges)
    last = sorted(range_ for name, range_ in ranges.items() if name.endswith("level_3"))
    assert [start for start, _ in last] == [0, *(stop for _, stop in last[:-1])]


def test_memory_kinds_are_the_same(tmp_path: Path) -> None:
    found = []
    for memory in ("device", "host", "file"):
        config = level_config("mhc", "three", bank={"memory": memory})
        found.append(run(Topology(), Job(config, folder=str(tmp_path))))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)
    torch.testing.assert_close(found[2], found[0], rtol=0, atol=0)


def test_bfloat16_rows_learn_about_the_same() -> None:
    config = level_config("mhc", "three", bank={"dtype": "bfloat16"})
    rounded = run(Topology(), Job(config, dtype=torch.float32))
    exact = run(Topology(), Job(level_config("mhc", "three"), dtype=torch.float32))
    assert rounded["rows/00000/level_3/weight"].dtype == torch.bfloat16
    assert rounded["level_1/weight"].dtype == torch.float32
    torch.testing.assert_close(rounded["losses"], exact["losses"], rtol=0.02, atol=0)


@pytest.mark.parametrize("kind", ["mhp", "mhc"])
def test_too_short_lengths_are_refused(kind: str) -> None:
    config = level_config(kind, **{kind: {"lengths": [9, 5]}})
    with pytest.raises(UserError, match=rf"head\.{kind}\.lengths=\[9, 5\]: the product 45 .*46"):
        build_head(Job(config).spec(), Topology())


def test_bad_labels_are_named_or_refused() -> None:
    labels = torch.tensor([[[3, -1], [-1, -1]], [[5, 46], [1, 2]]])
    config = level_config("mhc", objective="multi_label", on_bad_label="fail")
    with pytest.raises(LabelError, match="label 46") as caught:
        build_head(Job(config).spec(), Topology()).plan(0, labels)
    assert (caught.value.micro_batch, caught.value.position) == (1, 0)
    single = level_config("mhc", on_bad_label="fail")
    with pytest.raises(LabelError, match="label -1"):
        build_head(Job(single).spec(), Topology()).plan(0, labels[..., 1])
    with pytest.raises(ValueError, match="one per sample"):
        build_head(Job(single).spec(), Topology()).plan(0, labels)
