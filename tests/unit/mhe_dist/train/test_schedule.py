"""Learning rates and lengths of runs."""

from __future__ import annotations

import math

import pytest

from mhe_dist.config.data import DataConfig
from mhe_dist.config.schema import Config, OptimConfig, TrainConfig
from mhe_dist.train.schedule import learning_rate, total_steps


def course(total: int, **optim: object) -> list[float]:
    config = OptimConfig.model_validate({"lr": 0.8, **optim})
    return [learning_rate(step, total, config) for step in range(total)]


def test_constant() -> None:
    assert course(5, schedule="constant") == [0.8] * 5


def test_cosine_goes_from_the_peak_to_the_final_rate() -> None:
    rates = course(101, schedule="cosine", final_lr=0.2)
    assert rates[0] == pytest.approx(0.8)
    assert rates[50] == pytest.approx(0.5)
    assert rates[25] == pytest.approx(0.2 + 0.6 * (1 + math.cos(math.pi / 4)) / 2)
    assert rates[100] == pytest.approx(0.2)
    assert rates == sorted(rates, reverse=True)


@pytest.mark.parametrize("power", [1.0, 2.0, 0.5])
def test_polynomial(power: float) -> None:
    rates = course(11, schedule="polynomial", power=power, final_lr=0.1)
    expected = [0.1 + 0.7 * (1 - step / 10) ** power for step in range(11)]
    assert rates == pytest.approx(expected)


@pytest.mark.parametrize("schedule", ["constant", "cosine", "polynomial"])
def test_warm_up_grows_linearly_to_the_peak(schedule: str) -> None:
    rates = course(20, schedule=schedule, warmup_steps=3)
    assert rates[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert rates[-1] == pytest.approx(0.8 if schedule == "constant" else 0.0)
    assert max(rates) == pytest.approx(0.8)


@pytest.mark.parametrize("schedule", ["constant", "cosine", "polynomial"])
@pytest.mark.parametrize("total, warmup_steps", [(1, 0), (1, 1), (3, 3), (3, 9), (2, 1)])
def test_short_runs_have_rates(schedule: str, total: int, warmup_steps: int) -> None:
    rates = course(total, schedule=schedule, warmup_steps=warmup_steps)
    assert rates[0] == pytest.approx(0.8 / (warmup_steps + 1))
    assert all(0 < rate <= 0.8 for rate in rates)


def test_beyond_the_end_the_final_rate_stays() -> None:
    assert learning_rate(50, 10, OptimConfig(lr=0.8, final_lr=0.1)) == pytest.approx(0.1)


@pytest.mark.parametrize(
    "epochs, samples, max_steps, steps",
    [
        (1, 1000, 0, 10),
        (1, 1001, 0, 11),
        (0.5, 1000, 0, 5),
        (3, 950, 0, 29),
        (0.001, 1, 0, 1),
        (20, 1000, 7, 7),
        (1, 1000, 50, 10),
        (2, 10**11, 0, 2 * 10**9),
    ],
)
def test_total_steps(epochs: float, samples: int, max_steps: int, steps: int) -> None:
    train = TrainConfig(epochs=epochs, global_batch=100, max_steps=max_steps)
    config = Config.model_construct(data=DataConfig(shards="x"), train=train)
    assert total_steps(config, samples) == steps
