"""`auto` sizes of a head become numbers once, when a run begins, and stay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mhe_dist.config.schema import Config
from mhe_dist.config.write import config_to_dict, save_config
from mhe_dist.errors import UserError
from pipelines.pretrain.main import run_pretraining
from pipelines.runs.auto_sizes import explain_settled, settle_sizes
from pipelines.runs.folder import read_run_config
from pipelines.runs.resume import changed_keys, refuse_changed_config
from pipelines.runs.warm_start import find_checkpoint
from tests.support import tiny

AUTO = {"groups": "auto", "mhs": {"length": "auto", "extra_heads": "auto"}}


def config(folder: Path, workers: int = 2, **head: Any) -> Config:
    return Config.model_validate(
        {
            "run": {"name": "a", "dir": str(folder)},
            "data": {"shards": "data/train"},
            "model": {"embedding_dim": 128},
            "head": head,
            "train": {"global_batch": 512, "micro_batch": 64},
            "scale": {"workers": workers},
        }
    )


def sizes_of(config: Config) -> tuple[Any, Any, Any]:
    head = config.head
    return head.groups, head.mhs.length, head.mhs.extra_heads


def test_a_run_that_begins_gets_the_numbers_of_the_rule(tmp_path: Path) -> None:
    settled = settle_sizes(config(tmp_path), 6_000)
    assert sizes_of(settled) == (8, 750, 0)
    line = explain_settled(config(tmp_path), 6_000)
    assert "head.groups=8, head.mhs.length=750, head.mhs.extra_heads=0: " in line
    assert "\n" not in line and "up to 8 workers" in line and "head.kind=full" in line


def test_a_run_that_goes_on_keeps_its_numbers(tmp_path: Path) -> None:
    """With other workers, for which the rule would choose others, and with a part of them typed."""
    save_config(settle_sizes(config(tmp_path, 1), 10**6), f"{tmp_path}/a/config.yaml")
    begun = read_run_config(f"{tmp_path}/a")
    assert begun is not None and begun["head"]["groups"] == 8
    for head in ({}, AUTO, {"groups": 8}):
        again = config(tmp_path, 4, **head)
        assert refuse_changed_config(again) == []
        settled = settle_sizes(again, 6_000)
        assert config_to_dict(settled)["head"] == begun["head"]
    assert f"as {tmp_path}/a began" in explain_settled(config(tmp_path), 10**6)


def test_a_margin_is_chosen_once_too(tmp_path: Path) -> None:
    margin = {"scale": 32, "m": "auto"}
    settled = settle_sizes(config(tmp_path, margin=margin, groups=2, mhs={"length": 60}), 6_000)
    assert settled.head.margin.m == 0.522
    save_config(settled, f"{tmp_path}/a/config.yaml")
    again = config(tmp_path, margin=margin)
    assert refuse_changed_config(again) == []
    assert settle_sizes(again, 10**6).head.margin.m == 0.522
    with pytest.raises(UserError, match=r"head.margin.m: 0.522 in the run, 0.3 now"):
        refuse_changed_config(config(tmp_path, margin={"scale": 32, "m": 0.3}))


def test_another_number_is_still_refused(tmp_path: Path) -> None:
    save_config(settle_sizes(config(tmp_path), 6_000), f"{tmp_path}/a/config.yaml")
    with pytest.raises(UserError, match=r"head.groups: 8 in the run, 4 now"):
        refuse_changed_config(config(tmp_path, groups=4))
    with pytest.raises(UserError, match=r"head.mhs.length: 750 in the run, 100 now"):
        refuse_changed_config(config(tmp_path, mhs={"length": 100}))


def test_more_workers_than_the_groups_of_a_run_are_refused(tmp_path: Path) -> None:
    save_config(config(tmp_path, 2, groups=2), f"{tmp_path}/a/config.yaml")
    with pytest.raises(UserError, match=r"head.groups=2 is less than scale.workers=4.*run.name"):
        settle_sizes(config(tmp_path, 4), 6_000)


def test_what_is_a_number_stays_as_it_is(tmp_path: Path) -> None:
    given = config(tmp_path, groups=4, mhs={"length": 10, "extra_heads": 3})
    assert settle_sizes(given) is given, "without a look at the data"
    assert explain_settled(given) == ""
    full = settle_sizes(config(tmp_path, kind="full"), 6_000)
    assert full.head.groups == 8 and "mhs" not in config_to_dict(full)["head"]


def test_other_keys_may_not_become_auto(tmp_path: Path) -> None:
    before = config_to_dict(config(tmp_path))
    after = config_to_dict(config(tmp_path, matmul="float32"))
    assert changed_keys(before, after) == [("head.matmul", "auto", "float32")]


def test_a_run_of_no_head_yet_decides_nothing(tmp_path: Path) -> None:
    """That is what `mhe embed` writes of a backbone that nobody trained."""
    save_config(config(tmp_path), f"{tmp_path}/a/config.yaml")
    assert refuse_changed_config(config(tmp_path, groups=4)) == []
    assert sizes_of(settle_sizes(config(tmp_path), 6_000)) == (8, 750, 0)


@pytest.mark.slow
def test_a_rank_settles_the_sizes_and_a_resume_with_auto_keeps_them(tmp_path: Path) -> None:
    """The run and its checkpoint hold numbers; workers for whom they differ go on with them."""
    shards = tiny.write_shards(tmp_path / "data")
    auto = {**AUTO, "margin": {"kind": "cosface", "scale": 16, "m": "auto"}}
    first = tiny.config(tmp_path, shards, head=auto, train={"max_steps": 4}, scale={"workers": 4})
    run_pretraining(first)
    begun = read_run_config(first.run.path)
    assert begun is not None
    assert begun["head"]["groups"] == 4 and begun["head"]["mhs"]["length"] == 8
    assert 0.45 < begun["head"]["margin"]["m"] < 0.7
    saved = find_checkpoint(first.run.path)
    assert saved.run["config"]["head"] == begun["head"]
    overrides = {"train": {"max_steps": 6}, "resume": {"allow": ["train.max_steps"]}}
    run_pretraining(tiny.config(tmp_path, shards, head=auto, **overrides))
    after = read_run_config(first.run.path)
    assert after is not None and after["head"] == begun["head"]
    assert find_checkpoint(first.run.path).step == 6
