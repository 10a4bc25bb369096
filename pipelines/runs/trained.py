"""The backbone of a run, out of one of its checkpoints, without Ray and without DeepSpeed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mhe_dist.checkpoint.step_folder import step_of
from mhe_dist.config.schema import Config
from mhe_dist.config.stored import stored_config
from pipelines.runs.folder import absolute_path, find_run, read_run_config

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from mhe_dist.checkpoint.store import Checkpoint
    from mhe_dist.distributed.topology import Topology


@dataclass(frozen=True)
class TrainedBackbone:
    """A trained backbone.

    Attributes:
        config: of its run.
        path: folder or URL of its run.
        checkpoint: folder that it comes from.
        step: completed steps.
        run_id: MLflow's, if the run was logged there.
        model: in evaluation mode.
        trained_on: what its checkpoint says of the data: `data_digest`, `classes`, `samples`.
    """

    config: Config
    path: str
    checkpoint: str
    step: int
    run_id: str | None
    model: Any
    trained_on: dict[str, Any] = field(default_factory=dict)

    def embed(self, images: Tensor) -> Tensor:
        """uint8 `[B, 3, H, W]` -> float32 `[B, D]`, as `Engine.embed` computes it."""
        import torch

        from mhe_dist.backbone.normalization import normalize_images

        device = next(self.model.parameters()).device
        with torch.no_grad():
            pixels = normalize_images(images.to(device), self.model.normalization)
            embeddings: Tensor = self.model(pixels)
        return embeddings


def load_trained_backbone(
    run: str, device: torch.device | None = None, topology: Topology | None = None
) -> TrainedBackbone:
    """The backbone of a run's newest complete checkpoint, or of the one that is named.

    The number of ranks that trained it does not matter. The files of the head are not read.

    Args:
        run: path, URL or name of the run; or a `step_*` folder among its checkpoints.
        device: where the model shall be; that of `topology` by default, or the CPU.
        topology: ranks that load the same and share its check, which must all call;
            None: this process.

    Raises:
        UserError: there is no such run, or it has no complete checkpoint.
    """
    from mhe_dist.backbone.ema import is_backbone_weight
    from mhe_dist.backbone.model import restore_backbone
    from mhe_dist.distributed.topology import Topology

    path, found = _checkpoint(run.rstrip("/"), topology)
    if device is None and topology is not None:
        device = topology.device
    config = stored_config(read_run_config(path) or {})
    tensors = found.load_together(is_backbone_weight, topology or Topology())
    model: nn.Module = restore_backbone(config.model, config.data.image_size, tensors)
    about = {name: found.run.get(name) for name in ("data_digest", "classes", "samples")}
    return TrainedBackbone(
        config, path, found.path, found.step, found.run["run_id"], model.to(device), about
    )


def read_trained_config(run: str) -> Config:
    """The config of a run, which `load_trained_backbone` names in the same way.

    Raises:
        UserError: there is no such run.
    """
    return stored_config(read_run_config(find_run(_run_of(run.rstrip("/")))) or {})


def _run_of(run: str) -> str:
    """The run that a `step_*` folder lies in; anything else is the run's own name."""
    if step_of(run) is None:
        return run
    url = run if run.count("/") > 1 else absolute_path(run)  # typed in a folder of the run
    return url.rpartition("/")[0].rpartition("/")[0]


def _checkpoint(run: str, topology: Topology | None) -> tuple[str, Checkpoint]:
    """Path of a run, and the checkpoint that was asked for."""
    from mhe_dist.backbone.ema import is_backbone_weight
    from pipelines.runs.warm_start import find_checkpoint

    path = find_run(_run_of(run))
    if step_of(run) is not None:
        return path, find_checkpoint(run, select=is_backbone_weight)
    return path, find_checkpoint(path, topology, is_backbone_weight)
