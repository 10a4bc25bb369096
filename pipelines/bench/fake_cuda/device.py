"""The device: a FakeTensorMode in which only CUDA tensors are fake.

Host tensors stay real, so that NumPy, `tolist()` and all else that plans a step on the host works
as it does in a run. What touches the device goes through torch's own meta kernels, which raise
where CUDA would raise (a CPU operand in a CUDA product, a wrong type), and is noted in a ledger.

Limits:
- Values do not exist. What is copied to the host is zeros, or what `answer` gives.
- A CUDA build without a driver refuses autograd's engine: call `autograd.backward` instead.
- A dispatch mode belongs to one thread: while the device is in use, thread pools work at once, in
  the thread that asks.
- A launch of a kernel of `mhe_dist.kernels` counts with the traffic that its caller states.
- All fake tensors have the same `data_ptr`: code that copies unless two are equal does not copy.
- Launches are a lower bound (see `costs.py`); the peak is that of the tensors, without what the
  caching allocator loses.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any, Final
from unittest import mock

import numpy as np
import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef

from mhe_dist.distributed import transfer
from mhe_dist.kernels import dispatch
from mhe_dist.kernels.dispatch import KernelTraffic
from pipelines.bench.fake_cuda import autograd
from pipelines.bench.fake_cuda.costs import OpCost, op_cost, tensors_in
from pipelines.bench.fake_cuda.ledger import Kind, Ledger

aten = torch.ops.aten
STAGED_BYTES: Final = 64 * 1024  # up to which the driver takes a copy from pageable memory at once
MOST_PROGRAMS: Final = 65_535  # of a grid in each dimension but the first
# Operations whose result's shape is known on the device alone.
WAITING: Final = {
    aten.nonzero.default,
    aten.masked_select.default,
    aten._unique2.default,
    aten.unique_dim.default,
    aten.unique_consecutive.default,
    aten.bincount.default,
    aten.repeat_interleave.Tensor,
    aten.equal.default,
}
INDEXING: Final = {
    aten.index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
}
PINNING: Final = {aten._pin_memory.default, aten.pin_memory.default}
Answer = Callable[[Tensor], Tensor]


class FakeCuda(FakeTensorMode):
    """See the module. `with FakeCuda() as gpu: ...; print(gpu.ledger.waits())`.

    Args:
        answer: real values for the zeros that a copy to the host gives.

    Attributes:
        ledger: what happened.
        peak: most bytes of tensors at a time since `clear`.
    """

    def __init__(self, answer: Answer | None = None) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.ledger, self.peak = Ledger(), 0
        self._answer = answer
        # A weak reference keeps the number of a storage from being given to another one.
        self._pinned: dict[int, StorageWeakRef] = {}
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}
        self._bound = 0  # of the bytes that are allocated
        self._propagating = False  # what torch's own propagation dispatches is its affair

    @property
    def allocated(self) -> int:
        """Bytes of the tensors on the device."""
        self._live = {key: part for key, part in self._live.items() if not part[0].expired()}
        self._bound = sum(size for _, size in self._live.values())
        return self._bound

    def clear(self) -> None:
        """Begin to count anew."""
        self.ledger.clear()
        self.peak = self.allocated

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Propagate what touches the device; run the rest."""
        kwargs = dict(kwargs or {})
        if self._propagating:
            return super().__torch_dispatch__(func, types, args, kwargs)
        if func in PINNING:
            return self._pin(args[0].clone())
        if func is aten.is_pinned.default and not isinstance(args[0], FakeTensor):
            return self._is_pinned(args[0])
        if kwargs.pop("pin_memory", False):
            return self._pin(_empty_pages(func, args, kwargs))
        target = _device_of(kwargs.get("device"))
        if target != "cuda" and not any(_is_fake(x) for x in pytree.tree_leaves((args, kwargs))):
            return func(*args, **kwargs)
        return self._on_device(func, types, args, kwargs)

    def _on_device(self, func: Any, types: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if func is aten._local_scalar_dense.default:
            self.ledger.add("sync", str(func))
            return torch.zeros((), dtype=args[0].dtype).item()
        if func is aten.copy_.default:
            self._note_copy(str(func), args[1], args[0], len(args) > 2 and args[2])
            if not _is_fake(args[0]):
                return args[0].copy_(self._on_host(args[1], args[0].dtype))
        if func is aten._to_copy.default:
            self._note_copy(str(func), args[0], kwargs.get("device"), kwargs.get("non_blocking"))
            if _device_of(kwargs.get("device")) == "cpu":
                return self._to_host(args[0], kwargs)
        if func in INDEXING:
            if func is not aten.index.Tensor and not _is_fake(args[2]):
                if _is_mask(args[1]):  # torch fills it
                    fill = (args[0], args[1][0], args[2].item())
                    return self._propagate(aten.masked_fill_.Scalar, types, fill, kwargs)
                self.ledger.add("sync", str(func), detail="a number of the host")
            args = (args[0], self._positions(func, args[1]), *args[2:])
        if func in WAITING:
            self.ledger.add("sync", str(func), detail="the result's shape")
        if func is aten.nonzero.default:  # as many as there can be
            shape = (args[0].numel(), args[0].dim())
            func, args, kwargs = aten.new_zeros.default, (args[0], shape), {"dtype": torch.int64}
        return self._propagate(func, types, args, kwargs)

    def _propagate(self, func: Any, types: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        self._propagating = True
        try:
            args, kwargs = pytree.tree_map_only(Tensor, self._faked, (args, kwargs))
            out = super().__torch_dispatch__(func, types, args, kwargs)
        finally:
            self._propagating = False
        self._allocate(out)
        if (cost := op_cost(func, args, kwargs, out)) is not None:
            self._launch(str(func), cost)
        return out

    def _launch(self, op: str, cost: OpCost) -> None:
        launches, *work = cost
        read, written, flops = (amount // launches for amount in work)
        for _ in range(launches):
            self.ledger.add("kernel", op, read=read, written=written, flops=flops)

    def launch_kernel(
        self, kernel: Any, grid: Any, traffic: KernelTraffic, *arguments: Any, **constants: Any
    ) -> None:
        """What stands for `dispatch.launch`: nothing is computed."""
        strangers = [x for x in arguments if isinstance(x, Tensor) and not _is_fake(x)]
        if strangers:
            raise RuntimeError(f"{kernel.__name__}: an argument is on the host, not on the device")
        if any(programs > MOST_PROGRAMS for programs in grid[1:]):
            raise RuntimeError(f"{kernel.__name__}: a grid of {grid} programs is too large")
        self.ledger.add("kernel", kernel.__name__, read=traffic.read, written=traffic.written)

    def _faked(self, tensor: Tensor) -> Tensor:
        return tensor if isinstance(tensor, FakeTensor) else self.from_tensor(tensor)

    def _allocate(self, out: Any) -> None:
        for tensor in tensors_in(out):
            storage = tensor.untyped_storage()
            key = storage._cdata
            known = key in self._live and not self._live[key][0].expired()
            if tensor.device.type == "cuda" and not known:
                self._live[key] = (StorageWeakRef(storage), storage.nbytes())
                self._bound += storage.nbytes()
        if self._bound > self.peak:
            self.peak = max(self.peak, self.allocated)

    def _note_copy(self, op: str, source: Tensor, target: Any, non_blocking: Any) -> None:
        """Whether a copy between host and device makes the host wait."""
        to_tensor = isinstance(target, Tensor)
        there = target.device.type if to_tensor else _device_of(target) or source.device.type
        here = source.device.type
        if here == there:
            return
        size = source.numel() * source.element_size()
        detail = f"{here} to {there}, {size} bytes"
        if not non_blocking:
            self.ledger.add("sync", op, detail=f"{detail}, blocking")
        elif there == "cpu":  # torch pins the result of `to(non_blocking=True)`
            if to_tensor and not self._is_pinned(target):
                self.ledger.add("sync", op, detail=f"{detail}, to pageable memory")
        elif not self._is_pinned(source):
            kind: Kind = "staged" if size <= STAGED_BYTES else "sync"
            self.ledger.add(kind, op, detail=f"{detail}, from pageable memory")

    def _positions(self, func: Any, indices: Any) -> list[Any]:
        """Indices without masks, as `nonzero` would give them; those on the host are copied."""
        positions: list[Any] = []
        for index in indices:
            is_mask = index is not None and index.dtype in (torch.bool, torch.uint8)
            if index is not None and not _is_fake(index):
                self.ledger.add("sync", str(func), detail="an index on the host")
                positions += index.nonzero(as_tuple=True) if is_mask else [index]
            elif is_mask:
                self.ledger.add("sync", str(func), detail="a mask")
                one = index.new_zeros(index.numel(), dtype=torch.int64)
                positions += [one] * index.dim()
            else:
                positions.append(index)
        return positions

    def _to_host(self, tensor: Tensor, kwargs: dict[str, Any]) -> Tensor:
        self.ledger.add("kernel", "copy to the host", read=tensor.nbytes)
        values = self._on_host(tensor, kwargs.get("dtype") or tensor.dtype)
        return self._pin(values) if kwargs.get("non_blocking") else values

    def _on_host(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        zeros = torch.zeros(tensor.shape, dtype=dtype)
        return zeros if self._answer is None else self._answer(zeros)

    def _pin(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        self._pinned[storage._cdata] = StorageWeakRef(storage)
        return tensor

    def _is_pinned(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._pinned


@contextmanager
def fake_cuda(answer: Answer | None = None) -> Iterator[FakeCuda]:
    """The device, and what of `torch.cuda` a machine without a driver lacks."""
    gpu = FakeCuda(answer)
    patches: list[tuple[Any, str, Any]] = [
        (torch.cuda, "_lazy_init", lambda: None),
        (torch.cuda, "Event", _Event),
        (torch.cuda, "Stream", partial(_Stream, gpu.ledger)),
        (torch.cuda, "current_stream", lambda device=None: _Stream(gpu.ledger)),
        (torch.cuda, "default_stream", lambda device=None: _Stream(gpu.ledger)),
        (torch.cuda, "stream", lambda stream: nullcontext()),
        (torch.cuda, "synchronize", lambda device=None: gpu.ledger.add("sync", "synchronize")),
        (torch.cuda, "is_bf16_supported", lambda *args, **kwargs: True),
        (torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
        (torch.Tensor, "record_stream", lambda tensor, stream: None),
        (torch.autograd, "grad", autograd.grad),
        (ThreadPoolExecutor, "submit", _run_at_once),
        (transfer, "pin_in_place", lambda values, owner: gpu._pin(values) is values),
        (dispatch, "KERNEL_TENSORS", {FakeTensor}),
        (dispatch, "launch", gpu.launch_kernel),
    ]
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", "Accessing the data pointer")
        for owner, name, value in patches:
            stack.enter_context(mock.patch.object(owner, name, value))
        stack.enter_context(gpu)
        yield gpu


class _Event:
    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def record(self, *args: Any) -> None: ...
    def synchronize(self) -> None: ...
    def query(self) -> bool:
        return True


class _Stream:
    def __init__(self, ledger: Ledger, *args: Any, **kwargs: Any) -> None:
        self._ledger = ledger

    def wait_stream(self, other: Any) -> None: ...
    def wait_event(self, event: Any) -> None: ...
    def synchronize(self) -> None:
        self._ledger.add("sync", "stream.synchronize")


def _run_at_once(pool: Any, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Future[Any]:
    done: Future[Any] = Future()
    done.set_result(function(*args, **kwargs))
    return done


def _empty_pages(func: Any, args: Any, kwargs: dict[str, Any]) -> Tensor:
    """Memory for a factory's result; zeros only where they are touched, however large they are."""
    if func is not aten.zeros.default:
        return func(*args, **kwargs)
    dtype = kwargs.get("dtype") or torch.get_default_dtype()
    pages = np.zeros(int(np.prod(args[0])) * dtype.itemsize, dtype=np.uint8)
    return torch.from_numpy(pages).view(dtype).view(args[0])


def _is_fake(value: Any) -> bool:
    return isinstance(value, FakeTensor)


def _is_mask(indices: Any) -> bool:
    """Whether a single mask on the device is the whole index."""
    return len(indices) == 1 and _is_fake(indices[0]) and indices[0].dtype == torch.bool


def _device_of(device: Any) -> str | None:
    return None if device is None else torch.device(device).type
