"""`mhe checkpoint grow`, `mhe checkpoint verify`: what is done with whole checkpoints."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.markup import escape

from launcher.terminal import console
from launcher.verbs.options import RunName
from launcher.verbs.outputs import run_words, usable_folder
from mhe_dist.errors import RunError, UserError
from pipelines.runs.folder import find_checkpoint_folder, find_run
from pipelines.storage.urls import url_exists

Url = Annotated[str, typer.Argument(metavar="URL", help="A step_* folder, or a run: its newest.")]


def grow(
    run: RunName,
    classes: Annotated[int, typer.Option(help="The new number of classes.", min=1)],
    out: Annotated[
        str,
        typer.Option(
            help="Folder or URL of the run that goes on with them.", callback=usable_folder
        ),
    ],
) -> None:
    """Let a run go on with more classes: a new run begins where its newest checkpoint ends.

    Old classes keep their numbers, their rows and their optimizer state. All touched rows are held
    in memory, twice.

    Example: mhe checkpoint grow quickstart --classes 6000 --out runs/wider
    """
    from pipelines.runs.warm_start import find_checkpoint, grow_checkpoint

    next_run = run_words(out, "--out")
    if url_exists(f"{out}/checkpoints"):
        raise UserError(f"--out {out} has checkpoints already: name a run that does not exist yet")
    with console.status(f"growing {run} to {classes:,} classes"):
        path = grow_checkpoint(
            find_checkpoint(find_run(run)), classes, f"{out.rstrip('/')}/checkpoints"
        )
    console.say(f"Written: {escape(path)}")
    words = [*next_run, f"data.shards=SHARDS_OF_{classes}_CLASSES"]
    console.list_next([("go on", ["mhe", "train", "CONFIG", *words])])


def verify(url: Url) -> None:
    """Read a whole checkpoint and compare every checksum; exit code 1 if one does not fit.

    Example: mhe checkpoint verify runs/quickstart
    """
    from mhe_dist.checkpoint.files import CheckpointFolder

    folder = CheckpointFolder(find_checkpoint_folder(url))
    files = folder.manifest()
    if isinstance(files, str):
        raise RunError(f"{folder.url}: {files}")
    found = (folder.first_corrupt_file([entry]) for entry in sorted(files.items()))
    wrong = [reason for reason in found if reason]
    if wrong:
        raise RunError("\n  ".join([f"{folder.url}:", *wrong]))
    size = sum(entry.bytes for entry in files.values())
    console.say(f"{escape(folder.url)}: {len(files)} files, {size:,} bytes, every checksum fits.")
