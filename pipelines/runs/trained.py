"""The backbone of a run, out of one of its checkpoints, without Ray and without DeepSpeed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mhe_dist.config.schema import Config
from pipelines.runs import folder as runs

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from mhe_dist.checkpoint.store import Checkpoint


@dataclass(frozen=True)
class Trained:
    """A trained backbone.

    Attributes:
        config: of its run.
        path: folder or URL of its run.
        checkpoint: folder that it comes from.
        step: completed steps.
        run_id: MLflow's, if the run was logged there.
        model: in evaluation mode.
    """

    config: Config
    path: str
    checkpoint: str
    step: int
    run_id: str | None
    model: Any

    def embed(self, images: Tensor) -> Tensor:
        """uint8 `[B, 3, H, W]` -> float32 `[B, D]`, as `Engine.embed` computes it."""
        import torch

        from mhe_dist.backbone.model import pixels

        device = next(self.model.parameters()).device
        with torch.no_grad():
            embeddings: Tensor = self.model(pixels(images.to(device)))
        return embeddings


def load(run: str, device: torch.device | None = None) -> Trained:
    """The backbone of a run's newest complete checkpoint, or of the one that is named.

    The number of ranks that trained it does not matter.

    Args:
        run: path, URL or name of the run; or a `step_*` folder among its checkpoints.
        device: where the model shall be; the CPU by default.

    Raises:
        UserError: there is no such run, or it has no complete checkpoint.
    """
    from mhe_dist.backbone import model as backbone
    from mhe_dist.backbone.ema import is_weight

    path, found = _checkpoint(run.rstrip("/"))
    config = Config.model_validate(runs.settings(path))
    tensors = found.load(is_weight)
    model: nn.Module = backbone.rebuild(config.model, config.data.image_size, tensors)
    return Trained(config, path, found.path, found.step, found.run["run_id"], model.to(device))


def _checkpoint(run: str) -> tuple[str, Checkpoint]:
    """Path of a run, and the checkpoint that is meant."""
    from pipelines.runs import warm_start as inheritance

    folder, _, name = run.rpartition("/")
    if name.startswith("step_"):
        found = inheritance.source(run)
        return runs.find(folder.rpartition("/")[0]), found
    path = runs.find(run)
    return path, inheritance.source(path)
