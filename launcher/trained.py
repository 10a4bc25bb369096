"""The backbone of a run, out of its newest checkpoint, without Ray and without DeepSpeed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from launcher import runs
from mhe_dist.config import Config
from mhe_dist.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class Trained:
    """A trained backbone.

    Attributes:
        config: of its run.
        checkpoint: folder that it comes from.
        step: completed steps.
        model: in evaluation mode, on the CPU.
    """

    config: Config
    checkpoint: str
    step: int
    model: Any

    def embed(self, images: Tensor) -> Tensor:
        """uint8 `[B, 3, H, W]` -> float32 `[B, D]`, as `Engine.embed` computes it."""
        import torch

        from mhe_dist.backbone import pixels

        with torch.no_grad():
            embeddings: Tensor = self.model(pixels(images))
        return embeddings


def load(run: str) -> Trained:
    """The backbone of a run's newest complete checkpoint.

    Args:
        run: path, URL or name of the run.

    Raises:
        UserError: there is no such run, or it has no complete checkpoint.
    """
    from mhe_dist import backbone
    from mhe_dist.checkpoint import CheckpointStore
    from mhe_dist.topology import Topology

    path = runs.find(run)
    config = Config.model_validate(runs.settings(path))
    store = CheckpointStore(f"{path}/checkpoints", Topology(), config.checkpoint.keep_last)
    newest = store.newest()
    if newest is None:
        raise UserError(f"{path} has no complete checkpoint yet: mhe train goes on with it")
    tensors = newest.load(lambda name: name.startswith("model."))
    model: nn.Module = backbone.rebuild(config.model, config.data.image_size, tensors)
    return Trained(config, newest.path, newest.step, model)
