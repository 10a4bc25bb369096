"""Writes a configuration: as plain values, and back, as YAML, as a file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from omegaconf import OmegaConf

from mhe_dist.config.schema import CHECKED_LATER, Config
from mhe_dist.redact import masked


def config_to_dict(config: Config) -> dict[str, Any]:
    """The configuration as plain containers and scalars, as JSON and YAML hold them."""
    return config.model_dump(mode="json")


def config_from_dict(values: Mapping[str, Any]) -> Config:
    """The configuration of what `config_to_dict` gave for a valid one, perhaps with changes.

    Rules between keys are not looked at again: a part of a run need not keep those of the whole.
    """
    return Config.model_validate(values, context=CHECKED_LATER)


def config_to_yaml(config: Config, changed_only: bool = False) -> str:
    """The configuration as YAML for `load_config`: text that looks like a number is quoted.

    Args:
        config: what to write.
        changed_only: leave out what has its default value.
    """
    values = config.model_dump(mode="json", exclude_defaults=changed_only)
    return _to_yaml(values)


def masked_yaml(config: Config) -> str:
    """The whole configuration as YAML to be kept, copied and shown: secrets are masked."""
    return _to_yaml(masked(config_to_dict(config)))


def _to_yaml(values: dict[str, Any]) -> str:
    return OmegaConf.to_yaml(OmegaConf.create(values))


def save_config(config: Config, url: str) -> None:
    """Write the resolved configuration to a path or fsspec URL, as YAML for `load_config`.

    The file appears as a whole or not at all. Secrets are masked.
    """
    from mhe_dist.atomic_file import write_file

    write_file(url, masked_yaml(config))
