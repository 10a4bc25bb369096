"""What is wrong with a configuration: one mistake, and the error that lists all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from mhe_dist.errors import UserError


class ConfigMistake(NamedTuple):
    """One mistake.

    Attributes:
        path: dotted path of the key; empty if it is about several keys or the file as a whole.
        value: what the key holds; None if nothing.
        message: what is wrong and what is right.
        source: `file:line` or "command line"; empty if there is no one place.
    """

    path: str
    value: Any
    message: str
    source: str = ""

    def __str__(self) -> str:
        """`path=value (source): message`."""
        shown = "" if self.value is None or isinstance(self.value, dict) else f"={self.value}"
        where = f"({self.source})" if self.source and self.path else self.source
        head = " ".join(part for part in (self.path + shown, where) if part)
        return f"{head}: {self.message}" if head else self.message


class ConfigErrors(UserError):
    """All mistakes of a configuration, in `mistakes`."""

    def __init__(self, mistakes: Sequence[ConfigMistake]) -> None:
        self.mistakes = list(mistakes)
        count = len(self.mistakes)
        title = f"{count} mistake{'s' if count > 1 else ''} in the configuration"
        super().__init__("\n  ".join([f"{title}:", *map(str, self.mistakes)]))
