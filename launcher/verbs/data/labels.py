"""`mhe data labels ...`: label sets, which give the samples of a data set other classes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from launcher.tasks.resumable import resumable
from launcher.terminal import console
from launcher.terminal.progress import ProgressDisplay
from launcher.verbs.options import Processes
from launcher.verbs.outputs import usable_folder
from mhe_dist.limits import available_cores
from pipelines.shards.index import ShardIndex
from pipelines.shards.label_set import LabelSet

if TYPE_CHECKING:
    from pipelines.sources.label_table.build import LabelImport

MOST_CLASSES = 2**63 - 1  # a label is int64
SHOWN = 5  # classes, and faults, that the terminal names

Tables = Annotated[
    list[str], typer.Argument(metavar="TABLE...", help="CSV, TSV or Parquet files, or URLs.")
]
Shards = Annotated[str, typer.Option(help="Folder or URL of the data set.")]
NewLabelSet = Annotated[
    str,
    typer.Option(
        help="Folder or URL for the label set; it must not exist.", callback=usable_folder
    ),
]
Separator = Annotated[
    str, typer.Option(help="What stands between the classes of a text, if it has several.")
]

app = typer.Typer(
    no_args_is_help=True, help="Give the samples of a data set other classes, beside its tars."
)


@app.callback()
def labels() -> None:
    """Give the samples of a data set other classes, beside its tars (`data.labels`)."""


@app.command("from-table")
def from_table(
    tables: Tables,
    shards: Shards,
    out: NewLabelSet,
    key: Annotated[str, typer.Option(help="Column of the samples' keys, as in the tars.")] = "key",
    label: Annotated[
        str, typer.Option(help="Column of the classes: numbers, texts, or lists of them.")
    ] = "class",
    number: Annotated[
        str, typer.Option(help="Column of samples' numbers in the data set, in place of keys.")
    ] = "",
    shard: Annotated[
        str, typer.Option(help="Column of tars, as in index.json, if keys are not unique.")
    ] = "",
    separator: Separator = "",
    num_classes: Annotated[
        int,
        typer.Option(
            min=0, max=MOST_CLASSES, help="Classes are numbers below this, and stay; 0: find out."
        ),
    ] = 0,
    max_bad: Annotated[
        float, typer.Option(min=0, max=1, help="Largest share of rows that may name no sample.")
    ] = 0.01,
    processes: Processes = 0,
) -> None:
    """Make a label set from tables of keys and classes, for `data.labels`; no tar is written anew.

    A sample has the classes of all rows that name it. A sample that no row names, or whose classes
    are empty, is left out of a training. Classes that are the numbers [0, C) stay; others are given
    such numbers, and classes.tsv in the label set says which.

    Memory stays below 1 GiB and about 150 bytes for each class, however many samples and rows there
    are; temporary files take about 50 bytes for each of them (TMPDIR). Keys are read from the tars,
    512 bytes for each sample; with --number no tar is read.

    Example: mhe data labels from-table clean.csv --shards data/ms1mv2 --out data/ms1mv2-clean
    """
    from pipelines.sources.label_table.build import LabelOptions, import_labels
    from pipelines.sources.label_table.rows import TableLayout

    layout = TableLayout(key, label, number, shard, separator)
    options = LabelOptions(layout, num_classes, max_bad, processes or available_cores())
    index = ShardIndex.load(shards)
    with resumable(), ProgressDisplay().counting("reading keys") as progress:
        made = import_labels(tables, index, out, options, progress)
    _say_import(made)
    _list_next(made.labels, shards)


@app.command("from-classes")
def from_classes(
    tables: Tables,
    shards: Shards,
    out: NewLabelSet,
    name: Annotated[
        str, typer.Option(help="Column of the data set's classes, by name as in classes.tsv.")
    ] = "name",
    label: Annotated[
        str, typer.Option(help="Column of what they are given: texts, or lists of them.")
    ] = "class",
    separator: Separator = "",
    like: Annotated[
        str, typer.Option(help="Label set whose classes these are: of the training set, say.")
    ] = "",
) -> None:
    """Make a label set from a table that gives the classes of a data set other classes.

    Each sample has the classes that the table gives to its own: parts of it, attributes, a kind. A
    class that no row names has none. With --like the ids are those of another label set, and what
    is not in it is dropped.

    Example: mhe data labels from-classes parts.tsv --separator ' ' --shards data/han --out parts
    """
    from pipelines.sources.label_table.by_class import import_class_labels
    from pipelines.sources.label_table.rows import TableLayout

    layout = TableLayout(key=name, label=label, separator=separator)
    made = import_class_labels(tables, ShardIndex.load(shards), out, layout, like)
    _say_made(
        made.labels,
        (made.unknown, "rows name no class of the data set"),
        (made.missing, "classes are named by no row, and their samples are left out"),
        (made.dropped, f"classes of the table are not in {escape(like)}, and are dropped"),
    )
    _list_next(made.labels, shards)


@app.command()
def show(
    url: Annotated[str, typer.Argument(metavar="URL", help="Folder or URL of a label set.")],
) -> None:
    """Say what is in a label set, and check its files; exit code 1 if one is damaged.

    Example: mhe data labels show data/ms1mv2-clean
    """
    from pipelines.shards.label_report import largest, read_class_names, summarize_labels

    found = LabelSet.load(url)
    console.say(_describe(found))
    console.say(f"  digest: {found.digest}")
    console.say(f"  of the data set: {found.index_digest} ({escape(str(found.meta['index']))})")
    for name, value in found.meta.items():
        if name != "index":
            console.say(f"  {escape(name)}: {escape(str(value))}")
    faults = [(column.url, fault) for column in found.columns if (fault := column.find_fault())]
    for name, fault in faults:
        console.say(f"[red]{escape(name)}[/] is {fault}: make the label set again")
    if faults:
        raise typer.Exit(1)
    summary, names = summarize_labels(found), read_class_names(found)
    table = Table("classes of a sample", "samples", box=None)
    for count, samples in enumerate(summary.samples_by_count.tolist()):
        table.add_row(str(count), f"{samples:,}")
    console.print_table(table)
    empty = int((summary.per_class == 0).sum())
    console.say(f"classes without a sample: {empty:,}; the largest:")
    for number in largest(summary.per_class, SHOWN):
        console.say(f"  {summary.per_class[number]:,} of {number} ({escape(names[number])})")
    console.list_next([("train on it", _train_command(found, str(found.meta["index"])))])


@app.command()
def diff(
    before: Annotated[str, typer.Argument(metavar="A", help="Folder or URL of a label set.")],
    after: Annotated[str, typer.Argument(metavar="B", help="Another one of the same data set.")],
    samples: Annotated[int, typer.Option(min=0, help="How many samples are named at most.")] = 10,
) -> None:
    """Say what changed between two label sets of a data set; classes are the same by name.

    Example: mhe data labels diff data/ms1mv2-clean data/ms1mv2-cleaner
    """
    from pipelines.shards.label_report import compare_labels, largest

    sets = LabelSet.load(before), LabelSet.load(after)
    for found in sets:
        console.say(_describe(found))
    changes = compare_labels(*sets, samples)
    table = Table(show_header=False, box=None)
    for what, count in (
        ("samples with the same classes", changes.same),
        ("samples with other classes", changes.changed),
        ("samples with classes in A only", changes.removed),
        ("samples with classes in B only", changes.added),
    ):
        table.add_row(what, f"{count:,}")
    console.print_table(table)
    for counts, what in ((changes.lost, "lost"), (changes.gained, "gained")):
        for number in largest(counts, SHOWN):
            console.say(f"{escape(changes.classes[number])} {what} {counts[number]:,} samples")
    for sample in changes.first:
        old, new = (escape(", ".join(part) or "none") for part in (sample.before, sample.after))
        console.say(f"sample {sample.number}: {old} -> {new}")


def _describe(found: LabelSet) -> str:
    """A label set in a line of markup."""
    several = f", up to {found.max_labels} of them each" if found.max_labels > 1 else ""
    return (
        f"[bold]{escape(found.folder)}[/]: {found.labelled:,} of {found.samples:,} samples have "
        f"classes, of {found.num_classes:,}{several}"
    )


def _list_next(made: LabelSet, shards: str) -> None:
    """What to do with a new label set."""
    console.list_next(
        [
            ("look at it", ["mhe", "data", "labels", "show", made.folder]),
            ("train on it", _train_command(made, shards)),
        ]
    )


def _train_command(found: LabelSet, shards: str) -> list[str]:
    """The words that train on a label set of a data set."""
    words = ["mhe", "train", "CONFIG", f"data.shards={shards}", f"data.labels={found.folder}"]
    several = found.max_labels > 1
    return [*words, f"data.labels_per_sample={found.max_labels}"] if several else words


def _say_made(made: LabelSet, *left_out: tuple[int, str]) -> None:
    """A new label set, and how much of what is not in it, where there is any."""
    console.say(_describe(made))
    for count, what in left_out:
        if count:
            console.say(f"[yellow]{count:,}[/] {what}")


def _say_import(made: LabelImport) -> None:
    """What is in a label set of a table, and which rows and samples are not."""
    _say_made(
        made.labels,
        (made.unknown, "rows name no sample of the data set"),
        (made.missing, "samples are named by no row, and are left out"),
        (made.emptied, "samples have rows without a class, and are left out"),
        (made.repeated, "times a sample was given a class again"),
    )
    for fault in made.named[:SHOWN]:
        console.say(f"  {escape(fault.location)}: {escape(fault.reason)}")
    if len(made.named) > SHOWN:
        console.say(f"  and more in {escape(made.labels.folder)}/skipped.tsv")
