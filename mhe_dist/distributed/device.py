"""Where a rank computes: the config decides (`scale.gpu`), never what the machine has.

Device, backend and environment follow from one word. The launcher asks, too, so torch is imported
when a device is wanted.
"""

from __future__ import annotations

import faulthandler
import os
import sys
from typing import TYPE_CHECKING, Final, Literal, NamedTuple

from mhe_dist.errors import UserError

if TYPE_CHECKING:
    import torch


class DeviceChoice(NamedTuple):
    """What follows from the word of the config.

    Attributes:
        kind: type of torch's device.
        backend: of the process group that carries tensors of that device.
        environment: of a process that is a rank, from its beginning. A rank without a GPU sees
            none: no library can put anything there.
    """

    kind: Literal["cpu", "cuda"]
    backend: Literal["gloo", "nccl"]
    environment: dict[str, str]


# Memory of tensors in pages of 2 MB instead of 4 KB, where the kernel allows that (`madvise` or
# `always`): one that is too large for the C library to keep is taken from the system anew in each
# step. The library reads this when a process begins.
_TUNABLES: Final = "GLIBC_TUNABLES"
_HUGE_PAGES: Final = os.environ.get(_TUNABLES, "glibc.malloc.hugetlb=1")
_CPU: Final = DeviceChoice("cpu", "gloo", {"CUDA_VISIBLE_DEVICES": "", _TUNABLES: _HUGE_PAGES})
_GPU: Final = DeviceChoice(
    "cuda",
    "nccl",
    {
        "NCCL_DEBUG": "WARN",
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",  # a lost rank ends the others, they do not hang
        "TORCH_NCCL_BLOCKING_WAIT": "0",
    },
)


def choose_device(gpu: bool) -> DeviceChoice:
    """Device, backend and environment of every rank; `gpu` is `scale.gpu`."""
    return _GPU if gpu else _CPU


def prepare_rank(gpu: bool) -> None:
    """Set the environment of this process, which is a rank and nothing else.

    If native code kills it by a signal, stderr says where Python was.
    """
    if not faulthandler.is_enabled() and sys.__stderr__ is not None:
        faulthandler.enable(sys.__stderr__)
    os.environ.update(choose_device(gpu).environment)


def rank_device(gpu: bool) -> torch.device:
    """The device of this rank: its GPU (that of its number on the node), or the CPU.

    Raises:
        UserError: a GPU is wanted, and there is none for this rank.
    """
    import torch

    if not gpu:
        return torch.device("cpu")
    number = int(os.environ.get("LOCAL_RANK", "0"))
    if not torch.cuda.is_available():
        raise UserError(
            "scale.gpu=true or --gpu, but torch sees no GPU here: install a driver and a CUDA "
            f"build of torch (this is {torch.__version__}), look at CUDA_VISIBLE_DEVICES "
            f"({os.environ.get('CUDA_VISIBLE_DEVICES', 'not set')}), or use the CPU "
            "(scale.gpu=false, no --gpu)"
        )
    if number >= (count := torch.cuda.device_count()):
        raise UserError(
            f"scale.gpu=true or --gpu, but rank {number} of this node has no GPU: torch sees "
            f"{count}. Start at most {count} ranks on it (scale.workers, --world-size, torchrun "
            "--nproc-per-node), or use the CPU (scale.gpu=false, no --gpu)"
        )
    return torch.device("cuda", number)


def numbered_device(device: torch.device) -> torch.device:
    """The device as its tensors name it: "cuda" without a number is the process's current GPU."""
    import torch

    if device.type != "cuda" or device.index is not None:
        return device
    return torch.device("cuda", torch.cuda.current_device())


def default_device() -> torch.device:
    """Where somebody's own loop computes, which has no config and names no device.

    It follows the process group, if there is one: one that carries no CUDA tensors belongs to a
    loop on CPUs. Without one it is this process's GPU, or the CPU where there is none.
    """
    import torch
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized() and "nccl" not in _backends():
        return torch.device("cpu")
    return rank_device(torch.cuda.is_available())


def _backends() -> str:
    """Backends of the default process group by device, such as "cpu:gloo,cuda:nccl"."""
    import torch.distributed as dist

    return str(dist.get_backend_config())
