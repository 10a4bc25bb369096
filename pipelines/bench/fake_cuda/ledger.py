"""What happened on the fake device, with the line of this project that caused it."""

from __future__ import annotations

import sys
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

Kind = Literal["kernel", "sync", "staged"]
HERE: Final = str(Path(__file__).parent)
ROOT: Final = str(Path(__file__).parents[3])
ROOMS: Final = tuple(f"{ROOT}/{name}/" for name in ("mhe_dist", "pipelines", "launcher", "tests"))
LIBRARY: Final = "deepspeed"
WRAPPERS: Final = {"cuda_accelerator", "nvtx"}  # its files that only hand a call on


@dataclass(frozen=True)
class DeviceEvent:
    """One thing that happened.

    Attributes:
        kind: `kernel`, one launch; `sync`, the host waits for the device; `staged`, a copy from
            pageable memory so small that the driver takes it at once.
        op: the operation.
        line: file and line of the innermost function of this project.
        read, written: bytes that a kernel moves in the device's memory.
        flops: of a matrix product or a convolution.
        detail: what makes the host wait.
        library: the function of DeepSpeed that makes it wait; empty: one of this project does.
    """

    kind: Kind
    op: str
    line: str
    read: int = 0
    written: int = 0
    flops: int = 0
    detail: str = ""
    library: str = ""


class Ledger:
    """The events since the last `clear`."""

    def __init__(self) -> None:
        self.events: list[DeviceEvent] = []

    def add(
        self,
        kind: Kind,
        op: str,
        *,
        read: int = 0,
        written: int = 0,
        flops: int = 0,
        detail: str = "",
    ) -> None:
        """Note an event of the line that runs now."""
        name = op.removeprefix("aten.").removesuffix(".default")
        library = _library_function() if kind == "sync" else ""
        self.events.append(
            DeviceEvent(kind, name, _calling_line(), read, written, flops, detail, library)
        )

    def clear(self) -> None:
        """Forget all events."""
        self.events.clear()

    def of(self, kind: Kind) -> list[DeviceEvent]:
        """The events of a kind."""
        return [event for event in self.events if event.kind == kind]

    @property
    def moved(self) -> int:
        """Bytes that the kernels read and write."""
        return sum(event.read + event.written for event in self.events)

    @property
    def flops(self) -> int:
        """Floating-point operations of matrix products and convolutions."""
        return sum(event.flops for event in self.events)

    def waits(self) -> str:
        """A line of text for each line of code that makes the host wait."""
        found = Counter((e.line, e.library, e.op, e.detail) for e in self.of("sync"))
        return "\n".join(
            f"{count:5d} x {line}: {library} {op} {detail}"
            for (line, library, op, detail), count in found.most_common()
        )

    def heaviest(self, limit: int = 15) -> str:
        """A line of text for each of the lines of code whose kernels move the most bytes."""
        sums: dict[str, list[int]] = defaultdict(lambda: [0, 0])
        for event in self.of("kernel"):
            sums[event.line][0] += event.read + event.written
            sums[event.line][1] += 1
        rows = sorted(sums.items(), key=lambda item: -item[1][0])[:limit]
        return "\n".join(
            f"{moved / 1e6:9.1f} MB {count:5d} launches  {line}" for line, (moved, count) in rows
        )


def _calling_line() -> str:
    frame = sys._getframe(2)
    while frame is not None:
        name = frame.f_code.co_filename
        if _is_ours(name):
            return f"{name.removeprefix(ROOT + '/')}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return "(autograd)"


def _library_function() -> str:
    """`stage3.step`: the module and function of DeepSpeed inside the innermost line of ours."""
    frame = sys._getframe(2)
    while frame is not None and not _is_ours(frame.f_code.co_filename):
        path = Path(frame.f_code.co_filename)
        if LIBRARY in path.parts and path.stem not in WRAPPERS:
            return f"{path.stem}.{frame.f_code.co_name}"
        frame = frame.f_back  # type: ignore[assignment]
    return ""


def _is_ours(filename: str) -> bool:
    return filename.startswith(ROOMS) and not filename.startswith(HERE)
