"""One statistic out of several: how much likelier they are for one kind than for another."""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

_ROUNDS: Final = 12  # of Newton's method
_PENALTY: Final = 1e-2  # of the weights' squares
_LARGEST: Final = 30.0  # value of the statistic, either way
_DRAWN: Final = 20_000  # examples of a kind, evenly drawn


class Discriminant(NamedTuple):
    """The logarithm of a likelihood ratio as a polynomial of degree 2 in some features.

    Attributes:
        centre, scale: float64 `[F]`, of the features.
        weights: float64 `[1 + F + F (F + 1) / 2]`.
    """

    centre: Floats
    scale: Floats
    weights: Floats

    def score(self, features: Floats) -> Floats:
        """float64 `[n]` of features `[n, F]`; NaN where one of them is NaN."""
        terms = _terms((features - self.centre) / self.scale)
        found: Floats = np.clip(np.einsum("nt,t->n", terms, self.weights), -_LARGEST, _LARGEST)
        return found


def learn_discriminant(one: Floats, other: Floats) -> Discriminant | None:
    """Logistic regression of the kind on the features, both kinds with the same weight.

    Args:
        one: float64 `[n, F]`, features of examples that the statistic shall be large for.
        other: float64 `[m, F]`; examples with NaN are left out.

    Returns:
        None if there are hardly any examples of a kind.
    """
    one, other = (_some(each[~np.isnan(each).any(axis=1)]) for each in (one, other))
    if min(len(one), len(other)) < 2 * one.shape[1]:
        return None
    features = np.concatenate([one, other])
    centre, scale = features.mean(axis=0), features.std(axis=0)
    scale[scale < 1e-9] = 1.0
    terms = _terms((features - centre) / scale)
    kinds = np.repeat([1.0, 0.0], [len(one), len(other)])
    importance = np.repeat([0.5 / len(one), 0.5 / len(other)], [len(one), len(other)])
    importance *= len(features)
    weights = np.zeros(terms.shape[1])
    for _ in range(_ROUNDS):
        chance = 1 / (1 + np.exp(-np.clip(np.einsum("nt,t->n", terms, weights), -30, 30)))
        slope = np.einsum("nt,n->t", terms, importance * (kinds - chance)) - _PENALTY * weights
        curve = np.einsum("nt,n,nu->tu", terms, importance * chance * (1 - chance), terms)
        weights = weights + np.linalg.solve(curve + _PENALTY * np.eye(len(weights)), slope)
    return Discriminant(centre, scale, weights)


def _some(examples: Floats) -> Floats:
    step = max(1, len(examples) // _DRAWN)
    return examples[::step]


def _terms(values: Floats) -> Floats:
    """float64 `[n, T]`: 1, the values and their products."""
    products = [values[:, [at]] * values[:, at:] for at in range(values.shape[1])]
    return np.concatenate([np.ones((len(values), 1)), values, *products], axis=1)
