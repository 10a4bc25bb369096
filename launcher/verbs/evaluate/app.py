"""`mhe evaluate ...`: what a trained backbone can do, by the protocols of the field.

Each verb works on one machine as it stands, and on many processes under
`torchrun --nproc-per-node N --no-python mhe evaluate ...`: the results are the same. Those whose
work is embedding and comparing also take workers of this machine or of a Ray cluster.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table
from typer.core import TyperGroup

from launcher.terminal import console
from launcher.terminal.progress import accuracy_rows
from launcher.verbs.evaluate.classification import classification
from launcher.verbs.evaluate.labels import labels
from launcher.verbs.evaluate.own_images import identification, probe
from launcher.verbs.evaluate.shared import (
    EvaluatedBackbone,
    FlipOption,
    MlflowOption,
    WorkersOption,
    save_results,
    spinner,
)
from launcher.verbs.options import AddressOption, GpuOption, RunName
from mhe_dist.errors import UserError

if TYPE_CHECKING:
    from pipelines.evaluate.ijb import IjbResult
    from pipelines.evaluate.pair_sets import PairSetResult


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
    """Evaluate the newest checkpoint of a run; without another verb, on its held-out shards."""


@app.command()
def heldout(
    run: RunName,
    shards: Annotated[
        str, typer.Option(help="Held-out shards; those of the run's settings if left out.")
    ] = "",
    flip: Annotated[
        bool | None, typer.Option(help="Add the embedding of the mirrored image.")
    ] = None,
    gpu: GpuOption = None,
    workers: WorkersOption = None,
    address: AddressOption = "",
) -> None:
    """Held-out classes of a shard set, 1:1 and 1:N.

    Example: mhe evaluate quickstart --shards data/other/heldout
    """
    from pipelines.evaluate.heldout import evaluate_heldout
    from pipelines.report.evaluation import save_details

    with EvaluatedBackbone.open(run, gpu, workers, address) as opened:
        backbone, topology = opened.backbone, opened.topology
        settings, seed = backbone.config.evaluate, backbone.config.run.seed
        if shards:
            settings.shards = shards
            settings.typefaces = {}  # they are those of the run's own set
        if flip is not None:
            settings.flip = flip
        if not settings.shards:
            raise UserError(
                "evaluate.shards of the run is empty: name the held-out set with --shards"
            )
        with spinner(topology, f"evaluating {backbone.checkpoint}"):
            metrics, details, protocol = evaluate_heldout(
                *(opened.embed, settings, opened.image_size, seed, topology, True),
                *(opened.workers, opened.folder),
            )
    if not topology.is_first:
        return
    table = Table(show_header=False)
    for name, value in accuracy_rows(metrics):
        table.add_row(escape(name), value)
    for name in ("gallery", "probes", "pairs", "impostors"):
        table.add_row(name, f"{metrics[name]:,.0f}")
    table.add_row("protocol of rank-1, TAR", protocol)
    console.show_table(f"{backbone.checkpoint} on {settings.shards}", table)
    results = {"shards": settings.shards, "protocol": protocol, **metrics}
    curves = {"all gallery-probe pairs": (details["far"], details["tar"])}
    save_details(backbone.path, "heldout", details)
    save_results(backbone, "heldout", results, curves, f"ROC, {settings.shards}", {})


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
    flip: FlipOption = True,
    gpu: GpuOption = None,
    workers: WorkersOption = None,
    address: AddressOption = "",
    mlflow: MlflowOption = True,
) -> None:
    """Pairs of images, 1:1: ten-fold accuracy and TAR at FAR, with 95 % bootstrap intervals.

    Example: mhe evaluate verification quickstart --sets lfw.bin cfp_fp.bin agedb_30.bin

    Example: mhe evaluate verification quickstart --pairs pairs.csv --images photos
    """
    from pipelines.evaluate.pair_sets import (
        read_bin_sets,
        read_table_set,
        refuse_equal_names,
        verify_pair_sets,
    )

    paths = [*(sets or []), *(more or [])]
    if not paths and not pairs:
        raise UserError("name the sets: --sets lfw.bin cfp_fp.bin ..., or --pairs FILE.csv")
    pair_sets = read_bin_sets(paths)
    if pairs:
        pair_sets.append(read_table_set(pairs, images))
        refuse_equal_names(pair_sets)
    what = f"embedding {sum(each.images.count for each in pair_sets):,} images"
    with EvaluatedBackbone.open(run, gpu, workers, address, mlflow=mlflow) as opened:
        backbone, topology = opened.backbone, opened.topology
        with spinner(topology, what):
            results = verify_pair_sets(opened.embed, pair_sets, topology, opened.image_size, flip)
    if not topology.is_first:
        return
    console.show_table(backbone.checkpoint, _pair_sets_table(results))
    metrics = {name: value for each in results for name, value in each.named_metrics().items()}
    save_results(
        backbone,
        name="verification",
        results={each.name: each.to_dict() for each in results},
        curves={each.name: each.roc for each in results},
        title="ROC of the verification sets",
        metrics=metrics if mlflow else {},
    )


@app.command()
def ijb(
    run: RunName,
    root: Annotated[str, typer.Option(help="Folder that holds loose_crop/ and meta/.")],
    gpu: GpuOption = None,
    workers: WorkersOption = None,
    address: AddressOption = "",
    mlflow: MlflowOption = True,
) -> None:
    """IJB-B or IJB-C: templates 1:1 at FAR 1e-6 to 1e-1, and 1:N by rank and TPIR at FPIR.

    Example: mhe evaluate ijb quickstart --root IJBC
    """
    from pipelines.evaluate.ijb import evaluate_ijb
    from pipelines.evaluate.sets.ijb_files import load_ijb

    ijb_set = load_ijb(root)
    with EvaluatedBackbone.open(run, gpu, workers, address, mlflow=mlflow) as opened:
        backbone, topology = opened.backbone, opened.topology
        with spinner(topology, f"embedding {ijb_set.count:,} faces of {root}"):
            result = evaluate_ijb(
                *(opened.embed, ijb_set, topology, opened.image_size),
                *(opened.workers, opened.folder),
            )
    if result is None:
        return
    console.show_table(f"{backbone.checkpoint} on {root}", _ijb_table(result))
    name = ijb_set.name
    metrics = {f"{name}/{key}": value for key, value in result.named_metrics().items()}
    save_results(
        backbone,
        name=name,
        results=result.to_dict(),
        curves={name: result.roc},
        title=f"ROC of {name.upper()}, templates",
        metrics=metrics if mlflow else {},
    )


def _ijb_table(result: IjbResult) -> Table:
    table = Table("figure", "not above the FAR", "nearest FAR, as published")
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


def _pair_sets_table(results: Sequence[PairSetResult]) -> Table:
    from pipelines.evaluate.metrics.roc import tar_name
    from pipelines.evaluate.pair_sets import FARS

    table = Table("set", "pairs", "accuracy", *(tar_name(f).upper() for f in FARS), box=None)
    for each in results:
        cells = []
        for key in ("accuracy", *map(tar_name, FARS)):
            low, high = each.intervals[key]
            cells.append(
                f"{100 * each.metrics[key]:.2f} [dim]{100 * low:.2f} to {100 * high:.2f}[/]"
            )
        table.add_row(escape(each.name), f"{each.pairs:,}", *cells)
    return table


app.command()(classification)
app.command()(labels)
app.command()(identification)
app.command()(probe)
