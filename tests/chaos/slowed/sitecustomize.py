"""Makes a phase of a run last, so that a test meets it: in each process with this in PYTHONPATH.

MHE_TEST_PHASE names the phase; MHE_TEST_MARK a file that appears when it begins, and beside it one
`.ended` with the number of steps that have ended. Python imports a module of this name by itself.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

PHASES = {  # name: module, function in it, seconds longer, from which call on
    "importing": ("torch", "", 1.0, 1),
    "connecting": ("launcher.ray_cluster.ray_internals", "start_local_ray", 0.0, 1),
    "joining": ("launcher.ray_cluster.worker", "train_worker", 3.0, 1),
    "starting": ("pipelines.pretrain.run", "Run.__init__", 2.0, 1),
    "stepping": ("pipelines.pretrain.run", "Run._after_step", 0.1, 3),
    "saving": ("mhe_dist.checkpoint.store", "CheckpointStore._write", 1.0, 1),
    "evaluating": ("mhe_dist.engine.engine", "Engine.embed", 1.0, 1),
    "exporting": ("pipelines.pretrain.finish", "write_format", 4.0, 1),
}
COUNTED = ("pipelines.pretrain.run", "Run._after_step")


def slow(module: ModuleType, name: str, seconds: float, first: int) -> None:
    """Let a function of a module say that it is called, and take longer."""
    *names, last = name.split(".")
    owner = functools.reduce(getattr, names, module)
    function, calls = getattr(owner, last), 0

    @functools.wraps(function)
    def slowed(*arguments: Any, **keywords: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls >= first:
            mark()
            time.sleep(seconds)
        return function(*arguments, **keywords)

    setattr(owner, last, slowed)


def count(module: ModuleType) -> None:
    """Let every step that has ended be written down."""
    function = module.Run._after_step

    def counted(run: Any, info: Any, faults: Any) -> None:
        if run.topology.is_first:
            Path(f"{MARK}.ended").write_text(str(info.step + 1))
        function(run, info, faults)

    module.Run._after_step = counted


def mark() -> None:
    """Say that the phase has begun."""
    Path(MARK).touch()


class Finder(importlib.abc.MetaPathFinder):
    """Changes modules as they are imported."""

    def __init__(self) -> None:
        self._found: set[str] = set()

    def find_spec(
        self, name: str, path: object = None, target: object = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name not in (PLACE[0], COUNTED[0]) or name in self._found:
            return None
        self._found.add(name)
        if not PLACE[1]:
            mark()
            time.sleep(PLACE[2])
            return None
        spec = importlib.util.find_spec(name)
        assert spec and spec.loader
        execute = spec.loader.exec_module

        def execute_and_change(module: ModuleType) -> None:
            execute(module)
            if name == COUNTED[0]:
                count(module)
            if name == PLACE[0]:
                slow(module, *PLACE[1:])

        spec.loader.exec_module = execute_and_change  # type: ignore[method-assign]
        return spec


if "MHE_TEST_PHASE" in os.environ:
    PLACE = PHASES[os.environ["MHE_TEST_PHASE"]]
    MARK = os.environ["MHE_TEST_MARK"]
    sys.meta_path.insert(0, Finder())
