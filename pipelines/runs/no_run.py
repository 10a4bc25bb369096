"""What a path is that was given for a run and is none, and what to type instead."""

from __future__ import annotations

import shlex

from mhe_dist.config.load import load_config
from mhe_dist.config.shipped import find_config
from mhe_dist.errors import UserError
from pipelines.shards.index import index_exists
from pipelines.storage.urls import list_folder, resolve_url

RUN_CONFIG, CHECKPOINTS = "config.yaml", "checkpoints"
_LEVELS = 4  # a file of an exported model lies so deep in its run
_LOOKED_INTO = 200  # entries of a folder that may hold runs
_NAMED = 8  # of many runs


def describe_what_is_there(given: str, runs_folder: str) -> str:
    """What is at a path that names no run, and the cure; a path that holds nothing has one, too.

    Args:
        given: the path, URL or name.
        runs_folder: where runs are looked for by their names.
    """
    given = given.rstrip("/")
    if run := _run_around(given):
        return f"{given} lies in the run {run}: name that"
    if find_config(given).is_file():
        return _describe_file(given)
    if index_exists(given):
        return f"{given} is a data set: name the run that trained on it"
    for folder in (given, runs_folder):
        if runs := _runs_in(folder):
            more = f" and {len(runs) - _NAMED} more" if len(runs) > _NAMED else ""
            return f"{folder} holds {', '.join(runs[:_NAMED])}{more}: name one as {folder}/NAME"
    return f"name the run's folder, such as {runs_folder}/quickstart"


def _run_around(given: str) -> str:
    """The run that a file or folder of it lies in; empty: there is none."""
    parent = given
    for _ in range(_LEVELS):
        parent = parent.rpartition("/")[0]
        if not parent:
            break
        if _exists(f"{parent}/{RUN_CONFIG}") and _exists(f"{parent}/{CHECKPOINTS}"):
            return parent
    return ""


def _describe_file(given: str) -> str:
    """Of a configuration, the run that is made of it."""
    if find_config(given).suffix not in (".yaml", ".yml"):
        return f"{given} is a file, and a run is a folder: name that"
    try:
        run = load_config(given).run.path
    except UserError:
        return f"{given} is a configuration, and a run is the folder that mhe train makes of it"
    if _exists(f"{run}/{RUN_CONFIG}"):
        return f"{given} is a configuration, and its run is {run}: name that"
    return (
        f"{given} is a configuration whose run does not exist yet: "
        f"mhe train {shlex.quote(given)} makes {run}"
    )


def _runs_in(folder: str) -> list[str]:
    """The names of runs that lie in a folder."""
    names = (path.rpartition("/")[2] for path in list_folder(folder)[:_LOOKED_INTO])
    return [name for name in names if _exists(f"{folder}/{name}/{RUN_CONFIG}")]


def _exists(url: str) -> bool:
    filesystem, path = resolve_url(url)
    return bool(filesystem.exists(path))
