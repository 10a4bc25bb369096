"""The labels that a run of a study trains on: clustered, planted with faults, or audited."""

from __future__ import annotations

import json
from pathlib import Path

from rich.markup import escape

from launcher import execute
from launcher.reproduce.page import SCORE_FILE
from launcher.reproduce.plan import UNTRAINED, PlannedRun
from launcher.terminal import console
from launcher.terminal.progress import ProgressDisplay
from launcher.verbs.data import convert
from launcher.verbs.embedding import audit
from launcher.verbs.embedding.audit_task import open_task
from launcher.verbs.embedding.cluster import make_label_set
from launcher.verbs.embedding.shared import EmbeddingOptions
from mhe_dist.config.schema import Config
from pipelines.audit.findings import FIGURES_FILE, FINDINGS_FILE
from pipelines.clustering.settings import ClusterSettings
from pipelines.shards.label_set import label_set_exists
from pipelines.storage.urls import atomic_write


def make_labels(plan: PlannedRun, config: Config, clean: Config, out: str) -> None:
    """Make the label set of a run, unless it is there.

    Args:
        plan: a run whose labels are not those of its data.
        config: of the run.
        clean: the same on the data that is not dirty, for runs that are.
        out: folder of the study's runs.
    """
    if plan.planted:
        _plant(plan, clean, out)
    if plan.variant.clustered_by and not label_set_exists(f"{out}/{plan.labels}"):
        _cluster(plan, config, out)
    if plan.variant.audited_by and not _is_scored(plan, out):
        _audit_planted(plan, clean, out)


def _cluster(plan: PlannedRun, config: Config, out: str) -> None:
    """Cluster the embeddings of the data."""
    with convert.resumable(), ProgressDisplay() as display:
        execute.make_data(config, display)
        if plan.variant.clustered_by == UNTRAINED:
            from pipelines.runs.untrained import write_untrained_run

            run = config.run.model_copy(update={"name": plan.embedded_by})
            write_untrained_run(config.model_copy(update={"run": run}))
        settings = ClusterSettings(plan.study.classes, plan.study.labels_per_image, seed=plan.seed)
        model, target = f"{out}/{plan.embedded_by}", f"{out}/{plan.labels}"
        make_label_set(config.data.shards, model, target, settings)


def _plant(plan: PlannedRun, clean: Config, out: str) -> None:
    """Plant the faults of this seed into the clean data, unless they are."""
    target, faults = f"{out}/{plan.planted}", plan.study.faults
    assert faults is not None, "the study has dirty variants"
    if label_set_exists(f"{target}/labels"):
        return
    from pipelines.shards.index import ShardIndex
    from pipelines.sources.planted.dirty_set import plant_faults
    from pipelines.sources.planted.unseen_glyphs import draw_unseen_glyphs

    with convert.resumable(), ProgressDisplay() as display:
        execute.make_data(clean, display)
        display.waiting("planting faults")
        train, heldout = (ShardIndex.load(d.shards) for d in (clean.data, clean.evaluate))
        fonts = clean.data.glyphs.fonts if clean.data.glyphs else ""
        count = round(faults.foreign * train.samples)
        side = clean.data.image_size
        foreign = draw_unseen_glyphs([train, heldout], fonts, side, count, plan.seed)
        plant_faults(train, heldout, foreign, target, plan.seed, faults)


def _audit_planted(plan: PlannedRun, clean: Config, out: str) -> None:
    """Audit the dirty labels, write the cured ones, and compare the findings with the plan."""
    from pipelines.sources.planted.score import read_table, score_findings

    planted = f"{out}/{plan.planted}"
    _audit(plan, plan.embedded_by, f"{planted}/train", f"{planted}/labels", clean, out)
    findings = read_table(f"{out}/{plan.audit}/{FINDINGS_FILE}")
    scores = score_findings(findings, read_table(f"{planted}/plan.parquet"))
    kinds = {kind: score.as_dict() for kind, score in scores.items()}
    _write_score(plan, out, {"kinds": kinds})


def audit_clean_data(plan: PlannedRun, config: Config, out: str) -> None:
    """Audit the clean data with a run that was trained on it, to see what is accused there.

    Nothing happens if that is done.
    """
    if not _is_scored(plan, out):
        _audit(plan, plan.name, config.data.shards, "", config, out)
        _write_score(plan, out, {})


def _is_scored(plan: PlannedRun, out: str) -> bool:
    """Whether the audit is done to its end."""
    return Path(f"{out}/{plan.audit}/{SCORE_FILE}").exists()


def _audit(plan: PlannedRun, by: str, shards: str, labels: str, clean: Config, out: str) -> None:
    from pipelines.audit.cure import APPLICABLE
    from pipelines.audit.settings import AuditSettings

    console.say(f"auditing with {escape(by)}")
    settings = AuditSettings(plan.study.false_rate, plan.seed)
    folder = f"{out}/{plan.audit}"
    with convert.resumable():
        task = open_task(f"{out}/{by}", shards, labels, [clean.evaluate.shards], folder, settings)
        if not Path(f"{folder}/{FIGURES_FILE}").is_file():
            audit.find_faults(task, EmbeddingOptions("", clean.scale.workers, None, ""))
        audit.cure(task, APPLICABLE)


def _write_score(plan: PlannedRun, out: str, score: dict[str, object]) -> None:
    """Keep what the page says of an audit."""
    folder = f"{out}/{plan.audit}"
    figures = json.loads(Path(f"{folder}/{FIGURES_FILE}").read_text())
    about = {"false_rate": figures["false_rate"], "totals": figures["totals"]}
    with atomic_write(f"{folder}/{SCORE_FILE}") as stream:
        stream.write(json.dumps(about | score, indent=1).encode() + b"\n")
