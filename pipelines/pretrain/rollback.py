"""What happens when a run diverges: a bundle on disk, then the end, or a rollback.

A rollback goes on from the newest checkpoint before the divergence. It leaves out the step that
showed it, and the step before, whose update may have caused it.
"""

from __future__ import annotations

import json
import logging
from typing import Any

import numpy as np

from mhe_dist.atomic_file import write_file
from mhe_dist.distributed.failures import decided_by_first, failing_together
from mhe_dist.train.divergence import Diverged, Divergence
from pipelines.pretrain.restarts import SKIPPED_FILE, read_skipped_steps
from pipelines.pretrain.run import Run
from pipelines.storage.urls import atomic_write

logger = logging.getLogger(__name__)


def roll_back(run: Run, divergence: Divergence) -> None:
    """Write the bundle and go back to a checkpoint, from which a new `Run` goes on.

    All ranks must call.

    Raises:
        Diverged: there is no way back, or `guard.on_divergence` is not `rollback`.
    """
    guard, bundle = run.config.guard, _write_bundle(run, divergence)
    message = f"{divergence}; what is known of it is in {bundle}"
    run.recorder.emit("diverged", step=divergence.step, what=divergence.reason, bundle=bundle)
    logger.error(message)
    path = run.config.run.path
    before = read_skipped_steps(path, run.topology)
    skipped = before | {divergence.step - 1, divergence.step}
    if guard.on_divergence == "stop":
        raise Diverged(f"{message}. Lower optim.lr, clip (optim.clip_norm), or guard.on_divergence")
    if skipped == before:
        raise Diverged(f"{message}. It is the last step, which no run leaves out")
    if len(skipped) > 2 * guard.max_rollbacks:
        raise Diverged(f"{message}. It went back guard.max_rollbacks={guard.max_rollbacks} times")
    run.checkpointer.wait()
    if not run.store.roll_back_to(divergence.step - 1):
        raise Diverged(f"{message}. No checkpoint is older")
    content = json.dumps(sorted(skipped))
    decided_by_first(lambda: write_file(f"{path}/{SKIPPED_FILE}", content), run.topology)


def _write_bundle(run: Run, divergence: Divergence) -> str:
    """The bundle: norms per layer as they are now, and the batch of the step, read once more."""
    folder = f"{run.config.run.path}/divergence/step_{divergence.step:08d}"
    with failing_together(run.topology):
        (batch,) = run.open_loader(divergence.step, divergence.step + 1)
        for part in batch.micro_batches:
            arrays: dict[str, Any] = {"images": part.images.numpy(), "labels": part.labels.numpy()}
            with atomic_write(f"{folder}/micro_batch_{part.index:05d}.npz") as file:
                np.savez_compressed(file, keys=np.array(part.keys), **arrays)
    tensors = run.engine.state()

    def write_report() -> None:
        """With the norms of all layers."""
        report = {
            "step": divergence.step,
            "what": divergence.reason,
            "resumed_from": run.progress.resumed_from,
            "training": run.recorder.last,
            "norms": {name: float(tensor.float().norm()) for name, tensor in tensors.items()},
        }
        write_file(f"{folder}/report.json", json.dumps(report, indent=1))

    decided_by_first(write_report, run.topology)
    return folder
