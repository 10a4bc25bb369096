"""Which tensors go to a kernel: those on CUDA, where Triton is installed; eager code does the rest.

The modules of the kernels import Triton, so callers import them after they have asked here.
"""

from __future__ import annotations

import os
from functools import cache
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

SWITCH = "MHE_KERNELS"  # the environment variable that turns kernels off
MAX_WIDTH = 1024  # of rows: a program holds whole ones
# Of a unit of a bank: a program has four rows of that width at least, and a grid of CUDA 65,535
# programs at most for a unit.
MAX_UNIT_ROWS = 1 << 17
MAX_LENGTH = 4096  # of heads: a program holds a sample's logits over one
# Types of the tensors that kernels compute on. Other subclasses of Tensor stand for something else.
# A device that computes nothing adds its own, and takes the place of `launch`.
KERNEL_TENSORS: set[type] = {Tensor}


class KernelTraffic(NamedTuple):
    """Bytes of device memory that a launch reads and writes."""

    read: int
    written: int


def use_kernels(*tensors: Tensor) -> bool:
    """Whether kernels compute on all of `tensors`.

    `MHE_KERNELS=0` in the environment turns all kernels off.
    """
    plain_cuda = all(type(tensor) in KERNEL_TENSORS and tensor.is_cuda for tensor in tensors)
    return plain_cuda and _triton_installed() and os.environ.get(SWITCH) != "0"


def launch(
    kernel: Any, grid: tuple[int, ...], traffic: KernelTraffic, *arguments: Any, **constants: Any
) -> None:
    """Launch a Triton kernel.

    Args:
        kernel: what `triton.jit` made.
        grid: its programs.
        traffic: what it moves, for those who count.
        *arguments, **constants: of the kernel; the first one is a tensor.
    """
    # Triton launches on the process's current GPU, which need not be that of the tensors.
    with torch.cuda.device_of(arguments[0]):
        kernel[grid](*arguments, **constants)


@cache
def _triton_installed() -> bool:
    return find_spec("triton") is not None
