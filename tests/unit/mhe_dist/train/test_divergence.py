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


@pytest.mark.parametrize("norm", [0.0, 1e-20])
def test_first_gradients_that_vanish(norm: float) -> None:
    with pytest.raises(Divergence, match=r"^step 1: the first gradients of the backbone vanish"):
        Guard(GuardConfig()).check(records(3.0, 3.0, grad_norm=norm))
    assert Guard(GuardConfig()).check(records(3.0, first=7, grad_norm=norm)) == []
    assert Guard(GuardConfig(on_divergence="ignore")).check(records(3.0, grad_norm=norm)) == []


def test_large_first_gradients_bring_the_advice_to_clip() -> None:
    (advice,) = Guard(GuardConfig()).check(records(3.0, 3.0, grad_norm=1.2e5))
    assert advice.startswith("the first gradients are large (norm 1.2e+05): clip them (optim.clip")
    assert Guard(GuardConfig()).check(records(3.0, grad_norm=900.0)) == []
    assert Guard(GuardConfig(), clip_norm=1.0).check(records(3.0, grad_norm=1.2e5)) == []
    assert Guard(GuardConfig()).check(records(3.0, first=1, grad_norm=1.2e5)) == []


def test_first_gradients_that_explode() -> None:
    with pytest.raises(Divergence, match=r"explode \(norm 1\.0e\+16\): clip them"):
        Guard(GuardConfig()).check(records(3.0, grad_norm=1e16))
    assert Guard(GuardConfig(), clip_norm=1.0).check(records(3.0, grad_norm=1e16)) == []
    assert len(Guard(GuardConfig(on_divergence="ignore")).check(records(3.0, grad_norm=1e16))) == 1


def test_a_loss_of_exactly_zero_is_said_once() -> None:
    guard = Guard(GuardConfig())
    (warning,) = guard.check(records(1.0, 0.0, 0.0, grad_norm=0.0))
    assert warning.startswith("the loss of step 1 is exactly 0")
    assert guard.check(records(0.0, first=3)) == []
