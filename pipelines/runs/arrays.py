"""Images that lie in memory, as arrays, to embeddings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mhe_dist.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from pipelines.runs.trained import TrainedBackbone


def embed_arrays(
    backbone: TrainedBackbone, images: Tensor | npt.NDArray[Any], batch_size: int = 128
) -> npt.NDArray[np.float32]:
    """Embed uint8 RGB images, of the size that the backbone was trained on.

    Args:
        backbone: see `load_trained_backbone`.
        images: uint8 `[N, H, W, 3]` or `[N, 3, H, W]`, a NumPy array or a tensor.
        batch_size: images of one forward pass.

    Returns:
        float32 `[N, D]`, not normalised.

    Raises:
        UserError: the images have another type or shape; names both.
    """
    import torch

    pixels = torch.as_tensor(images)
    side = backbone.config.data.image_size
    channels_last = tuple(pixels.shape[1:]) == (side, side, 3)
    if pixels.dtype != torch.uint8 or not (
        channels_last or tuple(pixels.shape[1:]) == (3, side, side)
    ):
        raise UserError(
            f"images are {pixels.dtype} {list(pixels.shape)}; {backbone.path} needs torch.uint8 "
            f"[N, {side}, {side}, 3] or [N, 3, {side}, {side}]"
        )
    pixels = pixels.permute(0, 3, 1, 2) if channels_last else pixels
    width = backbone.config.model.embedding_dim
    parts = [np.empty((0, width), np.float32)]
    parts += [backbone.embed(part).float().cpu().numpy() for part in pixels.split(batch_size)]
    return np.concatenate(parts)
