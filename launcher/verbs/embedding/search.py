"""`mhe search`: images looked up among others by a trained backbone."""

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
from mhe_dist.errors import UserError
from pipelines.report.charts.numbers import format_share

if TYPE_CHECKING:
    from mhe_dist.distributed.topology import Topology
    from pipelines.embedding.embed import EmbeddedImages
    from pipelines.evaluate.search import SearchResult
    from pipelines.runs.trained import TrainedBackbone

SHOWN = 20  # queries in the terminal
FILES = (".npz", ".parquet")


def search(
    run: RunName,
    gallery: Annotated[
        str,
        typer.Option(help="What is searched: folder of images, shards, or a file of mhe embed."),
    ],
    query: Annotated[str, typer.Option(help="What is looked for: folder of images, or shards.")],
    top: Annotated[int, typer.Option(min=1, max=100, help="Entries of each query.")] = 5,
    out: Annotated[
        str,
        typer.Option(
            help="Folder for page, sheet and table; those of before are replaced.",
            callback=usable_folder,
        ),
    ] = "search",
    exact: Annotated[
        bool, typer.Option("--exact", help="Compare every pair, however long it takes.")
    ] = False,
    gpu: GpuOption = None,
) -> None:
    """Look images up among others: the nearest of each, in a table, a contact sheet and a page.

    Every pair is compared, if that is quick; else faiss searches approximately, and the recall is
    measured and said; --exact compares every pair all the same. The page holds its pictures and
    needs no network. A gallery that is searched often is embedded once, with mhe embed, by the same
    run.

    Example: mhe search quickstart --gallery photos/known --query photos/new
    """
    from pipelines.embedding.embed import embed_source
    from pipelines.evaluate.search import search as find
    from pipelines.report.sheets.search_page import write_search
    from pipelines.runs.trained import load_trained_backbone

    _refuse_rows(gallery, query)
    topology = join_ranks(run, gpu)
    backbone = load_trained_backbone(run, topology=topology)
    side, sets = backbone.config.data.image_size, []
    for source in (gallery.rstrip("/"), query.rstrip("/")):
        if source.endswith(FILES):
            sets.append(_read_gallery(source, backbone, topology))
            continue
        with spinner(topology, f"embedding {source}"):
            sets.append(embed_source(backbone.embed, source, topology, side))
    known, queries = sets
    if known is None or queries is None:
        return
    skipped = [f"{gallery.rstrip('/')}/{path}" for path in known.skipped]
    skipped += [f"{query.rstrip('/')}/{path}" for path in queries.skipped]
    say_left_out(list(dict.fromkeys(skipped)))  # both may be one folder
    with spinner(topology, f"searching {len(known.rows):,} images for {len(queries.rows):,}"):
        found = find(known, queries, top, exact)
    title = f"{backbone.config.run.name}: {query} in {gallery}"
    files = write_search(out.rstrip("/"), title, known, queries, found)
    _show(known, queries, found, files[-1])
    if found.recall is not None:
        console.say(f"The search was {found.describe()}. --exact compares every pair.")
    console.say("Written: " + ", ".join(escape(file) for file in files))
    console.list_next(viewing_steps(files[0]))


def _refuse_rows(gallery: str, query: str) -> None:
    """Refuse embeddings of which no images can be shown."""
    from pipelines.embedding.folder import holds_rows

    if query.endswith(FILES):
        raise UserError(f"--query {query}: name the images themselves, a folder or shards")
    if holds_rows(gallery):
        raise UserError(
            f"--gallery {gallery}: is a folder of rows; a search takes a file of mhe embed, --out "
            "FILE.npz, or the images themselves"
        )


def _read_gallery(
    path: str, backbone: TrainedBackbone, topology: Topology
) -> EmbeddedImages | None:
    """The gallery on the first rank, None on the others; all ranks must call.

    Raises:
        UserError, RunError: it cannot be searched; on all ranks, which would wait for the first.
    """
    from mhe_dist.distributed.failures import failing_together

    with failing_together(topology):
        return _open_gallery(path, backbone) if topology.is_first else None


def _open_gallery(path: str, backbone: TrainedBackbone) -> EmbeddedImages:
    """The embeddings of a file.

    Raises:
        UserError: they are of another model, or made otherwise than those of the queries.
    """
    from pipelines.embedding.embed import read_embeddings
    from pipelines.embedding.made_by import MadeBy

    found = read_embeddings(path)
    if found.made_by is None:
        console.say(
            f"[yellow]warning:[/] {escape(path)}: an older mhe embed wrote it, and it does not say "
            "which model made it; scores mean nothing if that was not this one"
        )
    else:
        MadeBy.of(backbone).refuse_other(found.made_by, f"--gallery {path}")
    return found


def _show(
    gallery: EmbeddedImages, queries: EmbeddedImages, found: SearchResult, listing: str
) -> None:
    """The first queries as a table; `listing` is the file that has all of them."""
    table = Table("query", "nearest", "score", "second", "score", box=None)
    for row in range(min(SHOWN, len(queries.keys))):
        cells = [escape(_name(queries, row))]
        pairs = zip(found.numbers[row, :2].tolist(), found.scores[row, :2], strict=True)
        for number, score in pairs:
            cells += [escape(_name(gallery, number)), f"{score:.3f}"]
        table.add_row(*cells)
    console.print_table(table)
    if (more := len(queries.keys) - SHOWN) > 0:
        words = f"{more:,} more {'query' if more == 1 else 'queries'}"
        console.say(f"And {words}, in {escape(listing)}.")
    known = set(gallery.classes)
    labelled = [
        gallery.classes[best] == own
        for own, best in zip(queries.classes, found.numbers[:, 0].tolist(), strict=True)
        if own and own in known
    ]
    if labelled:
        share = format_share(sum(labelled) / len(labelled))
        console.say(f"{share} of {len(labelled):,} queries found their own class first.")


def _name(images: EmbeddedImages, number: int) -> str:
    """What an image shows, if its source says so, and which one it is."""
    name, key = images.classes[number], images.keys[number]
    return f"{name} ({key})" if name and not key.startswith(f"{name}/") else key
