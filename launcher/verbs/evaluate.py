"""`mhe evaluate ...`: what a trained backbone can do, by the protocols of the field.

Each verb works on one machine as it stands, and on many processes under
`torchrun --nproc-per-node N --no-python mhe evaluate ...`: the results are the same.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table
from typer.core import TyperGroup

from launcher import console
from launcher.progress import accuracies
from launcher.trained import Trained, load
from mhe_dist.errors import RunError, UserError

if TYPE_CHECKING:
    from mhe_dist.topology import Topology
    from mhe_dist.tracking import Metrics
    from pipelines.evaluate.ijb import IjbResult
    from pipelines.evaluate.keep import Curves
    from pipelines.evaluate.pair_sets import Verified

RunName = Annotated[
    str,
    typer.Argument(
        metavar="RUN", help="Folder or URL of a run, its name in runs/, or a step_* checkpoint."
    ),
]
Flip = Annotated[bool, typer.Option(help="Add the embedding of the mirrored image.")]
Log = Annotated[bool, typer.Option("--mlflow/--no-mlflow", help="Add the figures to the run.")]


class _HeldoutByDefault(TyperGroup):
    """`mhe evaluate RUN` is `mhe evaluate heldout RUN`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """See `click.Group.parse_args`."""
        if args and args[0] not in self.commands and args[0] not in ctx.help_option_names:
            args = ["heldout", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(cls=_HeldoutByDefault, no_args_is_help=True)


@app.callback()
def evaluate() -> None:
    """Evaluate the newest checkpoint of a run; without another word, on its held-out shards."""


@app.command()
def heldout(
    run: RunName,
    shards: Annotated[
        str, typer.Option(help="Held-out shards; those of the run's settings if left out.")
    ] = "",
    flip: Annotated[
        bool | None, typer.Option(help="Add the embedding of the mirrored image.")
    ] = None,
) -> None:
    """Held-out classes of a shard set, 1:1 and 1:N.

    Example: mhe evaluate quickstart --shards data/other/heldout
    """
    from pipelines.evaluate import heldout as protocol

    place = join()
    found = load(run, place.device)
    config = found.config
    if shards:
        config.evaluate.shards = shards
    if flip is not None:
        config.evaluate.flip = flip
    if not config.evaluate.shards:
        raise UserError("evaluate.shards of the run is empty: name the held-out set with --shards")
    with busy(place, f"evaluating {found.checkpoint}"):
        metrics, details = protocol.run(found.embed, config, place)
    if not place.is_first:
        return
    table = Table(title=f"{found.checkpoint} on {config.evaluate.shards}", show_header=False)
    for name, value in accuracies(metrics):
        table.add_row(name, value)
    for name in ("gallery", "probes", "pairs", "impostors"):
        table.add_row(name, f"{metrics[name]:,.0f}")
    console.out.print(table)
    about = {"shards": config.evaluate.shards, **metrics}
    curves = {"all gallery-probe pairs": (details["far"], details["tar"])}
    keep(found, "heldout", about, curves, f"ROC, {config.evaluate.shards}", {})
    console.list_commands("Next", [("export it", f"mhe export {run}")])


@app.command()
def verification(
    run: RunName,
    more: Annotated[
        list[str] | None, typer.Argument(metavar="BIN...", help="InsightFace .bin files.")
    ] = None,
    sets: Annotated[list[str] | None, typer.Option(help="The same.", metavar="BIN...")] = None,
    flip: Flip = True,
    mlflow: Log = True,
) -> None:
    """Pairs of faces, 1:1: ten-fold accuracy and TAR at FAR, with 95 % bootstrap intervals.

    Example: mhe evaluate verification quickstart --sets lfw.bin cfp_fp.bin agedb_30.bin
    """
    from pipelines.evaluate import pair_sets

    paths = [*(sets or []), *(more or [])]
    if not paths:
        raise UserError("name the sets: --sets lfw.bin cfp_fp.bin ...")
    place = join()
    loaded = pair_sets.load_bins(paths)
    found = load(run, place.device)
    with busy(place, f"embedding {sum(each.images.count for each in loaded):,} images"):
        results = pair_sets.verify(found.embed, loaded, place, found.config.data.image_size, flip)
    if not place.is_first:
        return
    console.out.print(_verified(found.checkpoint, results))
    plain = {each.name: each.plain() for each in results}
    figures = {name: value for each in results for name, value in each.flat().items()}
    keep(
        *(found, "verification", plain, {each.name: each.roc for each in results}),
        "ROC of the verification sets",
        figures if mlflow else {},
    )


@app.command()
def ijb(
    run: RunName,
    root: Annotated[str, typer.Option(help="Folder that holds loose_crop/ and meta/.")],
    mlflow: Log = True,
) -> None:
    """IJB-B or IJB-C: templates 1:1 at FAR 1e-6 to 1e-1, and 1:N by rank and TPIR at FPIR.

    Example: mhe evaluate ijb quickstart --root IJBC
    """
    from pipelines.evaluate import ijb as protocol
    from pipelines.sources import ijb as source

    place = join()
    files = source.load(root)
    found = load(run, place.device)
    with busy(place, f"embedding {files.count:,} faces of {root}"):
        result = protocol.evaluate(found.embed, files, place, found.config.data.image_size)
    if result is None:
        return
    console.out.print(_ijb(f"{found.checkpoint} on {root}", result))
    curves = {files.name: result.roc}
    figures = {f"{files.name}/{key}": value for key, value in result.flat().items()}
    keep(
        *(found, files.name, result.plain(), curves, f"ROC of {files.name.upper()}, templates"),
        figures if mlflow else {},
    )


def _ijb(title: str, result: IjbResult) -> Table:
    table = Table("figure", "not above the FAR", "nearest FAR, as published", title=title)
    for far, tar in result.tar.items():
        nearest, at = result.nearest[far]
        table.add_row(
            f"TAR@FAR={far:.0e}", f"{100 * tar:.2f}", f"{100 * nearest:.2f} [dim]at {at:.1e}[/]"
        )
    for k, share in result.rank.items():
        table.add_row(f"1:N rank-{k}", f"{100 * share:.2f}", "")
    for fpir, share in result.tpir.items():
        table.add_row(f"1:N TPIR@FPIR={fpir:g}", f"{100 * share:.2f}", "")
    if not result.rank:
        table.add_row("1:N", "no tables in meta/", "")
    return table


def _verified(title: str, results: Sequence[Verified]) -> Table:
    from pipelines.evaluate.heldout import far_name
    from pipelines.evaluate.pair_sets import FARS

    table = Table("set", "pairs", "accuracy", *(far_name(f).upper() for f in FARS), title=title)
    for each in results:
        cells = []
        for key in ("accuracy", *map(far_name, FARS)):
            low, high = each.intervals[key]
            cells.append(f"{100 * each.metrics[key]:.2f} [dim]{100 * low:.2f}-{100 * high:.2f}[/]")
        table.add_row(each.name, f"{each.pairs:,}", *cells)
    return table


def join() -> Topology:
    """This process among those that torchrun started, or alone."""
    from mhe_dist import topology

    if "RANK" in os.environ:
        return topology.connect()
    return topology.Topology(device=topology.default_device())


def busy(place: Topology, what: str) -> AbstractContextManager[Any]:
    """A spinner on the first rank's terminal."""
    return console.out.status(escape(what)) if place.is_first else nullcontext()


def keep(
    found: Trained, name: str, plain: Any, curves: Curves, title: str, figures: Metrics
) -> None:
    """Write results beside the run, to MLflow if there are figures, and say where they are."""
    from mhe_dist.tracking import mlflow_uri
    from pipelines.evaluate import keep as keeping

    about = {"checkpoint": found.checkpoint, "step": found.step, "results": plain}
    files = keeping.write(found.path, name, about, curves, title)
    console.say("Written: " + ", ".join(escape(file) for file in files))
    if not (figures and found.run_id and found.config.tracking.mlflow):
        return
    named = {f"{name}/{key}": value for key, value in figures.items()}
    try:
        keeping.to_mlflow(mlflow_uri(found.config), found.run_id, found.step, named, files)
    except RunError as error:
        console.say(f"[yellow]warning:[/] {escape(str(error))}; the files above have them")
