"""What a machine has, asked without loading a library of the trade."""

from __future__ import annotations

import shutil
import subprocess
from contextlib import suppress

ANSWER_S = 20.0


def list_gpus() -> list[str]:
    """Name and memory of each NVIDIA GPU, as its driver says; none without an answer."""
    return ask_driver()[0]


def ask_driver() -> tuple[list[str], str]:
    """Name and memory of each NVIDIA GPU, and why the driver does not answer; empty: it does."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return [], ""
    query = [command, "--query-gpu=name,memory.total", "--format=csv,noheader"]
    try:
        process = subprocess.Popen(query, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    except OSError as error:
        return [], f"nvidia-smi cannot be started: {error}"
    try:
        said, _ = process.communicate(timeout=ANSWER_S)
    except subprocess.TimeoutExpired:
        process.kill()
        with suppress(subprocess.TimeoutExpired):  # the kernel may hold it for ever
            process.communicate(timeout=1.0)
        return [], f"the driver does not answer within {ANSWER_S:.0f} s"
    return (said.decode().splitlines() if process.returncode == 0 else []), ""
