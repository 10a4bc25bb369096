"""The space of a sweep: keys of the config, each with the values to try or a range to draw from."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import yaml

from mhe_dist.config.describe import all_keys
from mhe_dist.errors import UserError, list_choices

RANGES: Final = ("uniform", "loguniform", "randint", "lograndint")
"""Kinds of ranges, by Ray Tune's names: `{kind: [lowest, highest]}`, both included."""
_EXAMPLE: Final = "optim.lr: {loguniform: [0.05, 0.5]}, or head.mhs.extra_heads: [2, 6, 16]"

Space = dict[str, list[Any] | dict[str, list[Any]]]
"""Key of the config -> the values to try, or `{kind: [lowest, highest]}`."""


def read_space(file: str) -> Space:
    """Read the YAML of a space.

    Raises:
        UserError: it is no such file, or a key has neither values nor a range, or stands twice.
    """
    try:
        text = Path(file).read_text()
        content, repeated = yaml.safe_load(text), list(_repeated(yaml.compose(text)))
    except OSError as error:
        raise UserError(
            f"{file}: {error.strerror}; it should hold lines such as {_EXAMPLE}"
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{file} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict) or not content:
        raise UserError(f"{file}: it should hold lines such as {_EXAMPLE}")
    space: Space = {}
    for key, values in _flatten(content):
        repeated += [key] if key in space else []
        space[key] = _read_values(f"{file}: {key}", values)
    if repeated:
        raise UserError(f"{file}: {repeated[0]} stands there twice; keep one")
    return space


def _repeated(node: yaml.Node | None, prefix: str = "") -> Iterator[str]:
    """Keys that stand twice in one block; the loader keeps the last one and says nothing."""
    seen = set()
    for name, value in node.value if isinstance(node, yaml.MappingNode) else ():
        key = f"{prefix}{name.value}"
        if key in seen:
            yield key
        seen.add(key)
        yield from _repeated(value, f"{key}.")


def _flatten(content: dict[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and what they hold; blocks may be nested as in a config."""
    sections = {key.path for key in all_keys() if key.section}
    for name, values in content.items():
        key = f"{prefix}{name}"
        if key in sections and isinstance(values, dict):
            yield from _flatten(values, f"{key}.")
        else:
            yield key, values


def _read_values(where: str, values: Any) -> list[Any] | dict[str, list[Any]]:
    if isinstance(values, list) and values:
        return values
    if not isinstance(values, dict) or len(values) != 1:
        raise UserError(f"{where}: give a list of values, or one range, such as {_EXAMPLE}")
    ((kind, bounds),) = values.items()
    if kind not in RANGES:
        raise UserError(f"{where}: no range is called {kind}; {list_choices(str(kind), RANGES)}")
    whole = kind.endswith("randint")
    if not _are_bounds(bounds, int if whole else (int, float), kind.startswith("log")):
        numbers = "whole numbers" if whole else "numbers"
        above = " above 0" if kind.startswith("log") else ""
        raise UserError(f"{where}: {kind} takes two {numbers}{above}, [lowest, highest]")
    return {kind: bounds}


def _are_bounds(bounds: Any, kinds: Any, is_log: bool) -> bool:
    return (
        isinstance(bounds, list)
        and len(bounds) == 2
        and all(isinstance(each, kinds) and not isinstance(each, bool) for each in bounds)
        and all(math.isfinite(each) and (each > 0 or not is_log) for each in bounds)
        and bounds[0] < bounds[1]
    )


def count_trials(space: Space, samples: int) -> int:
    """Number of trials: every combination of the values, `samples` times."""
    return samples * math.prod(len(each) for each in space.values() if isinstance(each, list))


def has_ranges(space: Space) -> bool:
    """Whether anything is drawn: then more samples are other trials."""
    return any(isinstance(each, dict) for each in space.values())


def example_overrides(space: Space) -> Iterator[list[str]]:
    """Overrides that together hold every value of every list, and both ends of every range."""
    values = {
        key: each if isinstance(each, list) else next(iter(each.values()))
        for key, each in space.items()
    }
    for number in range(max(map(len, values.values()))):
        yield as_overrides({key: each[min(number, len(each) - 1)] for key, each in values.items()})


def as_overrides(drawn: Mapping[str, Any]) -> list[str]:
    """Settings as `key=value`, as they are typed on a command line."""
    return [
        f"{key}={value if isinstance(value, str) else json.dumps(value)}"
        for key, value in drawn.items()
    ]


def to_tune(space: Space) -> dict[str, Any]:
    """The space as Ray Tune takes it."""
    from ray import tune

    def _domain(values: Sequence[Any] | dict[str, list[Any]]) -> Any:
        if isinstance(values, list):
            return tune.grid_search(values)
        assert isinstance(values, dict)
        ((kind, (lowest, highest)),) = values.items()
        return getattr(tune, kind)(lowest, highest + kind.endswith("randint"))

    return {key: _domain(values) for key, values in space.items()}
