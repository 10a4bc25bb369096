"""Describes the config models: each key, what it may hold, and the key nearest to a typo."""

from __future__ import annotations

import re
import types
from collections.abc import Iterator
from difflib import get_close_matches
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from mhe_dist.config.schema import Config
from mhe_dist.config.section import ConfigSection, section_of

_BOUNDS = {"gt": "greater than", "ge": "at least", "lt": "less than", "le": "at most"}


class ConfigKey(NamedTuple):
    """A key of the configuration: its dotted path and its field; a section if it holds keys."""

    path: str
    field: FieldInfo
    section: type[ConfigSection] | None


class ConfigEntry(NamedTuple):
    """A key of a resolved configuration; a required key has the default "(required)".

    `allowed` says what it may hold, in words.
    """

    path: str
    value: Any
    default: Any
    description: str
    allowed: str


def all_keys(model: type[ConfigSection] = Config, prefix: str = "") -> Iterator[ConfigKey]:
    """Every section and key under a model, a section before its keys, in the order of the file."""
    for name, field in model.model_fields.items():
        section = section_of(field.annotation)
        yield ConfigKey(prefix + name, field, section)
        if section:
            yield from all_keys(section, f"{prefix}{name}.")


def describe_config(config: Config) -> list[ConfigEntry]:
    """Every key that applies, with value, default and description, in the order of the models."""
    entries = []
    for key in all_keys():
        value = value_at(config, key.path)
        if key.section is None or value is None:
            default = "(required)" if key.field.is_required() else key.field.default
            entries.append(
                ConfigEntry(
                    key.path, value, default, key.field.description or "", describe_type(key)
                )
            )
    return [entry for entry in entries if _applies(config, entry.path)]


def describe_type(key: ConfigKey) -> str:
    """What a key may hold, to follow "must be"."""
    return _describe_annotation(key.field.annotation, key.field.metadata)


def without_items(path: str) -> str:
    """The path of a key without the numbers of items: `data.mix.weight` of `data.mix.0.weight`."""
    return re.sub(r"\.\d+(?=\.|$)", "", path)


def bracketed(path: str) -> str:
    """A path as it is shown: `data.mix[0].weight` for `data.mix.0.weight`."""
    return re.sub(r"\.(-?\d+)(?=\.|$)", r"[\1]", path)


def without_brackets(path: str) -> str:
    """The inverse of `bracketed`."""
    return re.sub(r"\[([^\[\].]*)\]", r".\1", path).removeprefix(".")


def suggest(path: str) -> list[str]:
    """Existing paths, at most three, that are like an unknown one; the likeliest first.

    A slip in one part of the path comes first, then a key of that name in another section.
    """
    known = {key.path: key for key in all_keys()}
    fixed: list[str] = []
    for part in path.split("."):
        if part.isdigit() and fixed:
            fixed.append(part)
            continue
        here = without_items(".".join(fixed))
        names = [name.split(".")[-1] for name in known if name.rpartition(".")[0] == here]
        near = [part] if part in names else get_close_matches(part, names, 1)
        if not near:
            break
        fixed += near
    else:
        return [bracketed(".".join(fixed))]
    name = path.rsplit(".", 1)[-1]
    same = [other for other in known if other.rsplit(".", 1)[-1] == name]
    others = [other for other in known if not path.startswith(f"{other}.")]
    return (same or get_close_matches(path, others, 3, 0.75))[:3]


def _describe_annotation(annotation: Any, metadata: list[Any]) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        inner = [
            m for a in arguments[1:] for m in (a.metadata if isinstance(a, FieldInfo) else [a])
        ]
        words = _describe_annotation(arguments[0], inner)
    elif origin in (Union, types.UnionType):
        words = " or ".join(
            "null" if a is type(None) else _describe_annotation(a, []) for a in arguments
        )
    elif origin is Literal and len(arguments) == 1:
        words = str(arguments[0])
    elif origin is Literal:
        words = f"one of {', '.join(map(str, arguments))}"
    elif origin is list:
        words = f"a list, each item {_describe_annotation(arguments[0], [])}"
    elif origin is tuple:
        words = f"a list of {len(arguments)}, each {_describe_annotation(arguments[0], [])}"
    elif origin is dict and arguments[1] is not Any:
        words = f"a block of keys, each with {_describe_annotation(arguments[1], [])}"
    elif section := section_of(annotation):
        words = f"a block of keys ({', '.join(section.model_fields)})"
    else:
        words = _describe_scalar(annotation, metadata)
    return words


def _describe_scalar(annotation: Any, metadata: list[Any]) -> str:
    nouns = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    words = nouns.get(annotation, "a block of keys")
    bounds = [
        f"{_BOUNDS[kind]} {getattr(limit, kind)}"
        for limit in metadata
        for kind in _BOUNDS
        if getattr(limit, kind, None) is not None
    ]
    patterns = [p for m in metadata if (p := getattr(m, "pattern", None)) is not None]
    words += "".join(f" of the form {pattern}" for pattern in patterns)
    words += " that is not empty" * any(getattr(m, "min_length", None) for m in metadata)
    return " ".join([words, " and ".join(bounds)]).strip()


def value_at(config: Config, path: str) -> Any:
    """What a dotted path holds; None if a block on the way is null."""
    value: Any = config
    for name in path.split("."):
        is_item = isinstance(value, list) and name.isdigit()
        value = value[int(name)] if is_item else getattr(value, name, None)
    return value


def _applies(config: Config, path: str) -> bool:
    """Whether every block around a key is there (not null) and the key is of its kind."""
    section: Any = config
    for name in path.split("."):
        if not isinstance(section, ConfigSection) or name in section.inapplicable(section.__dict__):
            return False
        section = getattr(section, name)
    return True
