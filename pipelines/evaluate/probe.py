"""How good a backbone is for another task: simple classifiers on its embeddings."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from mhe_dist.distributed.topology import Topology
from mhe_dist.errors import UserError
from pipelines.data.mixture.class_list import names_of
from pipelines.embedding.embeddings import (
    Embed,
    EmbeddedSet,
    embed_labelled,
    normalize_embeddings,
)

Rows = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

TEST_SHARE = 0.2


def probe_images(
    embed: Embed, source: str, test: str, topology: Topology, image_size: int, k: int = 20
) -> dict[str, float] | None:
    """Embed labelled images and probe the embeddings; all ranks must call.

    Args:
        embed: see `embeddings.Embed`.
        source: shards or a folder per class (`embeddings.embed_labelled`).
        test: the same, of classes of `source` by their names; empty: a fifth of each class of
            `source`.
        topology, image_size: see `embeddings.embed_images`.
        k: see `probe_embeddings`.

    Returns:
        The accuracies on rank 0, None elsewhere.

    Raises:
        UserError: `source` is of one class, or `test` has a class that it lacks.
    """
    found = embed_labelled(embed, source, topology, image_size)
    other = None
    if test:
        other = embed_labelled(embed, test, topology, image_size, may_be_one_class=True)
    if found is None:
        return None
    rows, labels = found.embeddings, found.labels
    if other is not None:
        numbers = {name: number for number, name in _class_names(source, found).items()}
        names = _class_names(test, other)
        if unknown := sorted(set(names.values()) - numbers.keys()):
            raise UserError(
                f"--test {test}: its class {unknown[0]!r} is none of {source}, whose classes a "
                "probe tells apart; leave it out, or give the same class the same name"
            )
        test_labels = np.array([numbers[names[label]] for label in other.labels.tolist()])
        return probe_embeddings(rows, labels, other.embeddings, test_labels, k)
    train_rows, test_rows = split_by_class(labels)
    return probe_embeddings(
        rows[train_rows], labels[train_rows], rows[test_rows], labels[test_rows], k
    )


def _class_names(source: str, found: EmbeddedSet) -> dict[int, str]:
    """The names of the classes that images have, by number; a number, where a class has none."""
    labels = set(found.labels.tolist())
    names = dict(enumerate(found.folders)) or names_of(source, labels)
    return {label: names.get(label, str(label)) for label in labels}


def probe_embeddings(
    train: Rows, train_labels: Ints, test: Rows, test_labels: Ints, k: int = 20
) -> dict[str, float]:
    """Accuracy on the test rows of classifiers that were fitted to the training rows.

    `knn` is the majority of the k nearest by the cosine; `linear` is logistic regression on
    standardised embeddings of length 1 (L2 penalty, C = 1); `majority` always answers with the
    most frequent class.

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
    train_rows, test_rows = normalize_embeddings(train), normalize_embeddings(test)
    return {
        name: float(model.fit(train_rows, train_labels).score(test_rows, test_labels))
        for name, model in models.items()
    }


def split_by_class(labels: Ints) -> tuple[Ints, Ints]:
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
