"""What a run looks like where output is not a terminal, and the words of both looks."""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.file_proxy import FileProxy
from rich.live import Live

import launcher
from launcher.terminal.event_log import EventLogWriter
from launcher.terminal.progress import (
    PLAIN_EVERY_S,
    ProgressDisplay,
    accuracy_rows,
    format_duration,
)
from launcher.terminal.replay import replay_log

START = {
    **{"event": "start", "run": "runs/a", "step": 0, "steps": 1000, "resumed_from": None},
    **{"classes": 4000, "samples": 37000},
}
HELDOUT = {"rank1": 0.85, "chance": 0.002, "accuracy": 0.97, "tar@far=1e-3": 0.5, "probes": 9.0}


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def plain(clock: Clock, *events: tuple[float, dict[str, Any]]) -> list[str]:
    """Lines printed for `(seconds since the last event, event)` rows."""
    file = io.StringIO()
    with ProgressDisplay(Console(file=file, width=200), clock) as display:
        for seconds, event in events:
            clock.now += seconds
            display.handle(event)
    return file.getvalue().splitlines()


def metrics(step: int) -> dict[str, Any]:
    return {
        "event": "metrics",
        "step": step,
        "loss": 2.5,
        "images_per_s": 1234.0,
        "data_wait": 0.03,
    }


def test_a_warning_is_told(clock: Clock) -> None:
    warning = {"event": "warning", "step": 1200, "message": "[x] the loss is 0"}
    assert plain(clock, (0, warning)) == ["step 1,200  warning: [x] the loss is 0"]


def test_the_size_of_the_job_is_told(clock: Clock) -> None:
    assert plain(clock, (0, START)) == ["37,000 images of 4,000 classes, 1,000 steps."]


def test_a_resume_is_told_with_its_checkpoint(clock: Clock) -> None:
    lines = plain(clock, (0, {**START, "step": 500, "resumed_from": "runs/a/checkpoints/step_5"}))
    assert lines[0] == "Resumed at step 500 from runs/a/checkpoints/step_5."


def test_plain_lines_come_now_and_then_with_the_time_that_is_left(clock: Clock) -> None:
    lines = plain(
        clock,
        (0, START),
        (10, metrics(99)),
        (PLAIN_EVERY_S - 1, metrics(199)),
        (1, metrics(299)),
    )
    assert lines[1:] == [
        "step 100/1,000  loss 2.500  1,234 images/s  3% waiting for data  1 min 30 s left",
        "step 300/1,000  loss 2.500  1,234 images/s  3% waiting for data  1 min 10 s left",
    ]


def test_time_left_counts_from_the_resume(clock: Clock) -> None:
    lines = plain(clock, (0, {**START, "step": 800, "resumed_from": "x"}), (10, metrics(899)))
    assert lines[-1].endswith("10 s left")


def test_evaluations_checkpoints_and_failures_have_their_lines(clock: Clock) -> None:
    lines = plain(
        clock,
        (0, {"event": "evaluation", "step": 200, **HELDOUT}),
        (0, {"event": "checkpoint", "step": 200, "path": "runs/[a]", "seconds": 1.0}),
        (0, {"event": "export", "format": "onnx", "path": "b.onnx", "max_difference": 1e-6}),
        (0, {"event": "failed", "rank": 1, "message": "lost\nand long"}),
    )
    assert lines == [
        "step 200  held-out: rank-1 85.00% (chance 0.20%), verification 97.00%, "
        "TAR@FAR=1E-3 50.00%",
        "step 200  checkpoint runs/[a]",
        "exported onnx to b.onnx; largest difference from the trained model 1.0e-06",
        "Worker 1 failed: lost",
    ]


def test_the_summary_is_kept(clock: Clock) -> None:
    display = ProgressDisplay(Console(file=io.StringIO()), clock)
    display.handle({"event": "end", "summary": {"steps": 3}})
    assert display.summary == {"steps": 3}


def test_a_terminal_gets_a_bar(clock: Clock) -> None:
    file = io.StringIO()
    with ProgressDisplay(Console(file=file, force_terminal=True, width=120), clock) as display:
        display.waiting("starting")
        for event in (START, metrics(9), {"event": "end", "summary": {}}):
            display.handle(event)
    assert "10/1000" in file.getvalue()
    assert "loss 2.500" in file.getvalue()


def test_counting_says_plainly_and_once_what_it_does(clock: Clock) -> None:
    file = io.StringIO()
    with ProgressDisplay(Console(file=file), clock).counting("drawing") as progress:
        progress(1, 2)
        progress(2, 2)
    assert file.getvalue() == "drawing\n"


def test_counting_says_now_and_then_how_far_it_is(clock: Clock) -> None:
    file = io.StringIO()
    with ProgressDisplay(Console(file=file), clock).counting("embedding") as progress:
        for done in range(1, 5):
            progress(done * 500, 2000)
            clock.now += 0.6 * PLAIN_EVERY_S
    assert file.getvalue().splitlines() == ["embedding", "embedding: 1,500 of 2,000"]


def test_counting_nothing_says_nothing(clock: Clock) -> None:
    file = io.StringIO()
    with ProgressDisplay(Console(file=file), clock).counting("drawing"):
        pass
    assert not file.getvalue()


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.4, "0 s"), (59.4, "59 s"), (60, "1 min 00 s"), (185, "3 min 05 s"), (7800, "2 h 10 min")],
)
def test_durations(seconds: float, words: str) -> None:
    assert format_duration(seconds) == words


def test_accuracies_leave_out_sizes() -> None:
    assert [name for name, _ in accuracy_rows(HELDOUT)] == [
        "rank-1",
        "verification",
        "TAR@FAR=1E-3",
    ]


def test_accuracies_name_the_typefaces() -> None:
    brush = {"brush/rank1": 0.6, "brush/tar@far=1e-3": 0.5, "brush/tar@far=1e-4": 0.4}
    assert accuracy_rows(HELDOUT | brush)[3:] == [
        ("brush: rank-1", "60.00%"),
        ("brush: TAR@FAR=1E-4", "40.00%"),
    ]


def test_a_run_with_several_labels_says_how_well_it_finds_them() -> None:
    found = {"labels/p@1": 0.7, "labels/p@3": 0.5, "labels/psp@5": 0.4, "labels/frequent/p@1": 0.1}
    assert accuracy_rows(found) == [("labels: P@1", "70.00%"), ("labels: PSP@5", "40.00%")]


def test_a_second_wait_takes_the_place_of_the_first(clock: Clock) -> None:
    terminal = Console(file=io.StringIO(), force_terminal=True)
    stdout, stderr = sys.stdout, sys.stderr
    with ProgressDisplay(terminal, clock) as display:
        display.waiting("waiting for a lock")
        display.waiting("starting Ray")
        with display.counting("drawing") as progress:
            progress(1, 2)
        display.waiting("starting Ray again")
    assert (sys.stdout, sys.stderr) == (stdout, stderr)
    with Live(console=terminal):  # beside another it would be refused, or redirect nothing
        assert isinstance(sys.stdout, FileProxy)


def test_a_wait_beside_a_bar_is_a_line(clock: Clock) -> None:
    """Early versions of rich, 13.8 among them, refuse a spinner while a bar is drawn."""
    file = io.StringIO()
    with ProgressDisplay(Console(file=file, force_terminal=True, width=120), clock) as display:
        for event in (START, {"event": "stopping"}):
            display.handle(event)
        assert display._spinner is None
    assert "saving, then stopping\n" in file.getvalue()


@pytest.mark.parametrize("live", [True, False])
@pytest.mark.parametrize("name", ["photos [old]", "x[/y]", "[bold]", "{braces}", "a\\"])
def test_names_are_shown_as_they_are(name: str, live: bool, clock: Clock) -> None:
    file = io.StringIO()
    terminal = Console(file=file, force_terminal=live, width=120, color_system=None)
    with ProgressDisplay(terminal, clock) as display:
        display.waiting(f"waiting for {name}")
        with display.counting(f"embedding {name}") as progress:
            progress(1, 2)
    assert f"waiting for {name}" in file.getvalue()
    assert f"embedding {name}" in file.getvalue()


EVENTS: list[dict[str, Any]] = [
    {"event": "dashboard", "link": "http://127.0.0.1:8265"},
    {"event": "waiting", "what": "starting Ray"},
    {"event": "lock_taken_over", "run": "runs/a", "holder": "process 7 on host"},
    START,
    {"event": "settings_changed", "step": 7, "changes": {"optim.lr": (0.1, 0.2)}},
    metrics(9),
    {"event": "bad_samples", "step": 9, "count": 2},
    {"event": "evaluation", "step": 9, **HELDOUT},
    {"event": "checkpoint", "step": 9, "path": "runs/a/checkpoints/step_9", "seconds": 1.0},
    {"event": "checkpoint_failed", "step": 9, "message": "disk full"},
    {"event": "warning", "step": 9, "message": "the loss is 0"},
    {"event": "diverged", "step": 9, "what": "the loss is NaN", "bundle": "runs/a/divergence"},
    {"event": "failed", "rank": 1, "message": " "},
    {"event": "preempted", "rank": 1, "message": "saved"},
    {"event": "stopping"},
    {"event": "export", "format": "onnx", "path": "b.onnx", "max_difference": 1e-6},
    {"event": "nodes", "nodes": [{"host": "a"}, {"host": "b"}]},
    {"event": "trial", "measured": {"workers": 2}},
    {"event": "trial", "measured": None},
    {"event": "end", "summary": {"run": "runs/a"}},
]


def test_a_log_is_drawn_whatever_is_in_it(capsys: pytest.CaptureFixture[str]) -> None:
    """Events of every kind, of a later version, without a time, and other lines."""
    sink = io.StringIO()
    for event in EVENTS:
        EventLogWriter(sink).handle(event)
    later = ['{"event": "later", "what": "[x]"}', "a line [/y]"]
    assert replay_log([*sink.getvalue().splitlines(), *later]) == {"run": "runs/a"}
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2:] == later
    expected = "2 nodes have answered.", "2 workers have tried some steps.", "Worker 1 failed: "
    assert set(expected) < set(lines)


def test_no_kind_of_event_is_missing_above() -> None:
    root = Path(launcher.__file__).parents[1]
    files = [file for room in ("launcher", "pipelines") for file in (root / room).rglob("*.py")]
    text = "\n".join(file.read_text(encoding="utf-8") for file in files)
    sent = re.findall(r'{"event": "(\w+)"', text)
    sent += re.findall(r'\.emit\(\s*"(\w+)"', text)
    assert {"nodes", "trial", "checkpoint"} < set(sent)
    assert set(sent) <= {event["event"] for event in EVENTS}
