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

from mhe_dist.config import MarginConfig

_EDGE: Final = 1e-6  # beyond |cosine| = 1 - _EDGE, phi goes on along its tangent
_ADAFACE_EDGE: Final = 1e-3  # AdaFace keeps the angle with its margin inside [edge, pi - edge]
_NORM_RANGE: Final = (0.001, 100.0)
_STD_FLOOR: Final = 1e-3
INITIAL_NORMS: Final = (20.0, 100.0)  # AdaFace's running mean and deviation before any batch


@dataclass(frozen=True)
class Margin:
    """The margin of one step.

    Attributes:
        scale: s, what target and other cosines are multiplied with; 1 without normalisation.
        normalised: whether rows and embeddings are normalised; otherwise the logit is their inner
            product plus a bias.
        m1, m2, m3: of `cos(m1 * theta + m2) - m3`.
        m: AdaFace's margin, None for every other kind.
        h: AdaFace's concentration.
    """

    scale: float = 1.0
    normalised: bool = True
    m1: float = 1.0
    m2: float = 0.0
    m3: float = 0.0
    m: float | None = None
    h: float = 0.333

    @classmethod
    def at(cls, config: MarginConfig, step: int) -> Margin:
        """The margin at a step: it grows linearly from none to all of it over `warmup_steps`."""
        grown = min(1.0, step / config.warmup_steps) if config.warmup_steps else 1.0
        if config.kind == "none":
            return cls(normalised=False)
        if config.kind == "softmax":
            return cls(config.scale)
        if config.kind == "arcface":
            return cls(config.scale, m2=grown * config.m)
        if config.kind == "cosface":
            return cls(config.scale, m3=grown * config.m)
        if config.kind == "adaface":
            return cls(config.scale, m=grown * config.m, h=config.h)
        m1 = 1 + grown * (config.m1 - 1)
        return cls(config.scale, m1=m1, m2=grown * config.m2, m3=grown * config.m3)

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
        """
        if self.m is not None:
            if norms is None:
                raise ValueError("AdaFace needs the norms of the embeddings")
            return _adaptive(cosine, self.m, _quality(norms, mean, std, self.h).to(cosine.dtype))
        if self.m1 == 1 and self.m2 == 0:
            return cosine - self.m3, torch.ones_like(cosine)
        return _angular(cosine, self.m1, self.m2, self.m3)


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
    weight = ema * (count > 0)
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
    inner, sine = _inside(cosine)
    angle = m1 * inner.acos() + m2
    slope = m1 * angle.sin() / sine
    phi = angle.cos() + slope * (cosine - inner)
    rest = math.pi - (math.pi - m2) / m1
    drop = max(rest * math.sin(rest), 1 - math.cos(rest))
    turned = angle > math.pi
    phi = torch.where(turned, cosine - drop, phi) - m3
    return phi, torch.where(turned, 1, slope)


def _inside(cosine: Tensor) -> tuple[Tensor, Tensor]:
    """The cosine clamped away from +-1, where d theta / d cosine is infinite, and its sine."""
    inner = cosine.clamp(-1 + _EDGE, 1 - _EDGE)
    return inner, ((1 - inner) * (1 + inner)).sqrt()
