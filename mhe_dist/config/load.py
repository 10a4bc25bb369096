"""Reads a run's configuration: defaults < YAML file < `key=value`; reports all mistakes at once."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError

from mhe_dist.config.describe import all_keys, suggest, value_at
from mhe_dist.config.mistakes import (
    ConfigErrors,
    ConfigMistake,
    explain_error,
    explain_inapplicable,
    source_of,
)
from mhe_dist.config.schema import CHECKED_LATER, Config, validate_combinations
from mhe_dist.config.section import applicable_values, inapplicable_keys
from mhe_dist.config.shipped import find_config, shipped_configs
from mhe_dist.config.stored import stored_config
from mhe_dist.errors import first_line

COMMAND_LINE = "command line"
Check = Callable[[Config], Iterable[tuple[str, str]]]


def load_config(
    path: str | None, overrides: Sequence[str] = (), checks: Iterable[Check] = ()
) -> Config:
    """Read a configuration.

    Where an override changes a `kind`, keys of the file that belong to the former kind are left
    out. Any other key that does not belong to the chosen kind is a mistake.

    Args:
        path: YAML file, or the name of a config that comes with mhe, such as "quickstart"; None for
            defaults and overrides alone.
        overrides: `key=value` each; the value is YAML, except that a key which holds text takes
            it as it stands.
        checks: further checks, such as that files exist. Each yields (path of a key, message)
            pairs. It is called even when other keys are wrong; those then have their defaults.

    Raises:
        ConfigErrors: lists every mistake that was found.
    """
    mistakes: list[ConfigMistake] = []
    sources: dict[str, str] = {}
    file = OmegaConf.create()
    if path is not None:
        try:
            file, sources = _read(path)
        except ConfigErrors as errors:
            mistakes += errors.mistakes
    unreadable = bool(mistakes)
    mistakes += _inapplicable(file, sources)
    layers, malformed = _parse_overrides(overrides, sources)
    mistakes += malformed
    found, config = _validate(_merge(file, layers, mistakes), sources)
    if unreadable:  # then what is missing or does not fit may stand in the file
        mistakes += [mistake for mistake in found if mistake.source == COMMAND_LINE]
    else:
        mistakes += found
        mistakes += _contradictions(config, mistakes)
        mistakes += _failed(checks, config, mistakes, sources)
    if mistakes:
        raise ConfigErrors(mistakes)
    return config


def _problem(error: yaml.MarkedYAMLError, text: str) -> str:
    """What YAML finds wrong; of a tab, which cannot be seen, the cure."""
    mark = error.problem_mark
    line = text.split("\n")[mark.line] if mark and mark.line <= text.count("\n") else ""
    if "\t" in line[: len(line) - len(line.lstrip())]:
        return "a tab begins the line; indent with spaces"
    return str(error.problem)


def _read(name: str) -> tuple[DictConfig, dict[str, str]]:
    """A YAML file's values, and `file:line` of each of its keys."""
    path = str(find_config(name))
    try:
        text = Path(path).read_text(encoding="utf-8")
        values = OmegaConf.create(text)
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except FileNotFoundError:
        raise _alone(path, f"there is no such file{_similar_file(path)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise _alone(path, f"cannot be read: {error}") from None
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise _alone(path + line, f"is not YAML: {_problem(error, text)}") from None
    except yaml.YAMLError as error:
        raise _alone(path, f"is not YAML: {error}") from None
    if not isinstance(values, DictConfig) or isinstance(node, yaml.ScalarNode):
        raise _alone(path, "must hold keys and values, such as `run:` and below it `name: first`")
    return values, {key: f"{path}:{line}" for key, line in _lines(node, "")}


def _alone(source: str, message: str) -> ConfigErrors:
    return ConfigErrors([ConfigMistake("", None, message, source)])


def _similar_file(path: str) -> str:
    """A hint for a path that does not exist, or for a name that no shipped config has."""
    folder = Path(path).parent
    names = sorted(os.listdir(folder)) if folder.is_dir() else []
    near = [str(folder / name) for name in get_close_matches(Path(path).name, names, 1)]
    shipped = shipped_configs()
    near += get_close_matches(Path(path).stem, shipped, 1)
    hint = f"; did you mean {' or '.join(dict.fromkeys(near))}?" if near else "."
    is_name = Path(path).name == path and not Path(path).suffix
    return hint + (f" These come with mhe: {', '.join(shipped)}" if is_name else "")


def _lines(node: yaml.Node | None, prefix: str) -> Iterable[tuple[str, int]]:
    """Dotted path and line of every key below a YAML node."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield f"{prefix}{key.value}", key.start_mark.line + 1
            yield from _lines(value, f"{prefix}{key.value}.")


def _parse_overrides(
    overrides: Iterable[str], sources: dict[str, str]
) -> tuple[list[DictConfig], list[ConfigMistake]]:
    """A layer for each override, and those that are malformed; `sources` is brought up to date."""
    layers, mistakes = [], []
    for override in overrides:
        try:
            key, layer = _parse_override(override)
        except ValueError as error:
            mistakes.append(ConfigMistake("", None, str(error), COMMAND_LINE))
            continue
        layers.append(layer)
        for replaced in [k for k in sources if f"{k}.".startswith(f"{key}.")]:
            del sources[replaced]
        sources[key] = COMMAND_LINE
    return layers, mistakes


def _parse_override(override: str) -> tuple[str, DictConfig]:
    """Key and one-key layer of a `key=value`; ValueError if it is none."""
    key, equals, raw = override.partition("=")
    if not equals or not all(key.split(".")):
        hint = f"; did you mean {likely[0]}=...?" if (likely := suggest(key)) else ""
        raise ValueError(f"`{override}` is not of the form key=value{hint}")
    if _is_text(key) and raw[:1] not in ("'", '"') and raw != "null":
        layer = OmegaConf.create()
        OmegaConf.update(layer, key, raw)
        return key, layer
    try:
        return key, OmegaConf.from_dotlist([override])
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        problem = getattr(error, "problem", None) or error
        raise ValueError(f"`{override}`: the value is not YAML: {problem}") from None


def _is_text(path: str) -> bool:
    return any(key.path == path and key.field.annotation is str for key in all_keys())


def _inapplicable(file: DictConfig, sources: dict[str, str]) -> list[ConfigMistake]:
    """Keys of the file that are of another kind than the file itself chooses."""
    return [
        explain_inapplicable(path.split("."), value, reason, sources)
        for path, value, reason in inapplicable_keys(Config, _plain(file))
    ]


def _merge(
    file: DictConfig, overrides: list[DictConfig], mistakes: list[ConfigMistake]
) -> dict[str, Any]:
    """The file's values and the command line's on top, as plain containers, `${...}` filled in.

    Where the command line changes a `kind`, the file's keys of the former kind are left out.
    """
    try:
        chosen = _plain(OmegaConf.merge({}, file, *overrides))
        kept = applicable_values(Config, _plain(file), chosen)
        merged = _plain(OmegaConf.merge({}, kept, *overrides), resolve=True)
    except OmegaConfBaseException as error:
        message = first_line(error.msg or error)
        found = ConfigMistake(error.full_key or "", None, message)
        raise ConfigErrors([*mistakes, found]) from None
    if merged.get("data") is None:
        merged["data"] = {}  # then the missing keys of the section are reported
    return {str(key): value for key, value in merged.items()}


def _plain(values: Any, resolve: bool = False) -> dict[Any, Any]:
    plain = OmegaConf.to_container(values, resolve=resolve)
    assert isinstance(plain, dict)
    return plain


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
    wrong = [
        rf"\b{re.escape(mistake.path.partition('[')[0])}\b" for mistake in found if mistake.path
    ]
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
