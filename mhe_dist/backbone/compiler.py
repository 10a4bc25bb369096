"""What `model.compile` needs of a machine; asked without torch, before a run."""

from __future__ import annotations

import os
import shutil
import sysconfig
from pathlib import Path


def missing_compiler(gpu: bool) -> str:
    """What compiled code needs here and does not find, with the cure; empty where all is there.

    On a CPU torch's inductor writes C++. On a GPU Triton builds its launchers in C when the run
    begins, against Python's headers.

    Args:
        gpu: whether the network computes on one.
    """
    cure = "or set model.compile=false"
    if not gpu:
        compiler = os.environ.get("CXX", "g++")
        if shutil.which(compiler) is None:
            return (
                f"model.compile=true needs a C++ compiler on a CPU, but there is no {compiler}: "
                f"install one, name it in CXX, {cure}"
            )
        return ""
    named = os.environ.get("CC")
    if not any(shutil.which(name) for name in ([named] if named else ["gcc", "clang"])):
        return (
            f"model.compile=true needs a C compiler on a GPU, but there is no {named or 'gcc'}: "
            f"install one (gcc and libc6-dev), name it in CC, {cure}"
        )
    if not Path(sysconfig.get_paths()["include"], "Python.h").exists():
        return (
            "model.compile=true needs Python's headers on a GPU, but there is no Python.h in "
            f"{sysconfig.get_paths()['include']}: install them (python3-dev), {cure}"
        )
    return ""
