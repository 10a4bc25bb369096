"""A measured figure beside the most that it may be."""

from __future__ import annotations

from typing import NamedTuple


class BoundedFigure(NamedTuple):
    """One line of a table.

    Attributes:
        name: what is measured.
        figure: what was measured, in `unit`.
        bound: the most that it may be.
        unit: of both.
    """

    name: str
    figure: float
    bound: float
    unit: str

    @property
    def holds(self) -> bool:
        """Whether the bound is kept."""
        return self.figure <= self.bound
