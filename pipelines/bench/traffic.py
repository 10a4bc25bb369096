"""Counts the bytes that a rank passes to collectives."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Final
from unittest import mock

import torch.distributed as dist
from torch import Tensor

from mhe_dist.distributed.compat import collective_name

# Collective -> position of the argument that holds the tensor which a rank sends.
_SENT_ARGUMENT: Final = {
    "all_to_all_single": 1,
    "all_gather_single": 1,
    "reduce_scatter_single": 1,
    "all_reduce": 0,
}


class TrafficCounter:
    """Adds up what this rank sends within a `with` block.

    Attributes:
        bytes: of the tensors; what a ring algorithm forwards again is not counted.
    """

    def __init__(self) -> None:
        self.bytes = 0
        self._patches = ExitStack()

    def __enter__(self) -> TrafficCounter:
        for known_as, position in _SENT_ARGUMENT.items():
            name = collective_name(known_as)
            counted = self._counted(getattr(dist, name), position)
            self._patches.enter_context(mock.patch.object(dist, name, counted))
        return self

    def __exit__(self, *_: object) -> None:
        self._patches.close()

    def _counted(self, collective: Callable[..., Any], position: int) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            sent: Tensor = args[position]
            self.bytes += sent.numel() * sent.element_size()
            return collective(*args, **kwargs)

        return call
