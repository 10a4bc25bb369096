"""With which other settings a run goes on: the table of its keys, and the check before anything.

Every entry passes here: `mhe train` before it starts Ray, and each rank before it opens the data.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import Any, Literal, NamedTuple

from mhe_dist.atomic_file import write_file
from mhe_dist.config.describe import all_keys, suggest
from mhe_dist.config.head import AUTO, AUTO_KEYS
from mhe_dist.config.schema import Config
from mhe_dist.config.write import config_to_dict
from mhe_dist.errors import UserError
from mhe_dist.redact import masked
from mhe_dist.storage_retry import remove_if_exists
from pipelines.runs.folder import read_if_exists, read_run_config
from pipelines.storage.urls import resolve_url

CHANGES_FILE = "changes.json"  # in the run's folder

Permission = Literal["yes", "by name", "no"]


class ChangeRule(NamedTuple):
    """What a run that goes on may have otherwise than it began.

    Attributes:
        keys: dotted keys; `*` stands for the rest of one.
        permission: yes; by name, in `resume.allow`; or no.
        reason: what the keys are about.
    """

    keys: tuple[str, ...]
    permission: Permission
    reason: str


# The first rule with a key decides; docs/survival.md shows this table.
CHANGE_RULES = (
    ChangeRule(("run.name", "run.dir"), "yes", "where the run is"),
    ChangeRule(
        ("data.shards", "data.labels", "data.classes", "data.mix", "data.glyphs*"),
        "yes",
        "where the data is; the digests in the checkpoint hold what it is",
    ),
    ChangeRule(
        ("data.loader_workers", "data.prefetch", "data.remote.*"), "yes", "how the data is read"
    ),
    ChangeRule(
        ("data.on_bad_sample", "data.max_bad_fraction", "guard.*"), "yes", "what ends the run"
    ),
    ChangeRule(
        ("scale.*", "head.bank.memory", "head.bank.path"), "yes", "workers, and where rows are kept"
    ),
    ChangeRule(
        (
            *("train.log_every", "train.audit_every", "evaluate.*"),
            *("checkpoint.*", "tracking.*", "export.*", "resume.*"),
        ),
        "yes",
        "what is recorded, evaluated and kept, and when",
    ),
    ChangeRule(
        (
            *("optim.lr", "optim.schedule", "optim.warmup_steps", "optim.final_lr", "optim.power"),
            *("train.epochs", "train.max_steps"),
        ),
        "by name",
        "learning rate and length; the schedule is computed anew for all steps",
    ),
    ChangeRule(("optim.kind", "optim.ema", "head.optim.kind"), "no", "what the optimizer stores"),
    ChangeRule(("optim.*", "head.optim.*"), "by name", "the other numbers of the optimizers"),
    ChangeRule(("head.margin.kind",), "no", "what the margin stores"),
    ChangeRule(
        (
            *("head.margin.*", "head.mhs.extra_heads", "head.mhs.negatives"),
            *("head.mhs.correction", "head.partial_fc.rate", "head.objective"),
            "head.on_bad_label",
        ),
        "by name",
        "the loss",
    ),
    ChangeRule(("data.augment.*",), "by name", "random changes of the images"),
    ChangeRule(
        ("train.precision", "head.matmul", "model.grad_checkpointing", "model.compile"),
        "by name",
        "rounding",
    ),
    ChangeRule(
        ("run.seed", "data.*", "train.global_batch", "train.micro_batch"),
        "no",
        "which samples a step has",
    ),
    ChangeRule(("model.*", "head.*"), "no", "the network and the rows of a checkpoint"),
)

Change = tuple[str, Any, Any]
"""A dotted key, its value in the run, and its value now."""


def change_permission(key: str) -> Permission:
    """Whether a run may go on with another value of a dotted key; "no" for one without a rule."""
    for rule in CHANGE_RULES:
        if any(fnmatchcase(key, pattern) for pattern in rule.keys):
            return rule.permission
    return "no"


def changed_keys(before: dict[str, Any], after: dict[str, Any]) -> list[Change]:
    """Keys of two configs that differ and may not, unless by name.

    A key that only one of them has, because the other comes from another release, is no change; nor
    is `auto` for a number that the run began with (`pipelines.runs.auto_sizes`).
    """
    sections = {key.path for key in all_keys() if key.section}
    old, new = dict(_leaves(before, sections)), dict(_leaves(after, sections))
    held = [key for key in old if key in new and change_permission(key) != "yes"]
    changes = [(key, old[key], new[key]) for key in held if old[key] != new[key]]
    return [each for each in changes if each[0] not in AUTO_KEYS or AUTO not in each[1:]]


def refuse_changed_config(config: Config) -> list[Change]:
    """Refuse to go on with a run of the same name that was started with other settings.

    Returns:
        the changes that `resume.allow` names.

    Raises:
        UserError: names every key with both values, and the cures.
    """
    _check_allowed(config.resume.allow)
    before = read_run_config(config.run.path)
    if before is None:
        return []
    changes = changed_keys(masked(before), masked(config_to_dict(config)))
    refused = [change for change in changes if change[0] not in config.resume.allow]
    if refused:
        rows = "\n".join(f"  {key}: {old!r} in the run, {new!r} now" for key, old, new in refused)
        raise UserError(
            f"{config.run.path} was started with other settings:\n{rows}\n"
            f"Take those back to go on with it, or start another run: run.name=...{_cure(refused)}"
        )
    return changes


def refuse_other_data(
    saved: dict[str, Any], digest: str, labels: dict[str, str], config: Config
) -> None:
    """Refuse to go on with a checkpoint on other data or other labels than it was trained on.

    Args:
        saved: `run.json` of the checkpoint; one of before label sets has no `labels`.
        digest: of the data of this run.
        labels: digest of each of its label sets, by the key of the config that names it.
        config: of this run.

    Raises:
        UserError: names the key with both digests, and the cures.
    """
    before: dict[str, str] = saved.get("labels", {})
    for key in sorted(before.keys() | labels.keys()):
        old, new = before.get(key, "none"), labels.get(key, "none")
        if old != new:
            raise UserError(
                f"{key}: the label set with digest {new} is not that of the run's checkpoint, "
                f"{old}: train on the same labels, or give the run another name (run.name)"
            )
    if saved["data_digest"] != digest:
        raise UserError(
            f"data.shards={config.data.shards}: digest {digest} is not that of the run's "
            f"checkpoint, {saved['data_digest']}: train on the same shards, classes and mix "
            "(data.*), or give the run another name (run.name)"
        )


def record_changes(path: str, step: int, changes: list[Change]) -> None:
    """Add changes of settings to `changes.json` of a run, which is no longer complete.

    Args:
        path: of the run.
        step: the first step that is done with them.
        changes: as `refuse_changed_config` gives them.
    """
    if not changes:
        return
    entries = json.loads(read_if_exists(f"{path}/{CHANGES_FILE}") or "[]")
    values = {key: {"before": old, "now": new} for key, old, new in changes}
    entries.append({"time": time.time(), "step": step, "changes": values})
    write_file(f"{path}/{CHANGES_FILE}", json.dumps(entries, indent=1))
    files, root = resolve_url(path)
    remove_if_exists(files, f"{root}/summary.json")  # it says that the run is complete, as it was


def _check_allowed(allowed: list[str]) -> None:
    """Refuse names in `resume.allow` that are no keys, or of keys that cannot change."""
    known = {key.path for key in all_keys() if not key.section}
    for name in allowed:
        if name not in known:
            near = " or ".join(suggest(name))
            cure = f"; did you mean {near}?" if near else ": give dotted keys, such as optim.lr"
            raise UserError(f"resume.allow={name}: there is no such key{cure}")
        if change_permission(name) == "no":
            raise UserError(
                f"resume.allow={name}: a run cannot go on with another {name} (the table in "
                "docs/survival.md); start another run (run.name=...), which may begin with the "
                "weights of this one (model.init_from, head.init_from)"
            )


def _cure(refused: list[Change]) -> str:
    """How to go on with changes that people do want."""
    names = [key for key, _, _ in refused]
    if any(change_permission(name) == "no" for name in names):
        return ""
    return f"; or go on with the change: 'resume.allow=[{', '.join(names)}]'"


def _leaves(
    tree: dict[str, Any], sections: set[str], prefix: str = ""
) -> Iterator[tuple[str, Any]]:
    """Dotted keys and values; a dict that is a key's value is not taken apart."""
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and key in sections:
            yield from _leaves(value, sections, f"{key}.")
        else:
            yield key, value
