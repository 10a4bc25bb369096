"""The least that a routed step must do: its matrix products, and one read and write of its rows.

Forward `z = e w^T`, backward `z w` and `z^T e`, for own heads and for extra heads, into buffers
that are allocated beforehand. No softmax, margin, norms, optimizer or exchange.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mhe_dist.heads.routed.mhs import MhsRoute


class _Product(NamedTuple):
    """Samples `e` `[T, c, D]`, the rows of units `[T]`, and buffers for the results."""

    units: Tensor
    e: Tensor
    rows: Tensor
    z: Tensor
    back: Tensor
    gradient: Tensor


class BareProducts:
    """The products of one planned step on one rank.

    Args:
        head: gives the layout of the rows and the drawn extra heads.
        step, labels: as `head.plan` takes them.
    """

    def __init__(self, head: MhsRoute, step: int, labels: Tensor) -> None:
        layout, self._width = head.layout, head.width
        self._store = torch.zeros(layout.heads, layout.length, self._width)
        heads = layout.locate(labels.flatten())[0]
        unique, counts = torch.unique(heads, return_counts=True)
        self._products = [
            self._product(part, int(count))
            for count in counts.unique()
            for part in unique[counts == count].split(head.bank.units_per_chunk)
        ]
        groups = layout.group_of(heads)
        for group in groups.unique().tolist():
            drawn, samples = head.draw(step, group), int((groups == group).sum())
            if len(drawn):
                self._products.append(self._product(drawn, samples, together=True))
        for product in self._products:  # allocates the pages of the rows before time is measured
            self._store.index_copy_(0, product.units, product.rows.view(-1, *self._store.shape[1:]))

    def _product(self, units: Tensor, samples: int, together: bool = False) -> _Product:
        """Each unit against its own samples, or all units as one matrix against all samples."""
        length = self._store.shape[1]
        count, rows = (1, len(units) * length) if together else (len(units), length)
        return _Product(
            units,
            torch.randn(count, samples, self._width),
            torch.zeros(count, rows, self._width),
            torch.zeros(count, samples, rows),
            torch.zeros(count, samples, self._width),
            torch.zeros(count, rows, self._width),
        )

    def run(self) -> None:
        """Compute all products once."""
        shape = (-1, *self._store.shape[1:])
        for units, e, rows, z, back, gradient in self._products:
            torch.index_select(self._store, 0, units, out=rows.view(shape))
            torch.bmm(e, rows.transpose(1, 2), out=z)
            torch.bmm(z, rows, out=back)
            torch.bmm(z.transpose(1, 2), e, out=gradient)
            self._store.index_copy_(0, units, gradient.view(shape))
