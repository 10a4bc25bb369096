"""In Triton's interpreter each tensor of a launch ends at a page that nothing may touch.

A load or store beyond a tensor ends the process there; elsewhere it would go unnoticed.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from typing import Any

import pytest
import torch
from torch import Tensor

from mhe_dist.kernels import dispatch

PROT_NONE = 0


def guarded(tensor: Tensor) -> Tensor:
    """A copy in memory that ends where the tensor ends; of a tensor with gaps, the tensor."""
    if not tensor.is_contiguous() or not tensor.numel():
        return tensor
    size = -(-tensor.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, size + mmap.PAGESIZE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    end = ctypes.c_void_p(address + size)
    assert libc.mprotect(end, ctypes.c_size_t(mmap.PAGESIZE), PROT_NONE) == 0
    rest = size - tensor.nbytes
    copy = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=rest)
    return copy.view(tensor.shape).copy_(tensor)


@pytest.fixture(autouse=True)
def guard_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Launch kernels on guarded copies; what they store is copied back."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    from mhe_dist.kernels.interpreter import mend_interpreter

    mend_interpreter()
    launch = dispatch.launch

    def launch_guarded(kernel: Any, grid: Any, traffic: Any, *arguments: Any, **more: Any) -> None:
        tensors = {id(x): x for x in arguments if isinstance(x, Tensor)}
        copies = {key: guarded(tensor) for key, tensor in tensors.items()}
        launch(kernel, grid, traffic, *(copies.get(id(x), x) for x in arguments), **more)
        for key, tensor in tensors.items():
            tensor.copy_(copies[key])

    monkeypatch.setattr(dispatch, "launch", launch_guarded)
