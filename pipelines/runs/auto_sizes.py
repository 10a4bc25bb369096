"""Numbers for what is `auto` in a run's head, chosen once: those that the run has, or the rule's.

Every entry passes here when the classes of the data are known: `mhe train` and jobs before they
write the run's `config.yaml`, each rank before it builds the head, and a trial of preflight.
"""

from __future__ import annotations

from typing import Any

from mhe_dist.config.auto.head_sizes import (
    auto_keys,
    choose_sizes,
    demand_of,
    describe_sizes,
    fill_sizes,
)
from mhe_dist.config.head import AUTO, HeadConfig
from mhe_dist.config.schema import Config
from mhe_dist.errors import UserError
from pipelines.data.mixture.index import open_training_index
from pipelines.runs.folder import read_run_config


def settle_sizes(config: Config, classes: int | None = None, ranks: int = 1) -> Config:
    """The config with numbers where its head has `auto`.

    A run that was begun keeps its numbers, whatever workers it has now: rows and checkpoints are
    cut by them.

    Args:
        config: of the run.
        classes: C; None: as the index of the data says.
        ranks: that there are; `torchrun` may start more than `scale.workers`.

    Raises:
        UserError: the data cannot be read, or the run's groups are fewer than its workers.
    """
    if not auto_keys(config.head):
        return config
    head, _ = _settle_head(config, classes, ranks)
    workers = max([ranks, *config.group_sizes()])
    if wrong := head.validate_combinations(workers):
        raise UserError(
            f"{'; '.join(wrong)} ({config.run.path}/config.yaml has the numbers of this run, which "
            "it keeps: lower scale.workers, or start another run: run.name=...)"
        )
    return config.model_copy(update={"head": head})


def explain_settled(config: Config, classes: int | None = None) -> str:
    """In a line, what `settle_sizes` makes of `auto`, and why; empty if nothing is `auto`."""
    keys = auto_keys(config.head)
    return describe_sizes(keys, *_settle_head(config, classes, 1)) if keys else ""


def _settle_head(config: Config, classes: int | None, ranks: int) -> tuple[HeadConfig, str]:
    """The head with numbers where it has `auto`, and why they are so."""
    head = _as_recorded(config)
    if not auto_keys(head):
        return head, f"as {config.run.path} began"
    if classes is None:
        classes = open_training_index(config.data, config.run.seed).num_classes
    sizes = choose_sizes(head, demand_of(config, classes, ranks))
    return fill_sizes(head, sizes), sizes.explain(auto_keys(config.head), classes)


def _as_recorded(config: Config) -> HeadConfig:
    """The head with the numbers that its run began with, if it has begun."""
    recorded: dict[str, Any] = (read_run_config(config.run.path) or {}).get("head") or {}
    if recorded.get("kind") != config.head.kind:
        return config.head
    block, head = recorded.get("mhs") or {}, config.head
    sizes = {k: block[k] for k in ("length", "extra_heads") if _kept(head.mhs, block, k)}
    changes: dict[str, Any] = {"mhs": head.mhs.model_copy(update=sizes)}
    if _kept(head, recorded, "groups"):
        changes["groups"] = recorded["groups"]
    margin = recorded.get("margin") or {}
    if _kept(head.margin, margin, "m"):
        changes["margin"] = head.margin.model_copy(update={"m": margin["m"]})
    return head.model_copy(update=changes)


def _kept(section: Any, recorded: dict[str, Any], key: str) -> bool:
    """Whether a key is `auto` now and a number in the run."""
    return getattr(section, key) == AUTO and recorded.get(key, AUTO) != AUTO
