"""Checkpoints that later versions must read: `python -m tests.golden.record_checkpoints`.

They were written once, by an early version of the project. Running this again replaces them by
what the present version writes, and the proof is lost: do it only when old checkpoints are meant
to be refused.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipelines.runs.warm_start import find_checkpoint
from tests.conftest import run_ranks
from tests.golden.record import train
from tests.support import tiny

CHECKPOINTS = Path(__file__).with_name("checkpoints")
DIGESTS = CHECKPOINTS / "digests.json"
STEPS = 3
VIT = {"img_size": 16, "patch_size": 8, "depth": 1, "embed_dim": 8, "num_heads": 1}
HEADS: dict[str, dict[str, Any]] = {
    "mhs_route": {"kind": "mhs", "optim": {"kind": "adamw"}},
    "mhs_gather": {
        "kind": "mhs",
        "mhs": {"exchange": "gather", "length": 4, "extra_heads": 1},
        "margin": {"kind": "adaface", "scale": 16.0, "m": 0.2},
    },
    "full": {"kind": "full", "bank": {"dtype": "bfloat16"}},
    "partial_fc": {"kind": "partial_fc", "partial_fc": {"rate": 0.3}},
    "mhp": {"kind": "mhp", "margin": {"kind": "none"}},
    "mhc": {"kind": "mhc", "margin": {"kind": "none"}},
}


def digests(tensors: dict[str, Tensor]) -> dict[str, str]:
    """Name -> shape, type and a checksum of the bytes of each tensor."""
    return {
        name: f"{tuple(tensor.shape)} {tensor.dtype} {_checksum(tensor)}"
        for name, tensor in sorted(tensors.items())
    }


def _checksum(tensor: Tensor) -> str:
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(data).hexdigest()[:16]


def record(folder: Path) -> dict[str, dict[str, str]]:
    """Train a few steps with each head and keep the last checkpoint."""
    shards = tiny.write_shards(folder / "shards")
    found = {}
    for name, head in HEADS.items():
        config = tiny.config(
            folder,
            shards,
            run={"name": name},
            model={"name": "vit_tiny_patch16_224", "kwargs": VIT, "embedding_dim": 4},
            head=head,
            train={"max_steps": STEPS},
            scale={"zero_stage": 0},
        )
        run_ranks(train, 1, config.model_dump())
        source = Path(config.run.path) / "checkpoints" / f"step_{STEPS:08d}"
        shutil.copytree(source, CHECKPOINTS / name / source.name)
        found[name] = digests(find_checkpoint(str(source)).load(lambda _: True))
    return found


if __name__ == "__main__":
    shutil.rmtree(CHECKPOINTS, ignore_errors=True)
    with tempfile.TemporaryDirectory() as name:
        found = record(Path(name))
    DIGESTS.write_text(json.dumps(found, indent=1) + "\n")
