"""What the loop consumes: the micro-batches of one step that one rank computes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class MicroBatch:
    """The images of one forward pass.

    Attributes:
        index: canonical number of the micro-batch in the step, in `[0, n)`.
        images: uint8 `[B, 3, H, W]`, on the host; best channels last in memory.
        labels: int64 `[B]`, on the host; `[B, K]` where samples have up to K, padded with -1.
        keys: the samples' keys, for messages and for the record of a run.
    """

    index: int
    images: Tensor
    labels: Tensor
    keys: list[str]


@dataclass(frozen=True)
class StepBatch:
    """The `n / W` micro-batches of one rank in one optimizer step, in canonical order.

    Attributes:
        step: its number.
        micro_batches: those of this rank.
        wait_s: seconds that this rank waited for them.
        labels: int64 `[n, B]`, or `[n, B, K]`, on the host: those of the whole step, the same on
            all ranks; where a sample was replaced by another, its own label. None: this rank knows
            its own alone.
    """

    step: int
    micro_batches: list[MicroBatch]
    wait_s: float = 0.0
    labels: Tensor | None = None
