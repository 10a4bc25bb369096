"""Reads a run's configuration: defaults < file or dict < overrides; all mistakes at once."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from mhe_dist.config.describe import value_at, without_items
from mhe_dist.config.layers.stack import Override, fill_in, overrides_of, parse_override, put_on
from mhe_dist.config.layers.yaml_file import read_yaml_file
from mhe_dist.config.mistakes import (
    ConfigErrors,
    ConfigMistake,
    explain_error,
    explain_inapplicable,
    source_of,
)
from mhe_dist.config.schema import CHECKED_LATER, Config, validate_combinations
from mhe_dist.config.section import applicable_values, inapplicable_keys
from mhe_dist.config.stored import stored_config
from mhe_dist.config.write import config_to_dict

COMMAND_LINE = "command line"
ConfigLike = str | os.PathLike[str] | Mapping[str, Any] | Config
"""A YAML file or the name of one that comes with mhe, a dict of sections, or a whole config."""
Check = Callable[[Config], Iterable[tuple[str, str]]]


def load_config(
    base: str | Mapping[str, Any] | None,
    overrides: Sequence[str] = (),
    checks: Iterable[Check] = (),
    sections: Mapping[str, Any] | None = None,
) -> Config:
    """Read a configuration.

    Where an override changes a `kind`, keys of the base that belong to the former kind are left
    out. Any other key that does not belong to the chosen kind is a mistake.

    Args:
        base: YAML file, or the name of a config that comes with mhe, such as "quickstart", or
            values by section; None for defaults and overrides alone.
        overrides: `key=value` each; the value is YAML, except that a key which holds text takes
            it as it stands. `data.mix[0].weight=2` changes an item of a list.
        checks: further checks, such as that files exist. Each yields (path of a key, message)
            pairs. It is called even when other keys are wrong; those then have their defaults.
        sections: further overrides, values by section; they win.

    Raises:
        ConfigErrors: lists every mistake that was found.
    """
    mistakes: list[ConfigMistake] = []
    sources: dict[str, str] = {}
    values: dict[str, Any] = {}
    if isinstance(base, Mapping):
        values, mistakes = put_on({}, overrides_of(base))
    elif base is not None:
        try:
            values, sources = read_yaml_file(base)
        except ConfigErrors as errors:
            mistakes += errors.mistakes
    unreadable = bool(mistakes)
    mistakes += _inapplicable(values, sources)
    changes, malformed = _parse_overrides(overrides)
    changes += overrides_of(sections or {})
    mistakes += malformed
    _note_sources(changes, sources)
    try:
        values, misplaced = _layered(values, changes, sources)
    except ConfigErrors as errors:
        raise ConfigErrors([*mistakes, *errors.mistakes]) from None
    found, config = _validate(values, sources)
    if unreadable:  # then what is missing or does not fit may stand in the file
        mistakes += [mistake for mistake in found if mistake.source == COMMAND_LINE]
    else:
        mistakes += [*misplaced, *found]
        mistakes += _contradictions(config, mistakes)
        mistakes += _failed(checks, config, mistakes, sources)
    if mistakes:
        raise ConfigErrors(mistakes)
    return config


def resolve_config(
    config: ConfigLike,
    overrides: Sequence[str] = (),
    checks: Iterable[Check] = (),
    /,
    **sections: Mapping[str, Any],
) -> Config:
    """The whole config, with the changes made.

    Args:
        config: see `ConfigLike`.
        overrides: `section.key=value` each, as on the command line.
        checks: see `load_config`.
        **sections: keys of some sections, such as `train={"max_steps": 100}`; they win.

    Raises:
        ConfigErrors: with every mistake that can be found.
    """
    if isinstance(config, Config):
        config = config_to_dict(config)
    base = config if isinstance(config, Mapping) else os.fspath(config)
    return load_config(base, overrides, checks, sections)


def _parse_overrides(texts: Iterable[str]) -> tuple[list[Override], list[ConfigMistake]]:
    """The overrides, and those that are malformed."""
    overrides, mistakes = [], []
    for text in texts:
        try:
            overrides.append(parse_override(text, COMMAND_LINE))
        except ValueError as error:
            mistakes.append(ConfigMistake("", None, str(error), COMMAND_LINE))
    return overrides, mistakes


def _note_sources(overrides: Iterable[Override], sources: dict[str, str]) -> None:
    """Bring `file:line` of each key up to date with the overrides on top."""
    for path, _, source in overrides:
        for replaced in [key for key in sources if f"{key}.".startswith(f"{path}.")]:
            del sources[replaced]
        sources[path] = source


def _inapplicable(base: dict[str, Any], sources: dict[str, str]) -> list[ConfigMistake]:
    """Keys of the base that are of another kind than the base itself chooses."""
    return [
        explain_inapplicable(path.split("."), value, reason, sources)
        for path, value, reason in inapplicable_keys(Config, base)
    ]


def _layered(
    base: dict[str, Any], overrides: list[Override], sources: dict[str, str]
) -> tuple[dict[str, Any], list[ConfigMistake]]:
    """The overrides on top of the base, `${...}` filled in, and those that cannot lie there.

    Where an override changes a `kind`, the base's keys of the former kind are left out.
    """
    chosen, _ = put_on(base, overrides)
    values, mistakes = put_on(applicable_values(Config, base, chosen), overrides)
    try:
        values = fill_in(values, sources)
    except ConfigErrors as errors:
        raise ConfigErrors([*mistakes, *errors.mistakes]) from None
    if values.get("data") is None:
        values["data"] = {}  # then the missing keys of the section are reported
    return values, mistakes


def _validate(
    values: dict[str, Any], sources: dict[str, str]
) -> tuple[list[ConfigMistake], Config]:
    """What is wrong with single keys, and the configuration in which those have their defaults."""
    try:
        return [], Config.model_validate(values, context=CHECKED_LATER)
    except ValidationError as error:
        details = error.errors()
    for detail in details:
        values = _without(values, detail["loc"])
    values = {**values, "data": {"shards": "", **(values.get("data") or {})}}
    return [explain_error(detail, sources) for detail in details], stored_config(values)


def _contradictions(config: Config, found: list[ConfigMistake]) -> list[ConfigMistake]:
    """Contradictions between keys, but for those that are wrong already."""
    wrong = [rf"\b{re.escape(without_items(mistake.path))}\b" for mistake in found if mistake.path]
    return [
        ConfigMistake("", None, text)
        for text in validate_combinations(config)
        if not any(re.search(pattern, text) for pattern in wrong)
    ]


def _failed(
    checks: Iterable[Check], config: Config, found: list[ConfigMistake], sources: dict[str, str]
) -> list[ConfigMistake]:
    """What the caller's checks say, but for keys that are wrong already."""
    wrong = [mistake.path for mistake in found]
    return [
        ConfigMistake(path, value_at(config, path), message, source_of(path, sources))
        for check in checks
        for path, message in check(config)
        if not any(f"{path}.".startswith(f"{other}.") for other in wrong)
    ]


def _without(values: dict[str, Any], location: Sequence[Any]) -> dict[str, Any]:
    """A copy of nested values without the key at, or around, a location."""
    name, *rest = location
    inner = values.get(name)
    if rest and isinstance(inner, dict):
        return {**values, name: _without(inner, rest)}
    return {key: value for key, value in values.items() if key != name}
