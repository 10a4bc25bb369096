"""A run's configuration from what a caller in Python has: a file, a dict or a `Config`."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mhe_dist.config.load import Check, load_config
from mhe_dist.config.schema import Config
from mhe_dist.config.write import config_to_dict

ConfigLike = str | os.PathLike[str] | Mapping[str, Any] | Config
"""A YAML file or the name of one that comes with mhe, a dict of sections, or a whole config."""


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
    path: str | None = None
    base: Mapping[str, Any] = {}
    if isinstance(config, Config):
        base = config_to_dict(config)
    elif isinstance(config, Mapping):
        base = config
    else:
        path = os.fspath(config)
    return load_config(path, [*_as_overrides(base), *overrides, *_as_overrides(sections)], checks)


def _as_overrides(sections: Mapping[str, Any]) -> list[str]:
    """Each section as `name=JSON`, which is YAML, too."""
    return [f"{name}={json.dumps(values)}" for name, values in sections.items()]
