"""Is a backbone good for another task? Simple classifiers on its embeddings, by scikit-learn."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from mhe_dist.distributed.topology import Topology
from mhe_dist.errors import UserError
from pipelines.evaluate.embeddings import Embed, embed_labelled, normalised

Rows = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

TEST_SHARE = 0.2


def evaluate(
    embed: Embed, source: str, test: str, topology: Topology, side: int, k: int = 20
) -> dict[str, float] | None:
    """Embed labelled images and probe; all ranks must call.

    Args:
        embed: see `embeddings.Embed`.
        source: shards or a folder per class (`embeddings.embed_labelled`).
        test: the same, with the same classes; empty: a fifth of each class of `source`.
        topology, side: see `embeddings.embed_images`.
        k: see `probe`.

    Returns:
        The accuracies on rank 0, None elsewhere.
    """
    found = embed_labelled(embed, source, topology, side)
    other = embed_labelled(embed, test, topology, side) if test else None
    if found is None:
        return None
    rows, labels = found.embeddings, found.labels
    if other is not None:
        return probe(rows, labels, other.embeddings, other.labels, k)
    fitted, seen = split(labels)
    return probe(rows[fitted], labels[fitted], rows[seen], labels[seen], k)


def probe(
    train: Rows, train_labels: Ints, test: Rows, test_labels: Ints, k: int = 20
) -> dict[str, float]:
    """Accuracy on the test rows of classifiers that were fitted on the others.

    `knn` is the majority of the k nearest by the cosine; `linear` is logistic regression on
    standardised embeddings of length 1 (L2 penalty, C = 1); `majority` names the most frequent
    class, whatever it sees.

    Args:
        train, test: embeddings `[N, D]`, `[M, D]`.
        train_labels, test_labels: `[N]`, `[M]`.
        k: neighbours, at most N.

    Raises:
        UserError: the training rows are of one class.
    """
    from sklearn.dummy import DummyClassifier
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if len(np.unique(train_labels)) < 2:
        raise UserError("probe: the training samples are all of one class")
    models: dict[str, Any] = {
        "knn": KNeighborsClassifier(min(k, len(train)), metric="cosine", algorithm="brute"),
        "linear": make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)),
        "majority": DummyClassifier(),
    }
    fitted, seen = normalised(train), normalised(test)
    return {
        name: float(model.fit(fitted, train_labels).score(seen, test_labels))
        for name, model in models.items()
    }


def split(labels: Ints) -> tuple[Ints, Ints]:
    """Numbers of the training and of the test samples: a fifth of each class, always the same.

    Raises:
        UserError: a class has one sample only, or there are fewer test samples than classes.
    """
    from sklearn.model_selection import train_test_split

    numbers = np.arange(len(labels))
    try:
        train, test = train_test_split(
            numbers, test_size=TEST_SHARE, stratify=labels, random_state=0
        )
    except ValueError as error:
        raise UserError(f"probe: the set cannot be split ({error}); name a second one") from error
    return np.sort(train), np.sort(test)
