"""The samples of a data set in the order of its index, for evaluation and embedding."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress

import numpy as np
import torch
from torch import Tensor

from mhe_dist.errors import RunError
from pipelines.data.decode import Pixels
from pipelines.data.order import ShardSpan
from pipelines.data.sample import BadSampleError, load_sample, read_span
from pipelines.shards.index import ShardIndex


def read_in_order(
    index: ShardIndex, start: int, stop: int, image_size: int
) -> tuple[Tensor, Tensor, list[str]]:
    """The samples `[start, stop)` of a data set in the order of its index, not augmented.

    Returns:
        images uint8 `[n, 3, image_size, image_size]`, labels int64 `[n]`, keys.

    Raises:
        RunError: one of them cannot be used; an evaluation leaves nothing out.
    """
    images = np.empty((stop - start, 3, image_size, image_size), np.uint8)
    labels = np.empty(stop - start, np.int64)
    keys: list[str] = []
    for span in spans_in_order(index, start, stop):
        for position, raw in enumerate(read_span(index, span), span.start):
            try:
                sample = load_sample(index, span.shard, position, raw, image_size)
            except BadSampleError as error:
                raise RunError(f"{index.sample_name(span.shard, position)}: {error}") from error
            images[len(keys)] = _channels_first(sample.image)
            labels[len(keys)] = sample.label
            keys.append(sample.key)
    return torch.from_numpy(images), torch.from_numpy(labels), keys


def first_good_images(index: ShardIndex, count: int, image_size: int, limit: int) -> Tensor:
    """The first `count` images that can be used, of the first `limit` samples; fewer if need be.

    Returns:
        uint8 `[n, 3, image_size, image_size]`.
    """
    images: list[Tensor] = []
    for number in range(min(limit, index.samples)):
        with suppress(RunError):
            images.append(read_in_order(index, number, number + 1, image_size)[0])
        if len(images) == count:
            break
    return torch.cat(images) if images else torch.empty(0, 3, image_size, image_size).byte()


def spans_in_order(index: ShardIndex, start: int, stop: int) -> Iterator[ShardSpan]:
    """Where the samples `[start, stop)` of a data set lie."""
    shard, _ = index.locate(start)
    while start < stop:
        begin, end = (int(bound) for bound in index.starts[shard : shard + 2])
        if start < end:  # a shard may be empty
            yield ShardSpan(shard, start - begin, min(stop, end) - begin)
        start, shard = max(start, end), shard + 1


def _channels_first(image: Pixels) -> Pixels:
    """`[3, H, W]`; a grey image stays `[H, W]` and is broadcast where it is assigned."""
    return image.transpose(2, 0, 1) if image.ndim == 3 else image
