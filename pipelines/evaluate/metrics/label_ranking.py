"""How well ranked classes find the several labels of samples: P@k, recall@k, nDCG@k and PSP@k.

With the labels y of a sample and its k best classes, `hit` 1 where a class is one of the labels:

- `p@k = 1/k * sum hit`, `recall@k = sum hit / |y|`,
- `ndcg@k = sum hit_r / log2(r + 1)` over the ranks r = 1..k, by what `min(k, |y|)` hits at the
  first ranks would give; means over the samples with a label;
- `psp@k = sum hit / p` over all samples, by the largest sum that any ranking could give. `1 / p`
  makes up for labels that are missing more often where a class is rare.

The propensities `p`, PSP and the two others: Jain, Prabhu and Varma, "Extreme Multi-label Loss
Functions", KDD 2016.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from pipelines.data.mixture.label_choice import distinct_labels
from pipelines.shards.label_set import LabelLists

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

KS: Final = (1, 3, 5)
RANKED: Final = ("p", "recall", "ndcg", "psp")
# A and B of the propensities: what the paper takes where nothing is known of a data set.
_A: Final = 0.55
_B: Final = 1.5


def propensities(counts: Ints, images: int) -> Floats:
    """How likely a true label of each class is to be given, float64 `[C]`, in (0, 1].

    `1 / (1 + c * (N_l + B)^-A)` with `c = (log N - 1) * (B + 1)^A`, and `c = 0` below N = e.

    Args:
        counts: N_l, training images of each class, `[C]`.
        images: N, training images.
    """
    c = max(0.0, np.log(max(1, images)) - 1) * (_B + 1) ** _A
    return np.asarray(1 / (1 + c * (counts + _B) ** -_A), np.float64)


def find_labels(predicted: Ints, lists: LabelLists) -> tuple[npt.NDArray[np.bool_], Ints]:
    """Where predicted classes are labels `[N, k]`, and the rank of each label.

    A class that stands in a list twice counts once.

    Args:
        predicted: `[N, k]`, distinct classes of each sample, best first; -1: none.
        lists: the samples' labels.

    Returns:
        the hits `[N, k]`; of each of `distinct_labels` its rank from 0, k if not found, `[t]`.
    """
    owners, ids = distinct_labels(lists)
    width = 1 + max(ids.max(initial=0), predicted.max(initial=0))
    codes = np.where(predicted < 0, -1, np.arange(len(predicted))[:, None] * width + predicted)
    labels = owners * width + ids
    hits = np.isin(codes, labels)
    ranks = np.full(len(labels), predicted.shape[1], np.int64)
    ranks[np.searchsorted(labels, codes[hits])] = np.nonzero(hits)[1]
    return hits, ranks


def rank_figures(
    predicted: Ints, lists: LabelLists, weights: Floats | None = None
) -> dict[str, float]:
    """`p@1`, `recall@1`, `ndcg@1` and so on for each of `KS`, and with weights `psp@1`.

    Args:
        predicted: `[N, max(KS)]`, see `find_labels`.
        lists: of the samples, of whom one at least has a label.
        weights: `1 / p` of each class `[C]`, see `propensities`; None: no PSP.
    """
    hits, _ = find_labels(predicted, lists)
    owners, ids = distinct_labels(lists)
    sizes = np.bincount(owners, minlength=len(predicted))
    known = sizes > 0
    hits, sizes = hits[known].astype(np.float64), sizes[known]
    discounts = 1 / np.log2(np.arange(2, max(KS) + 2))
    ideal = np.append(0, np.cumsum(discounts))
    figures = {}
    for k in KS:
        found = hits[:, :k].sum(1)
        figures[f"p@{k}"] = float(found.mean() / k)
        figures[f"recall@{k}"] = float((found / sizes).mean())
        gain = hits[:, :k] @ discounts[:k] / ideal[np.minimum(sizes, k)]
        figures[f"ndcg@{k}"] = float(gain.mean())
    if weights is not None:
        gains = hits * weights[predicted[known]]
        best = weights[ids][np.lexsort((-weights[ids], owners))]
        rank = np.arange(len(owners)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        for k in KS:
            figures[f"psp@{k}"] = float(gains[:, :k].sum() / best[rank < k].sum())
    return figures
