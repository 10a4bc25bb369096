"""Writes a configuration: as plain values, as YAML, as a file."""

from __future__ import annotations

from typing import Any

from omegaconf import OmegaConf

from mhe_dist.config.schema import Config
from mhe_dist.redact import masked


def config_to_dict(config: Config) -> dict[str, Any]:
    """The configuration as plain containers and scalars, as JSON and YAML hold them."""
    return config.model_dump(mode="json")


def config_to_yaml(config: Config, changed_only: bool = False) -> str:
    """The configuration as YAML for `load_config`: text that looks like a number is quoted.

    Args:
        config: what to write.
        changed_only: leave out what has its default value.
    """
    values = config.model_dump(mode="json", exclude_defaults=changed_only)
    return OmegaConf.to_yaml(OmegaConf.create(values))


def save_config(config: Config, url: str) -> None:
    """Write the resolved configuration to a path or fsspec URL, as YAML for `load_config`.

    The file appears as a whole or not at all. Secrets are masked: it is kept, copied and shown.
    """
    from fsspec.core import url_to_fs

    files, name = url_to_fs(url)
    files.makedirs(files._parent(name), exist_ok=True)
    with files.transaction, files.open(name, "wb") as file:
        file.write(config_to_yaml(Config.model_validate(masked(config_to_dict(config)))).encode())
