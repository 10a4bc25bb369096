"""What this process may use of the machine, and has used: containers get a part of it.

Linux keeps the limits of a container in control groups, of version 2 or 1; a process is in a group,
and those above it hold, too. A group's folder may be out of sight from within: then the container
sees its own group at the top.
"""

from __future__ import annotations

import math
import os
import resource
from collections.abc import Iterator
from pathlib import Path

import psutil

GROUPS, MEMBERSHIP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def available_memory(groups: Path = GROUPS, membership: Path = MEMBERSHIP) -> int:
    """Bytes that can still be taken, what would be swapped or dropped from caches included.

    Args:
        groups: folder of the control groups.
        membership: file that says in which ones this process is.
    """
    free: int = psutil.virtual_memory().available
    names = (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    )
    for folder in _folders("memory", groups, membership):
        for limit_file, used_file, dropped in names:
            limit, used = _number(folder / limit_file), _number(folder / used_file)
            if limit is not None and used is not None:
                cached = _fields(folder / "memory.stat").get(dropped, 0)
                free = min(free, limit - used + cached)
    return max(0, free)


def available_cores(groups: Path = GROUPS, membership: Path = MEMBERSHIP) -> int:
    """Cores that this process may keep busy, at least 1: those it is bound to, or its quota.

    Args:
        groups: folder of the control groups.
        membership: file that says in which ones this process is.
    """
    bound = hasattr(os, "sched_getaffinity")  # not on macOS
    cores = len(os.sched_getaffinity(0)) if bound else os.cpu_count() or 1
    for folder in _folders("cpu", groups, membership):
        quota, _, period = _text(folder / "cpu.max").partition(" ")
        if not period:
            quota, period = (_text(folder / f"cpu.cfs_{name}_us") for name in ("quota", "period"))
        if quota.isdecimal() and period.isdecimal():  # no quota is "max", or -1
            cores = min(cores, max(1, math.ceil(int(quota) / int(period))))
    return cores


def peak_memory() -> int:
    """The most bytes that this process has had in memory."""
    for line in _text(Path("/proc/self/status")).splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    # Elsewhere than on Linux, where it begins with the peak of the process that started this one.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _folders(controller: str, groups: Path, membership: Path) -> Iterator[Path]:
    """Folders of the groups that hold for this process, the nearest first."""
    for line in _text(membership).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        top = groups / controller if controllers else groups
        own = top / path.lstrip("/")
        yield from (folder for folder in (own, *own.parents) if folder.is_relative_to(top))


def _number(path: Path) -> int | None:
    text = _text(path)
    return int(text) if text.isdecimal() else None


def _fields(path: Path) -> dict[str, int]:
    """A file of lines of a name and a number."""
    pairs = (line.split() for line in _text(path).splitlines())
    return {name: int(value) for name, value in pairs}


def _text(path: Path) -> str:
    """What a file holds; nothing where it is missing or may not be read."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""
