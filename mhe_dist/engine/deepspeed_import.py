"""DeepSpeed, imported once in a process: for its device, and without what no run uses of it."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def import_deepspeed(device: torch.device) -> Any:
    """DeepSpeed, set up for `device`, without its comm extension and without its chatter.

    It chooses its accelerator when it is imported, hence not at the top of a file. The extension
    would need a C++ compiler on every machine and gains nothing over gloo here.
    """
    if "deepspeed" not in sys.modules:
        os.environ["DS_ACCELERATOR"] = device.type
        with _mlflow_hidden(), _compiler_disabled():
            # The first engine would import this one, to see that its optimizer is not of that kind.
            import deepspeed.runtime.zero.muon.original_muon
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.utils.logger.setLevel("ERROR")
    # Its calls of torch functions that were renamed would warn on every rank.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    return deepspeed


@contextmanager
def _mlflow_hidden() -> Iterator[None]:
    """Let an import of MLflow fail: the autotuner tries one, which takes each rank two seconds."""
    is_ours = "mlflow" not in sys.modules
    if is_ours:
        sys.modules["mlflow"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        if is_ours:
            del sys.modules["mlflow"]


@contextmanager
def _compiler_disabled() -> Iterator[None]:
    """Let functions that ask to be compiled stay as they are.

    Three of the Muon optimizer ask when they are defined, and torch imports its compiler for them,
    which takes each rank two seconds.
    """
    name = "TORCHDYNAMO_DISABLE"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
