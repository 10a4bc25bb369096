"""What is wrong with a configuration: a mistake, its wording, and the error that lists them all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from pydantic_core import ErrorDetails

from mhe_dist.config.describe import all_keys, bracketed, describe_type, suggest, without_items
from mhe_dist.config.section import INAPPLICABLE, OWN_WORDS, TRUTH_VALUE, Inapplicable
from mhe_dist.errors import UserError, counted

RENAMED: dict[str, str] = {}
"""Dotted path of each key that a release removed or renamed -> what takes its place."""


class ConfigMistake(NamedTuple):
    """One mistake.

    Attributes:
        path: dotted path of the key, items of lists by their numbers; empty if it is about several
            keys or the file as a whole.
        value: what the key holds; None if nothing.
        message: what is wrong and what is right.
        source: `file:line` or "command line"; empty if there is no one place.
    """

    path: str
    value: Any
    message: str
    source: str = ""

    def __str__(self) -> str:
        """`path=value (source): message`, where the path is `data.mix[0].weight`."""
        return f"{self.head}: {self.message}" if self.head else self.message

    @property
    def head(self) -> str:
        """What the message is about: `path=value (source)`."""
        shown = "" if self.value is None or isinstance(self.value, dict) else f"={self.value}"
        where = f"({self.source})" if self.source and self.path else self.source
        return " ".join(part for part in (bracketed(self.path) + shown, where) if part)


class ConfigErrors(UserError):
    """All mistakes of a configuration, in `mistakes`."""

    def __init__(self, mistakes: Sequence[ConfigMistake]) -> None:
        self.mistakes = list(mistakes)
        title = f"{counted(len(self.mistakes), 'mistake')} in the configuration"
        super().__init__("\n  ".join([f"{title}:", *map(str, self.mistakes)]))


def explain_error(detail: ErrorDetails, sources: dict[str, str]) -> ConfigMistake:
    """The mistake behind one finding of pydantic.

    Args:
        detail: the finding.
        sources: where each key was set, by its dotted path.
    """
    parts, value = [str(part) for part in detail["loc"]], detail["input"]
    known = {key.path: key for key in all_keys()}
    heads = [without_items(".".join(parts[:depth])) for depth in range(1, len(parts) + 1)]
    if detail["type"] == "extra_forbidden" or heads[0] not in known:
        return _unknown(parts, value, sources)
    if detail["type"] == INAPPLICABLE:
        context = detail["ctx"]
        reason = Inapplicable(context["tag"], context["chosen"], context["owners"])
        return explain_inapplicable(parts, value, reason, sources)
    key = known[[head for head in heads if head in known][-1]]
    path = ".".join(parts)
    if detail["type"] == "missing":
        if not parts[-1].isdigit():
            return ConfigMistake(
                path, None, f"is required: {key.field.description}", source_of(path, sources)
            )
        path = ".".join(parts[:-1])  # a list that is too short
    message = f"must be {describe_type(key)}"
    if detail["type"] == OWN_WORDS:
        message = detail["msg"]
    elif detail["type"] == "string_type" and isinstance(value, bool | int | float):
        kind = "truth value" if isinstance(value, bool) else "number"
        message += f", but YAML reads this as a {kind}: quote it"
    elif detail["type"] == TRUTH_VALUE:
        message += ", but YAML reads this (on, yes, off, no) as a truth value: write the number"
    return ConfigMistake(path, value, message, source_of(path, sources))


def explain_inapplicable(
    parts: list[str], value: Any, reason: Inapplicable, sources: dict[str, str]
) -> ConfigMistake:
    """The mistake of a key that is of another kind than the chosen one."""
    path, value = _innermost(parts, value)
    message = reason.explain(".".join(parts[:-1]))
    return ConfigMistake(path, value, message, source_of(path, sources))


def _innermost(parts: list[str], value: Any) -> tuple[str, Any]:
    """A path followed down while there is no choice: `hed.kind` with its value, not `hed`."""
    while isinstance(value, dict) and len(value) == 1:
        ((name, value),) = value.items()
        parts = [*parts, str(name)]
    return ".".join(parts), value


def _unknown(parts: list[str], value: Any, sources: dict[str, str]) -> ConfigMistake:
    """The mistake of a key that does not exist."""
    path, value = _innermost(parts, value)
    message = "there is no such key"
    if any("." in part for part in parts) and path in {key.path for key in all_keys()}:
        block, _, name = path.rpartition(".")
        message = f"a file has no dots in its keys; write `{block}:` and below it `{name}: ...`"
        return ConfigMistake(path, value, message, source_of(path, sources))
    if path in RENAMED:
        message += f" any more; its successor is {RENAMED[path]}"
    elif near := suggest(path):
        message += f"; did you mean {' or '.join(near)}?"
    else:
        around = [key.path.rpartition(".") for key in all_keys()]
        here = path.rpartition(".")[0]
        names = ", ".join(name for block, _, name in around if block == without_items(here))
        message += f"; {bracketed(here) or 'the configuration'} has {names}" if names else ""
    return ConfigMistake(path, value, message, source_of(path, sources))


def source_of(path: str, sources: Mapping[str, str]) -> str:
    """Where a key, or else the nearest block around it, or else a key below it, was set."""
    around = path
    while around:
        if around in sources:
            return sources[around]
        around = around.rpartition(".")[0]
    return next((where for key, where in sources.items() if key.startswith(f"{path}.")), "")
