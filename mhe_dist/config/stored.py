"""Reads the configurations that runs and checkpoints keep."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mhe_dist.config.schema import CHECKED_LATER, Config
from mhe_dist.config.section import applicable_values

_HALF = [0.5, 0.5, 0.5]


def stored_config(values: Mapping[str, Any]) -> Config:
    """The configuration of a run that once was valid, from what the run or a checkpoint keeps.

    Earlier versions wrote the blocks of all kinds: those that do not apply are left out. Rules
    between keys that came later do not make an old run unreadable.

    Args:
        values: as `config_to_dict` gives them, or gave them in an earlier version.
    """
    applicable = applicable_values(Config, values, values)
    model = applicable.get("model") or {}
    if "mean" not in model and (model.get("kwargs") or {}).get("pretrained"):
        # Before `model.mean` there was, images were in [-1, 1], whatever the weights were.
        applicable["model"] = model | {"mean": _HALF, "std": _HALF}
    return Config.model_validate(applicable, context=CHECKED_LATER)
