"""A config for tests that need a few of its keys, and what is said about one with mistakes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from mhe_dist.config.mistakes import ConfigErrors
from mhe_dist.config.schema import Config


def config(**sections: Any) -> Config:
    """A config with these sections; where nothing is said of `data`, its shards are not there."""
    return Config.model_validate({"data": {"shards": "data/train"}, **sections})


def mistakes_of(make: Callable[..., Config], *values: Any, **sections: Any) -> list[str]:
    """The lines of the message with which `make` refuses these values, without the title."""
    with pytest.raises(ConfigErrors) as caught:
        make(*values, **sections)
    return [line.strip() for line in str(caught.value).splitlines()[1:]]
