"""Probes against a gallery: rank-k identification, and TAR at FAR over all their pairs.

Scores are computed band by band (`gallery_search`) and never kept as a whole. They are rounded to
12 decimals, so that equal embeddings get equal scores wherever a matrix product puts them; ties
count against the model.
"""

from __future__ import annotations

import hashlib
import math
import tempfile
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from mhe_dist.errors import UserError
from pipelines.embedding.embeddings import normalize_embeddings
from pipelines.evaluate.metrics.gallery_search import (
    BAND,
    ComparedRows,
    ProbesResult,
    ProbesTask,
    compare_band,
)
from pipelines.evaluate.metrics.roc import (
    KEPT,
    SPREAD,
    Floats,
    Ints,
    Roc,
    TopScores,
    round_scores,
    sampled_bound,
)
from pipelines.storage.mapped_file import create_mapped_array
from pipelines.storage.worker_pool import HERE, LazyTasks, Workers, run_tasks

_CHUNK: Final = 1 << 13  # rows, or pairs, that are made at a time


class Rows(Protocol):
    """float64 `[n, D]`: an array, or what makes parts of one when they are read."""

    def __len__(self) -> int: ...

    def __getitem__(self, which: Ints, /) -> Floats: ...


class Identification(NamedTuple):
    """The result of comparing every probe with the whole gallery.

    Attributes:
        ranks: int64 `[P]`, 1 + number of other classes that score at least as high as the probe's
            own; 0 for a probe whose class is not enrolled.
        classes: number of enrolled classes.
        roc: of all pairs of a probe and a gallery entry.
        nearest: int64 `[P, k]`, numbers of the k best gallery entries, best first.
        scores: `[P, k]`, the scores of `nearest`.
    """

    ranks: Ints
    classes: int
    roc: Roc
    nearest: Ints
    scores: Floats

    def rank(self, k: int) -> float:
        """Share of the enrolled probes whose class is among the k best."""
        enrolled = self.ranks[self.ranks > 0]
        return float(np.mean(enrolled <= k)) if len(enrolled) else math.nan

    def chance(self, k: int) -> float:
        """`rank(k)` of a random order of the classes."""
        return min(1.0, k / self.classes)

    def tpir(self, fpir: float) -> float:
        """True positive identification rate at a false positive identification rate, open set.

        The threshold is the lowest at which at most a share `fpir` of the probes that are not
        enrolled match any entry. The figure is the share of the enrolled probes whose best match
        is their own class, above the threshold. It is NaN without probes of both kinds.
        """
        enrolled, best = self.ranks > 0, self.scores[:, 0]
        strangers = -np.sort(-best[~enrolled])
        if not len(strangers) or not enrolled.any():
            return math.nan
        allowed = math.floor(fpir * len(strangers) + 1e-9)
        limit = strangers[allowed] if allowed < len(strangers) else -math.inf
        return float(np.mean((self.ranks == 1)[enrolled] & (best[enrolled] > limit)))


def identify(
    gallery: Rows,
    gallery_labels: Ints,
    probes: Rows,
    probe_labels: Ints,
    nearest: int = 5,
    max_far: float = 0.1,
    workers: Workers = HERE,
    folder: str = "",
) -> Identification:
    """Compare every probe with every gallery entry by the cosine.

    Args:
        gallery: `[G, D]`, rows of length 1.
        gallery_labels: `[G]`; a class may have several entries, the best one counts.
        probes: `[P, D]`, rows of length 1.
        probe_labels: `[P]`.
        nearest: k, number of gallery entries to return for each probe.
        max_far: largest FAR that will be requested; bounds how many impostor scores are kept,
            as does `KEPT`.
        workers: who compares; the result is the same, bit for bit.
        folder: which all of them reach, for rows and finished parts, so that memory is flat and
            the next call goes on with what this one has finished. Empty: all is in memory, for
            this process alone.

    Raises:
        UserError: no gallery or no probes.
    """
    if not len(gallery) or not len(probes):
        raise UserError(f"identification: {len(gallery)} gallery entries, {len(probes)} probes")
    order, probe_order = (
        np.argsort(labels, kind="stable") for labels in (gallery_labels, probe_labels)
    )
    names, labels = gallery_labels[order], probe_labels[probe_order]
    rows: ComparedRows | str
    if folder:
        rows = folder = _write_rows(folder, (gallery, order, names), (probes, probe_order, labels))
        compared = ComparedRows.open(folder)
    else:
        rows = compared = ComparedRows(gallery[order], names, probes[probe_order], labels)
    matches = np.searchsorted(names, labels, "right") - np.searchsorted(names, labels)
    impostors = len(probes) * len(names) - int(matches.sum())
    search = _Search(rows, compared, min(nearest, len(names)), folder, workers)
    ranks, near, scores, genuine, highest = search.run(
        impostors, min(impostors, math.floor(max_far * impostors) + 1, KEPT)
    )
    back = np.argsort(probe_order)
    return Identification(
        ranks[back],
        len(np.unique(names)),
        Roc(genuine, impostors, highest),
        order[near[back]],
        scores[back],
    )


class NormalizedRows:
    """Rows of length 1, made of others when they are read; `Rows` for `identify`.

    Args:
        rows: float `[N, D]`, of any length; a mapped file stays mapped.
        numbers: which of them, int64 `[n]`.
    """

    def __init__(self, rows: npt.NDArray[Any], numbers: Ints) -> None:
        self._rows, self._numbers = rows, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, which: Ints) -> Floats:
        return normalize_embeddings(np.asarray(self._rows[self._numbers[which]]))


def _write_rows(
    folder: str, gallery: tuple[Rows, Ints, Ints], probes: tuple[Rows, Ints, Ints]
) -> str:
    """Write both sides into a folder that is named by what they are; its path."""
    digest = hashlib.sha256()
    with tempfile.TemporaryDirectory(prefix=".rows-", dir=folder) as unnamed:
        for side, classes, (rows, order, labels) in (
            ("gallery", "names", gallery),
            ("probes", "labels", probes),
        ):
            np.save(Path(unnamed) / f"{classes}.npy", labels)
            digest.update(labels.tobytes())
            shape = (len(order), rows[order[:1]].shape[1])
            file = Path(unnamed) / f"{side}.npy"
            mapped = create_mapped_array(file, np.float64, shape)
            for start in range(0, len(order), _CHUNK):
                part = rows[order[start : start + _CHUNK]]
                mapped[start : start + _CHUNK] = part
                digest.update(part.tobytes())
            mapped.flush()
        named = Path(folder) / digest.hexdigest()[:16]
        named.mkdir(exist_ok=True)
        for file in Path(unnamed).iterdir():
            file.replace(named / file.name)
    return str(named)


class _Search(NamedTuple):
    """All bands of a comparison.

    Attributes:
        rows: as tasks are given them.
        compared: the same, here.
        nearest: k.
        folder: for finished parts; empty: none are kept.
        workers: who compares.
    """

    rows: ComparedRows | str
    compared: ComparedRows
    nearest: int
    folder: str
    workers: Workers

    def run(self, impostors: int, count: int) -> tuple[Ints, Ints, Floats, Floats, Floats]:
        """Ranks, nearest entries and their scores, genuine and the `count` highest impostors."""
        spread = SPREAD
        while True:
            bound = sampled_bound(self._draw, impostors, count, spread)
            found = self._above(bound, count)
            if len(found[-1]) >= count or bound == -math.inf:
                return found
            spread *= 4  # the sample was not like the rest

    def _draw(self, generator: np.random.Generator, count: int) -> Floats:
        """The scores of so many random pairs, or of fewer: of those of two classes."""
        rows = self.compared
        first = np.sort(generator.integers(0, len(rows.labels), count))
        second = generator.integers(0, len(rows.names), count)
        different = rows.labels[first] != rows.names[second]
        first, second, scores = first[different], second[different], []
        for start in range(0, len(first), _CHUNK):
            part = slice(start, start + _CHUNK)
            pairs = rows.probes[first[part]], rows.gallery[second[part]]
            scores.append(round_scores(np.einsum("nd,nd->n", *pairs)))
        return np.concatenate([np.empty(0), *scores])

    def _above(self, bound: float, count: int) -> tuple[Ints, Ints, Floats, Floats, Floats]:
        highest, parts = TopScores(count), dict[int, ProbesResult]()
        suffix = hashlib.sha256(f"{bound!r} {count} {self.nearest}".encode()).hexdigest()[:8]

        def _part(number: int) -> str:
            return f"{self.folder}/{suffix}-{number:06d}.npz" if self.folder else ""

        def _keep(number: int, result: ProbesResult) -> None:
            highest.add(result.impostors)
            parts[number] = result._replace(impostors=np.empty(0))

        def _task(number: int) -> ProbesTask:
            # What is known when a task begins spares work; it changes nothing in the result.
            limit = max(bound, highest.lower_bound)
            return ProbesTask(self.rows, number * BAND, self.nearest, limit, _part(number))

        def _finished(number: int) -> list[ProbesResult] | None:
            found = ProbesResult.read(_part(number)) if self.folder else None
            if found is None:
                return None
            _keep(number, found)
            return []

        def _record(number: int, made: list[ProbesResult]) -> None:
            result = made.pop() if made else ProbesResult.read(_part(number))
            assert result is not None  # its worker has just written it
            _keep(number, result)

        bands = math.ceil(len(self.compared.labels) / BAND)
        run_tasks(compare_band, LazyTasks(bands, _task), self.workers, _finished, _record)
        ranks, near, scores, genuine, _ = (
            np.concatenate(each)
            for each in zip(*(parts[number] for number in range(bands)), strict=True)
        )
        return ranks, near, scores, genuine, highest.descending()
