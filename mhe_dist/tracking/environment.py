"""What is recorded with each run of where it ran: libraries, the commit of the code, device."""

from __future__ import annotations

import os
import platform
import subprocess
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

COMMIT_VARIABLE = "MHE_GIT_COMMIT"
"""Names the commit of code that was sent to a cluster without its repository."""

LIBRARIES = ("torch", "deepspeed", "ray", "webdataset", "timm", "torchmetrics", "mlflow", "onnx")
"""Packages whose versions may explain what a run did."""


def environment_tags() -> dict[str, str]:
    """Versions of the libraries, and the git commit of this code where that is known."""
    return dict(_environment())


def device_name(device: torch.device) -> str:
    """What computes: "NVIDIA H200", or "AMD EPYC, AVX-512 BF16", a processor and what multiplies.

    Two runs compare in speed only where this is the same, and their number of workers.
    """
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if torch.cpu._is_amx_tile_supported():
        instructions = "AMX"
    elif torch.cpu._is_avx512_bf16_supported():
        instructions = "AVX-512 BF16"
    else:
        instructions = torch.backends.cpu.get_cpu_capability()
    return f"{processor_name()}, {instructions}"


def processor_name(info: Path = Path("/proc/cpuinfo")) -> str:
    """The model of this machine's processor; its architecture where the system names none.

    Args:
        info: what Linux says of its processors; those of ARM have no name there.
    """
    lines = info.read_text(errors="replace").splitlines() if info.exists() else []
    for key, _, value in (line.partition(":") for line in lines):
        if key.strip() == "model name" and value.strip():
            return value.strip()
    return platform.processor() or platform.machine()


@cache
def _environment() -> dict[str, str]:
    tags = {}
    for package in (*LIBRARIES, "mhe"):
        try:
            tags[f"version.{package}"] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    commit = _git("rev-parse", "HEAD") if _git("ls-files", Path(__file__).name) else ""
    if commit:
        changed = _git("status", "--porcelain", "--untracked-files=no")
        tags["git_commit"] = f"{commit}-dirty" if changed else commit
    elif sent := os.environ.get(COMMIT_VARIABLE):
        tags["git_commit"] = sent
    return tags


def _git(*arguments: str) -> str:
    """What git says in this file's folder; empty where there is no git or no checkout."""
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
