"""Backward passes without autograd's engine, which asks a CUDA build's driver for its streams.

The nodes of the graph are called from Python, in the order that the engine takes. Of the hooks only
those are called that wait for the gradient of a leaf. What a library asks the engine meanwhile is
answered here, too: DeepSpeed's ask which leaves a pass will reach, and to be called at its end.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

from mhe_dist.errors import UserError

Root = tuple[Any, int, Tensor]  # a node, which of its outputs, the gradient that arrives there


@dataclass
class _BackwardPass:
    """One that runs: the nodes that it will call, and what is to be called at its end."""

    nodes: set[Any] = field(default_factory=set)
    at_end: list[Callable[[], None]] = field(default_factory=list)


_RUNNING: list[_BackwardPass] = []


@contextmanager
def _running() -> Iterator[_BackwardPass]:
    _RUNNING.append(_BackwardPass())
    try:
        yield _RUNNING[-1]
    finally:
        _RUNNING.pop()


def missing_driver() -> str:
    """Why no graph can be built on the device here, with the cure; empty where one can.

    torch before 2.10 asks the driver for a stream when it makes a node of the graph, and aborts the
    process where there is no driver.
    """
    if torch.version.cuda is None or torch.__version__ >= "2.10" or torch.cuda.is_available():
        return ""
    return (
        f"torch {torch.__version__} counts the steps of a GPU only where there is one: install "
        "torch 2.10 or newer"
    )


def require_driver() -> None:
    """Raise UserError where no graph can be built on the device here."""
    if missing := missing_driver():
        raise UserError(missing)


def graph_task_id() -> int:
    """`torch._C._current_graph_task_id`: -1 while no backward pass runs."""
    return len(_RUNNING) - 1


def will_execute(node: Any) -> bool:
    """`torch._C._will_engine_execute_node`."""
    return node in _RUNNING[-1].nodes


class ExecutionEngine:
    """`torch.autograd.Variable._execution_engine`."""

    @staticmethod
    def queue_callback(callback: Callable[[], None]) -> None:
        """Call at the end of the backward pass that runs."""
        _RUNNING[-1].at_end.append(callback)


def backward(loss: Tensor, **_kwargs: Any) -> None:
    """`loss.backward()`: every leaf gets its `grad`, and what waits for that is called."""
    with _running() as running:
        for leaf, gradient in _leaf_gradients([_root(loss, torch.ones_like(loss))], running):
            leaf.grad = gradient if leaf.grad is None else leaf.grad + gradient
            hooks: Any = getattr(leaf, "_post_accumulate_grad_hooks", None) or {}
            for hook in list(hooks.values()):
                hook(leaf)
        for callback in running.at_end:
            callback()


def grad(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], grad_outputs: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """`torch.autograd.grad` with respect to leaves."""
    roots = [_root(out, given) for out, given in zip(outputs, grad_outputs, strict=True)]
    with _running() as running:
        found = {id(leaf): gradient for leaf, gradient in _leaf_gradients(roots, running)}
    return tuple(found[id(leaf)] for leaf in inputs)


def _root(output: Tensor, gradient: Tensor) -> Root:
    return output.grad_fn, output.output_nr, gradient


def _leaf_gradients(roots: list[Root], running: _BackwardPass) -> Iterator[tuple[Tensor, Tensor]]:
    """Leaves, each with the sum of its gradients."""
    arriving: dict[Any, dict[int, Tensor]] = defaultdict(dict)
    for node, output, gradient in roots:
        _add(arriving[node], output, gradient)
    waiting = _count_edges(list(arriving))
    running.nodes = set(waiting) | set(arriving)
    ready = [node for node in arriving if not waiting[node]]
    while ready:
        # As the engine chooses: leaves first, then what the forward pass made last.
        node = max(ready, key=lambda waiting_node: waiting_node._sequence_nr())
        ready.remove(node)
        given = arriving.pop(node, {})
        if hasattr(node, "variable"):
            yield node.variable, given[0]
            continue
        for (child, output), gradient in zip(node.next_functions, _call(node, given), strict=False):
            if child is None:
                continue
            if gradient is not None:
                _add(arriving[child], output, _fit(gradient, child, output))
            waiting[child] -= 1
            if not waiting[child]:
                ready.append(child)


def _count_edges(roots: list[Any]) -> Counter[Any]:
    """Of each node, the edges that lead to it."""
    edges: Counter[Any] = Counter()
    seen, stack = set(roots), list(roots)
    while stack:
        for child, _ in stack.pop().next_functions:
            if child is not None:
                edges[child] += 1
                if child not in seen:
                    seen.add(child)
                    stack.append(child)
    return edges


def _add(gradients: dict[int, Tensor], output: int, gradient: Tensor) -> None:
    known = gradients.get(output)
    gradients[output] = gradient if known is None else known + gradient


def _fit(gradient: Tensor, child: Any, output: int) -> Tensor:
    """With the shape and type that the child's output has, as the engine makes it."""
    wanted = child._input_metadata[output]
    if tuple(gradient.shape) != tuple(wanted.shape):
        gradient = gradient.sum_to_size(tuple(wanted.shape))
    return gradient.to(wanted.dtype)


@torch.no_grad()
def _call(node: Any, given: dict[int, Tensor]) -> tuple[Any, ...]:
    arguments = [given.get(output) for output in range(len(node._input_metadata))]
    call = node.apply if isinstance(node, BackwardCFunction) else node
    found = call(*arguments)
    return found if isinstance(found, tuple) else (found,)
