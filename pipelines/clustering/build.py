"""Makes a label set of the embeddings of a data set, from the first k-means to the last file."""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from pipelines.clustering.assign import Labels, open_search
from pipelines.clustering.balance import balance_classes, last_layout
from pipelines.clustering.hierarchy import find_mean, train_centres
from pipelines.clustering.members import Members, sort_members
from pipelines.clustering.quality import (
    Agreement,
    Floats,
    ReadLabels,
    choose_classes,
    mean_similarities,
    measure_agreement,
    measure_recall,
)
from pipelines.clustering.rows import Ints, UnitRows, refuse_other_rows
from pipelines.clustering.selection import KeptLabels, drop_images
from pipelines.clustering.settings import ClusterSettings
from pipelines.clustering.state import ClusterState, StagedJob, Watch
from pipelines.shards.index import ShardIndex
from pipelines.shards.label_set import write_label_files

CLUSTERS_FILE: Final = "clusters.tsv"
FORMAT: Final = "mhe-cluster-1"  # changes when the same embeddings would give other classes
SHOWN: Final = 12  # classes of each kind to look at
_IMAGES: Final = 10  # of each of them


class ShownClass(NamedTuple):
    """A class to look at.

    Attributes:
        number: its class id.
        images: some of its images, from the one most similar to its centre to the least.
        size: images that it is the nearest class of.
        similarity: their mean cosine to the centre.
    """

    number: int
    images: Ints
    size: int
    similarity: float


class Clustering(NamedTuple):
    """What was made, to look at.

    Attributes:
        counts: int64 `[C]`, images that each class is the nearest of.
        figures: by name, JSON-able.
        shown: classes to look at, by what they were chosen for.
    """

    counts: Ints
    figures: dict[str, Any]
    shown: dict[str, list[ShownClass]]


class ClusterJob(StagedJob):
    """One clustering, which ends with a label set.

    Attributes:
        index: the data set.
        settings: what is asked for.
        rows: the embeddings.
    """

    def __init__(
        self,
        target: str,
        index: ShardIndex,
        rows: npt.NDArray[Any],
        embedded_by: dict[str, Any],
        settings: ClusterSettings,
    ) -> None:
        """Claim the target, or go on with it.

        Args:
            target: folder for the label set, on this machine; it must not exist.
            index: the data set.
            rows: floating point `[N, D]` in the order of the index, usually memory-mapped.
            embedded_by: JSON-able; tells these embeddings from others.
            settings: what is asked for.

        Raises:
            UserError: the target exists or is not on this machine, something else is being made
                there, or so many classes cannot be made.
        """
        refuse_other_rows(index, rows)
        settings.validate(index.samples)
        self.index, self.settings, self.rows = index, settings, UnitRows(rows)
        self._embedded_by = embedded_by
        recipe = {
            "format": FORMAT,
            "index": index.digest,
            "embeddings": embedded_by,
            "settings": settings.as_dict(),
        }
        super().__init__(target, "classes are", recipe)

    @property
    def begins(self) -> bool:
        """Whether nothing is done yet."""
        journal = self._staging.journal
        return journal is not None and not len(journal)

    def run(
        self, watch: Watch, workers: int = 1, read_labels: ReadLabels | None = None
    ) -> Clustering | None:
        """Make the classes and the files of the label set; it gets its name by `publish`.

        Args:
            watch: is told of progress.
            workers: threads; the classes do not depend on their number.
            read_labels: true labels to compare with; None: there are none.

        Returns:
            What was made; None if an earlier attempt had come to that point.
        """
        state = self._open_state(watch, workers)
        if state.is_finished:
            return None
        rows = self._prepare_rows(state)
        train_centres(rows, self.settings, state)
        labels = balance_classes(rows, self.settings, state)
        dropped = drop_images(rows, labels, self.settings, state)
        selection = KeptLabels(labels, dropped, self.settings)
        nearest = self._open_nearest(state)
        state.once("kept", lambda: selection.write_nearest(nearest))
        members = sort_members(state, "members", nearest.classes, selection.num_classes)
        similarities = mean_similarities(nearest, members.counts)
        agreement = None if read_labels is None else measure_agreement(members, read_labels)
        figures = _figures(selection, members, similarities, agreement)
        figures["recall"] = self._measure_recall(rows, state)
        self._write(selection, members, similarities, figures)
        chosen = choose_classes(members.counts, similarities, SHOWN, self.settings.seed)
        shown = {
            what: [_show(number, members, nearest, similarities) for number in numbers]
            for what, numbers in chosen.items()
        }
        return Clustering(members.counts, figures, shown)

    def _prepare_rows(self, state: ClusterState) -> UnitRows:
        if not self.settings.center:
            return self.rows
        return self.rows.centered(find_mean(self.rows, self.settings.seed, state))

    def _open_nearest(self, state: ClusterState) -> Labels:
        shape = (self.index.samples,)
        return Labels(
            state.array("kept", shape, "int32"), state.array("kept_similarities", shape, "uint16")
        )

    def _measure_recall(self, rows: UnitRows, state: ClusterState) -> float:
        layout = last_layout(self.settings, state)
        search = open_search(state, self.settings, rows.dim, layout)
        centres = state.array("centres", (self.settings.classes, rows.dim), "float32")
        return measure_recall(rows, search, centres, self.settings.seed)

    def _write(
        self,
        selection: KeptLabels,
        members: Members,
        similarities: Floats,
        figures: dict[str, Any],
    ) -> None:
        pairs = zip(members.counts.tolist(), similarities.tolist(), strict=True)
        table = (
            (str(number), str(count), f"{similarity:.6f}")
            for number, (count, similarity) in enumerate(pairs)
        )
        write_label_files(
            self.folder,
            self.index,
            selection.num_classes,
            lambda: (part.lists for part in selection.parts()),
            meta={
                "made_by": "mhe cluster",
                "embeddings": self._embedded_by,
                "settings": self.settings.as_dict(),
                "figures": figures,
            },
            tables={CLUSTERS_FILE: (["class", "nearest_of", "mean_similarity"], table)},
            similarities=lambda: (part.similarities for part in selection.parts()),
        )


def _figures(
    selection: KeptLabels, members: Members, similarities: Floats, agreement: Agreement | None
) -> dict[str, Any]:
    """What the report and the label set say, by name."""
    counts, sizes = members.counts, selection.sizes
    labelled = int(counts.sum())
    figures: dict[str, Any] = {
        "images": selection.samples,
        "labelled": labelled,
        "labels": int(sizes.sum()),
        "classes": selection.num_classes,
        "largest": int(sizes.max(initial=0)),
        "median": float(np.median(sizes)) if len(sizes) else 0.0,
        "smallest": int(sizes.min(initial=selection.samples)),
        "nearest_largest": int(counts.max(initial=0)),
        "bounded": selection.bounded,
        "similarity": float((similarities * counts).sum() / max(1, labelled)),
        "broken": selection.broken,
        "duplicates": selection.duplicates,
        "outliers": selection.outliers,
        "full": selection.full,
    }
    if agreement is not None:
        figures |= {
            "purity": agreement.purity,
            "nmi": agreement.nmi,
            "true_classes": agreement.labels,
        }
    return figures


def _show(number: int, members: Members, nearest: Labels, similarities: Floats) -> ShownClass:
    """Images of a class, evenly from the most similar one to the least."""
    images = members.of(number)
    order = images[np.argsort(-nearest.similarities[images].astype(np.int64), kind="stable")]
    places = np.linspace(0, len(order) - 1, min(_IMAGES, len(order))).round().astype(int)
    count, similarity = int(members.counts[number]), float(similarities[number])
    return ShownClass(number, order[places], count, similarity)
