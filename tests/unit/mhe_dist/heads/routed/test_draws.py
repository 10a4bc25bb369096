"""What is drawn into a step's softmax: uniform, the same for any world size, cheap to draw."""

from __future__ import annotations

import math
import os
import tracemalloc
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chi2
from torch import Tensor

from mhe_dist.config.head import HeadConfig
from mhe_dist.distributed.topology import Topology
from mhe_dist.heads.gathered.base import GatheredHead
from mhe_dist.heads.registry import build_head
from mhe_dist.heads.row_head import HeadSpec, RowHead

STEPS, SEED = 4000, 11


def head(
    topology: Topology | None = None,
    classes: int = 46,
    folder: Path | None = None,
    **changes: object,
) -> RowHead:
    values: dict = {"kind": "mhs", "groups": 6}
    if changes.get("kind", "mhs") == "mhs":
        gather = {"exchange": "gather", "negatives": "batch"}
        values["mhs"] = {"length": 4, "extra_heads": 2, **gather}
    for key, value in changes.items():
        values[key] = values.get(key, {}) | value if isinstance(value, dict) else value
    config = HeadConfig.model_validate(values)
    return build_head(HeadSpec(config, classes, 3, SEED, 6, folder=folder), topology or Topology())


def check_uniform(draws: list[Tensor], numbers: list[int], size: int) -> None:
    """Assert that every set of `size` of the `numbers` is as likely: no pair is rarer than another.

    Pearson's statistic over pairs is asymptotically chi-square when `size` is 2; over single
    numbers it is, once scaled, for any size.
    """
    drawn = [draw.tolist() for draw in draws]
    assert all(len(set(draw)) == size and set(draw) <= set(numbers) for draw in drawn)
    if size == 2:
        cells, scale = {pair: 0 for pair in combinations(numbers, 2)}, 1.0
        for draw in drawn:
            cells[tuple(sorted(draw))] += 1
    else:
        n = len(numbers)
        cells, scale = dict.fromkeys(numbers, 0), (n - 1) / n / (1 - size / n)
        for number in (number for draw in drawn for number in draw):
            cells[number] += 1
    expected = sum(cells.values()) / len(cells)
    statistic = scale * sum((count - expected) ** 2 / expected for count in cells.values())
    assert 1e-3 < chi2.sf(statistic, len(cells) - 1) < 1 - 1e-3


def test_extra_heads_of_a_gather_are_uniform() -> None:
    built = head()
    check_uniform([built.draw(step) for step in range(STEPS)], list(range(12)), 2)


def test_extra_heads_of_a_route_are_uniform_in_each_group() -> None:
    built = head(groups=2, mhs={"exchange": "route", "negatives": "own_plus"})
    for group in range(2):
        heads = list(built.layout.group_heads(group))
        check_uniform([built.draw(step, group) for step in range(STEPS)], heads, 2)


@pytest.mark.parametrize("others", [2, 4])
def test_negatives_of_partial_fc_are_uniform(others: int) -> None:
    built = head(kind="partial_fc", groups=3, partial_fc={"rate": (3 + others) / 15})
    units = list(built.layout.group_heads(1))
    positives = torch.tensor([units[0], units[4], units[5]])
    draws = [built.draw(step, 1, positives) for step in range(STEPS)]
    assert all(set(positives.tolist()) < set(draw.tolist()) for draw in draws)
    rest = [unit for unit in units if unit not in positives]
    check_uniform([draw[~torch.isin(draw, positives)] for draw in draws], rest, others)


@pytest.mark.parametrize("kind", ["mhs", "partial_fc"])
def test_a_group_a_step_and_a_seed_have_a_draw_of_their_own(kind: str) -> None:
    """Two of sixty, so that two draws are seldom the same."""
    none = torch.empty(0, dtype=torch.int64)
    if kind == "mhs":
        built = head(classes=480, groups=2, mhs={"exchange": "route", "negatives": "own_plus"})
    else:
        built = head(classes=120, kind=kind, groups=2, partial_fc={"rate": 2 / 60})

    def draws(group: int, seed: int) -> list[tuple[int, ...]]:
        built.spec = replace(built.spec, seed=seed)
        first = built.layout.group_heads(group).start
        args = [] if kind == "mhs" else [none]
        return [tuple((built.draw(n, group, *args) - first).tolist()) for n in range(40)]

    found = [draws(0, SEED), draws(1, SEED), draws(0, SEED + 1)]
    assert all(
        len(draw) == 2 and len(set(of_steps)) > 35 for of_steps in found for draw in of_steps
    )
    for one, other in combinations(found, 2):
        assert sum(a == b for a, b in zip(one, other, strict=True)) <= 2
    assert draws(0, SEED) == found[0]


@given(st.data())
def test_partial_fc_draws_its_share(data: st.DataObject) -> None:
    rate = data.draw(st.floats(0.001, 1.0))
    classes = data.draw(st.integers(1, 200))
    built = head(kind="partial_fc", classes=classes, groups=3, partial_fc={"rate": rate})
    units = built.layout.group_heads(1)
    chosen = data.draw(st.sets(st.integers(units.start, units.stop - 1))) if units else set()
    positives = torch.tensor(sorted(chosen), dtype=torch.int64)
    drawn = built.draw(data.draw(st.integers(0, 99)), 1, positives).tolist()
    assert drawn == sorted(set(drawn))
    assert chosen <= set(drawn) <= set(units)
    assert len(drawn) == max(len(chosen), math.ceil(round(rate * len(units), 6)))


@pytest.mark.parametrize(
    "changes",
    [{"kind": "full"}, {"kind": "partial_fc", "partial_fc": {"rate": 0.3}}, {"kind": "mhs"}],
    ids=lambda changes: changes["kind"],
)
@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_selection_does_not_depend_on_the_world_size(world_size: int, changes: dict) -> None:
    labels = torch.randint(0, 46, (6, 4), generator=torch.Generator().manual_seed(1))

    def select(rank: int, size: int) -> tuple[list[int], int]:
        built = head(Topology(rank, size), **changes)
        assert isinstance(built, GatheredHead)
        built.begin(7)
        selection = built.select(torch.unique(built.layout.locate(labels)[0]))
        return list(map(int, selection.units)), selection.classes

    alone, classes = select(0, 1)
    parts = [select(rank, world_size) for rank in range(world_size)]
    assert [unit for units, _ in parts for unit in units] == alone
    assert {count for _, count in parts} == {classes}


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"kind": "partial_fc", "partial_fc": {"rate": 1e-6}},
        {"mhs": {"exchange": "gather"}},
        {"mhs": {"exchange": "route", "negatives": "own_plus"}},
    ],
    ids=["partial_fc", "gather", "route"],
)
def test_a_step_over_10_to_the_8_classes_is_cheap(changes: dict, tmp_path: Path) -> None:
    built = head(classes=10**8, folder=tmp_path, bank={"memory": "file"}, **changes)
    labels = torch.arange(24).view(6, 4) * 4_000_037
    tracemalloc.start()
    for step in range(3):
        built.plan(step, labels)
        for part in labels:
            built(torch.randn(4, 3, requires_grad=True), part).loss.backward()
        built.step(0.1)
    assert tracemalloc.get_traced_memory()[1] < 10**7
    tracemalloc.stop()
    files = [store._file.fileno() for store in built.bank._store.values()]
    written = sum(os.fstat(file).st_blocks * 512 for file in files)
    assert built.bank.bytes >= 2 * 10**8 * 3 * 4 > 500 * written
