"""A run before its first step, as a checkpoint: what embeds with a backbone that nobody trained."""

from __future__ import annotations

import warnings

from mhe_dist.checkpoint.store import CheckpointStore, CheckpointWarning
from mhe_dist.config.schema import Config
from mhe_dist.config.write import config_to_dict, save_config
from mhe_dist.distributed.topology import Topology
from mhe_dist.errors import RunError
from mhe_dist.redact import masked
from pipelines.runs.first_model import initial_model
from pipelines.runs.folder import newest_checkpoint


def write_untrained_run(config: Config) -> str:
    """Write the backbone that a run begins with as the checkpoint of its step 0, once.

    Its weights are those that `model.init_from` names, timm's own with `pretrained: true` in
    `model.kwargs`, or drawn from `run.seed`.

    Args:
        config: of the run; `run.dir` and `run.name` say where.

    Returns:
        Folder of the run.

    Raises:
        UserError: the weights that it asks for cannot be had.
        RunError: the checkpoint cannot be written.
    """
    path = config.run.path
    if newest_checkpoint(path):
        return path
    weights = initial_model(config).state_dict()
    store = CheckpointStore(f"{path}/checkpoints", Topology())
    about = {"step": 0, "run_id": None, "config": masked(config_to_dict(config))}
    store.save(0, {f"model.{name}": tensor for name, tensor in weights.items()}, {}, about)
    with warnings.catch_warnings():  # that a training goes on: there is none
        warnings.simplefilter("ignore", CheckpointWarning)
        saved = store.wait()
    if saved is None or saved.error:
        raise RunError(f"{path}: the backbone cannot be written ({saved and saved.error})")
    save_config(config, f"{path}/config.yaml")
    return path
