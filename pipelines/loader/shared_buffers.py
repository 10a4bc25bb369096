"""Images on their way from the loader processes to their rank, in memory that both share.

The memory is laid out once. If a process hands on a tensor instead, torch makes new shared memory
for each batch, which is first filled with zeros page by page: that takes a third of the time of
decoding, and more of it where the batch is read.
"""

from __future__ import annotations

import numpy as np

from pipelines.data.decode import Pixels
from pipelines.loader.shared_array import SharedArray


class SharedBuffers:
    """A ring of batch buffers for each loader process.

    A process fills its buffers in turn. With `prefetch` batches requested in advance, it may work
    on the batch that is `prefetch` behind the one that its rank has just received. So
    `prefetch + 1` buffers suffice if the rank copies a batch before it takes the next one of the
    process.
    """

    def __init__(self, processes: int, prefetch: int, images: int, side: int) -> None:
        """Lay out memory for at most `images` images of `side` x `side` in a batch."""
        self._memory = SharedArray((processes, prefetch + 1, images, side, side, 3), np.uint8)

    def images(self, process: int, batch_number: int) -> Pixels:
        """uint8 `[images, side, side, 3]`: the buffer of batch `batch_number` of a process."""
        buffers = self._memory.values[process]
        return buffers[batch_number % len(buffers)]
