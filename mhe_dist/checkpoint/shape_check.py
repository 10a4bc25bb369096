"""Refuses tensors whose names or shapes are not those that were expected."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from mhe_dist.errors import UserError

Shapes = dict[str, tuple[int, ...]]


def tensor_shapes(tensors: Mapping[str, Tensor]) -> Shapes:
    """Name -> shape."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def refuse_mismatch(
    expected: Shapes, found: Shapes, what: str, sides: tuple[str, str], limit: int = 10
) -> None:
    """Refuse tensors whose names or shapes are not the expected ones.

    Args:
        expected, found: name -> shape.
        what: first line of the message.
        sides: who has `expected`, and who `found`.
        limit: differences in the message.

    Raises:
        UserError: lists the first `limit` differences with both values.
    """
    wrong = [
        f"{name}: {sides[0]} has {expected.get(name, 'none')}, {sides[1]} {found.get(name, 'none')}"
        for name in sorted(expected.keys() | found.keys())
        if expected.get(name) != found.get(name)
    ]
    if wrong:
        more = [f"and {len(wrong) - limit} more"] if len(wrong) > limit else []
        raise UserError(f"{what}:\n  " + "\n  ".join(wrong[:limit] + more))
