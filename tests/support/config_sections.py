"""A config for tests that need a few of its keys."""

from __future__ import annotations

from typing import Any

from mhe_dist.config.schema import Config


def config(**sections: Any) -> Config:
    """A config with these sections; where nothing is said of `data`, its shards are not there."""
    return Config.model_validate({"data": {"shards": "data/train"}, **sections})
