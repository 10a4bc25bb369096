"""Tensors by name that are not those that were wanted."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from mhe_dist.errors import UserError

Shapes = dict[str, tuple[int, ...]]


def shapes(tensors: Mapping[str, Tensor]) -> Shapes:
    """Name -> shape."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def refuse_mismatch(
    wanted: Shapes, found: Shapes, what: str, sides: tuple[str, str], show: int = 10
) -> None:
    """Refuse tensors whose names or shapes are not those wanted.

    Args:
        wanted, found: name -> shape.
        what: first line of the message.
        sides: who has `wanted`, and who `found`.
        show: differences in the message.

    Raises:
        UserError: lists the first `show` differences with both values.
    """
    wrong = [
        f"{name}: {sides[0]} has {wanted.get(name, 'none')}, {sides[1]} {found.get(name, 'none')}"
        for name in sorted(wanted.keys() | found.keys())
        if wanted.get(name) != found.get(name)
    ]
    if wrong:
        more = [f"and {len(wrong) - show} more"] if len(wrong) > show else []
        raise UserError(f"{what}:\n  " + "\n  ".join(wrong[:show] + more))
