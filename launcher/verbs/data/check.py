"""`mhe data index`, `mhe data verify`, `mhe data show`: shards that are there."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from launcher.tasks.choose import choose_workers
from launcher.tasks.resumable import resumable
from launcher.terminal import console
from launcher.terminal.commands import viewing_steps
from launcher.terminal.progress import ProgressDisplay
from launcher.verbs.data.convert import MaxBad, describe, first_config, tell
from launcher.verbs.options import AddressOption, Processes
from launcher.verbs.outputs import usable_file, usable_folder
from mhe_dist.errors import UserError
from pipelines.shards.index import UNLABELLED, ShardIndex
from pipelines.sources.convert import DEFAULT_OPTIONS
from pipelines.sources.webdataset_tar import DEFAULT_LAYOUT, SampleLayout

if TYPE_CHECKING:
    from pipelines.data.verify import DatasetReport

SHOWN = 5  # problems of a kind that the terminal names
MEANINGS = {
    "shard": "tars that are missing, damaged, or not those of the index",
    "column": "columns of the index that are missing or damaged (`mhe data index` mends them)",
    "sample": "samples without an image or a label, or with a bad one",
    "image": "images that cannot be decoded",
    "label": "labels that the index does not share",
    "duplicate": "images that are in two classes",
}

Urls = Annotated[list[str], typer.Argument(metavar="URL...", help="Folders or URLs of data sets.")]


def index(
    tars: Annotated[
        list[str], typer.Argument(metavar="URL...", help="Tars ({000..099}, *), or their folders.")
    ],
    out: Annotated[
        str,
        typer.Option(
            help="Folder or URL for index.json; beside the tars if left out.",
            callback=usable_folder,
        ),
    ] = "",
    image: Annotated[
        str, typer.Option(help="Extensions of the image, the best first: jpg,png.")
    ] = ",".join(DEFAULT_LAYOUT.images),
    label: Annotated[
        str, typer.Option(help="Extension of the label, or a key in JSON: json:label.")
    ] = DEFAULT_LAYOUT.label,
    num_classes: Annotated[
        int, typer.Option(min=0, help="Labels are numbers below this, and stay; 0: find out.")
    ] = 0,
    skip_damaged: Annotated[
        bool, typer.Option("--skip-damaged", help="Take what can be read of damaged tars.")
    ] = False,
    max_bad: MaxBad = DEFAULT_OPTIONS.max_bad,
    processes: Processes = 0,
    address: AddressOption = "",
) -> None:
    """Make an index for WebDataset shards that somebody else wrote; no tar is written anew.

    Labels that are not the numbers [0, C) already, texts for example, are given such numbers in
    the index; classes.tsv says which.

    Of a data set that has an index, the index is renewed: one of an earlier format gets columns,
    without reading a tar; columns that are missing or damaged are made again from the tars.

    Example: mhe data index 's3://bucket/imagenet-{000000..000639}.tar' --label json:label
    """
    from pipelines.sources.renew_index import renew_index
    from pipelines.sources.webdataset import index_shards

    images = tuple(part.strip().lstrip(".").lower() for part in re.split("[;,]", image))
    layout = SampleLayout(images, label.strip().lower() if ":" not in label else label, num_classes)
    with (
        resumable(),
        choose_workers(processes, address=address) as workers,
        ProgressDisplay().counting("reading tars") as progress,
    ):
        # With any option the tars are meant, not an index that is there.
        is_plain = len(tars) == 1 and not out and layout == DEFAULT_LAYOUT and not skip_damaged
        made = renew_index(tars[0], workers, progress) if is_plain else None
        made = made or index_shards(tars, out, layout, skip_damaged, max_bad, workers, progress)
    tell(made)


def verify(
    data: Urls,
    out: Annotated[
        str,
        typer.Option(
            help="Folder or URL for the report (JSON, PNG); replaced if there.",
            callback=usable_folder,
        ),
    ] = "verify",
    processes: Processes = 0,
    address: AddressOption = "",
) -> None:
    """Read data sets completely and report what is wrong; exit code 1 if anything is.

    Checks sizes and checksums of the tars, and of each sample the name, the label, that the image
    can be decoded, and that no other class has the same image; counts the images of each class.

    Example: mhe data verify data/ms1mv2
    """
    from pipelines.data.verify import verify_dataset
    from pipelines.report.verification import write_verification
    from pipelines.storage.staging import Journal

    sets = [ShardIndex.load(url) for url in data]
    good = True
    for name, found in zip(_names(data), sets, strict=True):
        journal = Journal(f"{out}/.{name}.partial", [found.folder, found.digest])
        with (
            resumable(),
            choose_workers(processes, address=address) as workers,
            ProgressDisplay().counting(f"reading {name}") as progress,
        ):
            report = verify_dataset(found, journal, workers, progress)
        write_verification(report, f"{out}/{name}")
        journal.remove()
        _show(report)
        console.say(f"Report: {escape(f'{out}/{name}')}.json, .png")
        good = good and report.is_good
    if not good:
        raise typer.Exit(1)
    console.list_next([first_config(sets[0])])


def _names(data: list[str]) -> list[str]:
    """A file name for each data set, from its last folder; all of them different."""
    names: list[str] = []
    for url in data:
        parts = url.removesuffix("index.json").rstrip("/").split("/")
        name = first = re.sub(r"[^\w-]", "_", parts[-1]) or "data"
        number = len(names)
        while name in names:
            name, number = f"{first}-{number}", number + 1
        names.append(name)
    return names


def _show(report: DatasetReport) -> None:
    """The report as a table, the first problems of each kind below it."""
    from pipelines.report.verification import verification_summary

    about = verification_summary(report)
    console.say(describe(report.data))
    table = Table(show_header=False)
    for kind, meaning in MEANINGS.items():
        count = report.counts.get(kind, 0)
        table.add_row(meaning, f"[red]{count:,}[/]" if count else "[green]0[/]")
    table.add_section()
    table.add_row("usable images", f"{about['usable']:,}")
    table.add_row("images that their class has already", f"{report.repeated:,}")
    if not report.data.meta.get(UNLABELLED):
        for name, value in about["images_per_class"].items():
            table.add_row(name.replace("_", " "), f"{value:,.6g}")
    console.print_table(table)
    for kind in MEANINGS:
        named = [problem for problem in report.problems if problem.kind == kind]
        for problem in named[:SHOWN]:
            where = problem.location.removeprefix(f"{kind} ")
            console.say(f"[red]{kind}[/] {escape(where)}: {escape(problem.reason)}")
        if len(named) > SHOWN:
            console.say(f"  and {report.counts[kind] - SHOWN:,} more")
    console.say("[green]Nothing is wrong.[/]" if report.is_good else "[red]Something is wrong.[/]")


def show(
    data: Annotated[str, typer.Argument(metavar="URL", help="Folder or URL of a data set.")],
    out: Annotated[str, typer.Option(help="The picture, PNG.", callback=usable_file)] = "sheet.png",
    classes: Annotated[int, typer.Option(min=1, help="Classes, one per row.")] = 8,
    images: Annotated[int, typer.Option(min=1, help="Images of a class, at most.")] = 8,
    seed: Annotated[int, typer.Option(min=0, help="Another seed draws other classes.")] = 0,
) -> None:
    """Draw a contact sheet: some classes at random, some images of each.

    Example: mhe data show data/glyphs/train --out glyphs.png
    """
    if not out.lower().endswith(".png"):
        raise UserError(f"--out {out}: the picture is a PNG; let its name end with .png")
    from pipelines.report.figures import save_figure
    from pipelines.report.sheets.sample_sheet import draw_sample_sheet

    found = ShardIndex.load(data)
    save_figure(draw_sample_sheet(found, classes, images, seed), out)
    console.say(describe(found))
    console.say(f"Contact sheet: {escape(out)}")
    console.list_next([*viewing_steps(out), ("check it", ["mhe", "data", "verify", data])])
