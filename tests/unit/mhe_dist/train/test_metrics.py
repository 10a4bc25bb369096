"""The window of metrics on one rank."""

import math

import pytest
import torch

from mhe_dist.distributed.topology import Topology
from mhe_dist.train.metrics import MetricsAccumulator, memory


@pytest.fixture
def window():
    return MetricsAccumulator(Topology())


def test_means_sums_and_peaks(window):
    for value, weight in ((1.0, 1.0), (4.0, 2.0)):
        window.add({"m": torch.tensor(value), "host": value}, weight=weight)
        window.add({"s": torch.tensor(value)}, kind="sum")
        window.add({"x": torch.tensor(-value), "y": -value}, kind="max")
    assert window.drain().metrics == {"m": 3.0, "host": 3.0, "s": 5.0, "x": -1.0, "y": -1.0}


def test_each_step_keeps_its_own_loss(window):
    for step in (7, 8, 9):
        for micro_batch in range(2):
            window.add_loss(step, torch.tensor(step + 0.5 * micro_batch))
    window.add({"lr": 0.1})
    drained = window.drain()
    assert drained.losses == [(7, 7.25), (8, 8.25), (9, 9.25)]
    assert drained.records() == [
        (7, {"loss": 7.25}),
        (8, {"loss": 8.25}),
        (9, {"loss": 9.25, "lr": 0.1}),
    ]


def test_a_drain_empties_the_window(window):
    window.add({"a": 1.0})
    window.add_loss(0, torch.tensor(1.0))
    window.drain()
    assert window.drain() == ([], {})


def test_a_single_precision_value_is_kept_exactly(window):
    value = torch.tensor(0.1)
    window.add_loss(0, value)
    assert window.drain().losses == [(0, value.item())]


def test_gradients_are_not_kept_alive(window):
    weight = torch.ones((), requires_grad=True)
    window.add_loss(0, weight * 2)
    assert not window._losses[0][0].requires_grad


def test_what_has_no_weight_does_not_count_even_as_nan(window):
    window.add({"a": torch.tensor(math.nan)}, weight=0.0)
    window.add({"a": torch.tensor(2.0)}, weight=4.0)
    window.add({"none": math.nan}, weight=0.0)
    metrics = window.drain().metrics
    assert metrics["a"] == 2.0
    assert math.isnan(metrics["none"])


def test_a_loss_that_is_not_a_number_shows(window):
    window.add_loss(0, torch.tensor(math.nan))
    window.add({"peak": torch.tensor(math.nan)}, kind="max")
    window.add({"peak": torch.tensor(1.0)}, kind="max")
    drained = window.drain()
    assert math.isnan(drained.losses[0][1])
    assert math.isnan(drained.metrics["peak"])


def test_memory_is_of_this_process():
    figures = memory(torch.device("cpu"))
    assert 0.05 < figures["rss_gib"] <= figures["peak_rss_gib"] * 1.01 < 100
