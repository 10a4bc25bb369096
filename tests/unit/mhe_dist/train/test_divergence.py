"""What counts as divergence."""

from __future__ import annotations

import pytest

from mhe_dist.config.schema import GuardConfig
from mhe_dist.train.divergence import Divergence, Guard

NAN, INF = float("nan"), float("inf")


def records(*losses: float, first: int = 0, **last: float) -> list[tuple[int, dict[str, float]]]:
    found = [(first + i, {"loss": loss}) for i, loss in enumerate(losses)]
    found[-1][1].update(last)
    return found


@pytest.mark.parametrize("loss", [NAN, INF, -INF])
def test_the_first_loss_that_is_not_finite(loss: float) -> None:
    with pytest.raises(Divergence, match=f"^step 1: the loss is {loss}$") as found:
        Guard(GuardConfig()).check(records(3.0, loss, NAN))
    assert (found.value.step, found.value.reason) == (1, f"the loss is {loss}")


def test_a_gradient_that_is_not_finite_is_that_of_the_last_step() -> None:
    with pytest.raises(Divergence, match=r"^step 6: the norm of the gradient is inf$"):
        Guard(GuardConfig()).check(records(3.0, 3.0, first=5, grad_norm=INF))


def test_a_spike_is_told_from_the_mean_before_and_not_from_the_beginning() -> None:
    guard = Guard(GuardConfig(spike=2.0))
    guard.check(records(1.0, 9.0, 1.0))
    guard.check(records(*[3.0] * 40, first=3))
    guard.check(records(5.9, first=43))
    with pytest.raises(Divergence, match=r"^step 45: .* guard.spike=2 "):
        guard.check(records(3.0, 7.0, first=44))


FALLING = records(*[10.0 * 0.99**i for i in range(500)])


@pytest.mark.parametrize(
    ("config", "recorded", "diverged"),
    [
        (GuardConfig(spike=1.5), FALLING, False),
        (GuardConfig(), records(*[1.0] * 50, 1000.0), False),
        (GuardConfig(spike=1.5), records(*[1.0] * 50, 1000.0), True),
        (GuardConfig(on_divergence="ignore"), records(NAN, grad_norm=NAN), False),
        (GuardConfig(), records(NAN, grad_norm=NAN), True),
        (GuardConfig(), [], False),
    ],
)
def test_what_is_trouble_follows_the_config(config, recorded, diverged: bool) -> None:
    try:
        Guard(config).check(recorded)
    except Divergence:
        assert diverged
    else:
        assert not diverged
