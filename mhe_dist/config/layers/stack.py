"""Lays one layer of a configuration on another, and fills in its `${...}`."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any, NamedTuple, get_origin

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import GrammarParseError, InterpolationKeyError, OmegaConfBaseException

from mhe_dist.config.describe import all_keys, suggest, without_brackets, without_items
from mhe_dist.config.mistakes import ConfigErrors, ConfigMistake, source_of
from mhe_dist.errors import first_line


class Override(NamedTuple):
    """A change of a configuration.

    Attributes:
        path: dotted, of a key or an item: `optim.lr`, `data.mix.0.weight`.
        value: plain containers and scalars; a dict changes the keys that it has (see `_on_top`).
        source: "command line"; empty for a value of Python.
    """

    path: str
    value: Any
    source: str = ""


def overrides_of(sections: Mapping[str, Any]) -> list[Override]:
    """What a caller in Python gives: values by the names of their sections."""
    return [Override(str(name), _plain(values)) for name, values in sections.items()]


def parse_override(text: str, source: str) -> Override:
    """Read a `key=value`; the value is YAML, but for a key that holds text.

    Raises:
        ValueError: it is none.
    """
    key, equals, raw = text.partition("=")
    path = without_brackets(key)
    if not equals or not all(path.split(".")) or re.search(r"[\[\]]", path):
        hint = f"; did you mean {likely[0]}=...?" if (likely := suggest(path)) else ""
        raise ValueError(f"`{text}` is not of the form key=value{hint}")
    if _is_text(path) and raw[:1] not in ("'", '"') and raw != "null":
        return Override(path, raw, source)
    try:
        value = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={raw}"]))
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or error
        raise ValueError(f"`{text}`: the value is not YAML: {problem}") from None
    except OmegaConfBaseException:
        return Override(path, raw, source)  # fill_in will say what is wrong
    assert isinstance(value, dict)
    return Override(path, value["value"], source)


def put_on(
    values: dict[str, Any], overrides: Iterable[Override]
) -> tuple[dict[str, Any], list[ConfigMistake]]:
    """Nested values with overrides on top, the last one uppermost; and those that cannot be."""
    mistakes = []
    for override in overrides:
        layer = override.value
        for name in reversed(override.path.split(".")):
            layer = {name: layer}
        try:
            values = _on_top(values, layer, "")
        except IndexError as error:
            path, value, source = override
            mistakes.append(ConfigMistake(path, value, str(error), source))
    return values, mistakes


def fill_in(values: dict[str, Any], sources: Mapping[str, str]) -> dict[str, Any]:
    """Nested values with each `${...}` replaced by what it stands for.

    Raises:
        ConfigErrors: one stands for nothing, or something is no value of YAML.
    """
    try:
        config = OmegaConf.create(values)
        filled = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        path = without_brackets(error.full_key or "")
        value: Any = values
        for name in path.split("."):
            value = _child(value, name)
        found = ConfigMistake(path, value, explain_omegaconf(error), source_of(path, sources))
        raise ConfigErrors([found]) from None
    assert isinstance(filled, dict)
    return {str(key): value for key, value in filled.items()}


def explain_omegaconf(error: OmegaConfBaseException) -> str:
    """What OmegaConf finds wrong, in a line, with the cure where it is one of few."""
    message = first_line(error.msg or error)
    if isinstance(error, GrammarParseError):
        message = f"is no valid ${{...}}: {message}"
    elif isinstance(error, InterpolationKeyError):
        message += (
            "; ${...} takes a key that the file or an override sets; an environment variable is "
            "$NAME in a path, ${oc.env:NAME} elsewhere"
        )
    return message


def _plain(value: Any) -> Any:
    """A copy of what Python gives, with a path as its text and containers as YAML has them."""
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _is_text(path: str) -> bool:
    return any(
        key.path == without_items(path) and key.field.annotation is str for key in all_keys()
    )


def _on_top(below: Any, layer: Any, path: str) -> Any:
    """A layer on top of what lies below it at a path: dicts by their keys, lists by numbers.

    Of a dict whose names are the user's, such as `model.kwargs`, an empty one leaves none.

    Raises:
        IndexError: there is no such item.
    """
    if not isinstance(layer, dict) or (not layer and path in _dicts()):
        return layer
    if layer and all(re.fullmatch(r"-?\d+", str(name)) for name in layer):
        items = _default_items(path) if below is None else below
        if isinstance(items, list):
            return _items_on_top(items, layer, path)
    below = below if isinstance(below, dict) else {}
    if path == "scale":
        below = _as_range(below) if isinstance(layer.get("workers"), dict) else below
        below = _as_numbers(below) if "min_workers" in layer else below
    prefix = f"{path}." if path else ""
    above = {name: _on_top(below.get(name), v, f"{prefix}{name}") for name, v in layer.items()}
    return {**below, **above}


@cache
def _dicts() -> frozenset[str]:
    """The keys that hold a dict of the user's own names."""
    return frozenset(key.path for key in all_keys() if get_origin(key.field.annotation) is dict)


def _items_on_top(items: list[Any], layer: dict[Any, Any], path: str) -> list[Any]:
    above = dict(enumerate(items))
    for name, value in layer.items():
        if int(name) not in above:
            has = f"{len(items)} items, numbered from 0" if items else "no items"
            raise IndexError(f"{path} has {has}; to have others, give the whole list: {path}=[...]")
        above[int(name)] = _on_top(above[int(name)], value, f"{path}.{name}")
    return list(above.values())


def _default_items(path: str) -> list[Any] | None:
    """The items that a list has by default; None if the path is not that of a list."""
    default = next((key.field.default for key in all_keys() if key.path == path), None)
    return list(default) if isinstance(default, list | tuple) else None


def _as_range(scale: dict[str, Any]) -> dict[str, Any]:
    """A `scale` whose number of workers is a range, so that a range lies on it as a whole."""
    workers = scale.get("workers")
    if isinstance(workers, dict):
        return scale
    found = {"min": scale.get("min_workers"), "max": workers}
    others = {key: value for key, value in scale.items() if key != "min_workers"}
    return {**others, "workers": {end: n for end, n in found.items() if n is not None}}


def _as_numbers(scale: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `_as_range`."""
    workers = scale.get("workers")
    if not isinstance(workers, dict):
        return scale
    return {**scale, "workers": workers.get("max"), "min_workers": workers.get("min")}


def _child(value: Any, name: str) -> Any:
    """What a key or an item of nested values holds; None if there is none."""
    try:
        return value[int(name)] if isinstance(value, list) else value.get(name)
    except (AttributeError, IndexError, ValueError):
        return None
