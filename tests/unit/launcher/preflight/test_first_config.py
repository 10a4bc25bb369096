"""The first YAML for a user's data: it loads, its parts divide one another, and it says why."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from launcher.preflight.first_config import (
    Machine,
    choose_batch,
    choose_settings,
    write_first_config,
)
from launcher.preflight.own_data import OwnData
from mhe_dist.config.auto.head_sizes import MOST_CLASSES_OF_FULL, resolve_sizes
from mhe_dist.config.load import load_config
from mhe_dist.config.schema import Config, validate_combinations

MACHINES = [
    *(Machine(workers, False) for workers in (1, 2, 3, 6, 8)),
    *(Machine(workers, True, 8) for workers in (1, 4, 7, 64)),
]


def settings_of(data: OwnData, machine: Machine) -> Config:
    text = write_first_config(data, machine, "mine", ["a header"])
    return Config.model_validate(yaml.safe_load(text))


@pytest.mark.parametrize("machine", MACHINES, ids=str)
@pytest.mark.parametrize("images", [0, 40, 2_160, 500_000, 10**9])
@pytest.mark.parametrize("classes", [3, 216, 30_000, 10**8])
def test_any_data_on_any_machine_is_a_valid_run(
    machine: Machine, images: int, classes: int
) -> None:
    config = settings_of(OwnData("shards", classes, images, 64, "data/a", "data/b"), machine)
    assert validate_combinations(config) == []
    assert config.scale.workers == machine.workers and config.scale.gpu == machine.gpu
    assert config.train.micro_batches == machine.workers
    assert config.scale.zero_stage == (1 if machine.gpu else 0)
    assert not images or config.train.global_batch <= max(images, machine.workers)
    assert config.head.chosen_groups % machine.workers == 0
    if config.head.kind == "mhs":
        length, extra = config.head.mhs.chosen_length, config.head.mhs.chosen_extra_heads
        assert extra < max(1, -(-classes // length) // config.head.chosen_groups)
        assert (extra == 0) == (length >= 375)


@pytest.mark.parametrize("machine", MACHINES, ids=str)
@pytest.mark.parametrize("classes", [216, 30_000, 10**6, 10**8])
def test_its_sizes_are_those_of_auto(machine: Machine, classes: int) -> None:
    config = settings_of(OwnData("shards", classes, 10**7, 64, "data/a", "data/b"), machine)
    auto: dict[str, object] = {"groups": "auto"}
    if config.head.kind == "mhs":
        auto["mhs"] = config.head.mhs.model_copy(update={"length": "auto", "extra_heads": "auto"})
    head = config.head.model_copy(update=auto)
    assert resolve_sizes(config.model_copy(update={"head": head}), classes).head == config.head


def test_full_up_to_some_ten_thousand_classes_and_heads_beyond() -> None:
    machine = Machine(2, False)
    few, many = (
        settings_of(OwnData("shards", classes, 10**6, 64, "a"), machine).head
        for classes in (MOST_CLASSES_OF_FULL, MOST_CLASSES_OF_FULL + 1)
    )
    assert (few.kind, many.kind) == ("full", "mhs")
    assert 10_000 <= MOST_CLASSES_OF_FULL < 100_000


def test_rows_that_do_not_fit_are_kept_elsewhere() -> None:
    data = OwnData("shards", 10**8, 10**9, 112, "a")
    assert settings_of(data, Machine(8, False)).head.bank.memory == "file"
    assert settings_of(data, Machine(8, True, 8)).head.bank.memory == "host"
    assert settings_of(data, Machine(64, True, 8)).head.bank.memory == "device"


def test_small_data_gets_small_batches() -> None:
    batch = choose_batch(40, Machine(2, False))
    assert batch.global_batch * 8 <= 40 and batch.global_batch % batch.streams == 0


@pytest.mark.parametrize("classes", [216, 10**8])
def test_each_choice_says_why(classes: int) -> None:
    data = OwnData("shards", classes, 10**6, 64, "a", "b")
    sections = choose_settings(data, Machine(2, False), "mine")
    why = {f"{s}.{each.key}": each.why for s, found in sections.items() for each in found}
    chosen = {"head.kind", "head.groups", "train.global_batch", "data.image_size"}
    assert all(why[key] for key in chosen | ({"head.mhs"} if classes > 10**5 else set()))
    assert f"{classes:,}" in why["head.kind"]


def test_the_file_is_yaml_with_comments_of_a_hundred_columns(tmp_path: Path) -> None:
    data = OwnData("shards", 30_000, 10**6, 200, "data/a", "data/b")
    text = write_first_config(data, Machine(4, True, 8), "mine", ["a header", ""])
    assert max(map(len, text.splitlines())) <= 100
    (tmp_path / "a.yaml").write_text(text)
    assert load_config(str(tmp_path / "a.yaml")).data.image_size == 192
