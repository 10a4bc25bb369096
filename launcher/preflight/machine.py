"""What a machine has, asked without loading a library of the trade."""

from __future__ import annotations

import shutil
import subprocess

PACKAGES = ("torch", "deepspeed", "ray", "webdataset", "timm", "torchmetrics", "mlflow", "onnx")


def list_gpus() -> list[str]:
    """Name and memory of each NVIDIA GPU, as its driver says; none without a driver."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return []
    query = [command, "--query-gpu=name,memory.total", "--format=csv,noheader"]
    result = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False)
    return result.stdout.splitlines() if result.returncode == 0 else []
