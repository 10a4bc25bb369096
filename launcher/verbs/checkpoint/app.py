"""`mhe checkpoint ...`: looking into checkpoints."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from launcher.terminal import console
from launcher.verbs.checkpoint import grow
from mhe_dist.errors import UserError
from mhe_dist.sizes import MIB
from pipelines.runs.folder import find_checkpoint_folder

if TYPE_CHECKING:
    import torch

Tensors = dict[str, "tuple[tuple[int, ...], torch.dtype]"]

app = typer.Typer(no_args_is_help=True, help="Look into checkpoints, grow them.")


app.command("grow")(grow.grow)
app.command("verify")(grow.verify)


@app.callback()
def checkpoint() -> None:
    """Look into checkpoints."""


@app.command()
def inspect(
    url: Annotated[
        str, typer.Argument(metavar="URL", help="A step_* folder, or a run: its newest one.")
    ],
    every: Annotated[bool, typer.Option("--all", help="List every tensor.")] = False,
) -> None:
    """Say what a checkpoint holds: step, data, tensors by kind, and whether it is complete.

    Example: mhe checkpoint inspect runs/quickstart
    """
    from mhe_dist.checkpoint.files import CheckpointFolder
    from mhe_dist.checkpoint.store import Checkpoint

    path = find_checkpoint_folder(url)
    manifest = CheckpointFolder(path).manifest()
    if isinstance(manifest, str):
        raise UserError(f"{path} is not a complete checkpoint: {manifest}")
    found = Checkpoint(path, int(path.rpartition("_")[2]))
    size = sum(entry.bytes for entry in manifest.values())
    console.say(
        f"[bold]{escape(path)}[/]: complete, {size / MIB:,.1f} MiB in {len(manifest)} files"
    )
    for key in ("step", "images", "data_digest", "run_id"):
        console.say(f"  {key}: {escape(str(found.run.get(key)))}")
    for key, digest in found.run.get("labels", {}).items():
        console.say(f"  {escape(key)}: {escape(digest)}")
    rows = _one_by_one(found.names()) if every else _by_kind(found.names())
    table = Table("tensors" if every else "kind", "shape" if every else "tensors", "MiB", box=None)
    for row in rows:
        table.add_row(*row)
    console.print_table(table)
    if not every:
        words = ["mhe", "checkpoint", "inspect", path, "--all"]
        console.list_next([("see every tensor", words)])


def _by_kind(tensors: Tensors) -> Iterable[tuple[str, str, str]]:
    """Count and size by the first part of the name; the head's rows by their field."""
    kinds: dict[str, list[int]] = {}
    for name, (shape, dtype) in tensors.items():
        parts = name.split(".") if "/" not in name else name.split("/")
        kind = f"{parts[0]}/{parts[1]}/*/{parts[-1]}" if parts[1] == "rows" else parts[0]
        kinds.setdefault(kind, []).append(prod(shape) * dtype.itemsize)
    for kind, sizes in sorted(kinds.items()):
        yield kind, f"{len(sizes):,}", f"{sum(sizes) / MIB:,.2f}"


def _one_by_one(tensors: Tensors) -> Iterable[tuple[str, str, str]]:
    for name, (shape, dtype) in sorted(tensors.items()):
        text = f"{list(shape)} {str(dtype).removeprefix('torch.')}"
        yield name, escape(text), f"{prod(shape) * dtype.itemsize / MIB:,.2f}"
