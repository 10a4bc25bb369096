"""What happens when a run no longer learns: a bundle on disk, then the end, or a step back.

A step back continues from the newest checkpoint before the trouble, without the step at which it
showed and the one before, whose update may have caused it.
"""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING, Any

import fsspec
import numpy as np

from mhe_dist.guard import Diverged, Trouble
from pipelines.stream import Loader

if TYPE_CHECKING:
    from pipelines.pretrain import Run

logger = logging.getLogger(__name__)


class RolledBack(Exception):
    """The run is to be taken up again from its newest checkpoint."""


def skipped(path: str) -> set[int]:
    """Steps that the run at `path` does without."""
    filesystem, place = fsspec.core.url_to_fs(f"{path}/skipped.json")
    return set(json.loads(filesystem.cat_file(place))) if filesystem.exists(place) else set()


def handle(run: Run, trouble: Trouble) -> None:
    """Write the bundle and leave; all ranks must call.

    Raises:
        RolledBack: the run can go on from a checkpoint.
        Diverged: it cannot, or is not to.
    """
    guard, bundle = run.config.guard, _write(run, trouble)
    said = f"step {trouble.step}: {trouble.what}; what is known of it is in {bundle}"
    run.recorder.event("diverged", step=trouble.step, what=trouble.what, bundle=bundle)
    logger.error(said)
    path = run.config.run.path
    without = skipped(path) | {trouble.step - 1, trouble.step}
    if guard.on_divergence == "stop":
        raise Diverged(f"{said}. Lower optim.lr, clip (optim.clip_norm), or guard.on_divergence")
    if len(without) > 2 * guard.max_rollbacks:
        raise Diverged(f"{said}. It went back guard.max_rollbacks={guard.max_rollbacks} times")
    run.saver.wait()
    if not run.store.go_back(trouble.step - 1):
        raise Diverged(f"{said}. No checkpoint is older")
    if run.place.is_first:
        with fsspec.open(f"{path}/skipped.json", "w") as file:
            json.dump(sorted(without), file)
    run.place.barrier()
    raise RolledBack(said)


def _write(run: Run, trouble: Trouble) -> str:
    """The bundle: norms per layer as they are now, and the batch of the step, read once more."""
    folder = f"{run.config.run.path}/divergence/step_{trouble.step:08d}"
    mine = run.place.share(run.config.train.micro_batches)
    (batch,) = Loader(run.index, run.config, mine, trouble.step, trouble.step + 1)
    filesystem, path = fsspec.core.url_to_fs(folder)
    filesystem.makedirs(path, exist_ok=True)
    for part in batch.micro_batches:
        arrays: dict[str, Any] = {"images": part.images.numpy(), "labels": part.labels.numpy()}
        with filesystem.open(f"{path}/micro_batch_{part.index:05d}.npz", "wb") as file:
            np.savez_compressed(file, keys=np.array(part.keys), **arrays)
    tensors = run.engine.state()
    if run.place.is_first:
        report = {
            "step": trouble.step,
            "what": trouble.what,
            "resumed_from": run.progress.resumed_from,
            "training": run.recorder.last,
            "norms": {name: float(tensor.float().norm()) for name, tensor in tensors.items()},
        }
        with filesystem.open(f"{path}/report.json", "w") as file:
            json.dump(report, file, indent=1)
    return folder
