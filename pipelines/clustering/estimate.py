"""What a clustering will take: time by rates that are measured before it starts, memory, disk."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Final, NamedTuple

import numpy as np

from mhe_dist.seeds import generator
from pipelines.clustering.kmeans import find_nearest
from pipelines.clustering.rows import UnitRows
from pipelines.clustering.settings import (
    CHUNK_BYTES,
    ITERATIONS,
    PROBES,
    SAMPLE_BYTES,
    ClusterSettings,
    chunk_rows,
    sample_size,
)

BASE_BYTES: Final = 200 << 20  # the interpreter, NumPy, faiss, the search itself
_TRIAL_ROWS, _TRIAL_CENTRES = 4096, 1024
_MAPPED_BYTES: Final = 64 << 20  # pages of the embeddings around the rows that are read
_CLASS_BYTES: Final = 100  # of the tables of all classes, for each


class Rates(NamedTuple):
    """What this machine does.

    Attributes:
        products: multiplications and additions a second in a search, by all workers together.
        read_bytes: of the embeddings a second, made to rows of length 1, by all workers together.
    """

    products: float
    read_bytes: float


class Estimate(NamedTuple):
    """What a clustering will take.

    Attributes:
        stages: name and seconds of each.
        memory: bytes of the process at its peak.
        disk: bytes of its files until it is finished.
        kept: bytes of the label set.
    """

    stages: list[tuple[str, float]]
    memory: int
    disk: int
    kept: int

    @property
    def seconds(self) -> float:
        """Of all stages."""
        return sum(seconds for _, seconds in self.stages)


def measure_rates(rows: UnitRows, workers: int) -> Rates:
    """Measure search and reading on this machine, for about a second."""
    rng = generator(0, "cluster/trial")
    trial = rng.standard_normal((_TRIAL_ROWS, rows.dim), dtype=np.float32)
    part = min(rows.count, max(1, CHUNK_BYTES // (16 * rows.dim)))
    starts = np.linspace(0, rows.count - part, workers + 1).astype(int).tolist()

    def _search(_: int) -> None:
        find_nearest(trial, trial[:_TRIAL_CENTRES], 1)

    def _read(start: int) -> None:
        rows.read(start, start + part)

    with ThreadPoolExecutor(workers) as threads:
        list(threads.map(_search, range(workers)))  # faiss is imported, memory is there
        begun = time.perf_counter()
        list(threads.map(_search, range(2 * workers)))
        searched = time.perf_counter() - begun
        begun = time.perf_counter()
        list(threads.map(_read, starts))
        read = time.perf_counter() - begun
    size = 2.0 * workers * _TRIAL_ROWS * _TRIAL_CENTRES * rows.dim
    return Rates(size / searched, 4.0 * rows.dim * part * len(starts) / read)


def estimate_work(
    samples: int, dim: int, settings: ClusterSettings, workers: int, rates: Rates
) -> Estimate:
    """Predict the work of a clustering.

    Args:
        samples: N.
        dim: D.
        settings: what is asked for.
        workers: threads; the k-means of the cells is done by one of them.
        rates: of all workers together.
    """
    classes, cells = settings.classes, settings.cells
    read = 4.0 * samples * dim / rates.read_bytes
    one_core = rates.products / workers
    per_cell = classes / cells

    def _train(centres: float, images: float, rate: float) -> float:
        drawn = sample_size(round(centres), dim, round(max(images, centres)))
        return ITERATIONS * drawn * centres * dim / rate

    stages = []
    if cells > 1:
        stages.append(("cells", _train(cells, samples, one_core)))
        # Before and after large cells are split.
        stages.append(("images to cells", 2 * (read + samples * cells * dim / rates.products)))
    rate = one_core if cells == 1 else rates.products
    stages.append(("centres of the classes", cells * _train(per_cell, samples / cells, rate)))
    compared = classes if cells == 1 else cells + min(PROBES, cells) * per_cell
    once = read + samples * compared * dim / rates.products
    stages.append((f"nearest classes, up to {settings.rounds + 1} times", once))
    if settings.rounds:
        stages[-1] = (stages[-1][0], (settings.rounds + 1) * once)
    if settings.duplicates:
        pairs = samples * samples / classes / 2
        stages.append(("duplicates", read + pairs * dim / rates.products))
    stages.append(("the label set", samples * settings.labels_per_image / 4e6))
    return Estimate(stages, *_sizes(samples, dim, settings, workers))


def _sizes(samples: int, dim: int, settings: ClusterSettings, workers: int) -> tuple[int, int, int]:
    """Bytes of memory at the peak, of files until the end, of the label set."""
    classes, labels = settings.classes, settings.labels_per_image
    per_cell = round(classes / settings.cells)
    centre_rows = 4 * dim * (per_cell if settings.cells > 1 else classes)
    sample = min(4 * dim * samples, SAMPLE_BYTES)
    rows = min(chunk_rows(dim), samples)
    chunk, found = 4 * dim * rows, rows * PROBES * labels * 40
    each = max(sample + _MAPPED_BYTES, 2 * chunk + found) + 2 * centre_rows
    memory = BASE_BYTES + workers * each + _CLASS_BYTES * classes
    disk = samples * (6 * labels + 4 + 4 + 1) + 4 * dim * classes
    kept = samples * (4 + 6 * labels) + 40 * classes
    return memory, disk, kept
