"""Numbers as pages write them: percentages the same way in text, tables and charts."""

from __future__ import annotations

import re
from typing import Any, Final

_SHARE: Final = re.compile(
    r"(^|[/ ])(accuracy|rank\d+|top\d+|chance|knn|linear|majority"
    r"|(tar|tpir|p|recall|ndcg|psp)@\S+?)"
    r"(_std|_interval|_low|_high|_nearest)?$"
)


def is_share(name: str) -> bool:
    """Whether a figure of an evaluation is a share, which is written in percent."""
    return bool(_SHARE.search(name))


def format_share(value: float) -> str:
    """A share as percentage: 0.8631 is `86.31%`."""
    return f"{value:.2%}"


def format_value(value: Any) -> str:
    """A setting or figure as a cell of a table shows it."""
    if isinstance(value, list):
        return ", ".join(map(format_value, value))
    if isinstance(value, float):
        return f"{value:,.0f}" if value == int(value) and abs(value) >= 1 else f"{value:.5g}"
    return f"{value:,}" if type(value) is int else str(value)


def format_figure(name: str, value: Any) -> str:
    """A figure of an evaluation as a cell of a table shows it; shares in percent."""
    if is_share(name) and isinstance(value, list):
        return " to ".join(map(format_share, value))
    if is_share(name) and isinstance(value, float):
        return format_share(value)
    return format_value(value)


def format_power(value: float) -> str:
    """A small number by its power of ten: 0.001 is `1e-3`."""
    digits, _, power = f"{value:.1e}".partition("e")
    return f"{digits.removesuffix('.0')}e{int(power)}"


def format_tick(value: float) -> str:
    """A number beside an axis, short: `1,500`, `20k`, `3M`."""
    for size, letter in ((1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            unit = 1e6 if letter == "M" else 1e3
            return f"{value / unit:g}{letter}"
    return f"{value:,.6g}"
