"""Records the losses that a refactoring must reproduce: `python -m tests.golden.record`."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from mhe_dist.config.schema import Config
from mhe_dist.distributed.topology import Topology
from pipelines.pretrain.main import run_pretraining
from tests.conftest import run_ranks
from tests.support import tiny

LOSSES = Path(__file__).with_name("losses.json")
STEPS = 20


def train(topology: Topology, config: dict[str, Any]) -> bool:
    """One rank of the run."""
    run_pretraining(Config.model_validate(config))
    return True


def losses(folder: Path) -> list[float]:
    """Losses of 20 steps on the CPU: data, order, augmentation, backbone, head and optimizers."""
    config = tiny.config(folder, tiny.write_shards(folder / "shards"), train={"max_steps": STEPS})
    run_ranks(train, 1, config.model_dump())
    return tiny.per_step(config)[0]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        LOSSES.write_text(json.dumps(losses(Path(name)), indent=1) + "\n")
