"""`mhe audit`: wrong labels of a data set, found, shown, and cured by a label set."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import numpy as np
import typer
from rich.markup import escape
from rich.table import Table

from launcher.tasks.resumable import resumable
from launcher.terminal import console
from launcher.terminal.progress import ProgressDisplay
from launcher.verbs.embedding.audit_task import (
    MADE_OF,
    MODEL,
    AuditTask,
    open_task,
    read_figures,
    require_same,
    require_same_model,
)
from launcher.verbs.embedding.shared import (
    EmbeddingOptions,
    EmbeddingsOption,
    embed_shards,
    embedded_by,
    watch_stages,
)
from launcher.verbs.options import AddressOption, GpuOption
from launcher.verbs.outputs import usable_folder_here
from mhe_dist.limits import available_cores
from pipelines.audit.findings import FIGURES_FILE
from pipelines.shards.index import ShardIndex
from pipelines.shards.label_set import LabelSet
from pipelines.storage.urls import atomic_write

if TYPE_CHECKING:
    from pipelines.audit.evaluation_sets import EvaluationSet
    from pipelines.audit.findings import Decisions, Findings
    from pipelines.audit.job import AuditResult

LABELS_FOLDER = "labels"
STAGES = 24  # of an audit, about

Run = Annotated[
    str,
    typer.Argument(
        metavar="RUN",
        help="A run, or a step_* checkpoint; or a YAML file or its name: the backbone that it "
        "begins with.",
    ),
]
Shards = Annotated[
    str, typer.Option(help="Folder or URL of the data set; left out: what the run trained on.")
]
Labels = Annotated[
    str, typer.Option(help="Label set that is examined; left out: the run's, or the tars' labels.")
]
Against = Annotated[
    list[str] | None,
    typer.Option(help="Shards that the run is evaluated on, looked for in the data set; repeat."),
]
FalseRate = Annotated[
    float,
    typer.Option(help="Share of the right images, or classes, that may be accused; as estimated."),
]
Apply = Annotated[
    str, typer.Option(help="What the label set does of merge, split, relabel and drop; by comma.")
]
DecisionsOption = Annotated[
    str,
    typer.Option(help="CSV like decisions.csv with `reject` (or `accept`) in its last column."),
]
WorkerCount = Annotated[
    int, typer.Option(min=0, help="Embed and compare at the same time; 0: one per core or GPU.")
]


def audit(
    run: Run,
    shards: Shards = "",
    labels: Labels = "",
    against: Against = None,
    out: Annotated[
        str,
        typer.Option(
            help="Folder for what is found, on this machine.", callback=usable_folder_here
        ),
    ] = "audit",
    false_rate: FalseRate = 0.01,
    apply: Apply = "merge,split,relabel,drop",
    decisions: DecisionsOption = "",
    embeddings: EmbeddingsOption = "",
    seed: Annotated[int, typer.Option(help="Of every draw.")] = 0,
    workers: WorkerCount = 0,
    gpu: GpuOption = None,
    address: AddressOption = "",
) -> None:
    """Find wrong labels with a trained backbone, and write a label set without them.

    Looks for classes that are one and classes that are two, for images of another class or of none,
    for repeated pictures, and for pictures and identities of evaluation sets among the training
    images. Thresholds come from the data: faults are made of it to see what they look like, and
    at most a share --false-rate of what is right is accused, as estimated.

    OUT/audit.html shows the most certain findings in pictures. OUT/findings.parquet holds all of
    them, OUT/figures.json thresholds and histograms, OUT/labels the label set to train with. To
    decide by hand, write `reject` behind rows of OUT/decisions.csv and give it back with
    --decisions: the label set is made anew, the rest stays.
    No tar is ever changed.

    Killed at any point, the same command goes on, and finds the same; findings do not depend on the
    number of cores.

    Example: mhe audit quickstart --against data/heldout --out audit

    Example: mhe train quickstart run.name=again data.labels=audit/labels
    """
    from pipelines.audit.cure import parse_actions
    from pipelines.audit.findings import read_decisions
    from pipelines.audit.settings import AuditSettings

    actions, settings, out = parse_actions(apply), AuditSettings(false_rate, seed), out.rstrip("/")
    settings.validate()
    decided = read_decisions(decisions) if decisions else None
    how = EmbeddingOptions(embeddings.rstrip("/"), workers, gpu, address)
    with resumable():
        task = open_task(run, shards, labels, against or [], out, settings)
        if Path(f"{out}/{FIGURES_FILE}").is_file():
            if decided is None:  # else they are about these findings, whatever RUN is by now
                require_same_model(task)
            console.say(f"[bold]{escape(out)}[/] is complete: its findings are used.")
        else:
            find_faults(task, how)
        show_audit(task, cure(task, actions, decided))


def find_faults(task: AuditTask, how: EmbeddingOptions) -> None:
    """Embed, compare, and write the findings; `task.out` appears when they are complete.

    Raises:
        UserError: it cannot be done.
    """
    from pipelines.audit.evaluation_sets import EvaluationSet
    from pipelines.audit.job import AuditJob
    from pipelines.clustering.rows import UnitRows

    folder = embed_shards(task.index.folder, task.run, task.out, how)
    alone = how._replace(embeddings="")
    embedded = [
        embed_shards(url, task.run, f"{task.out}-against{number}", alone)
        for number, url in enumerate(task.against)
    ]
    sets = [
        EvaluationSet(url, each.index, UnitRows(each.rows), _known_labels(each.index))
        for url, each in zip(task.against, embedded, strict=True)
    ]
    recipe = task.made_of | {"embeddings": [embedded_by(each) for each in (folder, *embedded)]}
    side = folder.recipe.image_size
    threads = min(how.workers or available_cores(), available_cores())
    with AuditJob(
        *(task.out, task.index, folder.rows, task.read_labels, task.num_classes),
        *(sets, recipe, task.settings, side),
    ) as job:
        with ProgressDisplay().counting("auditing") as progress:
            result = job.run(watch_stages(STAGES, progress), threads)
        if result is not None:
            made_of = task.made_of | {MODEL: folder.recipe.made_by._asdict()}
            _write_down(job.folder, result, task, sets, made_of)
        job.publish()


def _write_down(
    folder: str,
    result: AuditResult,
    task: AuditTask,
    sets: Sequence[EvaluationSet],
    made_of: dict[str, Any],
) -> None:
    """Write the findings, their figures and the page."""
    from pipelines.audit.findings import write_findings
    from pipelines.audit.record import list_figures, list_findings
    from pipelines.report.audit.page import write_audit_page

    findings = list_findings(result, _names(task, sets))
    figures = list_figures(result, findings) | {MADE_OF: made_of}
    write_findings(folder, findings)
    with atomic_write(f"{folder}/{FIGURES_FILE}") as stream:
        stream.write(json.dumps(figures, indent=1).encode() + b"\n")
    write_audit_page(folder, task.index, task.labels, {url: url for url in task.against})


def _known_labels(index: ShardIndex) -> Any:
    """int32 `[M]`: identities of an evaluation set; None: its index holds none."""
    labels = index.label_column if index.knows_labels else None
    return None if labels is None else labels.astype(np.int32)


def _names(task: AuditTask, sets: Sequence[Any]) -> Any:
    from pipelines.audit.record import SampleNames
    from pipelines.data.mixture.class_list import names_of

    def named(index: ShardIndex) -> Any:
        return lambda wanted: names_of(index.folder, wanted)

    others = {each.name: (each.index, named(each.index)) for each in sets}
    return SampleNames(task.index, task.class_names, others)


class CuredAudit(NamedTuple):
    """A complete audit, and the label set that was made of it.

    Attributes:
        findings: all of them.
        figures: the content of figures.json.
        labels: the label set.
    """

    findings: Findings
    figures: dict[str, Any]
    labels: LabelSet


def cure(task: AuditTask, actions: Sequence[str], decisions: Decisions | None = None) -> CuredAudit:
    """Make the label set of a complete audit; one of before is replaced.

    Raises:
        UserError: the audit is of other data or settings, or the decisions are not about it.
    """
    from pipelines.audit.cure import cure_labels, write_cure
    from pipelines.audit.findings import read_findings

    findings = read_findings(task.out)
    require_same(task)
    decided = decisions.match(findings) if decisions else None
    names = task.class_names(range(task.num_classes))
    labels = task.read_labels(0, task.index.samples)
    cured = cure_labels(labels, task.num_classes, findings, actions, decided)
    about: dict[str, Any] = {"audit": task.made_of, "actions": list(actions)}
    if decisions:
        about["decisions"] = decisions.path
    made = write_cure(
        f"{task.out}/{LABELS_FOLDER}",
        task.index,
        cured,
        [names.get(number, str(number)) for number in range(task.num_classes)],
        about,
    )
    return CuredAudit(findings, read_figures(task), made)


def show_audit(task: AuditTask, made: CuredAudit) -> None:
    """What was found, and what to type next."""
    table = Table("", "found", "examined", "expected to be false", "threshold", box=None)
    for kind, found in made.figures["kinds"].items():
        threshold = "none" if found["threshold"] is None else f"{found['threshold']:.3f}"
        count, examined = f"{found['count']:,}", f"{found['examined']:,} {found['unit']}"
        table.add_row(
            kind.replace("_", " "), count, examined, f"{found['expected_false']:.1f}", threshold
        )
    totals = made.figures["totals"]
    console.show_table(f"{totals['images']:,} images of {totals['classes']:,} classes", table)
    console.say(
        f"doubted: {totals['images_doubted']:,} images, {totals['classes_doubted']:,} classes"
    )
    labels = made.labels
    console.say(
        f"[bold]{escape(labels.folder)}[/]: {labels.labelled:,} of {labels.samples:,} images in "
        f"{labels.num_classes:,} classes"
    )
    train = ["mhe", "train", "CONFIG", f"data.shards={task.index.folder}"]
    from pipelines.report.audit.page import PAGE_FILE

    page = str(Path(f"{task.out}/{PAGE_FILE}").absolute())
    console.list_next(
        [
            ("see it", ["python", "-m", "webbrowser", page]),
            ("train without them", [*train, f"data.labels={labels.folder}"]),
            ("what changed", ["mhe", "data", "labels", "show", labels.folder]),
        ]
    )
