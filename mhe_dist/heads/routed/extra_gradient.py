"""The gradient of the extra heads' rows in a step, kept as factors until it is needed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import torch
from torch import Tensor

from mhe_dist.bank.row_optim import Dense, RowGradient, SharedFactors
from mhe_dist.distributed.transfer import to_device
from mhe_dist.heads.products import in_tf32
from mhe_dist.sizes import LOGITS_BYTES

# Each program of the update reads all samples of a group: with more, a product of its own is less.
FACTOR_SAMPLES: Final = 256
# A program holds samples and rows whole: wider ones would not fit into what a card shares.
FACTOR_WIDTH: Final = 1024


class ExtraGradient:
    """The gradient `a^T e` of a group's extra rows, kept as factors until the step ends.

    Then it is one product over the samples of the step in their canonical order, and does not
    depend on which rank computed which micro-batch. Factors that exceed `LOGITS_BYTES` are
    multiplied before that.
    """

    def __init__(self) -> None:
        self._factors: list[tuple[Tensor, Tensor, Tensor]] = []
        self._early: Tensor | None = None

    def add(self, sample_numbers: Tensor, weights: Tensor, features: Tensor) -> None:
        """Keep `a` `[n, m * L]` and `e` `[n, D]` of samples with canonical numbers `[n]`, host."""
        self._factors.append((sample_numbers, weights, features))
        if sum(weights.nbytes for _, weights, _ in self._factors) > LOGITS_BYTES:
            self._early = self.total()
            self._factors.clear()

    def total(self) -> Tensor | None:
        """The gradient `[m * L, D]`, or None if no sample was scored against the rows."""
        if not self._factors:
            return self._early
        # A tensor alone would be copied by `cat`.
        numbers, weights, features = (
            parts[0] if len(parts) == 1 else torch.cat(parts)
            for parts in zip(*self._factors, strict=True)
        )
        if (numbers[1:] < numbers[:-1]).any():
            order = to_device(numbers.argsort(), weights.device)
            weights, features = weights[order], features[order]
        summed = weights.T @ features
        return summed if self._early is None else self._early.add_(summed)


class ExtraGradients:
    """Those of all groups of a rank.

    Args:
        extra: extra heads of each group.
        of_normalised: whether they are gradients of the normalised rows.
        takes_factors: whether the update of rows multiplies factors itself, and the step has but
            one micro-batch.
    """

    def __init__(
        self, extra: dict[int, Tensor], of_normalised: bool, takes_factors: bool = False
    ) -> None:
        self.extra, self.of_normalised, self._takes_factors = extra, of_normalised, takes_factors
        self._sums = {group: ExtraGradient() for group in extra}
        self._kept: tuple[Tensor, SharedFactors] | None = None

    def __getitem__(self, group: int) -> ExtraGradient:
        """That of a group."""
        return self._sums[group]

    def takes_factors(self, largest: int, width: int) -> bool:
        """Whether `keep` is better than a product for each group with `largest` samples at most.

        It multiplies in TF32, so only where products may be.
        """
        fits = largest <= FACTOR_SAMPLES and width <= FACTOR_WIDTH
        return self._takes_factors and in_tf32() and fits

    def keep(self, heads: Tensor, factors: SharedFactors) -> None:
        """Keep the factors of the step: the gradient of all groups' heads `[U]`, host."""
        self._kept = heads, factors

    def updates(self) -> Iterator[tuple[Tensor, RowGradient]]:
        """Heads and the gradient of their rows, each head once."""
        if self._kept is not None:
            yield self._kept
        for group, sums in self._sums.items():
            heads, summed = self.extra[group], sums.total()
            if summed is not None:
                summed = summed.view(len(heads), -1, summed.shape[1])
                yield heads, Dense(summed, None, self.of_normalised)
