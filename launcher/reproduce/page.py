"""The page of `mhe reproduce`: what the complete runs of all studies reached."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from launcher.reproduce.studies import STUDIES, PlannedRun, Study, Variant, plan_runs
from pipelines.report.comparison import Compared, Outcome
from pipelines.runs.folder import newest_checkpoint, read_run_config, read_summary


def write_study_page(page: str, folder: str, study: Study, seeds: int) -> list[str]:
    """Write the page from what is complete: this study, and others that were begun there.

    Args:
        page: path or URL of the Markdown file.
        folder: of the runs.
        study: the one that was asked for.
        seeds: how many of it count; of the others, as many as they have by default.

    Returns:
        Paths of the files.
    """
    from pipelines.report import comparison_markdown as comparison_page

    parts = []
    for each in STUDIES.values():
        compared = list(compare_variants(each, folder, seeds if each is study else each.seeds))
        if each is study or any(row.outcomes for row in compared):
            parts.append(
                comparison_page.Part(
                    *(each.name, each.title, each.text, f"mhe reproduce {each.name}"),
                    *(compared, each.typefaces, each.claim),
                )
            )
    return comparison_page.write(parts, page)


def compare_variants(study: Study, folder: str, seeds: int) -> Iterator[Compared]:
    """What the runs of each variant reached, and which are not complete."""
    for variant in study.variants:
        yield _compared(variant, folder, plan_runs(study, [variant], seeds))


def _compared(variant: Variant, folder: str, plans: Iterable[PlannedRun]) -> Compared:
    found = Compared(variant.name, variant.title, [])
    for plan in plans:
        path = f"{folder}/{plan.name}"
        outcome = _outcome(path, plan.seed)
        if outcome is None:
            newest = newest_checkpoint(path)
            found.missing[plan.seed] = int(newest.rpartition("_")[2]) if newest else 0
        else:
            found.outcomes.append(outcome)
    return found


def _outcome(path: str, seed: int) -> Outcome | None:
    """What the run at `path` reached; None while it is not complete."""
    from mhe_dist.tracking.jsonl import read_records

    summary, settings = read_summary(path), read_run_config(path)
    if summary is None or settings is None:
        return None
    records = read_records(f"{path}/metrics.jsonl")
    return Outcome.of(seed, settings["train"]["global_batch"], summary, records)
