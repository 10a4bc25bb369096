"""Margins against their papers' formulas, and derivatives against autograd and differences."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mhe_dist.config.head import MarginConfig
from mhe_dist.heads.margins import (
    INITIAL_NORMS,
    Margin,
    keep_negatives,
    norm_statistics,
    running_norms,
)

CONFIGS = {
    "none": MarginConfig(kind="none"),
    "softmax": MarginConfig(kind="softmax"),
    "arcface": MarginConfig(kind="arcface", m=0.5),
    "arcface, wide": MarginConfig(kind="arcface", m=1.5),
    "cosface": MarginConfig(kind="cosface", m=0.35),
    "combined": MarginConfig(kind="combined", m1=0.9, m2=0.4, m3=0.15),
    "combined, steep": MarginConfig(kind="combined", m1=1.35, m2=0.3, m3=0.1),
    "sphereface": MarginConfig(kind="combined", m1=4.0),
    "adaface": MarginConfig(kind="adaface", m=0.4),
}
every_kind = pytest.mark.parametrize("kind", CONFIGS)
MEAN, STD = 20.0, 5.0


def norms_like(cosine: Tensor) -> Tensor:
    """Norms that spread over AdaFace's whole range, and beyond both clips."""
    return (torch.arange(len(cosine)) * 7919 % 101).to(cosine.dtype) * 1.2


def target(kind: str, cosine: Tensor) -> tuple[Tensor, Tensor]:
    return Margin(CONFIGS[kind]).target(cosine, norms_like(cosine), MEAN, STD)


def reference(kind: str, cosine: Tensor) -> Tensor:
    """The papers' formulas through acos, for autograd in float64."""
    config, theta = CONFIGS[kind], cosine.acos()
    if config.kind in ("none", "softmax"):
        return cosine * 1
    if config.kind == "cosface":
        return cosine - config.m
    if config.kind == "arcface":
        fallback = cosine - config.m * math.sin(config.m)
        return torch.where(theta + config.m <= math.pi, (theta + config.m).cos(), fallback)
    if config.kind == "combined":
        return (config.m1 * theta + config.m2).cos() - config.m3
    safe = norms_like(cosine).clamp(0.001, 100)
    scaler = ((safe - MEAN) / (STD + 1e-3) * config.h).clip(-1, 1)
    angle = (theta - config.m * scaler).clamp(1e-3, math.pi - 1e-3)
    return angle.cos() - (config.m + config.m * scaler)


def grid(kind: str, count: int = 4001) -> Tensor:
    """Cosines on which the reference holds: before a combined margin's angle passes pi."""
    config = CONFIGS[kind]
    lowest = -0.9999
    if config.kind == "combined":
        end = (math.pi - config.m2) / config.m1
        lowest = math.cos(end) + 1e-4 if end < math.pi else lowest
    return torch.linspace(lowest, 0.9999, count, dtype=torch.float64)


@every_kind
def test_value_and_derivative_are_the_papers(kind: str) -> None:
    cosine = grid(kind).requires_grad_()
    expected = reference(kind, cosine)
    (slope,) = torch.autograd.grad(expected.sum(), cosine)
    phi, dphi = target(kind, cosine.detach())
    torch.testing.assert_close(phi, expected.detach(), rtol=0, atol=1e-12)
    torch.testing.assert_close(dphi, slope, rtol=1e-9, atol=1e-9)


@every_kind
def test_derivative_is_that_of_the_value_everywhere(kind: str) -> None:
    """Finite differences, over the whole line: fallback, edges and beyond +-1."""
    cosine = torch.linspace(-1.00001, 1.00001, 20_001, dtype=torch.float64)
    step = 1e-10
    low, dphi, high = (
        target(kind, cosine - step)[0], target(kind, cosine)[1], target(kind, cosine + step)[0],
    )  # fmt: skip
    error = (high - low) / (2 * step) - dphi
    jumps = error.abs() > 1e-3 * dphi.abs().clamp_min(1)
    assert jumps.sum() <= (1 if kind != "adaface" else 60)  # kinks: one each, or one per norm


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_and_beyond_by_rounding_are_finite(kind: str, dtype: torch.dtype) -> None:
    cosine = torch.tensor([1, -1, 1 + 1e-6, -1 - 1e-6, 1 - 1e-8, -1 + 1e-8, 0], dtype=dtype)
    phi, dphi = target(kind, cosine)
    assert phi.dtype == dphi.dtype == dtype
    assert phi.isfinite().all()
    assert dphi.isfinite().all()
    assert (dphi >= 0).all()
    if kind == "arcface":
        assert phi[0] == pytest.approx(math.cos(0.5), abs=1e-3)


@every_kind
def test_float32_is_close_to_float64(kind: str) -> None:
    cosine = grid(kind, 1001).float()
    phi, dphi = target(kind, cosine)
    exact, slope = target(kind, cosine.double())
    torch.testing.assert_close(phi.double(), exact, rtol=0, atol=2e-6)
    torch.testing.assert_close(dphi.double(), slope, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [kind for kind in CONFIGS if kind != "adaface"])
def test_a_better_cosine_is_never_worth_less(kind: str) -> None:
    cosine = torch.linspace(-1.00001, 1.00001, 200_001, dtype=torch.float64)
    phi, _ = target(kind, cosine)
    assert (phi.diff() > 0).all()


@pytest.mark.parametrize("norm", [0.0, 10.0, 20.0, 30.0, 200.0])
def test_adaface_never_values_a_better_cosine_less(norm: float) -> None:
    cosine = torch.linspace(-1.00001, 1.00001, 20_001, dtype=torch.float64)
    margin = Margin(CONFIGS["adaface"])
    phi, _ = margin.target(cosine, torch.full_like(cosine, norm), MEAN, STD)
    assert (phi.diff() >= 0).all()
    assert phi.diff().max() < 0.01


@pytest.mark.parametrize("kind", ["arcface", "combined", "combined, steep", "sphereface"])
def test_phi_jumps_at_most_where_the_fallback_begins_and_downward(kind: str) -> None:
    config = CONFIGS[kind]
    m1, m2 = (1.0, config.m) if config.kind == "arcface" else (config.m1, config.m2)
    begin = (math.pi - m2) / m1
    theta = torch.linspace(0, math.pi, 100_001, dtype=torch.float64)
    phi, _ = target(kind, theta.cos())
    steps = phi.diff()
    crossing = (theta[:-1] <= begin) & (theta[1:] > begin)
    assert (steps <= 0).all()
    assert steps[~crossing].abs().max() < 2e-4
    if kind == "arcface":
        assert steps[crossing].item() == pytest.approx(
            1 - math.cos(0.5) - 0.5 * math.sin(0.5), abs=1e-4
        )
    if kind == "sphereface":  # there the usual step would be upward
        assert steps[crossing].abs().max() < 2e-4


def test_adaface_by_hand() -> None:
    """A mean norm: only the additive margin; high and low norms: one of the two extremes."""
    margin = Margin(CONFIGS["adaface"])
    cosine = torch.full((3,), 0.6, dtype=torch.float64)
    norms = torch.tensor([20.0, 99.0, 0.0], dtype=torch.float64)
    phi, dphi = margin.target(cosine, norms, MEAN, STD)
    theta = math.acos(0.6)
    assert phi.tolist() == pytest.approx([0.2, math.cos(theta - 0.4) - 0.8, math.cos(theta + 0.4)])
    assert dphi[0] == pytest.approx(1)


def test_adaface_without_norms_is_a_mistake_of_the_caller() -> None:
    with pytest.raises(ValueError, match="norms"):
        Margin(CONFIGS["adaface"]).target(torch.zeros(2))


def test_scale_and_normalisation() -> None:
    for kind, config in CONFIGS.items():
        margin = Margin(config)
        assert margin.normalised == (kind != "none")
        assert margin.needs_norms == (kind == "adaface")
        assert margin.scale == (1.0 if kind == "none" else 64.0)


@pytest.mark.parametrize("kind", ["arcface", "cosface", "combined", "adaface"])
def test_the_margin_grows_from_none_to_all(kind: str) -> None:
    config = CONFIGS[kind].model_copy(update={"warmup_steps": 100})
    cosine = torch.full((4,), 0.3, dtype=torch.float64)
    norms = torch.full((4,), 30.0, dtype=torch.float64)

    def value(step: int) -> float:
        return Margin(config).at(step).target(cosine, norms, MEAN, STD)[0][0].item()

    assert value(0) == pytest.approx(0.3, abs=1e-12)
    assert value(0) > value(50) > value(100)
    assert value(100) == value(10**6)
    assert Margin(config).at(100) == Margin(config)


def test_half_way_the_margin_is_half() -> None:
    config = MarginConfig(kind="combined", m1=1.2, m2=0.4, m3=0.1, warmup_steps=10)
    half = Margin(config).at(5)
    assert half.parts == pytest.approx((1.1, 0.2, 0.05))


def test_negatives_that_are_too_close_are_left_out() -> None:
    cosine = torch.tensor([[-1.0, 0.39, 0.4, 0.41, 1.0]])
    assert keep_negatives(cosine, 0.4).tolist() == [[True, True, True, False, False]]
    assert keep_negatives(cosine, 0.0).all()


def test_norm_statistics_add_up_over_ranks() -> None:
    norms = torch.rand(100, generator=torch.Generator().manual_seed(0)) * 150
    parts = (
        norm_statistics(norms[:30]) + norm_statistics(norms[30:30]) + norm_statistics(norms[30:])
    )
    torch.testing.assert_close(parts, norm_statistics(norms))
    mean, std = running_norms(*start(), parts, ema=1.0)
    clipped = norms.double().clamp(0.001, 100)
    torch.testing.assert_close(mean, clipped.mean())
    torch.testing.assert_close(std, clipped.std())


def test_running_norms_follow_slowly() -> None:
    batch = norm_statistics(torch.tensor([9.0, 11.0]))
    mean, std = running_norms(*start(), batch, ema=0.01)
    assert mean.item() == pytest.approx(0.99 * 20 + 0.01 * 10)
    assert std.item() == pytest.approx(0.99 * 100 + 0.01 * math.sqrt(2))


@pytest.mark.parametrize("norms, mean", [([], 20.0), ([30.0], 25.0)])
def test_running_norms_survive_tiny_batches(norms: list[float], mean: float) -> None:
    found = running_norms(*start(), norm_statistics(torch.tensor(norms)), ema=0.5)
    assert found[0].item() == mean
    assert found[1].item() == (100.0 if not norms else 50.0)


def start() -> tuple[Tensor, Tensor]:
    mean, std = (torch.tensor(value, dtype=torch.float64) for value in INITIAL_NORMS)
    return mean, std


def test_norms_get_no_gradient() -> None:
    norms = torch.full((2,), 10.0, requires_grad=True)
    check: Callable[[Tensor], bool] = lambda tensor: not tensor.requires_grad  # noqa: E731
    assert all(map(check, Margin(CONFIGS["adaface"]).target(torch.zeros(2), norms)))
    assert check(norm_statistics(norms))
