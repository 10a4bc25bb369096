"""Writes the page of an audit: one HTML file with its pictures, which needs no network."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import numpy as np

from pipelines.audit.findings import LEAK, REPEATED
from pipelines.report.audit.cards import CardMaker, FindingCard
from pipelines.report.audit.findings import (
    AuditFindings,
    ClassMembers,
    Kind,
    read_findings,
    short_name,
)
from pipelines.report.charts.chart import DrawnChart, Histogram
from pipelines.report.charts.counts import draw_histogram
from pipelines.report.charts.numbers import format_share
from pipelines.report.page import render_page
from pipelines.shards.index import ShardIndex
from pipelines.shards.label_set import LabelSet

PAGE_FILE: Final = "audit.html"
SHOWN: Final = 60  # findings of each kind
_MEMBERS: Final = 64  # images of a class that its pictures are chosen from


def write_audit_page(
    folder: str,
    index: ShardIndex,
    labels: LabelSet | None = None,
    sets: Mapping[str, str] | None = None,
    limit: int = SHOWN,
) -> str:
    """Write `audit.html` beside the findings of an audit; what is there is replaced.

    Args:
        folder: path or URL, with `findings.parquet` and `figures.json`.
        index: the data set; its images are read by their rows.
        labels: the labels that were audited; None: those of the index.
        sets: shards of the evaluation sets, by the name that was given for `neighbour_set`.
        limit: findings of each kind that are shown.

    Returns:
        The page.

    Raises:
        UserError: there are no findings, or they are damaged.
    """
    findings = read_findings(folder, limit)
    members = ClassMembers(index, labels, _shown_classes(findings), findings.doubted, _MEMBERS)
    maker = CardMaker(findings, members, index.folder, sets or {})
    sections = [_section(kind, list(maker.cards(kind)), findings) for kind in findings.kinds]
    rows = [card.rows for section in sections for card in section["cards"]]
    values = {
        "name": f"Audit of {short_name(index.folder if labels is None else labels.folder)}",
        "subtitle": _subtitle(findings, index, labels),
        "tiles": list(_tiles(findings)),
        "sections": sections,
        "columns": findings.columns,
        "rows": rows,
        "digest": hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16],
    }
    render_page("audit/audit.html.j2", f"{folder}/{PAGE_FILE}", values)
    return f"{folder}/{PAGE_FILE}"


def _shown_classes(findings: AuditFindings) -> Iterator[int]:
    for kind in findings.kinds:
        for rows in kind.shown:
            yield from (rows[0][name] for name in ("class", "neighbour_class"))


def _subtitle(findings: AuditFindings, index: ShardIndex, labels: LabelSet | None) -> str:
    classes = index.num_classes if labels is None else labels.num_classes
    said = f"{index.samples:,} images of {classes:,} classes"
    rate = findings.figures.get("false_rate")
    if rate is not None:
        said += f"; thresholds at a false rate of {rate:.3g}"
    return f"{said}; nothing is changed in the tars"


def _tiles(findings: AuditFindings) -> Iterator[tuple[str, str]]:
    """The most important figures, as (name, value)."""
    totals = findings.figures.get("totals", {})
    for what in ("images", "classes"):
        doubted, total = totals.get(f"{what}_doubted"), totals.get(what)
        if doubted is not None and total:
            yield f"{what} doubted, {format_share(doubted / total)}", f"{doubted:,}"
    for kind in findings.kinds:
        if kind.name in (REPEATED, LEAK):
            yield kind.text.title.lower(), f"{kind.total:,}"
    if "seconds" in totals:
        yield "minutes of the audit", f"{totals['seconds'] / 60:.1f}"


def _section(kind: Kind, cards: Sequence[FindingCard], findings: AuditFindings) -> dict[str, Any]:
    return {
        "kind": kind,
        "cards": cards,
        "chart": _chart(kind),
        "facts": list(_facts(kind, findings)),
    }


def _chart(kind: Kind) -> DrawnChart | None:
    """The statistic of all that was examined, with the threshold."""
    found = kind.figures.get("histogram")
    if not found or not found["counts"]:
        return None
    chart = Histogram(
        title="All that was examined",
        x="score",
        unit=kind.figures.get("unit") or kind.text.more,
        edges=np.array(found["edges"], np.float64),
        counts=np.array(found["counts"], np.int64),
        threshold=kind.figures.get("threshold"),
        note=f"Score: {statistic}" if (statistic := kind.figures.get("statistic")) else "",
    )
    return draw_histogram(chart)


def _facts(kind: Kind, findings: AuditFindings) -> Iterator[tuple[str, str]]:
    """What is known of a kind, as (name, value)."""
    figures = kind.figures
    noun = kind.text.one if kind.total == 1 else kind.text.more
    yield noun, f"{kind.total:,}"
    if (examined := figures.get("examined")) is not None:
        yield f"{figures.get('unit') or 'cases'} examined", f"{examined:,}"
    if (threshold := figures.get("threshold")) is not None:
        yield "threshold", f"{threshold:.4g}"
    if (rate := findings.figures.get("false_rate")) is not None:
        yield "false rate asked for", f"{rate:.3g}"
    if (expected := figures.get("expected_false")) is not None:
        yield "of them false, as estimated", f"{expected:,.1f}"
    if (recall := figures.get("recall")) is not None:
        yield "neighbours that the search finds", format_share(recall)
    if kind.changes_labels:
        yield "if accepted", kind.text.accept
    else:
        yield "label set", "not changed by these"
