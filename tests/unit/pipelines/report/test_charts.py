"""Charts: what is drawn is what was recorded, in bounded size, readable by pointer, key and ear."""

from __future__ import annotations

import re
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from pipelines.report.charts.chart import (
    BarChart,
    DrawnChart,
    Histogram,
    Line,
    LineChart,
    PointMap,
    thin_envelope,
)
from pipelines.report.charts.counts import draw_bars, draw_histogram, draw_points
from pipelines.report.charts.frame import WIDTH, Scale
from pipelines.report.charts.lines import draw_lines
from pipelines.report.charts.numbers import format_figure, format_power, format_tick
from pipelines.report.charts.run_charts import heldout_charts, roc_chart, training_charts


def ramp(name: str = "loss", count: int = 11, **options: Any) -> Line:
    return Line(name, np.arange(count), np.linspace(2, 1, count), **options)


def stops(drawn: DrawnChart) -> list[ElementTree.Element]:
    return [each for each in ElementTree.fromstring(drawn.svg).iter("g") if each.get("aria-label")]


def said(drawn: DrawnChart) -> list[str]:
    return [each.attrib["aria-label"] for each in stops(drawn)]


def test_each_place_says_its_values_and_can_be_reached() -> None:
    drawn = draw_lines(LineChart("Loss", "step", [ramp(), ramp("other", colour=1)]))
    assert said(drawn)[5] == "step 5: loss 1.5, other 1.5"
    assert all(each.get("tabindex") == "-1" for each in stops(drawn))
    root = ElementTree.fromstring(drawn.svg)
    assert root.get("tabindex") == "0"
    assert root.attrib["aria-label"].startswith("Loss over step: loss from 2 to 1, lowest 1")
    text = ["".join(each.itertext()) for each in stops(drawn)[5].iter("tspan")]
    assert text == ["step 5", "loss 1.5", "other 1.5"]


def test_colours_are_the_pages() -> None:
    drawn = draw_lines(LineChart("Loss", "step", [ramp(colour=2, dash=1)]))
    assert not re.search(r"#[0-9a-f]{3}|rgb|style=|fill=|stroke=", drawn.svg)
    assert 'class="line c2 d1"' in drawn.svg


def test_places_lie_side_by_side_over_the_whole_width() -> None:
    drawn = draw_lines(LineChart("Loss", "step", [ramp(count=500)]))
    hits = [e for e in ElementTree.fromstring(drawn.svg).iter("rect") if e.get("class") == "hit"]
    left = [float(each.attrib["x"]) for each in hits]
    width = [float(each.attrib["width"]) for each in hits]
    assert len(hits) == 48
    np.testing.assert_allclose(np.add(left, width)[:-1], left[1:], atol=0.11)
    assert left[-1] + width[-1] == pytest.approx(WIDTH - 14, abs=0.2)


def test_a_line_goes_through_its_values() -> None:
    drawn = draw_lines(LineChart("Share", "step", [ramp(count=3)], is_share=True))
    path = next(
        e.attrib["d"]
        for e in ElementTree.fromstring(drawn.svg).iter("path")
        if e.get("class") == "line c0 d0"
    )
    points = np.array(re.findall(r"([\d.-]+) ([\d.-]+)", path), float)
    scale = Scale(0, 1, 200, 10)
    np.testing.assert_allclose(points[:, 1], scale([2, 1.5, 1]), atol=0.1)


def test_a_long_run_makes_no_larger_chart() -> None:
    sizes = [
        len(draw_lines(LineChart("L", "step", [ramp(count=n), ramp(count=n, is_faint=True)])).svg)
        for n in (2_000, 200_000)
    ]
    assert sizes[1] < 1.2 * sizes[0] < 60_000


def test_the_envelope_keeps_the_extremes() -> None:
    y = np.zeros(10_000)
    y[[17, 6_001]] = 9, -9
    y[40] = np.nan
    x, thin = thin_envelope(np.arange(len(y)), y, 50)
    assert len(x) <= 100 and (np.diff(x) > 0).all()
    assert set(thin) == {0, 9, -9} and x[thin == 9] == 17


@pytest.mark.parametrize("values", [[np.nan] * 3, [np.nan, 1.0, np.nan], [0.0] * 3, [np.inf, 1, 2]])
def test_values_that_cannot_be_drawn_leave_gaps(values: list[float]) -> None:
    drawn = draw_lines(LineChart("L", "step", [Line("l", np.arange(3), np.array(values))]))
    assert "nan" not in drawn.svg and "inf" not in drawn.svg


def test_names_cannot_break_the_page() -> None:
    name = "<b>&\"'"
    charts = [
        draw_lines(LineChart(name, name, [ramp(name), ramp()])),
        draw_bars(BarChart(name, name, name, [name], np.array([1]))),
        draw_points(PointMap(name, [(name, np.eye(2))])),
    ]
    for drawn in charts:
        assert "<b>" not in drawn.svg
        assert name in ElementTree.fromstring(drawn.svg).attrib["aria-label"]


def test_bars_say_their_counts() -> None:
    counts = np.array([3, 0, 1234])
    drawn = draw_bars(BarChart("By class", "found", "classes", ["0%", "50%", "100%"], counts))
    assert said(drawn) == [
        "found 0%: 3 classes",
        "found 50%: 0 classes",
        "found 100%: 1,234 classes",
    ]
    bars = [e for e in ElementTree.fromstring(drawn.svg).iter("rect") if e.get("class") == "bar c0"]
    heights = [float(each.attrib["height"]) for each in bars]
    assert heights[1] == 0 and heights[0] / heights[2] == pytest.approx(3 / 1234, abs=1e-3)


def test_names_below_bars_do_not_touch() -> None:
    """What has no room is left out below the axis; the bar itself still says it."""
    names = [f"{tenth}0%" for tenth in range(11)]
    drawn = draw_bars(BarChart("By class", "found", "classes", names, np.ones(11, int)))
    texts = [e for e in ElementTree.fromstring(drawn.svg).iter("text") if e.text in names]
    left = [float(each.attrib["x"]) - 3.2 * len(str(each.text)) for each in texts]
    right = [float(each.attrib["x"]) + 3.2 * len(str(each.text)) for each in texts]
    assert [each.text for each in texts] == names[::2]
    assert all(end < begin for end, begin in zip(right[:-1], left[1:], strict=True))
    assert len(said(drawn)) == 11


def test_a_group_of_a_map_says_its_name() -> None:
    groups = [(f"c{n}", np.full((n + 1, 2), float(n))) for n in range(12)]
    drawn = draw_points(PointMap("Map", groups))
    assert said(drawn)[:2] == ["c0: 1 image", "c1: 2 images"]
    marks = [len(e.findall("circle")) for e in stops(drawn)[:5]]
    assert marks == [1, 2, 3, 4, 5]
    assert len(stops(drawn)[5].findall("rect[@class='mark']")) == 6


def test_a_box_stays_inside_and_names_no_more_than_fit() -> None:
    lines = [ramp("x" * 60 + str(n)) for n in range(20)]
    for each in stops(draw_lines(LineChart("L", "step", lines))):
        box = each.find("g[@class='tip']/rect")
        assert box is not None
        assert 0 <= float(box.attrib["x"]) <= WIDTH - float(box.attrib["width"])
        text = ["".join(line.itertext()) for line in each.iter("tspan")]
        assert len(text) == 12 and text[-1] == "and 10 more"
        assert text[1].startswith("xxx") and text[1].endswith(each.attrib["aria-label"][-2:])


def test_a_run_gives_the_charts_that_its_records_allow() -> None:
    records = [{"step": n, "loss": 3 - n / 10, "lr": 0.1} for n in range(10)]
    assert [chart.title for chart in training_charts(records)] == ["Training loss", "Learning rate"]
    assert list(heldout_charts(records, {})) == []
    records[9] |= {"heldout/rank1": 0.25, "heldout/chance": 0.01}
    (chart,) = heldout_charts(records, {})
    assert chart.levels == [("chance of rank-1", 0.01)]
    legend = [name for name, _ in draw_lines(chart).legend]
    assert legend == ["rank-1 25.00%", "chance of rank-1 1.00%"]


def test_a_roc_has_powers_of_ten_below_it() -> None:
    far = np.geomspace(1e-4, 0.1, 31)
    drawn = draw_lines(roc_chart("ROC", {"TAR": (far, np.linspace(0.5, 1, 31))}))
    assert "false accept rate 1e-3: TAR 66.67%" in said(drawn)
    text = [e.text for e in ElementTree.fromstring(drawn.svg).findall("text")]
    assert {"1e-4", "1e-3", "1e-2", "1e-1", "0%", "100%", "false accept rate"} <= set(text)


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("rank1", 0.90264, "90.26%"),
        ("lfw accuracy_interval", [0.99, 1.0], "99.00% to 100.00%"),
        ("tar@far=1e-3_nearest", 0.5, "50.00%"),
        ("few_shot/top1", 0.161, "16.10%"),
        ("threshold", 0.0200001, "0.02"),
        ("probes", 88.0, "88"),
        ("recall@5", 1.0, "100.00%"),
        ("rank1_probes", 7, "7"),
    ],
)
def test_shares_are_percentages(name: str, value: Any, text: str) -> None:
    assert format_figure(name, value) == text


def test_short_numbers() -> None:
    assert [format_power(each) for each in (0.001, 2.5e-4, 1.0)] == ["1e-3", "2.5e-4", "1e0"]
    assert [format_tick(v) for v in (0.0, 0.25, 1500, 20_000, 2.5e6)] == [
        "0",
        "0.25",
        "1,500",
        "20k",
        "2.5M",
    ]


def test_doubted_labels_have_a_chart_in_percent_where_they_are_recorded() -> None:
    records = [{"step": step, "loss": 1.0, "accuracy": 0.5} for step in range(4)]
    assert "Doubted labels" not in [chart.title for chart in training_charts(records)]
    records[3]["doubted"] = 0.125
    chart = next(c for c in training_charts(records) if c.title == "Doubted labels")
    assert chart.is_share and said(draw_lines(chart)) == ["step 3: images 12.50%"]


def test_a_histogram_has_a_threshold_a_logarithmic_axis_and_numbers_that_are_not_whole() -> None:
    counts = np.array([1000, 10, 0, 1])
    drawn = draw_histogram(Histogram("All", "margin", "images", np.arange(5) / 4, counts, 0.5))
    assert said(drawn) == [
        "0 to 0.25: 1,000 images",
        "0.25 to 0.5: 10 images",
        "0.75 to 1: 1 images",
    ]
    bars = [
        e for e in ElementTree.fromstring(drawn.svg).iter("rect") if "bar" in e.get("class", "")
    ]
    assert [bar.get("class") for bar in bars] == ["bar c0", "bar c0", "bar c1"]
    tall, middle, low = (float(bar.attrib["height"]) for bar in bars)
    # Two powers of ten, and one.
    assert (tall - middle) / (middle - low) == pytest.approx(2, abs=0.05)
    texts = ["".join(e.itertext()) for e in ElementTree.fromstring(drawn.svg).iter("text")]
    assert {"threshold 0.5", "1,000", "10", "0.6"} <= set(texts)


def test_a_threshold_beyond_all_counts_is_drawn_and_none_is_left_out() -> None:
    counts = np.array([3, 2])
    drawn = draw_histogram(Histogram("All", "margin", "images", np.arange(3.0), counts, 5.0))
    line = next(
        e for e in ElementTree.fromstring(drawn.svg).iter("path") if e.get("class") == "threshold"
    )
    assert 0 < float(re.findall(r"M([\d.]+)", line.attrib["d"])[0]) <= WIDTH
    assert "threshold" not in draw_histogram(Histogram("All", "x", "i", np.arange(3.0), counts)).svg
