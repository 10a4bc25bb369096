"""Which tensors go to a kernel: those on CUDA, where Triton is installed; eager code does the rest.

The modules of the kernels import Triton, so callers import them after they have asked here.
"""

from __future__ import annotations

import os
from functools import cache
from importlib.util import find_spec

from torch import Tensor

SWITCH = "MHE_KERNELS"  # the environment variable that turns kernels off
MAX_WIDTH = 1024  # of rows: a program holds whole ones


def use_kernels(*tensors: Tensor) -> bool:
    """Whether kernels compute on all of `tensors`.

    Never on subclasses of Tensor: they stand for something else, such as a device that computes
    nothing. `MHE_KERNELS=0` in the environment turns all kernels off.
    """
    plain_cuda = all(type(tensor) is Tensor and tensor.is_cuda for tensor in tensors)
    return plain_cuda and _triton_installed() and os.environ.get(SWITCH) != "0"


@cache
def _triton_installed() -> bool:
    return find_spec("triton") is not None
