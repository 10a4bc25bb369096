"""The benchmark of training measures what it says."""

from __future__ import annotations

import pytest

from pipelines.bench.train import PARTS, TrainCase, TrainTimes, measure_training

CASE = TrainCase(
    backbone="resnet10t",
    micro_batch=2,
    world_size=1,
    length=10,
    extra_heads=2,
    steps=1,
    rounds=2,
    photos=100,
)


@pytest.mark.long
def test_both_loops_train_and_the_parts_are_those_of_ours() -> None:
    times = measure_training(CASE)
    assert len(times.mhe) == len(times.bare) == 2
    assert min(times.mhe + times.bare) > 0
    assert tuple(times.parts) == PARTS
    assert 0 < sum(times.parts.values()) < 2 * max(times.mhe)


def test_the_ratio_is_of_images_per_second() -> None:
    times = TrainTimes(CASE, mhe=[2.0, 4.0, 2.0], bare=[1.0, 1.0, 2.0], parts={})
    assert times.ratio == 0.5
    assert times.images_per_s(times.mhe) == 1.0
    assert times.to_dict()["ratio"] == 0.5
