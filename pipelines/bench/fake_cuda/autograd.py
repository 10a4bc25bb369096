"""Backward passes without autograd's engine, which asks a CUDA build's driver for its streams.

The nodes of the graph are called from Python, in topological order. Of the hooks only those are
called that wait for the gradient of a leaf.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

Root = tuple[Any, int, Tensor]  # a node, which of its outputs, the gradient that arrives there


def backward(loss: Tensor) -> None:
    """`loss.backward()`: every leaf gets its `grad`, and what waits for that is called."""
    for leaf, gradient in _leaf_gradients([_root(loss, torch.ones_like(loss))]):
        leaf.grad = gradient if leaf.grad is None else leaf.grad + gradient
        hooks: Any = getattr(leaf, "_post_accumulate_grad_hooks", None) or {}
        for hook in list(hooks.values()):
            hook(leaf)


def grad(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], grad_outputs: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """`torch.autograd.grad` with respect to leaves."""
    roots = [_root(out, given) for out, given in zip(outputs, grad_outputs, strict=True)]
    found = {id(leaf): gradient for leaf, gradient in _leaf_gradients(roots)}
    return tuple(found[id(leaf)] for leaf in inputs)


def _root(output: Tensor, gradient: Tensor) -> Root:
    return output.grad_fn, output.output_nr, gradient


def _leaf_gradients(roots: list[Root]) -> Iterator[tuple[Tensor, Tensor]]:
    """Leaves, each with the sum of its gradients."""
    arriving: dict[Any, dict[int, Tensor]] = defaultdict(dict)
    for node, output, gradient in roots:
        _add(arriving[node], output, gradient)
    waiting = _count_edges(list(arriving))
    ready = [node for node in arriving if not waiting[node]]
    while ready:
        node = ready.pop()
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
