"""`mhe cluster`: classes for images that have none, as a label set."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from launcher.tasks.resumable import resumable
from launcher.terminal import console
from launcher.terminal.progress import ProgressDisplay, format_duration
from launcher.verbs.embedding.shared import (
    EMBEDDINGS_SUFFIX,
    EmbeddingOptions,
    EmbeddingsOption,
    embed_shards,
    embedded_by,
    watch_stages,
)
from launcher.verbs.options import AddressOption, GpuOption
from launcher.verbs.outputs import usable_folder_here
from mhe_dist.errors import UserError
from mhe_dist.limits import available_cores
from mhe_dist.sizes import GIB, MIB
from pipelines.report.charts.numbers import format_share
from pipelines.shards.index import ShardIndex
from pipelines.shards.label_set import LabelSet
from pipelines.storage.urls import require_absent

if TYPE_CHECKING:
    from pipelines.clustering.build import ClusterJob
    from pipelines.clustering.quality import ReadLabels
    from pipelines.clustering.settings import ClusterSettings

IN_THE_BACKGROUND = 0.9  # share of the free memory that a clustering may be predicted to take

Classes = Annotated[int, typer.Option(min=1, help="How many classes to make.")]
LabelsPerImage = Annotated[int, typer.Option(min=1, max=64, help="Classes of an image, at most.")]
Model = Annotated[
    str,
    typer.Option(
        help="A run, or a step_* checkpoint; or a YAML file or its name: the backbone that it "
        "begins with."
    ),
]
FurtherWithin = Annotated[
    float,
    typer.Option(
        min=0,
        help="A further class is given if its distance (1 - cosine) is at most so many times "
        "that of the nearest; 0: always.",
    ),
]
MaxSize = Annotated[
    float,
    typer.Option(
        min=0, help="No class gets more than so many times the average of images; 0: any."
    ),
]
Rounds = Annotated[int, typer.Option(min=0, help="How often large classes are split, at most.")]
DropDuplicates = Annotated[
    float,
    typer.Option(
        min=0,
        max=1,
        help="Of images of a class whose cosine is at least this, one is kept; 0: all.",
    ),
]
DropOutliers = Annotated[
    float,
    typer.Option(
        min=0, max=0.9, help="Share of the images, those farthest from any class, without one."
    ),
]
Center = Annotated[
    bool, typer.Option(help="Subtract the mean of the embeddings from each of them.")
]
WorkerCount = Annotated[
    int, typer.Option(min=0, help="Embed and search at the same time; 0: one per core or GPU.")
]


def cluster(
    shards: Annotated[str, typer.Argument(metavar="SHARDS", help="Folder or URL of the data set.")],
    classes: Classes,
    out: Annotated[
        str,
        typer.Option(
            help="Folder for the label set, on this machine; it must not exist.",
            callback=usable_folder_here,
        ),
    ],
    model: Model = "",
    embeddings: EmbeddingsOption = "",
    labels_per_image: LabelsPerImage = 8,
    further_within: FurtherWithin = 1.5,
    max_size: MaxSize = 5.0,
    rounds: Rounds = 2,
    drop_duplicates: DropDuplicates = 0.0,
    drop_outliers: DropOutliers = 0.0,
    center: Center = True,
    seed: Annotated[int, typer.Option(help="The same seed gives the same label set.")] = 0,
    workers: WorkerCount = 0,
    gpu: GpuOption = None,
    address: AddressOption = "",
) -> None:
    """Make classes of images that have none: embed, cluster, give each image its nearest classes.

    A class is a centre of spherical k-means. Above 2,048 classes, images are first dealt to cells,
    and each cell gets its share of the classes. Large classes are split, empty ones are given up.
    The label set holds the classes of each image, the nearest first, and how similar it is to
    them; figures and contact sheets are in report/ of it.

    Killed at any point, the same command goes on, and ends with the same bytes; they depend on the
    seed and the embeddings, not on the number of cores. Memory: up to 0.3 GiB, and 0.4 GiB for
    each worker, for a million classes, however many images there are. Clustering uses no GPU. Time,
    memory and disk are predicted before the clustering begins, from rates that are measured then.

    Example: mhe cluster data/photos --model quickstart --classes 1000 --out data/photos-classes
    """
    from pipelines.clustering.settings import ClusterSettings

    settings = ClusterSettings(
        *(classes, labels_per_image, further_within, max_size, rounds),
        *(drop_duplicates, drop_outliers, center, seed),
    )
    shards, out = shards.rstrip("/"), out.rstrip("/")
    how = EmbeddingOptions(embeddings.rstrip("/"), workers, gpu, address)
    with resumable():
        made = make_label_set(shards, model, out, settings, how)
    config = model if model.endswith((".yaml", ".yml")) else "CONFIG"
    show_next(shards, made, how.embeddings or f"{out}{EMBEDDINGS_SUFFIX}", config)


def make_label_set(
    shards: str,
    model: str,
    out: str,
    settings: ClusterSettings,
    how: EmbeddingOptions = EmbeddingOptions(),  # noqa: B008, it cannot be changed
) -> LabelSet:
    """Embed and cluster, and say what was made; the arguments are those of `cluster`.

    Raises:
        UserError: it cannot be done, or there is something at `out`.
    """
    from pipelines.clustering.build import ClusterJob

    require_absent(out)
    index = ShardIndex.load(shards)
    settings.validate(index.samples)
    folder = embed_shards(shards, model, out, how)
    threads = min(how.workers or available_cores(), available_cores())
    with ClusterJob(out, index, folder.rows, embedded_by(folder), settings) as job:
        made = make_classes(job, threads, read_labels(index))
    console.say(describe(made))
    console.show_table(f"{made.num_classes:,} classes of {made.samples:,} images", figures(made))
    return made


def read_labels(index: ShardIndex) -> ReadLabels | None:
    """Reads the labels that the data set has; None: it has none, or its tars alone know them."""
    if not index.knows_labels:
        return None

    def read(numbers: Any) -> Any:
        found = index.labels_of(numbers)
        assert found is not None, "it was asked before"
        return found

    return read


def make_classes(job: ClusterJob, workers: int, labels: ReadLabels | None) -> LabelSet:
    """Predict what it takes, make the classes, write the report, give the label set its name.

    Raises:
        UserError: there is no room.
    """
    from pipelines.report.sheets.cluster_report import write_cluster_report

    if job.begins:
        _predict(job, workers)
    with ProgressDisplay().counting("clustering") as progress:
        stages = 12 + 3 * job.settings.rounds
        made = job.run(watch_stages(stages, progress), workers, labels)
    if made is not None:
        found = made.figures, made.counts, made.shown
        write_cluster_report(f"{job.folder}/report", job.index, *found)
    job.publish()
    return LabelSet.load(job.target)


def _predict(job: ClusterJob, workers: int) -> None:
    from pipelines.clustering.estimate import estimate_work, measure_rates

    rows, settings = job.rows, job.settings
    found = estimate_work(rows.count, rows.dim, settings, workers, measure_rates(rows, workers))
    table = Table(show_header=False, box=None)
    for name, seconds in found.stages:
        table.add_row(name, format_duration(seconds))
    table.add_row("[bold]together, at most about[/]", format_duration(found.seconds))
    table.add_row("memory", f"{found.memory / GIB:.1f} GiB")
    table.add_row(
        "disk", f"{found.disk / MIB:,.0f} MiB until the end, {found.kept / MIB:,.0f} kept"
    )
    console.show_table(
        f"{settings.classes:,} classes of {rows.count:,} embeddings of {rows.dim}, as measured now",
        table,
    )
    free = shutil.disk_usage(job.folder).free
    if found.disk + found.kept > free:
        raise UserError(
            f"--out {job.target}: {(found.disk + found.kept) / MIB:,.0f} MiB are needed there "
            f"until the end, and {free / MIB:,.0f} are free; make room, or name another folder"
        )
    memory = _free_memory()
    if memory and found.memory > IN_THE_BACKGROUND * memory:
        raise UserError(
            f"about {found.memory / GIB:.1f} GiB of memory are needed and {memory / GIB:.1f} are "
            "free; take fewer --workers, or close other programs"
        )


def _free_memory() -> int:
    """Bytes that this machine has free for programs; 0: it does not tell."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            lines = dict(line.split(":", 1) for line in file)
        return int(lines["MemAvailable"].split()[0]) << 10
    except (OSError, KeyError, ValueError):
        return 0


def describe(made: LabelSet) -> str:
    """A new label set in a line of markup."""
    return (
        f"[bold]{escape(made.folder)}[/]: {made.labelled:,} of {made.samples:,} images have "
        f"classes, of {made.num_classes:,}, up to {made.max_labels} each"
    )


def figures(made: LabelSet) -> Table:
    """What a label set that was clustered says of itself."""
    found = made.meta["figures"]
    table = Table(show_header=False, box=None)

    def add(what: str, value: str) -> None:
        table.add_row(what, value)

    labelled = max(1, found["labelled"])
    add("classes of an image, on average", f"{found['labels'] / labelled:.2f}")
    add(
        "images of a class",
        f"{found['smallest']:,} to {found['largest']:,}, median {found['median']:,.0f}",
    )
    add("mean cosine to the nearest centre", f"{found['similarity']:.3f}")
    for key, what in (
        ("duplicates", "left out: near-duplicates"),
        ("outliers", "left out: outliers"),
        ("broken", "left out: no finite embedding"),
        ("full", "left out: their classes are full"),
        ("bounded", "classes that were cut to the bound"),
    ):
        if found[key]:
            add(what, f"{found[key]:,}")
    if "purity" in found:
        add(f"purity against the {found['true_classes']:,} labels", format_share(found["purity"]))
        add("NMI with them", f"{found['nmi']:.3f}")
    if found["recall"] < 1:
        add("nearest class found (512 images)", format_share(found["recall"]))
    return table


def show_next(shards: str, made: LabelSet, embeddings: str, config: str = "CONFIG") -> None:
    """What to type next, and what can be deleted; `config` is the file to train with."""
    train = ["mhe", "train", config, f"data.shards={shards}", f"data.labels={made.folder}"]
    if made.max_labels > 1:
        train.append(f"data.labels_per_sample={made.max_labels}")
    console.list_next(
        [
            ("train on it", train),
            ("look at it", ["mhe", "data", "labels", "show", made.folder]),
            ("see its classes", ["python", "-m", "webbrowser", f"{made.folder}/report/random.png"]),
            ("once it is right", ["rm", "-r", embeddings]),
        ]
    )
