"""Embeds whole sets of images by tasks, wherever these run; the rows come back to this process.

A task is a range of the blocks that `embeddings.map_images` makes of the set, so that every block
holds the same images. Each is embedded by one thread of a CPU, or by a GPU: the same bits, however
many work and on whichever node.
"""

from __future__ import annotations

import math
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor

from mhe_dist.backbone.model import digest_model
from mhe_dist.distributed.topology import Topology
from pipelines.embedding.embeddings import Images, SpreadEmbed, map_images
from pipelines.embedding.write_folder import load_embedder
from pipelines.runs.trained import TrainedBackbone
from pipelines.storage.urls import resolve_url, to_url
from pipelines.storage.worker_pool import LazyTasks, Workers, run_tasks

_BLOCKS: Final = 8  # of a task: 1,024 images


class WeightsName(NamedTuple):
    """Which weights a task embeds with, and by what.

    Attributes:
        checkpoint: URL, which all workers reach.
        model_digest: `digest_model` of what it holds.
        gpu: on the worker's GPU.
    """

    checkpoint: str
    model_digest: str
    gpu: bool


class BlocksTask(NamedTuple):
    """Some blocks of a set.

    Attributes:
        weights: that embed them.
        images: theirs alone.
        image_size, flip, block: see `embeddings.embed_images`.
    """

    weights: WeightsName
    images: Images
    image_size: int
    flip: bool
    block: int


class WorkerEmbed(SpreadEmbed):
    """Embeds sets by workers, and single batches in this process.

    Args:
        backbone: as this process has loaded it.
        workers: who embeds.
        gpu: whether each of them has a GPU.
    """

    def __init__(self, backbone: TrainedBackbone, workers: Workers, gpu: bool) -> None:
        self._embed, self._workers = backbone.embed, workers
        checkpoint = to_url(*resolve_url(backbone.checkpoint))
        self._weights = WeightsName(checkpoint, digest_model(backbone.model), gpu)

    def __call__(self, pixels: Tensor) -> Tensor:
        """See `embeddings.Embed`."""
        return self._embed(pixels)

    def embed_images(
        self, images: Images, image_size: int, flip: bool, block: int
    ) -> npt.NDArray[np.float32]:
        """See `embeddings.embed_images`; memory: the result, and what waits for its place."""
        size = _BLOCKS * block
        rows = np.empty((images.count, 0), np.float32)

        def _task(number: int) -> BlocksTask:
            start = number * size
            part = images.part(start, min(start + size, images.count))
            return BlocksTask(self._weights, part, image_size, flip, block)

        def _record(number: int, made: list[Any]) -> None:
            nonlocal rows
            found, part = made.pop(), made.pop()
            if not rows.shape[1]:
                rows = np.empty((images.count, part.shape[1]), np.float32)
            rows[number * size : number * size + len(part)] = part
            images.add_findings(number * size, found)

        tasks = LazyTasks(math.ceil(images.count / size), _task)
        run_tasks(embed_blocks, tasks, self._workers, record=_record)
        return rows


def embed_blocks(task: BlocksTask) -> list[Any]:
    """The rows of some blocks, float32 `[n, D]`, and what reading them has told.

    Returns:
        Both, in a list that the receiver empties.

    Raises:
        RunError: an image cannot be used, or the checkpoint was changed.
    """
    weights = task.weights
    embed = load_embedder(weights.checkpoint, weights.model_digest, task.flip, weights.gpu)
    rows = map_images(embed, task.images, Topology(), task.image_size, task.block)
    return [rows, task.images.findings()]
