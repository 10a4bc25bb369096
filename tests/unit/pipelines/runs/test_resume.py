"""With which other settings a run goes on, and what is said where it does not."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mhe_dist.config.describe import all_keys
from mhe_dist.config.schema import Config
from mhe_dist.config.write import config_to_dict, config_to_yaml, save_config
from mhe_dist.errors import UserError
from mhe_dist.tracking.jsonl import JsonlTracker
from pipelines.pretrain.main import run_pretraining
from pipelines.runs.folder import read_run_config
from pipelines.runs.resume import (
    CHANGE_RULES,
    change_permission,
    changed_keys,
    record_changes,
    refuse_changed_config,
    refuse_other_data,
)
from pipelines.runs.warm_start import find_checkpoint
from pipelines.shards.index import ShardIndex
from tests.support import tiny
from tests.support.config_sections import config
from tests.support.data.label_sets import write_labels

DOCS = Path(__file__).parents[4] / "docs" / "survival.md"


def test_every_key_has_a_rule_and_every_rule_a_key() -> None:
    keys = [key.path for key in all_keys() if not key.section]
    found = {key: [rule for rule in CHANGE_RULES if matches(rule.keys, key)] for key in keys}
    assert [key for key, rules in found.items() if not rules] == []
    patterns = {pattern for rule in CHANGE_RULES for pattern in rule.keys}
    known = [key.path for key in all_keys()]
    assert [p for p in patterns if not any(matches((p,), key) for key in known)] == []


def matches(patterns: tuple[str, ...], key: str) -> bool:
    return any(key == p or (p.endswith("*") and key.startswith(p[:-1])) for p in patterns)


def test_the_docs_show_the_table() -> None:
    lines = ["| keys | may change | what they are |", "|---|---|---|"]
    for rule in CHANGE_RULES:
        keys = ", ".join(f"`{key}`" for key in rule.keys)
        lines.append(f"| {keys} | {rule.permission} | {rule.reason} |")
    assert "\n".join(lines) in DOCS.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("key", "permission"),
    [
        ("scale.workers", "yes"),
        ("data.loader_workers", "yes"),
        ("optim.lr", "by name"),
        ("train.epochs", "by name"),
        ("head.margin.m", "by name"),
        ("train.global_batch", "no"),
        ("optim.kind", "no"),
        ("model.name", "no"),
    ],
)
def test_the_first_rule_decides(key: str, permission: str) -> None:
    assert change_permission(key) == permission


def test_only_keys_that_change_what_is_learnt_are_held() -> None:
    before = config_to_dict(config(head={"mhs": {"length": 100}}))
    free = config(scale={"workers": 2}, train={"log_every": 3}, checkpoint={"keep_last": 9})
    assert changed_keys(before, config_to_dict(free)) == []
    remote = {"retries": 9, "cache_dir": "/scratch"}
    cached = config(data={"shards": before["data"]["shards"], "remote": remote})
    assert changed_keys(before, config_to_dict(cached)) == []
    held = config(optim={"lr": 0.2}, head={"mhs": {"length": 10}})
    assert changed_keys(before, config_to_dict(held)) == [
        ("head.mhs.length", before["head"]["mhs"]["length"], 10),
        ("optim.lr", 0.1, 0.2),
    ]


def test_arguments_of_the_backbone_are_one_value() -> None:
    """Also where the run began with none of them."""
    before, kwargs = config_to_dict(config()), {"drop_path_rate": 0.1}
    after = config_to_dict(config(model={"kwargs": kwargs}))
    assert changed_keys(before, after) == [("model.kwargs", {}, kwargs)]


def test_a_key_of_another_release_is_no_change() -> None:
    now = config_to_dict(config())
    before = {**now, "gone": 1, "optim": {k: v for k, v in now["optim"].items() if k != "power"}}
    assert changed_keys(before, now) == []


def begun(folder: Path) -> Config:
    """A run that has begun."""
    first = config(run={"name": "a", "dir": str(folder)})
    assert refuse_changed_config(first) == []
    save_config(first, f"{first.run.path}/config.yaml")
    assert refuse_changed_config(first) == []
    return first


def test_another_run_of_the_same_name_is_refused(tmp_path: Path) -> None:
    run = begun(tmp_path).run.model_dump()
    with pytest.raises(UserError, match=r"optim.lr: 0.1 in the run, 0.2 now[\s\S]*run.name=") as e:
        refuse_changed_config(config(run=run, optim={"lr": 0.2}))
    assert "'resume.allow=[optim.lr]'" in str(e.value), "the cure that people want"
    with pytest.raises(UserError, match=r"train.global_batch") as e:
        refuse_changed_config(config(run=run, optim={"lr": 0.2}, train={"global_batch": 1024}))
    assert "resume.allow" not in str(e.value), "no cure"


def test_a_change_is_possible_by_name(tmp_path: Path) -> None:
    run = begun(tmp_path).run.model_dump()
    changed: dict[str, Any] = {"run": run, "optim": {"lr": 0.2}, "train": {"epochs": 30}}
    with pytest.raises(UserError, match=r"train.epochs: 20.0 in the run, 30.0 now") as e:
        refuse_changed_config(config(**changed, resume={"allow": ["optim.lr"]}))
    assert "optim.lr: " not in str(e.value)
    allowed = config(**changed, resume={"allow": ["optim.lr", "train.epochs"]})
    assert refuse_changed_config(allowed) == [("optim.lr", 0.1, 0.2), ("train.epochs", 20.0, 30.0)]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("optim.lrr", r"resume.allow=optim.lrr: there is no such key; did you mean optim.lr\?"),
        ("train.global_batch", r"resume.allow=train.global_batch: a run cannot go on with another"),
    ],
)
def test_a_name_must_be_one_that_can_be_allowed(tmp_path: Path, name: str, message: str) -> None:
    values = config(run={"dir": str(tmp_path)}, resume={"allow": [name]})
    with pytest.raises(UserError, match=message):
        refuse_changed_config(values)


def test_changes_are_added_to_the_record_of_the_run(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text("{}")
    record_changes(str(tmp_path), 7, [("optim.lr", 0.1, 0.2)])
    record_changes(str(tmp_path), 9, [("train.epochs", 20.0, 30.0)])
    first, second = json.loads((tmp_path / "changes.json").read_text())
    assert (first["step"], first["changes"]) == (7, {"optim.lr": {"before": 0.1, "now": 0.2}})
    assert second["step"] == 9
    assert not (tmp_path / "summary.json").exists(), "the run is no longer complete"


@pytest.mark.slow
def test_every_entry_compares_the_settings_and_records_what_was_allowed(tmp_path: Path) -> None:
    """A finished run is refused another length, then goes on for more steps by name."""
    shards = tiny.write_shards(tmp_path / "shards")
    first = tiny.config(tmp_path, shards, run={"name": "a"}, train={"max_steps": 2})
    run_pretraining(first)
    longer = first.model_copy(deep=True)
    longer.train.max_steps = 3
    file = tmp_path / "longer.yaml"
    file.write_text(config_to_yaml(longer))
    command = [sys.executable, "-m", "pipelines.pretrain", str(file)]
    refused = subprocess.run(command, check=False, capture_output=True, text=True)
    assert refused.returncode == 2, refused.stderr
    assert "train.max_steps: 2 in the run, 3 now" in refused.stderr
    assert "Traceback" not in refused.stderr
    kept = read_run_config(first.run.path)
    assert kept is not None and kept["train"]["max_steps"] == 2, "and nothing was written"
    longer.resume.allow = ["train.max_steps"]
    events: list[dict[str, Any]] = []
    run_pretraining(longer, events.append)
    changed = [event for event in events if event["event"] == "settings_changed"]
    assert [event["changes"] for event in changed] == [{"train.max_steps": [2, 3]}]
    kept = read_run_config(first.run.path)
    assert kept is not None and kept["train"]["max_steps"] == 3
    assert kept["resume"] == {"allow": ["train.max_steps"]}
    (entry,) = json.loads((Path(first.run.path) / "changes.json").read_text())
    assert entry["step"] == 2
    assert len(tiny.per_step(longer)[0]) == 3
    shorter = first.model_copy(deep=True)
    shorter.resume.allow = ["train.max_steps"]
    with pytest.raises(UserError, match=r"has done 3 steps, but .* give 2 now"):
        run_pretraining(shorter)


@pytest.mark.slow
def test_a_run_goes_on_without_the_weights_that_it_began_with(tmp_path: Path) -> None:
    shards = tiny.write_shards(tmp_path / "shards")
    before = tiny.trained_run(tmp_path / "before", shards)
    begun = before.model.model_dump() | {"init_from": before.run.path}
    run = tiny.config(tmp_path / "runs", shards, model=begun, train={"max_steps": 1})
    run_pretraining(run)
    shutil.rmtree(before.run.path)
    longer = run.model_copy(deep=True)
    longer.train.max_steps, longer.resume.allow = 2, ["train.max_steps"]
    run_pretraining(longer)
    assert len(tiny.per_step(longer)[0]) == 2


@pytest.mark.parametrize(
    ("saved", "now", "key"),
    [
        ({"data.labels": "a"}, {"data.labels": "b"}, "data.labels: .* digest b .* checkpoint, a"),
        ({"data.labels": "a"}, {}, "data.labels: .* digest none .* checkpoint, a"),
        ({}, {"data.mix.1.labels": "b"}, r"data.mix.1.labels: .* digest b .* checkpoint, none"),
        (None, {"data.labels": "b"}, "data.labels: .* digest b .* checkpoint, none"),
        ({"data.labels": "a"}, {"data.labels": "a"}, "data.shards=data/train: digest new"),
    ],
)
def test_other_labels_are_refused_by_name(
    saved: dict[str, str] | None, now: dict[str, str], key: str
) -> None:
    """Also where the checkpoint was written before there were label sets."""
    run = {"data_digest": "old"} | ({} if saved is None else {"labels": saved})
    with pytest.raises(UserError, match=key):
        refuse_other_data(run, "new", now, config())
    refuse_other_data(run, "old", saved or {}, config())


@pytest.mark.slow
def test_a_run_records_its_labels_and_does_not_resume_with_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tags: dict[str, str] = {}  # which MLflow gets, too
    start = JsonlTracker.start
    monkeypatch.setattr(
        JsonlTracker, "start", lambda self, *args: (tags.update(args[1]), start(self, *args))
    )
    shards = tiny.write_shards(tmp_path / "shards")
    index = ShardIndex.load(shards)
    ids = [[int(label)] for shard in index.shards for label in shard.labels]
    same = write_labels(f"{tmp_path}/same", index, ids, tiny.CLASSES).folder
    other = write_labels(f"{tmp_path}/other", index, [[], *ids[1:]], tiny.CLASSES)
    first = tiny.config(
        tmp_path, shards, run={"name": "a"}, data={"labels": same}, train={"max_steps": 1}
    )
    summary = run_pretraining(first)
    (digest,) = summary["labels"].values()
    assert find_checkpoint(first.run.path).run["labels"] == {"data.labels": digest}
    assert tags["data.labels.digest"] == digest
    longer = first.model_copy(deep=True)
    longer.train.max_steps, longer.resume.allow = 2, ["train.max_steps"]
    longer.data.labels = other.folder
    with pytest.raises(UserError, match=f"data.labels: .*{other.digest}.*{digest}"):
        run_pretraining(longer)
