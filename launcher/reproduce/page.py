"""The page of `mhe reproduce`: the results of the complete runs of all studies."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from launcher.reproduce.plan import PlannedRun, Study, Variant, plan_runs
from launcher.reproduce.studies import STUDIES
from pipelines.report.comparison import Outcome, VariantResult
from pipelines.runs.folder import (
    newest_checkpoint,
    read_if_exists,
    read_run_config,
    read_summary,
)

SCORE_FILE = "score.json"  # in the folder of an audit

if TYPE_CHECKING:
    from pipelines.report.comparison_markdown import WrittenPage


def write_study_page(page: str, folder: str, study: Study, seeds: int) -> WrittenPage:
    """Write the page from the complete runs of this study, and of others that are there or on it.

    Args:
        page: path or URL of the Markdown file.
        folder: of the runs.
        study: the requested study; it is on the page even without a complete run.
        seeds: number of its seeds; other studies count their default number of seeds.
    """
    from pipelines.report.comparison_markdown import ComparisonSection, write_comparison_page

    sections, existing = [], read_if_exists(page) or ""
    for each in STUDIES.values():
        results = list(compare_variants(each, folder, seeds if each is study else each.seeds))
        is_on_page = f"\n## {each.title}\n" in existing
        if each is study or is_on_page or any(result.outcomes for result in results):
            section = ComparisonSection(
                name=each.name,
                title=each.title,
                text=each.text,
                command=f"mhe reproduce {each.name}",
                results=results,
                typefaces=each.typefaces,
                measures=each.measures,
                claims=each.claims,
                more=_describe_faults(each, folder, results),
            )
            sections.append(section)
    return write_comparison_page(sections, page, existing)


def _describe_faults(study: Study, folder: str, results: list[VariantResult]) -> list[str]:
    """What is said of planted faults, if the study has some."""
    if study.faults is None:
        return []
    from pipelines.report.planted_faults import AuditScores, describe_audits, describe_recovery

    audits = []
    for variant in study.variants:
        plans = plan_runs(study, [variant], study.seeds)
        texts = [read_if_exists(f"{folder}/{p.audit}/{SCORE_FILE}") for p in plans if p.audit]
        scores = [json.loads(text) for text in texts if text]
        if scores:
            audits.append(AuditScores(variant.title, scores))
    probes = (("", "All probes"), *study.typefaces)
    return [*describe_recovery(results, probes), "", *describe_audits(audits)]


def compare_variants(study: Study, folder: str, seeds: int) -> Iterator[VariantResult]:
    """The outcomes of each variant, and the runs that are not complete."""
    for variant in study.variants:
        yield _variant_result(variant, folder, plan_runs(study, [variant], seeds))


def _variant_result(variant: Variant, folder: str, plans: Iterable[PlannedRun]) -> VariantResult:
    result = VariantResult(variant.name, variant.title, [])
    for plan in plans:
        path = f"{folder}/{plan.name}"
        outcome = _outcome(path, plan.seed)
        if outcome is None:
            newest = newest_checkpoint(path)
            result.missing[plan.seed] = int(newest.rpartition("_")[2]) if newest else 0
        else:
            result.outcomes.append(outcome)
    return result


def _outcome(path: str, seed: int) -> Outcome | None:
    """The outcome of the run at `path`; None while it is not complete."""
    from mhe_dist.tracking.jsonl import read_records

    summary, settings = read_summary(path), read_run_config(path)
    if summary is None or settings is None:
        return None
    records = read_records(f"{path}/metrics.jsonl")
    return Outcome.of(seed, settings["train"]["global_batch"], summary, records)
