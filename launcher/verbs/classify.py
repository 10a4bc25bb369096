"""`mhe classify`: what a run's head takes images for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from launcher.terminal import console
from launcher.terminal.commands import viewing_steps
from launcher.verbs.evaluate.shared import join_ranks, say_left_out, spinner
from launcher.verbs.options import GpuOption, RunName
from launcher.verbs.outputs import usable_folder
from mhe_dist.errors import counted

if TYPE_CHECKING:
    from pipelines.evaluate.classify import ClassifiedImages

SHOWN = 20  # images in the terminal


def classify(
    run: RunName,
    images: Annotated[str, typer.Option(help="Folder of images, or a set of shards.")],
    top: Annotated[int, typer.Option(min=1, max=100, help="Classes of each image.")] = 5,
    out: Annotated[
        str,
        typer.Option(
            help="Folder for sheet and table; those of before are replaced.", callback=usable_folder
        ),
    ] = "classified",
    gpu: GpuOption = None,
) -> None:
    """Name the class of images, among all classes of a run: a table and a contact sheet.

    For images of the training classes. To look images up among others, of any classes, there is mhe
    search.

    Example: mhe classify photos --images new --top 5
    """
    from pipelines.evaluate.classify import classify_source, name_classes
    from pipelines.report.sheets.class_sheet import write_classes
    from pipelines.runs.trained import load_trained_backbone
    from pipelines.runs.warm_start import find_checkpoint, trained_head

    topology = join_ranks(run, gpu)
    backbone = load_trained_backbone(run, topology=topology)
    data = backbone.config.data
    with (
        spinner(topology, f"classifying {images}"),
        trained_head(find_checkpoint(backbone.checkpoint), topology) as head,
    ):
        found = classify_source(backbone.embed, head, images, topology, data.image_size, top)
    if found is None:
        return
    names = name_classes(data, found.classes)
    say_left_out(found.skipped)
    files = write_classes(out.rstrip("/"), found, names)
    _show(found, names, files[-1])
    console.say("Written: " + ", ".join(escape(file) for file in files))
    console.list_next(viewing_steps(files[0]))


def _show(found: ClassifiedImages, names: dict[int, str], listing: str) -> None:
    """The first images as a table; `listing` is the file that has all of them."""
    table = Table("image", "class", "score", "second", "score", box=None)
    for key, classes, scores in zip(
        found.keys[:SHOWN], found.classes.tolist(), found.scores, strict=False
    ):
        cells = [escape(key)]
        for number, score in zip(classes[:2], scores, strict=False):
            cells += [escape(names.get(number, str(number))), f"{score:.2f}"]
        table.add_row(*cells)
    console.print_table(table)
    if (more := len(found.keys) - SHOWN) > 0:
        console.say(f"And {counted(more, 'more image')}, in {escape(listing)}.")
    if not names:
        console.say("Classes are numbers: the training set's classes.tsv cannot be read here.")
