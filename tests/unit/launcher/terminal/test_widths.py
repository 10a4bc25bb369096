"""Titles and figures stay whole in terminals of any usual width."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table

from launcher.terminal import console
from launcher.terminal.progress import ProgressDisplay, accuracy_rows
from launcher.terminal.summary import show_summary
from launcher.verbs.evaluate.app import _ijb_table, _pair_sets_table
from mhe_dist.config.schema import Config
from pipelines.evaluate.ijb import IjbResult
from pipelines.evaluate.metrics.roc import tar_name
from pipelines.evaluate.pair_sets import FARS

HELDOUT = {
    **{"rank1": 0.9026, "chance": 0.002, "accuracy": 0.978, "tar@far=1e-3": 0.512},
    **{"tar@far=1e-2": 0.734, "brush/rank1": 0.3215, "brush/tar@far=1e-4": 0.2168},
    **{"lfw/accuracy": 0.99817, "cfp_fp/accuracy": 0.98271},
}
PROTOCOL = "enrolled: the first image of each class in the order of the shards"
SUMMARY = {
    **{"run": "runs/a", "steps": 20, "classes": 50, "samples": 300, "world_size": 2},
    **{"resumed_from": None, "images_per_s": 812.4, "phases": {"train": 65.2, "export": 3.0}},
    **{"training": {"loss": 1.25}, "heldout": HELDOUT, "protocol": PROTOCOL, "exports": {}},
    **{"checkpoints": "runs/a/checkpoints", "mlflow": None},
}
WIDTHS = pytest.mark.parametrize("width", [60, 80, 120])


@pytest.fixture
def screen(width: int, monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What a terminal of that width shows of our console."""
    file = io.StringIO()
    terminal = Console(
        file=file, width=width, force_terminal=True, color_system=None, highlight=False
    )
    monkeypatch.setattr(console, "out", terminal)
    return file


def lines(screen: io.StringIO, width: int) -> list[str]:
    """Lines as the terminal breaks them: at the width, wherever that is."""
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue())
    cut = [[line[i : i + width] for i in range(0, len(line), width)] for line in text.splitlines()]
    return [part for parts in cut for part in parts]


@WIDTHS
def test_the_heldout_line_breaks_between_figures(screen: io.StringIO, width: int) -> None:
    event = {"event": "evaluation", "step": 12_000, **HELDOUT}
    with ProgressDisplay(console.out) as display:
        display.handle(event)
    shown = lines(screen, width)
    for name, value in accuracy_rows(HELDOUT):
        assert any(f"{name} {value}" in line for line in shown), (name, shown)


def test_a_file_gets_the_heldout_line_in_one() -> None:
    file = io.StringIO()
    with ProgressDisplay(Console(file=file, width=60)) as display:
        display.handle({"event": "evaluation", "step": 12_000, **HELDOUT})
    assert len(file.getvalue().splitlines()) == 1


@WIDTHS
def test_the_summary_has_whole_titles_and_figures_and_says_its_protocol(
    screen: io.StringIO, width: int
) -> None:
    name = "a-rather-long-name-of-a-run-of-40-letters"
    config = Config.model_validate({"run": {"name": name}, "data": {"shards": "x"}})
    show_summary(config, SUMMARY)
    shown = lines(screen, width)
    assert f"Run {name}" in shown
    for figure, value in accuracy_rows(HELDOUT):
        assert any(figure in line and value in line for line in shown), figure
    words = " ".join(re.sub(r"[│┃]", " ", " ".join(shown)).split())
    assert "protocol of rank-1, TAR" in words
    assert re.search("the first image of each class in the order", words)


@WIDTHS
def test_tables_of_sets_keep_their_figures_whole(screen: io.StringIO, width: int) -> None:
    names = ["accuracy", *map(tar_name, FARS)]

    class Result:
        name, pairs = "agedb_30", 6000
        metrics = dict.fromkeys(names, 0.98765)
        intervals = dict.fromkeys(names, (0.97531, 0.99246))

    console.show_table("runs/a/checkpoints/step_00012000", _pair_sets_table([Result()]))  # type: ignore[list-item]
    shown = lines(screen, width)
    assert "runs/a/checkpoints/step_00012000" in shown
    text = "\n".join(shown)
    assert text.count("98.77") == text.count("97.53") == text.count("99.25") == len(names)
    assert "6,000" in text and "agedb_30" in text


@WIDTHS
def test_the_table_of_templates_keeps_its_figures_whole(screen: io.StringIO, width: int) -> None:
    tar = {far: 0.98765 for far in (1e-6, 1e-4)}
    result = IjbResult.__new__(IjbResult)
    for key, value in (("tar", tar), ("nearest", {far: (0.97531, far) for far in tar})):
        object.__setattr__(result, key, value)
    for key in ("rank", "tpir"):
        object.__setattr__(result, key, {})
    console.show_table("runs/a/checkpoints/step_00012000 on IJBC", _ijb_table(result))
    shown = lines(screen, width)
    assert "runs/a/checkpoints/step_00012000 on IJBC" in shown
    assert "\n".join(shown).count("98.77") == 2
    assert "\n".join(shown).count("97.53 at 1.0e-0") == 2


@WIDTHS
def test_no_name_is_cut_off_in_a_table(screen: io.StringIO, width: int) -> None:
    name = "runs/" + "0123456789" * 12
    table = Table("run", "what it says", box=None)
    table.add_row(name, "some words " * 10)
    console.print_table(table)
    first = "".join(line.split()[0] for line in screen.getvalue().splitlines()[1:])
    assert name in first


def test_every_table_of_a_verb_is_printed_whole() -> None:
    for file in (Path(console.__file__).parents[1] / "verbs").rglob("*.py"):
        assert not re.search(r"out\.print\((\w*_)?table\b", file.read_text()), file
