"""What an audit found, as rows with names and keys, and in figures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from pipelines.audit.classes.centres import Floats
from pipelines.audit.findings import (
    DROP,
    DUPLICATE,
    FOREIGN,
    KINDS,
    LEAK,
    MERGE,
    MIXED,
    NO_ACTION,
    RELABEL,
    REPEATED,
    SPLIT,
    WRONG_LABEL,
    Findings,
    join_findings,
    make_findings,
)
from pipelines.audit.images.repeats import tell_copies
from pipelines.audit.images.strays import FOREIGN as IS_FOREIGN
from pipelines.audit.images.strays import WRONG_LABEL as IS_WRONG
from pipelines.audit.images.strays import Nearness, read_nearness
from pipelines.audit.job import AuditResult, SharedWithSet
from pipelines.audit.separation import Separation
from pipelines.clustering.rows import Ints
from pipelines.shards.index import ShardIndex
from pipelines.sources.label_table.keys import read_some_keys

_BINS: Final = 80  # of a histogram
_PART: Final = 1 << 18  # images that are looked at together
STATISTICS: Final = {
    DUPLICATE: ("pairs", "how much likelier two classes are one than two (logarithm)"),
    MIXED: ("classes", "how much more similar images of a part are than those of both parts"),
    WRONG_LABEL: ("images", "cosine to the nearest other class minus that to its own"),
    FOREIGN: ("images", "how much likelier a doubted image is of no class than of the nearest"),
    REPEATED: ("images", "how similar two pictures are (1: equal)"),
    LEAK: ("images", "how similar a picture and one of an evaluation set are (1: equal)"),
}

Names = Callable[[set[int]], Mapping[int, str]]
"""Numbers of classes to their names; those without one are left out."""


@dataclass(frozen=True)
class SampleNames:
    """Where findings get their names from.

    Attributes:
        index: the data set.
        classes: names of its classes.
        sets: for each evaluation set its index and the names of its classes.
    """

    index: ShardIndex
    classes: Names
    sets: Mapping[str, tuple[ShardIndex, Names]]


def list_findings(result: AuditResult, names: SampleNames) -> Findings:
    """All findings, kind after kind, with names and keys."""
    parts = [
        _duplicates(result),
        _mixed(result),
        *_strays(result),
        _repeats(result),
        *(_leaks(result, each) for each in result.shared),
    ]
    found = join_findings(parts)
    _name_classes(found, names)
    _name_samples(found, names)
    return found


def _duplicates(result: AuditResult) -> Findings:
    found = result.duplicates
    return make_findings(
        DUPLICATE,
        len(found.first),
        class_=found.first,
        neighbour_class=found.second,
        score=found.score,
        probability=found.probability,
        group=found.groups,
        action=np.where(found.groups >= 0, MERGE, NO_ACTION),
    )


def _mixed(result: AuditResult) -> Findings:
    apart, separation = np.asarray(result.mixed.apart), result.mixed_separation
    is_mixed = apart >= separation.threshold
    labels = np.asarray(result.labels)
    images = np.flatnonzero(np.asarray(result.mixed.part) & is_mixed[labels] & (labels >= 0))
    classes = labels[images]
    return make_findings(
        MIXED,
        len(images),
        sample=images,
        class_=classes,
        score=apart[classes],
        probability=separation.probability(apart[classes])[0],
        group=1,
        action=SPLIT,
    )


def _strays(result: AuditResult) -> list[Findings]:
    found = []
    for number, kind, action in ((IS_WRONG, WRONG_LABEL, RELABEL), (IS_FOREIGN, FOREIGN, DROP)):
        images = np.flatnonzero(np.asarray(result.strays.kind) == number)
        near = read_nearness(result.scores, result.parted, result.duplicates.ids, images)
        belongs = result.strays.belonging.score(near, result.strays.figures)
        found.append(
            make_findings(
                kind,
                len(images),
                sample=images,
                class_=np.asarray(result.labels)[images],
                neighbour_class=result.parents[near.neighbour],
                score=near.doubt if kind == WRONG_LABEL else -belongs,
                probability=np.asarray(result.strays.probability)[images],
                action=action,
            )
        )
    return found


def _repeats(result: AuditResult) -> Findings:
    pairs = result.repeats
    told_apart = tell_copies(pairs.likeness, result.copies, result.false_rate)
    kept = np.flatnonzero(told_apart.are_copies)
    labels, likeness = np.asarray(result.labels), pairs.likeness[kept]
    return make_findings(
        REPEATED,
        len(kept),
        sample=pairs.images[kept],
        class_=labels[pairs.images[kept]],
        neighbour_class=labels[pairs.neighbours[kept]],
        neighbour_sample=pairs.neighbours[kept],
        score=likeness,
        probability=told_apart.probability[kept],
    )


def _leaks(result: AuditResult, shared: SharedWithSet) -> Findings:
    pairs, labels = shared.copies, np.asarray(result.labels)
    told_apart = tell_copies(pairs.likeness, result.copies, result.false_rate)
    kept = np.flatnonzero(told_apart.are_copies)
    order = np.lexsort((pairs.neighbours[kept], -pairs.likeness[kept], pairs.images[kept]))
    kept = kept[order]  # of each training image the copy that is most like it
    kept = kept[np.flatnonzero(np.diff(pairs.images[kept], prepend=-1))]
    likeness = pairs.likeness[kept]
    pictures = make_findings(
        LEAK,
        len(kept),
        sample=pairs.images[kept],
        class_=labels[pairs.images[kept]],
        neighbour_sample=pairs.neighbours[kept],
        neighbour_set=shared.other.name,
        score=likeness,
        probability=told_apart.probability[kept],
        action=DROP,
    )
    found = shared.identities
    separation = result.duplicates.rule.separation
    identities = make_findings(
        LEAK,
        len(found.classes),
        class_=found.classes,
        neighbour_key=[str(number) for number in found.identities.tolist()],
        neighbour_sample=found.samples,
        neighbour_set=shared.other.name,
        score=found.score,
        probability=separation.probability(found.score)[0]
        if np.isfinite(separation.threshold)
        else 1.0,
    )
    return join_findings([pictures, identities])


def _name_classes(findings: Findings, names: SampleNames) -> None:
    """Fill in the names of classes, and of identities of evaluation sets; a number has itself."""
    for numbers, target in (("class", "class_name"), ("neighbour_class", "neighbour_name")):
        values = findings[numbers]
        known = names.classes(set(values[values >= 0].tolist()))
        findings[target][:] = [
            known.get(number, str(number)) if number >= 0 else "" for number in values.tolist()
        ]
    identity = (findings["kind"] == LEAK) & (findings["sample"] < 0)
    for name, (_, classes) in names.sets.items():
        here = np.flatnonzero(identity & (findings["neighbour_set"] == name))
        identities = [int(number) for number in findings["neighbour_key"][here]]
        found = classes(set(identities))
        findings["neighbour_key"][here] = [found.get(each, str(each)) for each in identities]


def _name_samples(findings: Findings, names: SampleNames) -> None:
    """Fill in the keys of samples, which are read from the tars."""
    of_set = findings["neighbour_set"]
    is_image = findings["sample"] >= 0  # else it is an identity, which has its own name
    sources = [("sample", "key", names.index, np.ones(len(findings), bool))]
    sources.append(("neighbour_sample", "neighbour_key", names.index, of_set == ""))
    for name, (index, _) in names.sets.items():
        sources.append(("neighbour_sample", "neighbour_key", index, is_image & (of_set == name)))
    for numbers, target, index, chosen in sources:
        here = np.flatnonzero(chosen & (findings[numbers] >= 0))
        findings[target][here] = keys_of(index, findings[numbers][here])


def keys_of(index: ShardIndex, numbers: Ints) -> npt.NDArray[Any]:
    """The keys of samples by their numbers, in that order; each tar is opened once."""
    distinct, places = np.unique(numbers, return_inverse=True)
    shards = np.searchsorted(index.starts, distinct, side="right") - 1
    keys = np.empty(len(distinct), object)
    for shard in np.unique(shards).tolist():
        here = np.flatnonzero(shards == shard)
        keys[here] = read_some_keys(index, shard, distinct[here] - index.starts[shard])
    return keys[places]


def list_figures(result: AuditResult, findings: Findings) -> dict[str, Any]:
    """The content of `figures.json`."""
    labels = np.asarray(result.labels)
    kinds: dict[str, Any] = {}
    observed = _observed(result)
    examined_by = {
        DUPLICATE: (result.duplicates.rule.separation, result.class_recall),
        MIXED: (result.mixed_separation, None),
        WRONG_LABEL: (result.strays.separation, result.class_recall),
        FOREIGN: (result.strays.belonging.parting, result.class_recall),
        REPEATED: (None, result.image_recall),
        LEAK: (None, None),
    }
    for kind in KINDS:
        chosen = findings.of(findings["kind"] == kind)
        if kind == MIXED:  # a row for each image of a part; the class counts once
            chosen = chosen.of(np.unique(chosen["class"], return_index=True)[1])
        unit, statistic = STATISTICS[kind]
        separation, recall = examined_by[kind]
        kinds[kind] = {
            "count": len(chosen),
            "threshold": (
                tell_copies(observed[kind], result.copies, result.false_rate).threshold
                if separation is None
                else _threshold(kind, separation)
            ),
            "expected_false": float((1 - chosen["probability"].astype(np.float64)).sum()),
            "examined": int((~np.isnan(observed[kind])).sum()),
            "unit": unit,
            "statistic": statistic,
            "histogram": histogram(observed[kind]),
            "recall": recall,
        }
    accused = np.isin(findings["kind"].astype(str), (WRONG_LABEL, FOREIGN, LEAK))
    images = findings["sample"][accused & (findings["sample"] >= 0)]
    pairs = findings.of(findings["kind"] == DUPLICATE)
    mixed = findings.of(findings["kind"] == MIXED)
    doubted = [pairs["class"], pairs["neighbour_class"], mixed["class"]]
    return {
        "false_rate": result.false_rate,
        "totals": {
            "images": int((labels >= 0).sum()),
            "classes": int((np.bincount(labels[labels >= 0]) > 0).sum()),
            "images_doubted": len(np.unique(images)),
            "classes_doubted": len(np.unique(np.concatenate(doubted))),
            "seconds": round(result.seconds, 1),
        },
        "kinds": kinds,
        "identities_shared_by_design": {
            each.other.name: each.identities.by_design
            for each in result.shared
            if each.identities.by_design
        },
    }


def _threshold(kind: str, separation: Separation) -> float | None:
    value = separation.threshold
    if kind == FOREIGN:
        value = -value
    if kind == WRONG_LABEL:
        value = max(value, 0.0)
    return float(value) if np.isfinite(value) else None


def _observed(result: AuditResult) -> dict[str, npt.NDArray[Any]]:
    """Of each kind the statistics of all that was examined; NaN: it could not be."""
    doubt, foreign = _observed_images(result)
    shared = [each.copies.likeness for each in result.shared]
    return {
        DUPLICATE: result.duplicates.observed,
        MIXED: np.asarray(result.mixed.apart),
        WRONG_LABEL: doubt,
        FOREIGN: foreign,
        REPEATED: result.repeats.likeness,
        LEAK: np.concatenate([np.empty(0), *shared]),
    }


def _observed_images(result: AuditResult) -> tuple[Floats, Floats]:
    """float64 `[N]`, the doubt of each image, and of those doubted how foreign each is."""
    count, strays = len(result.labels), result.strays
    doubt, foreign = np.empty(count), [np.empty(0)]
    for start in range(0, count, _PART):
        here = slice(start, start + _PART)
        near = read_nearness(result.scores, result.parted, result.duplicates.ids, here)
        doubt[here] = near.doubt
        doubted = np.asarray(strays.kind[here]) != 0
        chosen = Nearness(*(values[doubted] for values in near))
        foreign.append(-strays.belonging.score(chosen, strays.figures))
    return doubt, np.concatenate(foreign)


def histogram(values: npt.NDArray[Any]) -> dict[str, list[float]] | None:
    """Edges and counts of the values that are numbers; None: there is none."""
    known = values[np.isfinite(values)]
    if not len(known):
        return None
    low, high = float(known.min()), float(known.max())
    counts, edges = np.histogram(known, _BINS, (low, max(high, low + 1e-6)))
    return {"edges": edges.tolist(), "counts": counts.tolist()}
