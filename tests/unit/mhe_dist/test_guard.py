"""What counts as divergence."""

from __future__ import annotations

import pytest

from mhe_dist.config import GuardConfig
from mhe_dist.guard import Guard, Trouble

NAN, INF = float("nan"), float("inf")


def records(*losses: float, first: int = 0, **last: float) -> list[tuple[int, dict[str, float]]]:
    found = [(first + i, {"loss": loss}) for i, loss in enumerate(losses)]
    found[-1][1].update(last)
    return found


@pytest.mark.parametrize("loss", [NAN, INF, -INF])
def test_the_first_loss_that_is_not_finite(loss: float) -> None:
    found = Guard(GuardConfig()).look(records(3.0, loss, NAN))
    assert found is not None and found.step == 1
    assert str(loss) in found.what


def test_a_gradient_that_is_not_finite_is_that_of_the_last_step() -> None:
    found = Guard(GuardConfig()).look(records(3.0, 3.0, first=5, grad_norm=INF))
    assert found == Trouble(6, "the norm of the gradient is inf")


def test_a_spike_is_told_from_the_mean_before_and_not_from_the_beginning() -> None:
    guard = Guard(GuardConfig(spike=2.0))
    assert guard.look(records(1.0, 9.0, 1.0)) is None
    assert guard.look(records(*[3.0] * 40, first=3)) is None
    assert guard.look(records(5.9, first=43)) is None
    found = guard.look(records(3.0, 7.0, first=44))
    assert found is not None and found.step == 45
    assert "guard.spike=2" in found.what


def test_a_falling_loss_and_no_spikes_asked_for_are_no_trouble() -> None:
    losses = [10.0 * 0.99**i for i in range(500)]
    assert Guard(GuardConfig(spike=1.5)).look(records(*losses)) is None
    assert Guard(GuardConfig()).look(records(*[1.0] * 50, 1000.0)) is None


def test_ignored_when_the_config_says_so() -> None:
    assert Guard(GuardConfig(on_divergence="ignore")).look(records(NAN, grad_norm=NAN)) is None


def test_nothing_recorded_nothing_wrong() -> None:
    assert Guard(GuardConfig()).look([]) is None
