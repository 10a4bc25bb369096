"""The door for people who import: few names, each imported when used, and a callable package."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import mhe_dist
import pipelines
from mhe_dist.config.load import resolve_config
from mhe_dist.config.mistakes import ConfigErrors
from pipelines.pretrain import main as pretrain_main

NAMES = {
    "mhe_dist": [
        *("Checkpoint", "CheckpointStore", "Config", "DataConfig", "Engine", "HeadOutput", "Loop"),
        *("RunError", "StandaloneHead", "Topology", "UserError"),
        *("connect", "create_head", "load_config"),
    ],
    "pipelines": [
        *("Loader", "Sample", "SampleOrder", "ShardIndex", "ShardWriter", "TrainedBackbone"),
        *("class_centres", "embed_arrays", "load_trained_backbone", "open_checkpoint", "pretrain"),
    ],
}
IMPORTED = """
import sys
before = set(sys.modules)
import mhe_dist, pipelines
new = set(sys.modules) - before
print(*sorted(name for name in new if name.partition(".")[0] not in sys.stdlib_module_names))
"""


@pytest.mark.parametrize("package", NAMES)
def test_the_names_are_these(package: str) -> None:
    module = importlib.import_module(package)
    assert list(module.__all__) == NAMES[package]
    assert set(NAMES[package]) <= set(dir(module))


@pytest.mark.parametrize("name", [f"{p}.{n}" for p, names in NAMES.items() for n in names])
def test_each_name_is_there(name: str) -> None:
    package, _, attribute = name.partition(".")
    found = getattr(importlib.import_module(package), attribute)
    assert callable(found) and found.__doc__


@pytest.mark.parametrize("module", [mhe_dist, pipelines])
def test_other_names_are_not_there(module: Any) -> None:
    with pytest.raises(AttributeError, match="no attribute 'create_hed'"):
        module.create_hed  # noqa: B018


def test_importing_brings_nothing_so_it_takes_no_time() -> None:
    command = [sys.executable, "-c", IMPORTED]
    run = subprocess.run(command, capture_output=True, check=True, text=True)
    assert run.stdout.split() == ["mhe_dist", "mhe_dist.lazy", "pipelines"]


def test_pretrain_is_a_function_and_a_package(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(
        pretrain_main, "run_pretraining", lambda *args: seen.append(args) or {"step": 3}
    )
    summary = pipelines.pretrain(
        {"data": {"shards": "here"}},
        ["train.max_steps=3", "run.name=mine"],
        on_event=print,
        train={"global_batch": 64, "micro_batch": 64},
        data={"streams": 8},
    )
    assert summary == {"step": 3}
    ((config, on_event),) = seen
    assert config.run.name == "mine" and config.train.max_steps == 3
    assert (config.data.shards, config.data.streams, config.train.micro_batch) == ("here", 8, 64)
    assert on_event is print


def test_a_config_comes_from_a_file_a_dict_or_a_config(tmp_path: Path) -> None:
    values = {"data": {"shards": "1e3", "augment": {"flip": 0.25}}, "optim": {"lr": 1e-8}}
    (tmp_path / "run.yaml").write_text(json.dumps(values))
    from_dict, from_file = resolve_config(values), resolve_config(tmp_path / "run.yaml")
    assert from_dict == from_file == resolve_config(from_dict)
    assert (from_dict.data.shards, from_dict.optim.lr) == ("1e3", 1e-8)
    changed = resolve_config(from_dict, ["optim.lr=0.5", "run.seed=4"], optim={"lr": 0.25})
    assert (changed.optim.lr, changed.run.seed, changed.data) == (0.25, 4, from_dict.data)


def test_a_wrong_key_is_named() -> None:
    with pytest.raises(ConfigErrors, match=r"did you mean train\.max_steps"):
        resolve_config({"data": {"shards": "here"}}, train={"max_step": 3})
