"""What an operation costs a GPU: launches, bytes of device memory, floating-point operations.

Every operation that autograd or a head asks for counts as one launch that reads its arguments and
writes its results. Some take more (`logsumexp`, `topk`, `sort`), so the figures are lower bounds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import Any, Final, NamedTuple

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten

# Operations without a kernel.
FREE: Final = {
    aten.empty.memory_format,
    aten.empty_like.default,
    aten.empty_strided.default,
    aten.new_empty.default,
    aten.new_empty_strided.default,
    aten.detach.default,
    aten.lift_fresh.default,
    aten.set_.source_Storage,
    aten.is_pinned.default,
    aten._unsafe_view.default,
    aten._local_scalar_dense.default,
    torch.ops.prim.device.default,
}
# Those that take nothing of their first argument but its shape and type.
FILLING: Final = {
    aten.new_full.default,
    aten.new_zeros.default,
    aten.new_ones.default,
    aten.full_like.default,
    aten.zeros_like.default,
    aten.ones_like.default,
}
# Those that read as many elements as they return.
GATHERING: Final = {aten.index.Tensor, aten.index_select.default, aten.gather.default}
# Those that write some elements of their first argument -> positions of the index and the values.
SCATTERING: Final = {
    aten.index_put_.default: (1, 2),
    aten._index_put_impl_.default: (1, 2),
    aten.index_copy_.default: (2, 3),
    aten.index_fill_.int_Scalar: (2, None),
    aten.scatter_.src: (2, 3),
    aten.scatter_.value: (2, None),
}
FOREACH_TENSORS: Final = 30  # that one launch of a `_foreach_` operation takes, about


class OpCost(NamedTuple):
    """Of one operation: launches, bytes read and written on the device, operations."""

    launches: int
    read: int
    written: int
    flops: int


def op_cost(func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> OpCost | None:
    """Cost of a call, or None if it launches nothing."""
    if func in FREE or _is_view(func):
        return None
    given, made = list(tensors_in((args, kwargs))), list(tensors_in(out))
    launches = 1
    if "_foreach_" in str(func):
        launches = -(-max(len(made), len(given)) // FOREACH_TENSORS)
    out_argument = kwargs.get("out")  # written, not read
    read, written = _traffic(func, args, [t for t in given if t is not out_argument], made)
    return OpCost(launches, read, written, _flops(func, args, out))


def tensors_in(tree: Any) -> Iterator[Tensor]:
    """All tensors in nested arguments."""
    return (leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor))


def device_bytes(tensor: Tensor) -> int:
    """Bytes of distinct elements on the device; 0 for a tensor on the host."""
    if tensor.device.type != "cuda":
        return 0
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    return prod(size for size, stride in sizes if stride or not size) * tensor.element_size()


def _traffic(
    func: Any, args: Sequence[Any], given: list[Tensor], made: list[Tensor]
) -> tuple[int, int]:
    """Bytes read and written on the device."""
    read, written = sum(map(device_bytes, given)), sum(map(device_bytes, made))
    if func in FILLING:
        return 0, written
    if func in GATHERING:
        return read - device_bytes(args[0]) + written, written
    if func in SCATTERING:
        index, values = SCATTERING[func]
        indices = sum(map(device_bytes, tensors_in(args[index])))
        count = max(t.numel() for t in tensors_in(args[index]))
        source = 0 if values is None else device_bytes(args[values])
        return indices + source, max(source, count * args[0].element_size())
    return read, written or device_bytes(given[0])


def _is_view(func: Any) -> bool:
    infos = [result.alias_info for result in func._schema.returns]
    return bool(infos) and all(info is not None and not info.is_write for info in infos)


def _flops(func: Any, args: Sequence[Any], out: Any) -> int:
    name = func.overloadpacket.__name__
    count = flop_registry.get(getattr(aten, name.removesuffix("_"), None))
    return int(count(*args, out_val=out)) if count is not None else 0
