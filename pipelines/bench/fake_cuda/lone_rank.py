"""One rank of many, without the others: collectives that exchange nothing.

On the device a collective is one launch. On the host, whose values decide what happens next, every
other rank is taken to send what this one would send itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Final
from unittest import mock

import torch.distributed as dist
from torch import Tensor

from mhe_dist.distributed.topology import Topology
from pipelines.bench.fake_cuda.ledger import Ledger

GATHERS: Final = ("all_gather_single", "all_gather_into_tensor")
SCATTERS: Final = ("reduce_scatter_single", "reduce_scatter_tensor")


@contextmanager
def lone_rank(topology: Topology, ledger: Ledger) -> Iterator[None]:
    """Let the collectives of `torch.distributed` be those of a rank without others."""

    def all_to_all(arrived: Tensor, given: Tensor, receive: Any, send: Any, group: Any) -> None:
        """Every rank sends what this one would send to itself."""
        if given.device.type == "cuda":
            _launch(ledger, "all_to_all", given, arrived)
        else:
            own = given.split(send)[topology.rank]
            arrived.copy_(own.repeat(topology.world_size, *[1] * (own.dim() - 1)))

    def gather(
        output_tensor: Tensor, input_tensor: Tensor, group: Any = None, async_op: bool = False
    ) -> _Done | None:
        """Every rank gives what this one gives."""
        if input_tensor.device.type == "cuda":
            _launch(ledger, "all_gather", input_tensor, output_tensor)
        else:
            copies = [topology.world_size, *[1] * (input_tensor.dim() - 1)]
            output_tensor.copy_(input_tensor.repeat(copies))
        return _Done() if async_op else None

    def scatter(
        output: Tensor, input: Tensor, op: Any = None, group: Any = None, async_op: bool = False
    ) -> _Done | None:
        """This rank gets as much as its share has."""
        _launch(ledger, "reduce_scatter", input, output)
        return _Done() if async_op else None

    def all_reduce(
        tensor: Tensor, op: Any = None, group: Any = None, async_op: bool = False
    ) -> _Done | None:
        """On the host nothing is added up."""
        if tensor.device.type == "cuda":
            _launch(ledger, "all_reduce", tensor, tensor)
        return _Done() if async_op else None

    fakes: dict[str, Callable[..., _Done | None]] = {
        "all_to_all_single": all_to_all,
        "all_reduce": all_reduce,
        **dict.fromkeys(GATHERS, gather),
        **dict.fromkeys(SCATTERS, scatter),
    }
    with ExitStack() as stack:
        for name, fake in fakes.items():
            stack.enter_context(mock.patch.object(dist, name, fake, create=True))
        yield


class _Done:
    """Of a collective that was not waited for; to wait is the stream's affair, not the host's."""

    def wait(self) -> None: ...


def _launch(ledger: Ledger, name: str, given: Tensor, arrived: Tensor) -> None:
    ledger.add("kernel", f"nccl.{name}", read=given.nbytes, written=arrived.nbytes)
