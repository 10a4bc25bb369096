"""Reads the YAML file of a run: its values as they stand in it, and the line of each key."""

from __future__ import annotations

import os
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mhe_dist.config.describe import without_brackets
from mhe_dist.config.layers.stack import explain_omegaconf
from mhe_dist.config.mistakes import ConfigErrors, ConfigMistake, source_of
from mhe_dist.config.shipped import find_config, shipped_configs


def read_yaml_file(name: str) -> tuple[dict[Any, Any], dict[str, str]]:
    """A file's values, `${...}` as it stands, and `file:line` of each key by its dotted path.

    Args:
        name: of the file, or of a config that comes with mhe.

    Raises:
        ConfigErrors: there is no such file, or it is not YAML of keys and values.
    """
    path = str(find_config(name))
    try:
        text = Path(path).read_text(encoding="utf-8")
        values = OmegaConf.create(text)
    except FileNotFoundError:
        raise _alone(path, f"there is no such file{_similar_file(path)}") from None
    except IsADirectoryError:
        raise _alone(path, f"is a folder, no config{_similar_file(f'{path}.yaml')}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise _alone(path, f"cannot be read: {error}") from None
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise _alone(path + line, f"is not YAML: {_problem(error, text)}") from None
    except yaml.YAMLError as error:
        raise _alone(path, f"is not YAML: {error}") from None
    except OmegaConfBaseException as error:
        key, sources = without_brackets(error.full_key or ""), _sources(path, text)
        found = ConfigMistake(key, None, explain_omegaconf(error), source_of(key, sources) or path)
        raise ConfigErrors([found]) from None
    sources = _sources(path, text)
    if not isinstance(values, DictConfig) or (len(values) and not sources):
        raise _alone(path, "must hold keys and values, such as `run:` and below it `name: first`")
    plain = OmegaConf.to_container(values)
    assert isinstance(plain, dict)
    return plain, sources


def _problem(error: yaml.MarkedYAMLError, text: str) -> str:
    """What YAML finds wrong; of a tab, which cannot be seen, the cure."""
    mark = error.problem_mark
    line = text.split("\n")[mark.line] if mark and mark.line <= text.count("\n") else ""
    if "\t" in line[: len(line) - len(line.lstrip())]:
        return "a tab begins the line; indent with spaces"
    return str(error.problem)


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


def _sources(path: str, text: str) -> dict[str, str]:
    """`file:line` of each key and item of a YAML text by its dotted path; none of a scalar."""
    node = yaml.compose(text, Loader=yaml.SafeLoader)
    return {key: f"{path}:{line}" for key, line in _lines(node, "")}


def _lines(node: yaml.Node | None, prefix: str) -> Iterable[tuple[str, int]]:
    """Dotted path and line of every key and item below a YAML node."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield f"{prefix}{key.value}", key.start_mark.line + 1
            yield from _lines(value, f"{prefix}{key.value}.")
    elif isinstance(node, yaml.SequenceNode):
        for number, item in enumerate(node.value):
            yield f"{prefix}{number}", item.start_mark.line + 1
            yield from _lines(item, f"{prefix}{number}.")
