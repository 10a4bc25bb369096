"""What a run looks like in a terminal or a notebook: a live bar, or a plain line now and then."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.status import Status
from rich.text import Text

from launcher.events import Event
from launcher.terminal import console
from mhe_dist.errors import first_line
from pipelines.report.charts.numbers import format_share

PLAIN_EVERY_S = 20.0


class ProgressDisplay:
    """Draws the events of a run, as a context manager around it.

    Attributes:
        summary: what the run achieved, once it has ended.
    """

    def __init__(
        self, terminal: Console | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._console = terminal or console.out
        self._clock = clock
        self._is_live = is_live(self._console)
        self._bar = _bar(self._console) if self._is_live else None
        self._spinner: Status | None = None
        self._task: Any = None
        self._steps = 0
        self._begun = (0.0, 0)
        self._next_line = 0.0
        self.summary: dict[str, Any] | None = None

    def __enter__(self) -> ProgressDisplay:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop_waiting()
        if self._bar:
            self._bar.stop()

    def waiting(self, what: str) -> None:
        """Show that something goes on, until the next event; beside a bar, in a line of its own."""
        self._stop_waiting()
        if self._is_live and not (self._bar and self._bar.live.is_started):
            self._spinner = self._console.status(Text(what))
            self._spinner.start()
        else:
            self._say(escape(what))

    @contextmanager
    def counting(self, what: str) -> Iterator[Callable[[int, int], None]]:
        """A bar for work that is not a run; it appears with the first `progress(done, total)`.

        Where no bar can be drawn, a line says what is done, now and then.
        """
        self._stop_waiting()
        if not self._is_live:
            yield self._say_now_and_then(escape(what))
            return
        name = TextColumn("{task.description}", markup=False)
        columns = (name, BarColumn(bar_width=24), TimeRemainingColumn(compact=True))
        with _progress(self._console, *columns) as bar:
            task = bar.add_task(what, visible=False)
            yield lambda done, total: bar.update(task, completed=done, total=total, visible=True)

    def _say_now_and_then(self, what: str) -> Callable[[int, int], None]:
        next_line = -math.inf

        def _progress(done: int, total: int) -> None:
            nonlocal next_line
            if self._clock() < next_line:
                return
            self._say(f"{what}: {done:,} of {total:,}" if math.isfinite(next_line) else what)
            next_line = self._clock() + PLAIN_EVERY_S

        return _progress

    def handle(self, event: Event) -> None:
        """Draw one event (the kinds are those of `pipelines.pretrain.main`)."""
        self._stop_waiting()
        draw = {
            "dashboard": lambda event: self._say(f"Ray's dashboard: {event['link']}"),
            "start": self._start,
            "lock_taken_over": self._lock_taken_over,
            "settings_changed": self._settings_changed,
            "metrics": self._metrics,
            "bad_samples": self._bad_samples,
            "evaluation": self._evaluation,
            "checkpoint": self._checkpoint,
            "checkpoint_failed": self._checkpoint_failed,
            "preempted": self._preempted,
            "diverged": self._diverged,
            "export": self._export,
            "warning": self._warning,
            "failed": self._failed,
            "end": self._end,
            "waiting": lambda event: self.waiting(event["what"]),
            "stopping": lambda event: self.waiting("saving, then stopping"),
            "nodes": lambda event: self._say(f"{len(event['nodes']):,} nodes have answered."),
            "trial": self._trial,
        }
        draw.get(event["event"], self._unknown)(event)

    def _start(self, event: Event) -> None:
        if event["resumed_from"]:
            source = escape(event["resumed_from"])
            self._say(f"[green]Resumed[/] at step {event['step']:,} from {source}.")
        for name, reason in event.get("passed_over", {}).items():
            self._say(f"[yellow]Passed over[/] checkpoint {escape(name)}: {escape(reason)}")
        images, classes = event["samples"], event["classes"]
        self._say(f"{images:,} images of {classes:,} classes, {event['steps']:,} steps.")
        self._steps, self._begun = event["steps"], (self._clock(), event["step"])
        self._next_line = 0.0
        if self._bar and self._task is None:
            self._task = self._bar.add_task("", total=event["steps"], numbers="")
            self._bar.start()
        self._advance(event["step"], "")

    def _lock_taken_over(self, event: Event) -> None:
        self._say(
            f"[yellow]Took over[/] the lock of {escape(event['holder'])}, which ended without "
            "giving it back."
        )

    def _settings_changed(self, event: Event) -> None:
        for key, (before, now) in event["changes"].items():
            change = escape(f"{key}: {before} before, {now} now")
            self._say(f"[yellow]Changed[/] from step {event['step']:,} on: {change}")

    def _metrics(self, event: Event) -> None:
        step = event["step"] + 1  # counted from 0
        numbers = (
            f"loss {event['loss']:.3f}  {event['images_per_s']:,.0f} images/s  "
            f"{event['data_wait']:.0%} waiting for data"
        )
        self._advance(step, numbers)
        if self._bar is None and self._clock() >= self._next_line:
            self._next_line = self._clock() + PLAIN_EVERY_S
            self._say(f"step {step:,}/{self._steps:,}  {numbers}  {self._remaining(step)}")

    def _advance(self, step: int, numbers: str) -> None:
        if self._bar:
            self._bar.update(self._task, completed=step, numbers=numbers)

    def _remaining(self, step: int) -> str:
        since, first = self._begun
        seconds = (self._clock() - since) / (step - first) * (self._steps - step)
        return f"{format_duration(seconds)} left"

    def _evaluation(self, event: Event) -> None:
        figures = [escape(f"{name} {value}") for name, value in accuracy_rows(event)]
        self._say(_break_between(f"step {event['step']:,}  held-out: ", figures, self._console))

    def _bad_samples(self, event: Event) -> None:
        count = f"{event['count']:,} bad samples so far, replaced by others"
        self._say(f"[yellow]step {event['step']:,}  {count}[/]")

    def _checkpoint(self, event: Event) -> None:
        self._say(f"[dim]step {event['step']:,}  checkpoint {escape(str(event['path']))}[/]")

    def _checkpoint_failed(self, event: Event) -> None:
        self._say(
            f"[bold red]step {event['step']:,}  no checkpoint:[/] {escape(event['message'])}; "
            "training goes on, the last good one stands"
        )

    def _diverged(self, event: Event) -> None:
        self._say(
            f"[bold red]step {event['step']:,}  {escape(event['what'])};[/] "
            f"step, samples, norms and batch are in {escape(event['bundle'])}"
        )

    def _export(self, event: Event) -> None:
        self._say(
            f"[dim]exported {event['format']} to {escape(str(event['path']))}; largest difference "
            f"from the trained model {event['max_difference']:.1e}[/]"
        )

    def _warning(self, event: Event) -> None:
        self._say(f"[yellow]step {event['step']:,}  warning:[/] {escape(event['message'])}")

    def _failed(self, event: Event) -> None:
        said = first_line(event["message"])[:200]
        self._say(f"[yellow]Worker {event['rank']} failed:[/] {escape(said)}")

    def _preempted(self, event: Event) -> None:
        self._say(f"[yellow]Worker {event['rank']}:[/] {escape(event['message'])}")

    def _trial(self, event: Event) -> None:
        measured = event["measured"]
        workers = f"{measured['workers']:,} workers have tried some steps." if measured else ""
        self._say(workers or "No trial: the data set is made when the run begins.")

    def _unknown(self, event: Event) -> None:
        """An event of another version of mhe, whose log this one reads."""
        self._say(escape(json.dumps(event, default=str)))

    def _end(self, event: Event) -> None:
        self.summary = event["summary"]
        if self._bar:
            self._bar.stop()

    def _say(self, text: str) -> None:
        self._console.print(text, soft_wrap=True)

    def _stop_waiting(self) -> None:
        if self._spinner:
            self._spinner.stop()
            self._spinner = None


def is_live(terminal: Console) -> bool:
    """Whether bars can be drawn and redrawn: in a terminal, or in a notebook with ipywidgets."""
    return terminal.is_terminal or (terminal.is_jupyter and find_spec("ipywidgets") is not None)


def _break_between(begin: str, figures: list[str], terminal: Console) -> str:
    """A list after its beginning; lines that a terminal would break end between two figures.

    A file gets one line, whatever its length, so that it can be searched.
    """
    lines = [begin]
    for number, figure in enumerate(figures):
        word = figure + ("," if number < len(figures) - 1 else "")
        space = " " if number and lines[-1].strip() else ""
        if terminal.is_terminal and len(lines[-1] + space + word) > terminal.width and number:
            lines.append("    ")
            space = ""
        lines[-1] += space + word
    return "\n".join(lines)


def announce_once(say: Callable[[str], None], what: str) -> Callable[[int, int], None]:
    """A progress callback that says once what is going on."""
    announced = False

    def _announce(done: int, total: int) -> None:
        nonlocal announced
        if not announced:
            say(what)
        announced = True

    return _announce


def _bar(terminal: Console) -> Progress:
    return _progress(
        terminal,
        TextColumn("training"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[numbers]}"),
        TimeRemainingColumn(compact=True),
    )


def _progress(terminal: Console, *columns: ProgressColumn) -> Progress:
    """A bar that leaves stdout and stderr alone: they are redirected while it lives."""
    return Progress(*columns, console=terminal, redirect_stdout=False, redirect_stderr=False)


def format_duration(seconds: float) -> str:
    """`seconds` as a person says it: 42 s, 3 min 05 s, 2 h 10 min."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"


def accuracy_rows(heldout: dict[str, Any]) -> list[tuple[str, str]]:
    """The held-out figures that matter as `(name, value)`, chance beside rank-1."""
    rows = []
    if "rank1" in heldout:
        chance = format_share(heldout["chance"])
        rows.append(("rank-1", f"{format_share(heldout['rank1'])} (chance {chance})"))
        rows.append(("verification", format_share(heldout["accuracy"])))
    rows += [(k.upper(), format_share(v)) for k, v in heldout.items() if k.startswith("tar@")]
    for key, value in heldout.items():
        if key.endswith("/rank1"):
            name = key.removesuffix("/rank1")
            rows.append((f"{name}: rank-1", format_share(value)))
            if (smallest := f"{name}/tar@far=1e-4") in heldout:
                rows.append((f"{name}: TAR@FAR=1E-4", format_share(heldout[smallest])))
    for k in (1, 5):
        if (key := f"classification/top{k}") in heldout:
            rows.append((f"top-{k} of the training classes", format_share(heldout[key])))
    for figure in ("p@1", "p@5", "psp@5"):
        if (key := f"labels/{figure}") in heldout:
            rows.append((f"labels: {figure.upper()}", format_share(heldout[key])))
    sets = [key for key in heldout if key.endswith("/accuracy")]
    return rows + [(key.removesuffix("/accuracy"), format_share(heldout[key])) for key in sets]
