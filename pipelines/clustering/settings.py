"""What a clustering is asked for, and the sizes that follow from it and never from the machine."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Final

from mhe_dist.errors import UserError

ONE_LEVEL: Final = 2048  # classes up to which a single k-means finds them all
PROBES: Final = 8  # cells that an image's classes are looked for in
ITERATIONS: Final = 20  # of each k-means
POINTS: Final = 256  # images for each centre that a k-means learns from, at most
SAMPLE_BYTES: Final = 1 << 28  # of the float32 rows that a k-means learns from, at most
CHUNK_BYTES: Final = 1 << 26  # of the float32 rows that are in memory together, at most
CHUNK_ROWS: Final = 1 << 15  # images that are labelled together, at most: what a kill costs
CELL_BOUND: Final = 4.0  # a cell with more than so many times the average is split


@dataclass(frozen=True)
class ClusterSettings:
    """What is asked for.

    Attributes:
        classes: C.
        labels_per_image: K; an image gets its nearest 1 to K classes.
        further_within: a further class is kept if its distance, 1 - cosine, is at most so many
            times that of the nearest; 0: all K are kept.
        max_size: no class gets more than so many times the average number of images; 0: no bound.
        rounds: how often classes are split and dissolved to come to that bound, at most.
        duplicates: of images of a class whose cosine is at least this, one is kept; 0: all are.
        outliers: share of the images, those farthest from any class, that get none.
        center: subtract the mean direction of all embeddings first.
        seed: of every draw.
    """

    classes: int
    labels_per_image: int = 8
    further_within: float = 1.5
    max_size: float = 5.0
    rounds: int = 2
    duplicates: float = 0.0
    outliers: float = 0.0
    center: bool = True
    seed: int = 0

    def as_dict(self) -> dict[str, Any]:
        """The settings as JSON holds them."""
        return asdict(self)

    def validate(self, samples: int) -> None:
        """Refuse what cannot be done with so many images.

        Raises:
            UserError: names the option and the cure.
        """
        if samples < self.classes:
            raise UserError(
                f"--classes {self.classes}: there are {samples:,} images, and a class has one at "
                "least; ask for fewer classes"
            )
        if 0 < self.max_size < 1:
            raise UserError(
                f"--max-size {self.max_size}: a class cannot be bound to less than the average; "
                "give 1 or more, or 0 for no bound"
            )
        if 0 < self.further_within < 1:
            raise UserError(
                f"--further-within {self.further_within}: no class is nearer than the nearest; "
                "give 1 or more, or 0 to keep all"
            )

    @property
    def cells(self) -> int:
        """Coarse cells that the classes are first dealt to; 1: a single k-means finds them all."""
        return 1 if self.classes <= ONE_LEVEL else round(math.sqrt(self.classes))


def sample_size(centres: int, dim: int, available: int) -> int:
    """Images that a k-means of so many centres learns from.

    Args:
        centres: of the k-means.
        dim: D of the embeddings.
        available: images that there are, at least as many as centres.
    """
    fitting = max(SAMPLE_BYTES // (4 * dim), centres)
    return min(available, POINTS * centres, fitting)


def chunk_rows(dim: int) -> int:
    """Images whose embeddings are in memory together."""
    return min(CHUNK_ROWS, max(1024, CHUNK_BYTES // (4 * dim)))
