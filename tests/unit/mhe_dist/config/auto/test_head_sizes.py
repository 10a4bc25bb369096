"""The rule behind `auto`: what it chooses where a study measured it, and what bounds it beyond."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest

from mhe_dist.config.auto.head_sizes import (
    BUDGET,
    FEWEST_MET,
    LONGEST,
    MOST_CLASSES_OF_FULL,
    MOST_MET,
    HeadDemand,
    SizeChoice,
    auto_keys,
    choose_groups,
    choose_kind,
    choose_sizes,
    count_classes_met,
    fill_sizes,
    resolve_sizes,
)
from mhe_dist.config.head import AUTO, AUTO_KEYS, HeadConfig
from mhe_dist.config.load import ConfigErrors, load_config
from mhe_dist.config.schema import Config
from mhe_dist.errors import UserError
from mhe_dist.kernels.dispatch import MAX_LENGTH

STUDY = HeadDemand(6_000, 128, 2, 256, 2, gpu=False)  # of `mhe reproduce heads`, on two workers
LARGE = STUDY._replace(classes=93_966)  # of `mhe reproduce full`
GPUS = HeadDemand(10**8, 512, 8, 128, 8, gpu=True)


def head_of(**mhs: Any) -> HeadConfig:
    return HeadConfig.model_validate({"kind": "mhs", "mhs": mhs})


def sizes_of(demand: HeadDemand, **mhs: Any) -> tuple[int, int, int]:
    return choose_sizes(head_of(**mhs), demand)[:3]


def sizes_and_classes(demand: HeadDemand, head: HeadConfig) -> tuple[SizeChoice, int]:
    sizes = choose_sizes(head, demand)
    return sizes, count_classes_met(fill_sizes(head, sizes).mhs, demand, sizes.groups)


def test_where_a_study_measured_the_rule_takes_its_best() -> None:
    assert sizes_of(STUDY) == (2, 600, 0)  # one own head of a tenth of the classes
    assert sizes_of(STUDY, negatives="own") == (2, 600, 0)
    assert sizes_of(STUDY, exchange="gather", negatives="batch") == (2, 10, 0)
    groups, length, extra = sizes_of(LARGE)
    assert (groups, length) == (2, 128) and extra in (72, 73)  # the study had 72


def test_a_head_of_a_whole_group_where_there_are_as_many_workers() -> None:
    assert sizes_of(STUDY._replace(workers=16, micro_batches=16)) == (16, 375, 0)


def test_kind_by_classes() -> None:
    assert [choose_kind(n) for n in (2, MOST_CLASSES_OF_FULL, MOST_CLASSES_OF_FULL + 1)] == [
        *("full", "full", "mhs")
    ]


DEMANDS = [
    HeadDemand(classes, dim, workers, batch, workers * turns, gpu, labels)
    for classes, dim, workers, batch, turns, gpu, labels in product(
        (1, 3, 100, 6_000, 93_966, 10**6, 10**8, 10**9),
        (128, 512),
        (1, 3, 8, 64),
        (8, 128),
        (1, 4),
        (False, True),
        (1, 8),
    )
]


@pytest.mark.parametrize("kind", ["own", "own_plus", "batch", "gathered"])
@pytest.mark.parametrize("memory", ["device", "file"])
def test_any_demand_has_sizes_within_the_bounds(kind: str, memory: str) -> None:
    gathers = kind in ("batch", "gathered")
    block = {
        "exchange": "gather" if gathers else "route",
        "negatives": "own_plus" if kind == "gathered" else kind,
    }
    head = HeadConfig.model_validate({"kind": "mhs", "mhs": block, "bank": {"memory": memory}})
    for demand in DEMANDS:
        (groups, length, extra, *_), seen = sizes_and_classes(demand, head)
        assert groups % demand.workers == 0 and demand.micro_batches % groups == 0
        assert 1 <= length <= min(LONGEST, demand.classes)
        heads = -(-demand.classes // length)
        assert 0 <= extra < max(1, heads if gathers else -(-heads // groups))
        if kind in ("own", "own_plus", "gathered"):
            least = min(FEWEST_MET, demand.classes // groups)
            assert least <= seen <= 2 * MOST_MET, demand


def rows_met(demand: HeadDemand) -> float:
    """Rows that a worker meets in a forward pass of routed heads, own and extra ones."""
    groups, length, extra = sizes_of(demand)
    own = min(demand.classes / demand.workers, demand.micro_batch * demand.labels * length)
    return own + groups / demand.workers * extra * length


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("dim", [128, 512])
@pytest.mark.parametrize("classes", [6_000, 93_966, 10**6, 10**9])
def test_the_rows_of_a_forward_pass_stay_within_the_budget(
    classes: int, dim: int, gpu: bool
) -> None:
    for batch in (64, 256):
        for micro_batches in (8, 32):
            demand = HeadDemand(classes, dim, 8, batch, micro_batches, gpu)
            assert rows_met(demand) * dim * 4 <= batch * BUDGET[gpu]


def test_the_budget_decides_with_many_classes() -> None:
    assert sizes_of(GPUS) == (8, 128, 78)
    on_disk = head_of().model_copy(update={"bank": HeadConfig().bank.model_copy()})
    on_disk.bank.memory = "file"
    narrow = choose_sizes(on_disk, GPUS)
    assert narrow.length == 32 and narrow.length * (1 + narrow.extra_heads) < MOST_MET
    assert sizes_of(GPUS) == sizes_of(GPUS._replace(classes=10**9))  # nothing grows with C


def test_groups_for_every_number_of_workers_that_the_batches_allow() -> None:
    many, routed, full = (
        GPUS._replace(workers=2, micro_batches=8),
        head_of(),
        HeadConfig(kind="full"),
    )
    assert choose_groups(routed, many) == 8
    assert choose_groups(routed, many._replace(micro_batches=128)) == 8  # four times, or eight
    assert choose_groups(routed, many._replace(workers=3, micro_batches=12)) == 12
    assert choose_groups(routed, many._replace(workers=64, micro_batches=1024)) == 256
    # Groups of fewer classes than a sample should meet are for the workers' sake alone.
    small = many._replace(classes=6_000, workers=8, micro_batches=32)
    assert (choose_groups(routed, small), choose_groups(full, small)) == (8, 32)
    few = small._replace(classes=300, micro_batches=8)
    assert choose_groups(routed, few) == choose_groups(full, few) == 8


def test_numbers_that_are_given_are_kept() -> None:
    assert sizes_of(GPUS, length=100) == (8, 100, 99)
    assert sizes_of(GPUS, extra_heads=0)[2] == 0
    assert sizes_of(STUDY, extra_heads=5) == (2, 100, 5)
    assert sizes_of(STUDY, length=600) == (2, 600, 0)
    given = HeadConfig.model_validate({"groups": 7, "mhs": {"length": 5, "extra_heads": 3}})
    assert fill_sizes(given, choose_sizes(given, STUDY)) == given


def test_which_keys_are_auto() -> None:
    assert [*auto_keys(HeadConfig()), "head.margin.m"] == list(AUTO_KEYS)
    margin = {"m": "auto"}
    assert auto_keys(HeadConfig(margin=margin)) == list(AUTO_KEYS)
    assert auto_keys(HeadConfig(kind="full", margin=margin)) == ["head.groups", "head.margin.m"]
    assert auto_keys(HeadConfig(kind="full")) == ["head.groups"]
    assert auto_keys(head_of(length=4, extra_heads=1)) == ["head.groups"]


def test_a_config_gets_its_numbers() -> None:
    values = {
        "data": {"shards": "x"},
        "model": {"embedding_dim": 128},
        "train": {"global_batch": 512, "micro_batch": 256},
        "scale": {"workers": 2},
    }
    head = resolve_sizes(Config.model_validate(values), 6_000).head
    assert (head.groups, head.mhs.length, head.mhs.extra_heads) == (2, 600, 0)
    assert head.chosen_groups == 2 and auto_keys(head) == []


def test_a_number_that_nobody_chose_is_named() -> None:
    head = HeadConfig()
    for read, key in (
        (lambda: head.chosen_groups, "head.groups"),
        (lambda: head.mhs.chosen_length, "head.mhs.length"),
        (lambda: head.mhs.chosen_extra_heads, "head.mhs.extra_heads"),
        (lambda: HeadConfig(margin={"m": "auto"}).margin.chosen_m, "head.margin.m"),
    ):
        with pytest.raises(UserError, match=f"^{key}=auto: "):
            read()


@pytest.mark.parametrize("value", ["0", "-1", "much", "[1]"])
def test_no_number_is_one_mistake(value: str) -> None:
    with pytest.raises(ConfigErrors) as error:
        load_config(None, ["data.shards=x", f"head.groups={value}"])
    assert len(error.value.mistakes) == 1
    assert "head.groups" in str(error.value)
    assert "must be a whole number greater than 0 or auto" in str(error.value)


def test_auto_can_be_typed() -> None:
    overrides = ["data.shards=x", "head.groups=auto", "head.mhs.length=auto"]
    assert load_config(None, overrides).head.groups == AUTO


def test_a_long_head_has_a_kernel() -> None:
    assert LONGEST == MAX_LENGTH
