"""The folder of a checkpoint by its name: its step, and what lies beside one that is not there."""

from __future__ import annotations

import re

import fsspec

_NAME = re.compile(r"step_(\d+)")
MANIFEST = "manifest.json"  # written last: where it is, the checkpoint is complete
_NAMED = 8  # of many checkpoints, the newest ones


def step_of(url: str) -> int | None:
    """The step of a `step_*` folder by its name; None: it is the name of something else."""
    found = _NAME.fullmatch(url.rstrip("/").rpartition("/")[2])
    return int(found[1]) if found else None


def describe_missing_step(url: str) -> str:
    """What to say of a `step_*` folder that does not exist; empty: it does, or `url` names none."""
    filesystem, path = fsspec.core.url_to_fs(url)
    if step_of(url) is None or filesystem.exists(path):
        return ""
    return f"{url}: there is no such checkpoint; {describe_siblings(url)}"


def describe_siblings(url: str) -> str:
    """The complete checkpoints beside a `step_*` folder, in words."""
    parent = url.rstrip("/").rpartition("/")[0] or "."
    filesystem, path = fsspec.core.url_to_fs(parent)
    try:
        listed = [str(each).rstrip("/") for each in filesystem.ls(path, detail=False)]
    except (FileNotFoundError, NotADirectoryError):
        return f"there is no folder {parent}"
    steps = sorted(
        (step, each.rpartition("/")[2])
        for each in listed
        if (step := step_of(each)) is not None and filesystem.exists(f"{each}/{MANIFEST}")
    )
    if not steps:
        return f"{parent} holds no complete one"
    named = ", ".join(name for _, name in steps[-_NAMED:])
    older = f" and {len(steps) - _NAMED} older ones" if len(steps) > _NAMED else ""
    return f"{parent} holds {named}{older}"
