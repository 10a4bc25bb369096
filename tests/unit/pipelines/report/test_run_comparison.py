"""The page of several runs: what differs between them, in figures, curves and settings."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from launcher import cli
from mhe_dist.config.write import save_config
from pipelines.report.charts.lines import draw_lines
from pipelines.report.charts.run_charts import compared_chart
from pipelines.report.plots import series
from pipelines.report.run_comparison import (
    RecordedRun,
    _positions,
    write_comparison_page,
)
from tests.support import tiny

SUMMARY = {"world_size": 2, "samples": 60, "classes": 5}


def make_run(folder: Path, name: str, rank1: float, **sections: Any) -> str:
    config = tiny.config(folder, "unused", run={"name": name}, **sections)
    save_config(config, f"{config.run.path}/config.yaml")
    records = [
        {"step": step, "time": 1.0, "loss": 4 - 0.1 * step, "images_per_s": 0.9}
        for step in range(12)
    ]
    records[11] |= {"heldout/rank1": rank1, "heldout/chance": 0.2, "heldout/brush/rank1": 0.5}
    lines = "".join(json.dumps(record) + "\n" for record in records)
    Path(config.run.path, "metrics.jsonl").write_text(lines)
    return config.run.path


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two complete runs of other heads and rates, and one that has only begun."""
    folder = tmp_path_factory.mktemp("runs")
    found = [
        make_run(folder, "wide", 0.75, optim={"lr": 0.2}),
        make_run(folder, "narrow", 0.5, head={"kind": "full"}),
    ]
    summaries = [
        {"protocol": "first by name", "device": "NVIDIA H200"},
        {"protocol": "first of the shards"},
    ]
    for run, own in zip(found, summaries, strict=True):
        Path(run, "summary.json").write_text(json.dumps(SUMMARY | own))
    config = tiny.config(folder, "unused", run={"name": "young"})
    save_config(config, f"{config.run.path}/config.yaml")
    return [*found, config.run.path]


@pytest.fixture(scope="module")
def page(runs: list[str], tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("page") / "page.html"
    titles = write_comparison_page(runs, str(out))
    assert titles == ["Figures", "Training", "Unseen classes", "Speed", "Settings", "Runs"]
    return out.read_text()


def cells(page: str, title: str) -> dict[str, list[str]]:
    """The rows of a section's table by their first cell."""
    section = page.partition(f"<h2>{title}</h2>")[2].partition("</section>")[0]
    rows = re.findall(r"<tr>(.*?)</tr>", section)
    found = [re.findall(r"<t[dh]>(.*?)</t[dh]>", row) for row in rows]
    return {row[0]: row[1:] for row in found}


def test_figures_stand_side_by_side_with_their_protocols(page: str) -> None:
    figures = cells(page, "Figures")
    assert figures[""] == ["wide", "narrow", "young"]
    assert figures["rank-1, unseen classes"] == ["75.00%", "50.00%", "-"]
    assert figures["protocol of rank-1, TAR"] == ["first by name", "first of the shards", "-"]
    assert figures["brush: rank-1"] == ["50.00%", "50.00%", "-"]
    assert figures["steps"] == ["12", "12", "0, not complete"]
    assert figures["minutes of training"] == ["14.2", "14.2", "-"]  # 12 steps of 64 images
    assert figures["device"] == ["NVIDIA H200", "-", "-"]
    assert figures["training loss, last step"] == ["2.900", "2.900", "-"]


def test_the_settings_are_those_in_which_runs_differ(page: str) -> None:
    settings = cells(page, "Settings")
    assert settings["optim.lr"] == ["0.2", "0.02", "0.02"]
    assert settings["head.kind"][1] == "full" != settings["head.kind"][0]
    assert settings["head.mhs.length"][1] == "-"  # does not apply
    assert not {"run.name", "train.global_batch", "model.name"} & settings.keys()


def test_the_page_needs_nothing_else(page: str) -> None:
    assert page.count('<svg class="chart"') == 3  # loss, rank-1, speed
    assert "<img" not in page and "http" not in page.split("<section", maxsplit=1)[0]
    assert "src=" not in page and len(page) < 100_000


def recorded(label: str, tmp_path: Path, batch: int) -> RecordedRun:
    config = tiny.config(tmp_path, "unused", train={"global_batch": batch, "micro_batch": 4})
    records = [{"step": step, "loss": 2.0 - step / 10} for step in range(10)]
    return RecordedRun(label, config, records, {})


def test_steps_of_different_sizes_are_drawn_over_images(tmp_path: Path) -> None:
    runs = [recorded("a", tmp_path, 8), recorded("b", tmp_path, 16)]
    positions, unit = _positions(runs)
    assert unit == "images seen"
    named = [(run.label, run.records) for run in runs]
    chart = compared_chart(named, "loss", "Loss", unit, positions)
    assert [(line.name, line.x[-1]) for line in chart.lines] == [("a", 72), ("b", 144)]
    assert chart.x == unit
    assert _positions(runs[:1] * 2)[1] == "step"


def test_many_runs_have_lines_of_their_own(tmp_path: Path) -> None:
    runs = [recorded(str(number), tmp_path, 8) for number in range(15)]
    named = [(run.label, run.records) for run in runs]
    chart = compared_chart(named, "loss", "Loss", "step", _positions(runs)[0])
    assert len({(line.colour, line.dash) for line in chart.lines}) == 15
    assert len(draw_lines(chart).legend) == 15
    assert np.all(series(runs[0].records, "loss")[0] == np.arange(10))


def test_the_command_compares_runs_and_takes_one_twice_as_one(
    runs: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.run(["report", runs[0], runs[2]]) == 0
    assert "comparison.html: Figures, Training" in capsys.readouterr().out
    assert Path("comparison.html").exists()
    assert cli.run(["report", runs[2], runs[2]]) == 0
    assert Path(runs[2], "report.html").exists()


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    pair = [make_run(tmp_path / part, "same", 0.5) for part in ("a", "b")]
    write_comparison_page(pair, str(tmp_path / "page.html"))
    page = (tmp_path / "page.html").read_text()
    assert cells(page, "Figures")[""] == pair
    assert "They are the same." in page
