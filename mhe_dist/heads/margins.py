"""Margins: what becomes of the target cosine before the softmax, with its derivative.

All kinds are `phi(theta) = cos(m1 * theta + m2) - m3` with theta the angle between an embedding and
its class centre: ArcFace has m2 (arXiv 1801.07698), CosFace m3 (arXiv 1801.09414), SphereFace m1,
AdaFace an m2 and m3 of each sample (arXiv 2204.00964). Heads compute gradients in closed form, so
everything here returns the derivative with respect to the cosine beside the value, both without the
scale s.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from mhe_dist.config.head import MarginConfig
from mhe_dist.kernels.dispatch import use_kernels

_EDGE: Final = 1e-6  # beyond |cosine| = 1 - _EDGE, phi goes on along its tangent
_ADAFACE_EDGE: Final = 1e-3  # AdaFace keeps the angle with its margin inside [edge, pi - edge]
_NORM_RANGE: Final = (0.001, 100.0)
_STD_FLOOR: Final = 1e-3
INITIAL_NORMS: Final = (20.0, 100.0)  # AdaFace's running mean and deviation before any batch


@dataclass(frozen=True)
class Margin:
    """A configured margin, grown to a part of itself.

    Attributes:
        config: kind and sizes.
        growth: the part of the margin that applies, in [0, 1].
    """

    config: MarginConfig
    growth: float = 1.0

    def at(self, step: int) -> Margin:
        """The margin of a step: it grows linearly from 0 to all over `warmup_steps`."""
        steps = self.config.warmup_steps
        return Margin(self.config, min(1.0, step / steps) if steps else 1.0)

    @property
    def normalised(self) -> bool:
        """Whether logits are cosines; otherwise they are inner products plus a bias."""
        return self.config.kind != "none"

    @property
    def scale(self) -> float:
        """s, what cosines are multiplied with; 1 without normalisation."""
        return self.config.scale if self.normalised else 1.0

    @property
    def filter(self) -> float:
        """Negatives with a higher cosine do not count; 0: all count."""
        return self.config.filter

    @property
    def needs_norms(self) -> bool:
        """Whether `target` needs the norms of the embeddings (AdaFace)."""
        return self.config.kind == "adaface"

    @property
    def parts(self) -> tuple[float, float, float]:
        """m1, m2 and m3 of the kinds that are the same for every sample."""
        config, growth = self.config, self.growth
        if config.kind == "arcface":
            return 1.0, growth * config.chosen_m, 0.0
        if config.kind == "cosface":
            return 1.0, 0.0, growth * config.chosen_m
        if config.kind == "combined":
            return 1 + growth * (config.m1 - 1), growth * config.m2, growth * config.m3
        return 1.0, 0.0, 0.0

    def target(
        self,
        cosine: Tensor,
        norms: Tensor | None = None,
        mean: Tensor | float = INITIAL_NORMS[0],
        std: Tensor | float = INITIAL_NORMS[1],
    ) -> tuple[Tensor, Tensor]:
        """The target cosine with its margin, and the derivative with respect to the cosine.

        Args:
            cosine: `[B]`, float32 or float64; may exceed 1 by rounding. Logits if not normalised.
            norms: `[B]`, norms of the embeddings, for AdaFace alone; held constant.
            mean, std: AdaFace's running statistics of the norms (see `running_norms`).

        Returns:
            `phi` and `dphi`, `[B]` each, in the type of `cosine`, finite everywhere.

        Raises:
            ValueError: AdaFace without norms.
        """
        if self.needs_norms:
            if norms is None:
                raise ValueError("AdaFace needs the norms of the embeddings")
            quality = _quality(norms, mean, std, self.config.h).to(cosine.dtype)
            return _adaptive(cosine, self.growth * self.config.chosen_m, quality)
        m1, m2, m3 = self.parts
        if m1 == 1 and m2 == 0:
            return cosine - m3, torch.ones_like(cosine)
        return _angular(cosine, m1, m2, m3)


def keep_negatives(cosine: Tensor, threshold: float) -> Tensor:
    """Mask of the negatives that stay: those whose cosine does not exceed the threshold.

    Negatives that are too close are taken for wrongly labelled (PartialFC's filter, arXiv
    2203.15565). Threshold 0 keeps all.
    """
    return cosine <= threshold if threshold > 0 else torch.ones_like(cosine, dtype=torch.bool)


def norm_statistics(norms: Tensor) -> Tensor:
    """Count, sum and sum of squares of clipped norms `[B]`: float64 `[3]`, added up over ranks."""
    clipped = norms.detach().double().clamp(*_NORM_RANGE)
    return torch.stack([torch.ones_like(clipped).sum(), clipped.sum(), clipped.square().sum()])


def running_norms(
    mean: Tensor, std: Tensor, statistics: Tensor, ema: float
) -> tuple[Tensor, Tensor]:
    """AdaFace's running mean and deviation after one more batch, which counts with weight `ema`.

    Args:
        mean, std: float64 scalars, `INITIAL_NORMS` at first.
        statistics: sum of `norm_statistics` over the batch; an empty batch changes nothing.
        ema: the paper's alpha.
    """
    count, total, squares = statistics
    batch_mean = total / count.clamp_min(1)
    spread = (squares - count * batch_mean.square()).clamp_min(0)
    batch_std = (spread / (count - 1).clamp_min(1)).sqrt()
    weight = ema * (count > 0).to(mean.dtype)
    return torch.lerp(mean, batch_mean, weight), torch.lerp(std, batch_std, weight)


def _quality(norms: Tensor, mean: Tensor | float, std: Tensor | float, h: float) -> Tensor:
    """AdaFace's normalised norm in [-1, 1], its stand-in for the quality of an image."""
    clipped = norms.detach().clamp(*_NORM_RANGE)
    return ((clipped - mean) / (std + _STD_FLOOR) * h).clamp(-1, 1)


def _adaptive(cosine: Tensor, m: float, quality: Tensor) -> tuple[Tensor, Tensor]:
    """AdaFace: `cos(theta - m * quality) - (m + m * quality)`; constant where the angle ends."""
    inner, sine = _inside(cosine)
    angle = inner.acos() - m * quality
    moving = (angle > _ADAFACE_EDGE) & (angle < math.pi - _ADAFACE_EDGE)
    angle = angle.clamp(_ADAFACE_EDGE, math.pi - _ADAFACE_EDGE)
    slope = torch.where(moving, angle.sin() / sine, 0)
    return angle.cos() - (m + m * quality) + slope * (cosine - inner), slope


def _angular(cosine: Tensor, m1: float, m2: float, m3: float) -> tuple[Tensor, Tensor]:
    """`cos(m1 * theta + m2) - m3`, and a straight line where that would rise again.

    From the angle on where `m1 * theta + m2` passes pi, ArcFace's authors go on with
    `cos(theta) - m2 * sin(m2)`; with m1, pi minus that angle takes the place of m2. The step down
    is never less than what keeps phi monotone.
    """
    rest = math.pi - (math.pi - m2) / m1
    drop = max(rest * math.sin(rest), 1 - math.cos(rest))
    if m1 == 1 and cosine.dtype == torch.float32 and use_kernels(cosine):
        from mhe_dist.kernels.angular_margin import angular_margin

        return angular_margin(cosine.contiguous(), m2, m3, drop, _EDGE)
    inner, sine = _inside(cosine)
    angle = m1 * inner.acos() + m2
    slope = m1 * angle.sin() / sine
    phi = angle.cos() + slope * (cosine - inner)
    turned = angle > math.pi
    phi = torch.where(turned, cosine - drop, phi) - m3
    return phi, torch.where(turned, 1, slope)


def _inside(cosine: Tensor) -> tuple[Tensor, Tensor]:
    """The cosine clamped away from +-1, where d theta / d cosine is infinite, and its sine."""
    inner = cosine.clamp(-1 + _EDGE, 1 - _EDGE)
    return inner, ((1 - inner) * (1 + inner)).sqrt()
