"""The folder of a checkpoint by its name: its step, and what lies beside one that is not there."""

from __future__ import annotations

import re

import fsspec

from mhe_dist.storage_errors import ABSENT
from mhe_dist.storage_retry import path_exists, until_answered

_NAME = re.compile(r"step_(\d+)")
MANIFEST = "manifest.json"  # written last: where it is, the checkpoint is complete
_NAMED = 8  # of many checkpoints, the newest ones


def step_of(url: str) -> int | None:
    """The step of a `step_*` folder by its name; None: it is the name of something else."""
    found = _NAME.fullmatch(url.rstrip("/").rpartition("/")[2])
    return int(found[1]) if found else None


def folder_of_step(step: int) -> str:
    """The name of the folder that a store gives to the checkpoint of a step."""
    return f"step_{step:08d}"


def list_steps(root: str) -> list[int]:
    """Steps of all folders of checkpoints at a path or URL, complete or not, newest first.

    Raises:
        StorageUnavailable, UserError: see `until_answered`; that there are none is an answer.
    """
    filesystem, path = fsspec.core.url_to_fs(root)
    filesystem.invalidate_cache()
    try:
        listed = until_answered(lambda: filesystem.ls(path, detail=False), root)
    except ABSENT:
        return []
    names = {str(each).rstrip("/").rpartition("/")[2] for each in listed}
    steps = {step for name in names if (step := step_of(name)) is not None}
    return sorted((step for step in steps if folder_of_step(step) in names), reverse=True)


def describe_missing_step(url: str) -> str:
    """What to say of a `step_*` folder that does not exist; empty: it does, or `url` names none.

    Raises:
        StorageUnavailable, UserError: see `until_answered`.
    """
    filesystem, path = fsspec.core.url_to_fs(url)
    if step_of(url) is None or path_exists(filesystem, path):
        return ""
    return f"{url}: there is no such checkpoint; {describe_siblings(url)}"


def describe_siblings(url: str) -> str:
    """The complete checkpoints beside a `step_*` folder, in words."""
    parent = url.rstrip("/").rpartition("/")[0] or "."
    filesystem, path = fsspec.core.url_to_fs(parent)
    try:
        listed = until_answered(lambda: filesystem.ls(path, detail=False), parent)
    except ABSENT:
        return f"there is no folder {parent}"
    steps = sorted(
        (step, each.rpartition("/")[2])
        for each in (str(name).rstrip("/") for name in listed)
        if (step := step_of(each)) is not None and path_exists(filesystem, f"{each}/{MANIFEST}")
    )
    if not steps:
        return f"{parent} holds no complete one"
    named = ", ".join(name for _, name in steps[-_NAMED:])
    older = f" and {len(steps) - _NAMED} older ones" if len(steps) > _NAMED else ""
    return f"{parent} holds {named}{older}"
