"""Pictures of a run from its records."""

import json
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from pipelines.report.comparison import Outcome, VariantResult
from pipelines.report.comparison_plot import draw_comparison
from pipelines.report.evaluation import draw_roc
from pipelines.report.plots import (
    STYLE,
    _draw_figures,
    draw_plots,
    plot_heldout,
    plot_roc,
    running_mean,
    series,
)
from pipelines.report.sheets import contact_sheet
from pipelines.report.sheets.contact_sheet import PLAIN, RIGHT, WRONG
from pipelines.shards.index import ShardIndex
from pipelines.shards.writer import Sample, ShardWriter
from tests.support.data.images import encoded

SIDE = 8
FACES = (("easy", "Easy"), ("hard", "Hard"))


@pytest.fixture
def shards(tmp_path):
    with ShardWriter(str(tmp_path / "heldout"), "heldout") as writer:
        samples = []
        for number in range(12):
            picture = Image.new("RGB", (SIDE, SIDE), (20 * number, 0, 0))
            members = {"png": encoded(picture, "png"), "cls": str(number // 2).encode()}
            samples.append(Sample(f"{number}", members))
        writer.write(samples)
        writer.finish(6)
    return str(tmp_path / "heldout")


def details():
    nearest = np.array([[0, 2, 4], [4, 2, 0], [6, 8, 10]])
    right = np.array([[True, False, False], [False, True, False], [False, False, False]])
    far = np.geomspace(1e-5, 0.1, 50)
    return {
        "probes": np.array([1, 3, 5]),
        "nearest": nearest,
        "right": right,
        "far": far,
        "tar": np.linspace(0.5, 0.99, 50),
    }


def write_run(folder, records, arrays):
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    if arrays:
        np.savez(folder / "evaluation.npz", **arrays)


@pytest.mark.slow
def test_everything_that_the_records_allow_is_drawn(tmp_path, shards):
    records = [{"step": s, "loss": 5.0 - s / 100, "lr": 0.1} for s in range(200)]
    records[-1] |= {"accuracy": 0.5, "images_per_s": 100.0, "data_wait": 0.1}
    records.append({"step": 199, "heldout/rank1": 0.8, "heldout/chance": 0.01})
    write_run(tmp_path / "run", records, details())
    written = [Path(file) for file in draw_plots(str(tmp_path / "run"), shards, SIDE)]
    names = ["heldout", "neighbours", "note", "overview", "throughput", "training"]
    assert sorted(path.stem for path in written) == names
    for path in written:
        with Image.open(path) as picture:
            assert min(picture.size) > (200 if path.stem == "note" else 400)
            assert path.stem != "note" or picture.width < 700  # no wider than MLflow shows it
            # Ink on white: neither blank nor filled.
            ink = (np.asarray(picture.convert("L")) < 250).mean()
            assert 0.005 < ink < 0.9


def test_a_run_without_evaluation_has_no_such_pictures(tmp_path):
    write_run(tmp_path / "run", [{"step": 0, "loss": float("nan"), "lr": 0.1}], {})
    written = draw_plots(str(tmp_path / "run"), "", SIDE)
    assert sorted(Path(file).stem for file in written) == ["note", "overview", "training"]


def test_no_legend_or_figure_lies_on_a_curve():
    """Curves of held-out figures may go anywhere, that of a ROC goes from below to the right."""
    falls = [0.9, 0.1, 0.05, 0.02, 0.9]
    rows = [(step, value) for step, value in enumerate(falls)]
    records = [{"step": s, "heldout/rank1": v, "heldout/chance": 0.01} for s, v in rows]
    far = np.logspace(-6, -1, 200)
    details = {"far": far, "tar": np.clip(0.2 * (7 + np.log10(far)), 0, 1)}
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9.2, 3.5))
        heldout, roc = figure.subplots(1, 2)
        plot_heldout(heldout, records)
        plot_roc(roc, details)
        figure.draw_without_rendering()
        legend = heldout.get_legend().get_window_extent()
        assert legend.y1 < heldout.xaxis.get_tightbbox().y0 + 1
        assert heldout.get_position().height > 0.4
        curve = roc.transData.transform(np.column_stack([details["far"], details["tar"]]))
        for text in roc.texts:
            box = text.get_window_extent()
            assert not any(box.contains(*point) for point in curve)
            assert box.x1 < roc.get_window_extent().x1


@pytest.mark.parametrize(("last", "marked"), [(1e-2, 3), (4e-3, 2), (1.0, 3)])
def test_a_roc_names_no_rate_beyond_its_end(last: float, marked: int) -> None:
    """Of very many pairs it is kept for small rates alone: its last point stood for 1e-2."""
    far = np.geomspace(1e-5, last, 50)
    with mpl.rc_context(STYLE):
        axes = Figure().subplots()
        plot_roc(axes, {"far": far, "tar": np.linspace(0.1, 0.9, 50)})
    assert len(axes.texts) == marked


def test_drawing_leaves_the_callers_style_alone(tmp_path):
    before = dict(mpl.rcParams)
    write_run(tmp_path / "run", [{"step": 0, "loss": 1.0, "lr": 0.1}], {})
    draw_plots(str(tmp_path / "run"), "", SIDE)
    assert dict(mpl.rcParams) == before


def test_series_takes_the_records_that_have_the_metric():
    steps, values = series([{"step": 1, "a": 2.0}, {"step": 2}, {"step": 5, "a": 3.0}], "a")
    assert (steps.tolist(), values.tolist()) == ([1, 5], [2.0, 3.0])
    assert len(series([], "a")[0]) == 0


def test_a_running_mean_reaches_both_ends():
    values = np.array([1.0, 2.0, 6.0, 4.0])
    np.testing.assert_allclose(running_mean(values, 3), [1.5, 3.0, 4.0, 5.0])
    np.testing.assert_allclose(running_mean(values, 1), values)


def frames(row, tiles):
    """Colours of the frames of a row, the probe's first."""
    tile, gap = contact_sheet.SIDE + 2 * contact_sheet._FRAME, contact_sheet._GAP
    starts = [0] + [tile + contact_sheet._MARGIN + i * (tile + gap) for i in range(tiles)]
    return [tuple(row[0, start].tolist()) for start in starts]


@pytest.mark.parametrize(
    ("probe", "expected"),
    [(0, [RIGHT, PLAIN, PLAIN]), (1, [WRONG, RIGHT, PLAIN]), (2, [WRONG, WRONG, WRONG])],
)
def test_the_right_one_is_green_and_what_beats_it_red(shards, probe, expected):
    row = contact_sheet._probe_row(ShardIndex.load(shards), details(), probe, SIDE)
    assert frames(row, 3) == [PLAIN, *expected]


def test_the_tiles_are_the_images_that_were_named(shards):
    row = contact_sheet._probe_row(ShardIndex.load(shards), details(), 1, SIDE)
    frame, tile = contact_sheet._FRAME, contact_sheet.SIDE + 2 * contact_sheet._FRAME
    assert row[frame, frame].tolist() == [60, 0, 0]  # probe 3
    assert row[frame, tile + contact_sheet._MARGIN + frame].tolist() == [80, 0, 0]  # gallery 4


@pytest.mark.parametrize(
    ("lowest", "label"),
    [(0.95, "true accept rate (axis from 93%)"), (0.01, "true accept rate")],
)
def test_a_cut_axis_of_a_roc_says_so(lowest, label):
    far = np.geomspace(1e-5, 0.1, 9)
    (axes,) = draw_roc({"lfw": (far, np.linspace(lowest, 1, 9))}, "ROC").axes
    assert axes.get_ylabel() == label
    assert (axes.get_ylim()[0] > 0) == ("axis from" in label)


def test_cut_axes_of_a_comparison_say_so():
    def variant(name, easy, hard):
        heldout = {"easy/rank1": easy, "hard/rank1": hard}
        heldout |= {"easy/tar@far=1e-4": easy, "hard/tar@far=1e-4": hard}
        return VariantResult(name, name, [Outcome(0, heldout, 9.0, 0.1, 1.0, 1.0, 1.0, 1, 1.0)])

    figure = draw_comparison([variant("a", 0.96, 0.02), variant("b", 0.92, 0.3)], FACES)
    for axes in figure.axes:
        begin = axes.get_xlim()[0]
        assert axes.get_xlabel() == (f"(axis from {begin:.0f}%)" if begin > 0 else "")
    assert [axes.get_xlim()[0] > 0 for axes in figure.axes] == [True, True, False, False]


def test_other_plots_of_a_run_begin_at_nothing(tmp_path):
    records = [{"step": s, "loss": 5.0 - s / 100, "lr": 0.1, "accuracy": 0.9} for s in range(9)]
    for record in records:
        record |= {"images_per_s": 900.0, "data_wait": 0.4, "heldout/rank1": 0.98}
    for figure in _draw_figures(records, details()).values():
        for axes in figure.axes:
            assert axes.get_ylim()[0] == 0, axes.get_title()
