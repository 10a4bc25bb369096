"""The head benchmark measures what it says, on a case small enough for a test."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from mhe_dist.distributed.collectives import all_to_all
from mhe_dist.distributed.topology import Topology
from mhe_dist.heads.registry import build
from pipelines.bench import head, head_report
from pipelines.bench.products import BareProducts
from pipelines.bench.traffic import Traffic
from tests.conftest import run_ranks

SMALL = {"world_size": 2, "batch": 8, "width": 16, "length": 4, "extra_heads": 2, "steps": 3}


@pytest.fixture(scope="module")
def results() -> list[head_report.Result]:
    cases = [head.Case(kind, 64, **SMALL) for kind in ("full", "mhs")]
    return [head_report.Result(case, head.run(case)) for case in cases]


def test_the_figures_are_those_of_the_head(results: list[head_report.Result]) -> None:
    by_kind = {result.case.kind: result.figures for result in results}
    for figures in by_kind.values():
        assert figures["bank"] == 64 * 16 * 4 * 2
        assert figures["steps"] == 2  # the first one warms up
        assert min(figures[name] for name in (*head.PHASES, "step")) > 0
    assert by_kind["full"]["classes_seen"] == 64
    assert 4 < by_kind["mhs"]["classes_seen"] <= 12


def test_a_routed_embedding_travels_there_and_back(results: list[head_report.Result]) -> None:
    routed = next(r.figures for r in results if r.case.kind == "mhs")
    assert routed["sent"] <= 2 * 2 * 8 * 16 * 4  # all samples of both ranks, and their gradients


def test_report(results: list[head_report.Result], tmp_path: Path) -> None:
    turns = head_report.Turns({64: 2.0, 512: 3.0}, {"step": 2.0, "bare": 1.0})
    assert head_report.table(results).row_count == len(results)
    ratios = dict(head_report.ratios(results, turns))
    assert ratios["mhs route on one rank over its bare products"] == "2.00 x the time"
    assert ratios["mhs route, 512 over 64 classes"] == "1.50 x the time"
    head_report.plot(results, tmp_path / "head.png")
    head_report.save(results, turns, tmp_path / "head.json")
    assert (tmp_path / "head.png").stat().st_size > 10_000
    assert len(json.loads((tmp_path / "head.json").read_text())["cases"]) == len(results)


def test_cases_take_turns_in_the_same_processes() -> None:
    seconds = head.run_in_turn([head.Case("mhs", classes, **SMALL) for classes in (512, 64)])
    assert len(seconds) == 2
    assert min(seconds) > 0


def _send(topology: Topology) -> int:
    with Traffic() as traffic:
        all_to_all(torch.zeros(3, 5), [1, 2], [1 + topology.rank, 1 + topology.rank], topology)
    return traffic.bytes


def test_traffic_counts_what_is_given() -> None:
    assert run_ranks(_send, 2) == [60, 60]


def test_bare_products_read_and_write_each_met_head_once() -> None:
    case = head.Case("mhs", 64, **SMALL | {"world_size": 1})
    built = build(case.spec(""), Topology())
    labels = torch.arange(8).view(1, 8)
    products = BareProducts(built, 0, labels)
    products.run()
    own = built.layout.locate(labels)[0].unique()
    met = [unit for part in products._products for unit in part.units.tolist()]
    assert sorted(met) == sorted([*own.tolist(), *built.draw(0, 0).tolist()])


@pytest.mark.parametrize(("number", "text"), [(7, "7"), (125_000, "125k"), (10**9, "1G")])
def test_counts_are_short(number: int, text: str) -> None:
    assert head_report.count(number) == text
