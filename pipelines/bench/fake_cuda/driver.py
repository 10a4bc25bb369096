"""What a library asks the CUDA runtime besides work, answered for one card that is not there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any, Final
from unittest import mock

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from pipelines.bench.fake_cuda import autograd

CARD: Final = SimpleNamespace(name="none", major=8, minor=0, total_memory=80 << 30)
ANSWERS: Final[dict[str, Callable[..., Any]]] = {
    "is_available": lambda: True,
    "device_count": lambda: 1,
    "current_device": lambda: 0,
    "set_device": lambda device: None,
    "get_device_properties": lambda device=None: CARD,
    "get_device_capability": lambda device=None: (CARD.major, CARD.minor),
    "empty_cache": lambda: None,
    "reset_peak_memory_stats": lambda device=None: None,
    "memory_allocated": lambda device=None: 0,
    "max_memory_allocated": lambda device=None: 0,
}


@contextmanager
def fake_driver() -> Iterator[None]:
    """Let an engine like DeepSpeed's work on the device; within `fake_cuda`."""
    to = nn.Module.to

    def to_device(module: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        """Moved once: fake parameters cannot be swapped for themselves."""
        there = all(isinstance(parameter, FakeTensor) for parameter in module.parameters())
        return module if there else to(module, *args, **kwargs)

    patches: list[tuple[Any, str, Any]] = [
        *((torch.cuda, name, answer) for name, answer in ANSWERS.items()),
        (nn.Module, "to", to_device),
        (torch.Tensor, "backward", autograd.backward),
        (torch._C, "_current_graph_task_id", autograd.graph_task_id),
        (torch._C, "_will_engine_execute_node", autograd.will_execute),
        (torch.autograd.Variable, "_execution_engine", autograd.ExecutionEngine()),
    ]
    with ExitStack() as stack:
        for owner, name, value in patches:
            stack.enter_context(mock.patch.object(owner, name, value))
        yield
