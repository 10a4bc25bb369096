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
from pydantic_core import ErrorDetails

from mhe_dist.config.describe import all_keys, describe_type, suggest, value_at
from mhe_dist.config.mistakes import ConfigErrors, ConfigMistake
from mhe_dist.config.schema import Config, validate_combinations

COMMAND_LINE = "command line"
Check = Callable[[Config], Iterable[tuple[str, str]]]


def load_config(
    path: str | None, overrides: Sequence[str] = (), checks: Iterable[Check] = ()
) -> Config:
    """Read a configuration.

    Args:
        path: YAML file; None for defaults and overrides alone.
        overrides: `key=value` each; the value is YAML, except that a key which holds text takes
            it as it stands.
        checks: further demands, such as that files exist. Each yields (path of a key, message)
            pairs; it is asked even when other keys are wrong, which then have their defaults.

    Raises:
        ConfigErrors: with every mistake that can be told.
    """
    mistakes: list[ConfigMistake] = []
    sources: dict[str, str] = {}
    layers = []
    if path is not None:
        try:
            values, sources = _read(path)
            layers.append(values)
        except ConfigErrors as errors:
            mistakes += errors.mistakes
    unreadable = bool(mistakes)
    for override in overrides:
        try:
            key, layer = _parse_override(override)
        except ValueError as error:
            mistakes.append(ConfigMistake("", None, str(error), COMMAND_LINE))
            continue
        layers.append(layer)
        sources = {k: v for k, v in sources.items() if not f"{k}.".startswith(f"{key}.")}
        sources[key] = COMMAND_LINE
    found, config = _validate(_merge(layers, mistakes), sources)
    if unreadable:  # then what is missing or does not fit may stand in the file
        mistakes += [mistake for mistake in found if mistake.source == COMMAND_LINE]
    else:
        mistakes += [*found, *_contradictions(config, found)]
        mistakes += _failed(checks, config, found, sources)
    if mistakes:
        raise ConfigErrors(mistakes)
    return config


def _read(path: str) -> tuple[DictConfig, dict[str, str]]:
    """A YAML file's values, and `file:line` of each of its keys."""
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
        raise _alone(path + line, f"is not YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise _alone(path, f"is not YAML: {error}") from None
    if not isinstance(values, DictConfig) or isinstance(node, yaml.ScalarNode):
        raise _alone(path, "must hold keys and values, such as `run:` and below it `name: first`")
    return values, {key: f"{path}:{line}" for key, line in _lines(node, "")}


def _alone(source: str, message: str) -> ConfigErrors:
    return ConfigErrors([ConfigMistake("", None, message, source)])


def _similar_file(path: str) -> str:
    folder = Path(path).parent
    names = sorted(os.listdir(folder)) if folder.is_dir() else []
    near = get_close_matches(Path(path).name, names, 1)
    return f"; did you mean {folder / near[0]}?" if near else ""


def _lines(node: yaml.Node | None, prefix: str) -> Iterable[tuple[str, int]]:
    """Dotted path and line of every key below a YAML node."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield f"{prefix}{key.value}", key.start_mark.line + 1
            yield from _lines(value, f"{prefix}{key.value}.")


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


def _merge(layers: list[DictConfig], mistakes: list[ConfigMistake]) -> dict[str, Any]:
    """The layers on top of one another as plain containers, `${...}` filled in."""
    try:
        merged = OmegaConf.to_container(OmegaConf.merge({}, *layers), resolve=True)
    except OmegaConfBaseException as error:
        message = str(error.msg or error).splitlines()[0]
        raise ConfigErrors(
            [*mistakes, ConfigMistake(error.full_key or "", None, message)]
        ) from None
    assert isinstance(merged, dict)
    if merged.get("data") is None:
        merged["data"] = {}  # so that a missing section is told by its missing keys
    return {str(key): value for key, value in merged.items()}


def _validate(
    values: dict[str, Any], sources: dict[str, str]
) -> tuple[list[ConfigMistake], Config]:
    """What is wrong with single keys, and the configuration in which those have their defaults."""
    context = {"combinations_later": True}
    try:
        return [], Config.model_validate(values, context=context)
    except ValidationError as error:
        details = error.errors()
    for detail in details:
        values = _without(values, detail["loc"])
    values = {**values, "data": {"shards": "", **(values.get("data") or {})}}
    return [_mistake(d, sources) for d in details], Config.model_validate(values, context=context)


def _contradictions(config: Config, found: list[ConfigMistake]) -> list[ConfigMistake]:
    """Misfits between keys, but for those that are wrong already."""
    wrong = [rf"\b{re.escape(mistake.path.partition('[')[0])}\b" for mistake in found]
    texts = [
        text for text in validate_combinations(config) if not any(re.search(w, text) for w in wrong)
    ]
    return [ConfigMistake("", None, text) for text in texts]


def _failed(
    checks: Iterable[Check], config: Config, found: list[ConfigMistake], sources: dict[str, str]
) -> list[ConfigMistake]:
    """What the caller's checks say, but for keys that are wrong already."""
    wrong = [mistake.path for mistake in found]
    return [
        ConfigMistake(path, value_at(config, path), message, _source(path, sources))
        for check in checks
        for path, message in check(config)
        if not any(f"{path}.".startswith(f"{other}.") for other in wrong)
    ]


def _mistake(detail: ErrorDetails, sources: dict[str, str]) -> ConfigMistake:
    """Words for one finding of pydantic."""
    parts, value = [str(part) for part in detail["loc"]], detail["input"]
    known = {key.path: key for key in all_keys()}
    heads = [".".join(parts[:depth]) for depth in range(1, len(parts) + 1)]
    if detail["type"] == "extra_forbidden" or heads[0] not in known:
        return _unknown(parts, value, sources)
    key = known[[head for head in heads if head in known][-1]]
    if detail["type"] == "missing" and key.path == heads[-1]:
        return ConfigMistake(key.path, None, f"is required: {key.field.description}")
    items = "" if detail["type"] == "missing" else heads[-1][len(key.path) + 1 :]
    path = f"{key.path}[{items}]" if items else key.path
    return ConfigMistake(path, value, f"must be {describe_type(key)}", _source(key.path, sources))


def _unknown(parts: list[str], value: Any, sources: dict[str, str]) -> ConfigMistake:
    """A key that does not exist, followed down while there is no choice: `hed.kind`, not `hed`."""
    while isinstance(value, dict) and len(value) == 1:
        ((name, value),) = value.items()
        parts = [*parts, str(name)]
    path = ".".join(parts)
    message = "there is no such key"
    if near := suggest(path):
        message += f"; did you mean {' or '.join(near)}?"
    else:
        around = [key.path.rpartition(".") for key in all_keys()]
        here = ".".join(parts[:-1])
        names = ", ".join(name for section, _, name in around if section == here)
        message += f"; {here or 'the configuration'} has {names}" if names else ""
    return ConfigMistake(path, value, message, _source(path, sources))


def _source(path: str, sources: dict[str, str]) -> str:
    """Where a key, or else the nearest block around it, or else a key below it, was set."""
    around = path
    while around:
        if around in sources:
            return sources[around]
        around = around.rpartition(".")[0]
    return next((where for key, where in sources.items() if key.startswith(f"{path}.")), "")


def _without(values: dict[str, Any], location: Sequence[Any]) -> dict[str, Any]:
    """A copy of nested values without the key at, or around, a location."""
    name, *rest = location
    inner = values.get(name)
    if rest and isinstance(inner, dict):
        return {**values, name: _without(inner, rest)}
    return {key: value for key, value in values.items() if key != name}
