"""What the sections of `make gpu` found: figures, checks that hold or do not, and their table."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch

from mhe_dist.atomic_file import write_file
from mhe_dist.errors import describe_error

NAME_WIDTH = 60  # of a figure's name


@dataclass(frozen=True)
class GpuSettings:
    """How to measure.

    Attributes:
        device: "cuda", or "cpu" where the command tests itself.
        small: sizes of a self-test instead of those that a GPU answers in minutes.
        folder: of files that the section writes.
    """

    device: str
    small: bool
    folder: Path

    @property
    def torch_device(self) -> torch.device:
        """The one device that is looked at."""
        return torch.device("cuda", 0) if self.on_gpu else torch.device("cpu")

    @property
    def on_gpu(self) -> bool:
        """Whether a GPU is looked at."""
        return self.device == "cuda"


class GpuFigure(NamedTuple):
    """Something measured: its name, the number, and the unit."""

    name: str
    value: float | str
    unit: str = ""


class GpuCheck(NamedTuple):
    """Something that must hold.

    Attributes:
        name: what.
        passed: whether it does; None: it could not be tried here, and `detail` says why.
        detail: what was seen.
    """

    name: str
    passed: bool | None
    detail: str = ""


@dataclass
class GpuFindings:
    """Of one section.

    Attributes:
        figures, checks: in their order.
        seconds: that the section took.
        complete: whether it went through to its end.
        file: written anew after each of them, so that a process that dies leaves what it found.
    """

    figures: list[GpuFigure] = field(default_factory=list)
    checks: list[GpuCheck] = field(default_factory=list)
    seconds: float = 0.0
    complete: bool = False
    file: Path | None = None

    def figure(self, name: str, value: float | str, unit: str = "") -> None:
        """Note a figure."""
        self.figures.append(GpuFigure(name, value, unit))
        self.save()

    def check(self, name: str, passed: bool, detail: str = "") -> None:
        """Note whether something holds."""
        self.checks.append(GpuCheck(name, passed, detail))
        self.save()

    def leave_out(self, name: str, why: str) -> None:
        """Note that something could not be tried here."""
        self.checks.append(GpuCheck(name, None, why))
        self.save()

    @contextmanager
    def attempt(self, name: str) -> Iterator[None]:
        """Let an error inside be a failed check of that name; the section goes on."""
        try:
            yield
        except Exception as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{Path(frame.filename).name}:{frame.lineno}"
            self.check(name, False, f"{describe_error(error)} ({where})")

    @property
    def failed(self) -> list[GpuCheck]:
        """The checks that do not hold."""
        return [check for check in self.checks if check.passed is False]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "complete": self.complete,
            "seconds": round(self.seconds, 2),
            "figures": [figure._asdict() for figure in self.figures],
            "checks": [check._asdict() for check in self.checks],
        }

    def save(self) -> None:
        """Write to the file."""
        if self.file is not None:
            write_file(str(self.file), json.dumps(self.as_dict(), indent=1) + "\n")

    @staticmethod
    def load(file: Path) -> GpuFindings:
        """Read what `save` wrote; nothing if the process died before."""
        if not file.exists():
            return GpuFindings()
        values = json.loads(file.read_text(encoding="utf-8"))
        figures = [GpuFigure(**figure) for figure in values["figures"]]
        checks = [GpuCheck(**check) for check in values["checks"]]
        return GpuFindings(figures, checks, values["seconds"], values["complete"])


def seconds_of(settings: GpuSettings, call: Callable[[], object], repeats: int = 20) -> float:
    """Median seconds of a call on the device, after two that warm it up."""
    times = []
    for number in range(repeats + 2):
        begin = now(settings)
        call()
        if number >= 2:
            times.append(now(settings) - begin)
    return median(times)


def now(settings: GpuSettings) -> float:
    """The clock, once the device has done its work."""
    if settings.on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter()


def gpu_table(sections: dict[str, GpuFindings]) -> str:
    """Figures of each section, what failed or was left out, and a line for each section."""
    lines: list[str] = []
    for name, found in sections.items():
        lines += [name, *_figure_lines(found), *_trouble_lines(found), ""]
    lines += [_summary_line(name, found) for name, found in sections.items()]
    return "\n".join(lines) + "\n"


def write_gpu_json(sections: dict[str, GpuFindings], file: Path) -> None:
    """Everything, as JSON."""
    found = {name: section.as_dict() for name, section in sections.items()}
    file.write_text(json.dumps({"sections": found}, indent=1) + "\n", encoding="utf-8")


def all_hold(sections: dict[str, GpuFindings]) -> bool:
    """Whether no check failed and every section went to its end."""
    return all(found.complete and not found.failed for found in sections.values())


def _figure_lines(found: GpuFindings) -> Iterator[str]:
    for figure in found.figures:
        yield f"  {figure.name:{NAME_WIDTH}} {_number(figure):>14} {figure.unit}".rstrip()


def _number(figure: GpuFigure) -> str:
    value = figure.value
    if isinstance(value, str):
        return value
    if value == 0 or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.1e}" if abs(value) < 0.001 else f"{value:.3g}"


def _trouble_lines(found: GpuFindings) -> Iterator[str]:
    for check in found.checks:
        if check.passed is not True:
            word = "FAILED" if check.passed is False else "not tried"
            yield f"  {word}: {check.name}: {check.detail}"


def _summary_line(name: str, found: GpuFindings) -> str:
    counts = [sum(check.passed is kind for check in found.checks) for kind in (True, False, None)]
    end = "" if found.complete else ", DID NOT REACH ITS END"
    held, failed, left_out = counts
    return (
        f"{name:10} {held:3} hold, {failed} failed, {left_out} not tried, "
        f"{found.seconds:.0f} s{end}"
    )
