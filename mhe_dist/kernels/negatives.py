"""What the kernels of a softmax with a target share: the logits of all other classes."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl


class Negatives(NamedTuple):
    """How logits become those of negatives.

    Attributes:
        scale: of the cosines.
        threshold: cosines above it are dropped; 0: none.
    """

    scale: float
    threshold: float


@triton.jit
def negative_logits(z, scale, threshold, filtered: tl.constexpr):
    """Logits of negatives; those whose cosine is above the threshold are dropped."""
    if filtered:
        z = tl.where(tl.div_rn(z, scale) > threshold, float("-inf"), z)
    return z


@triton.jit
def finite(peak):
    """What may be taken from logits before they are exponentiated, if they are all -inf too."""
    return tl.where(peak == float("-inf"), 0.0, peak)


@triton.jit
def log_add(a, b):
    """`log(exp(a) + exp(b))`, -inf if both are."""
    peak = finite(tl.maximum(a, b))
    return peak + tl.log(tl.exp(a - peak) + tl.exp(b - peak))
