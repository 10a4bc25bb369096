"""Kernels loop up to an argument in the interpreter of any Triton, with any NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

from mhe_dist.kernels.interpreter import mend_interpreter


@triton.jit
def _count_kernel(turns, count):
    total = tl.load(turns)
    for _ in range(count):
        total += 1
    tl.store(turns, total)


def as_triton_before_3_8(tensor: Any, *scope: Any) -> None:
    """Its bound of a loop, and what NumPy 2.4 says to that."""

    def bound(self: Any) -> int:
        if np.ndim(self.handle.data):
            raise TypeError("only 0-dimensional arrays can be converted to Python scalars")
        return int(self.handle.data)

    _PATCH(tensor, *scope)
    tensor.__index__ = bound


_PATCH: Any = interpreter._patch_lang_tensor


def turns_of(count: int) -> int:
    turns = torch.zeros(1, dtype=torch.int32)
    _count_kernel[(1,)](turns, count)
    return int(turns)


def test_it_fails_before_and_counts_after(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interpreter, "_patch_lang_tensor", as_triton_before_3_8)
    with pytest.raises(interpreter.InterpreterError, match="only 0-dimensional"):
        turns_of(7)
    mend_interpreter()
    assert turns_of(7) == 7 and turns_of(0) == 0
    mend_interpreter()
    assert turns_of(5) == 5
