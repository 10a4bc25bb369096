"""Small heads of levels, and what the tests let them do."""

from __future__ import annotations

import torch

from mhe_dist.config.head import HeadConfig
from tests.support.heads.head_jobs import CLASSES, MARGINS, Job

DTYPES = (torch.float64, torch.float32)
LABELS = ("repeated", "one", "short", "bad")
# Of 46 classes: two balanced levels, three with padding, whole prefixes of padding, one level, and
# a first level that tells nothing.
LENGTHS: dict[str, list[int]] = {
    "balanced": [],
    "three": [3, 4, 5],
    "padded": [4, 5, 6],
    "one level": [46],
    "one digit": [2, 100],
}
VARIANTS: dict[str, dict] = {
    "adamw": {"optim": {"kind": "adamw", "weight_decay": 0.01}},
    "no momentum": {"optim": {"momentum": 0.0}},
    "filter": {"margin": {"filter": 0.2}},
}


def level_config(
    kind: str, lengths: str = "three", margin: str = "cosface", /, **changes: object
) -> HeadConfig:
    """A small head with lengths of `LENGTHS`; blocks in `changes` are merged."""
    values: dict = {
        "kind": kind,
        "margin": MARGINS[margin],
        "optim": {"weight_decay": 0.01},
        "groups": 3,
        "on_bad_label": "ignore",
        kind: {"lengths": LENGTHS[lengths]} | ({"candidates": 2} if kind == "mhc" else {}),
    }
    for key, value in changes.items():
        values[key] = values.get(key, {}) | value if isinstance(value, dict) else value
    return HeadConfig.model_validate(values)


def _cases() -> dict[str, list[Job]]:
    found = {}
    for kind in ("mhp", "mhc"):
        for lengths in LENGTHS:
            config = level_config(kind, lengths)
            found[f"{kind}-{lengths}"] = [Job(config, dtype=dtype) for dtype in DTYPES]
        for labels in LABELS:
            found[f"{kind}-{labels}"] = [Job(level_config(kind), labels)]
        for margin in MARGINS:
            config = level_config(kind, "three", margin)
            found[f"{kind}-{margin}"] = [Job(config, "short", dtype) for dtype in DTYPES]
        for name, changes in VARIANTS.items():
            config = level_config(kind, **changes)
            found[f"{kind}-{name}"] = [Job(config)]
        config = level_config(kind, "balanced", "none")
        found[f"{kind}-in pieces"] = [Job(config, "short", num_classes=401, cramped=True)]
    for candidates in (1, 50):
        config = level_config("mhc", "three", mhc={"candidates": candidates})
        found[f"mhc-{candidates} candidates"] = [Job(config)]
    for margin in ("none", "cosface", "adaface"):
        for labels in ("many", "neighbours"):
            config = level_config("mhc", "three", margin, objective="multi_label")
            found[f"mhc-{labels} labels, {margin}"] = [Job(config, labels)]
    config = level_config("mhc", "padded", "none", objective="multi_label")
    found["mhc-multi-label with one"] = [Job(config, "short")]
    return found


PREDICTIONS: dict[str, list[Job]] = {
    "mhp": [Job(level_config("mhp", "three"), predict=7)],
    "mhp of one": [Job(level_config("mhp", "one level", "none"), predict=7)],
    "mhp, all classes and more": [Job(level_config("mhp", "padded"), predict=CLASSES + 3)],
    "mhc, beam of 7": [Job(level_config("mhc", "three"), predict=7)],
    "mhc, beam of 9": [Job(level_config("mhc", "three", "none", mhc={"candidates": 9}), predict=3)],
    "mhc, all classes and more": [Job(level_config("mhc", "padded"), predict=CLASSES + 3)],
    "mhc, many labels": [
        Job(level_config("mhc", "three", "none", objective="multi_label"), "many", predict=5)
    ],
}
CASES = _cases()
