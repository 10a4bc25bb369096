"""`mhe evaluate ...`: what a trained backbone can do, by the protocols of the field.

Each verb works on one machine as it stands, and on many processes under
`torchrun --nproc-per-node N --no-python mhe evaluate ...`: the results are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from typer.core import TyperGroup

from launcher.terminal import console
from launcher.terminal.progress import accuracy_rows
from launcher.verbs.evaluate import own_images
from launcher.verbs.evaluate.shared import Flip, Log, RunName, busy, join, keep
from mhe_dist.errors import UserError
from pipelines.runs.trained import load_trained_backbone

if TYPE_CHECKING:
    from pipelines.evaluate.ijb import IjbResult
    from pipelines.evaluate.pair_sets import Verified


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

    topology = join()
    found = load_trained_backbone(run, topology.device)
    config = found.config
    if shards:
        config.evaluate.shards = shards
        config.evaluate.typefaces = {}  # they are those of the run's own set
    if flip is not None:
        config.evaluate.flip = flip
    if not config.evaluate.shards:
        raise UserError("evaluate.shards of the run is empty: name the held-out set with --shards")
    with busy(topology, f"evaluating {found.checkpoint}"):
        metrics, details = protocol.run(found.embed, config, topology)
    if not topology.is_first:
        return
    table = Table(title=f"{found.checkpoint} on {config.evaluate.shards}", show_header=False)
    for name, value in accuracy_rows(metrics):
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
    pairs: Annotated[
        str, typer.Option(help="A CSV file: first,second,same (paths below --images; 0 or 1).")
    ] = "",
    images: Annotated[str, typer.Option(help="Folder of the images of --pairs.")] = ".",
    flip: Flip = True,
    mlflow: Log = True,
) -> None:
    """Pairs of images, 1:1: ten-fold accuracy and TAR at FAR, with 95 % bootstrap intervals.

    Example: mhe evaluate verification quickstart --sets lfw.bin cfp_fp.bin agedb_30.bin

    Example: mhe evaluate verification quickstart --pairs pairs.csv --images photos
    """
    from pipelines.evaluate import pair_sets

    paths = [*(sets or []), *(more or [])]
    if not paths and not pairs:
        raise UserError("name the sets: --sets lfw.bin cfp_fp.bin ..., or --pairs FILE.csv")
    topology = join()
    loaded = pair_sets.load_bins(paths)
    if pairs:
        loaded.append(pair_sets.load_table(pairs, images))
    found = load_trained_backbone(run, topology.device)
    with busy(topology, f"embedding {sum(each.images.count for each in loaded):,} images"):
        results = pair_sets.verify(
            found.embed, loaded, topology, found.config.data.image_size, flip
        )
    if not topology.is_first:
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
    from pipelines.evaluate.sets import ijb_files as source

    topology = join()
    files = source.load(root)
    found = load_trained_backbone(run, topology.device)
    with busy(topology, f"embedding {files.count:,} faces of {root}"):
        result = protocol.evaluate(found.embed, files, topology, found.config.data.image_size)
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
    from pipelines.evaluate.metrics.roc import far_name
    from pipelines.evaluate.pair_sets import FARS

    table = Table("set", "pairs", "accuracy", *(far_name(f).upper() for f in FARS), title=title)
    for each in results:
        cells = []
        for key in ("accuracy", *map(far_name, FARS)):
            low, high = each.intervals[key]
            cells.append(f"{100 * each.metrics[key]:.2f} [dim]{100 * low:.2f}-{100 * high:.2f}[/]")
        table.add_row(each.name, f"{each.pairs:,}", *cells)
    return table


app.command()(own_images.identification)
app.command()(own_images.probe)
