"""The head benchmark measures what it says, on a case small enough for a test."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from mhe_dist.distributed.collectives import all_to_all
from mhe_dist.distributed.topology import Topology
from mhe_dist.heads.registry import build_head
from pipelines.bench.head import PHASES, HeadCase, measure_case, measure_in_turn
from pipelines.bench.head_report import (
    HeadMeasurement,
    TimesInTurn,
    measurements_table,
    plot_measurements,
    save_measurements,
    short_count,
    time_ratios,
)
from pipelines.bench.products import BareProducts
from pipelines.bench.traffic import TrafficCounter
from tests.conftest import run_ranks

SMALL = {"world_size": 2, "batch": 8, "width": 16, "length": 4, "extra_heads": 2, "steps": 3}


@pytest.fixture(scope="module")
def results() -> list[HeadMeasurement]:
    cases = [HeadCase(kind, 64, **SMALL) for kind in ("full", "mhs")]
    return [HeadMeasurement(case, measure_case(case)) for case in cases]


@pytest.mark.slow
def test_the_figures_are_those_of_the_head(results: list[HeadMeasurement]) -> None:
    by_kind = {result.case.kind: result.figures for result in results}
    for figures in by_kind.values():
        assert figures["bank"] == 64 * 16 * 4 * 2
        assert figures["steps"] == 2  # the first one warms up
        assert min(figures[name] for name in (*PHASES, "step")) > 0
    assert by_kind["full"]["classes_seen"] == 64
    assert 4 < by_kind["mhs"]["classes_seen"] <= 12


@pytest.mark.slow
def test_a_routed_embedding_travels_there_and_back(results: list[HeadMeasurement]) -> None:
    routed = next(r.figures for r in results if r.case.kind == "mhs")
    assert routed["sent"] <= 2 * 2 * 8 * 16 * 4  # all samples of both ranks, and their gradients


@pytest.mark.slow
def test_report(results: list[HeadMeasurement], tmp_path: Path) -> None:
    in_turn = TimesInTurn({64: 2.0, 512: 3.0}, {"step": 2.0, "bare": 1.0}, {64: 1.6}, 8, {64: 6.5})
    assert measurements_table(results).row_count == len(results)
    ratios = dict(time_ratios(results, in_turn))
    assert ratios["mhs route on one rank over its bare products"] == "2.00 x the time"
    assert ratios["mhs route, 512 over 64 classes"] == "1.50 x the time"
    assert ratios["mhs route, 8 labels over one, 64 classes"] == "1.25 x the time"
    rows = "mhs route, 8 labels over one, 64 classes, rows"
    assert ratios[rows] == "6.50 x those a step touches"
    plot_measurements(results, tmp_path / "head.png")
    save_measurements(results, in_turn, tmp_path / "head.json")
    assert (tmp_path / "head.png").stat().st_size > 10_000
    assert len(json.loads((tmp_path / "head.json").read_text())["cases"]) == len(results)


@pytest.mark.slow
def test_cases_take_turns_in_the_same_processes() -> None:
    cases = [HeadCase("mhs", 512, labels=labels, **SMALL) for labels in (3, 1)]
    figures = measure_in_turn([*cases, HeadCase("mhs", 64, **SMALL)])
    assert len(figures) == 3
    assert min(case.seconds for case in figures) > 0
    # 16 samples, and two extra heads of each group; with 512 classes few heads are drawn twice.
    several, one = figures[0].heads, figures[1].heads
    assert 2 < one <= 16 + 2
    assert one < several <= 3 * 16 + 2


def _send(topology: Topology) -> int:
    with TrafficCounter() as traffic:
        all_to_all(torch.zeros(3, 5), [1, 2], [1 + topology.rank, 1 + topology.rank], topology)
    return traffic.bytes


@pytest.mark.slow
def test_traffic_counts_what_is_sent() -> None:
    assert run_ranks(_send, 2) == [60, 60]


def test_bare_products_read_and_write_each_used_head_once() -> None:
    case = HeadCase("mhs", 64, **SMALL | {"world_size": 1})
    built = build_head(case.spec(""), Topology())
    labels = torch.arange(8).view(1, 8)
    products = BareProducts(built, 0, labels)
    products.run()
    own = built.layout.locate(labels)[0].unique()
    units = [unit for part in products._products for unit in part.units.tolist()]
    assert sorted(units) == sorted([*own.tolist(), *built.draw(0, 0).tolist()])


@pytest.mark.parametrize(("number", "text"), [(7, "7"), (125_000, "125k"), (10**9, "1G")])
def test_counts_are_short(number: int, text: str) -> None:
    assert short_count(number) == text
