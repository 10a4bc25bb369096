"""`mhe data recordio`, `mhe data folder`: other formats to shards."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer
import yaml
from rich.markup import escape

from launcher.preflight.own_data import make_name
from launcher.tasks.choose import choose_workers
from launcher.tasks.resumable import resumable
from launcher.terminal import console
from launcher.terminal.commands import as_typed
from launcher.terminal.progress import ProgressDisplay
from launcher.verbs.options import AddressOption, Processes
from launcher.verbs.outputs import usable_folder
from mhe_dist.errors import UserError, counted
from mhe_dist.sizes import MIB
from pipelines.shards.index import UNLABELLED, ShardIndex
from pipelines.sources.convert import DEFAULT_OPTIONS, ImportOptions, ImportResult

Out = Annotated[
    str,
    typer.Option(help="Folder or URL for the shards; it must not exist.", callback=usable_folder),
]
ShardMib = Annotated[float, typer.Option(min=0.01, help="About how large a tar is, in MiB.")]
Shuffle = Annotated[
    bool, typer.Option(help="In a random order over all classes, which training needs.")
]
MaxBad = Annotated[
    float, typer.Option(min=0, max=1, help="Largest share of samples that may be left out as bad.")
]


def recordio(
    rec: Annotated[str, typer.Option(help="The .rec file; .idx and property lie beside it.")],
    out: Out,
    idx: Annotated[
        bool, typer.Option(help="Read the records that .idx names, or all that there are.")
    ] = True,
    shard_mib: ShardMib = DEFAULT_OPTIONS.shard_bytes / MIB,
    shuffle: Shuffle = DEFAULT_OPTIONS.shuffle,
    max_bad: MaxBad = DEFAULT_OPTIONS.max_bad,
    processes: Processes = 0,
    address: AddressOption = "",
) -> None:
    """Convert InsightFace RecordIO (MS1MV2, Glint360K, WebFace); images stay byte for byte.

    Labels become class ids in [0, C); classes.tsv beside the tars says which is which. The same
    command goes on where it was interrupted.

    Example: mhe data recordio --rec faces_emore/train.rec --out data/ms1mv2
    """
    from pipelines.sources.insightface import import_recordio

    with (
        resumable(),
        choose_workers(processes, address=address) as workers,
        ProgressDisplay().counting("converting") as progress,
    ):
        options = ImportOptions(round(shard_mib * MIB), shuffle, workers, max_bad)
        # Looking through the records is the smaller part of the work.
        made = import_recordio(
            *(rec, out, idx, options),
            scanning=lambda done, total: progress(10 * done, 100 * total),
            writing=lambda done, total: progress(10 * total + 90 * done, 100 * total),
        )
    tell(made)


def folder(
    root: Annotated[str, typer.Option(help="Folder or URL with one folder of images per class.")],
    out: Out,
    lst: Annotated[
        str, typer.Option(help="An .lst file that names the files below --root and their labels.")
    ] = "",
    table: Annotated[
        str,
        typer.Option(help="CSV or Parquet with the columns path (below --root) and class."),
    ] = "",
    no_classes: Annotated[
        bool,
        typer.Option("--no-classes", help="All images below --root, in no class: to embed them."),
    ] = False,
    heldout_classes: Annotated[
        int, typer.Option(min=0, help="So many whole classes are kept to measure with.")
    ] = 0,
    heldout_images: Annotated[
        int, typer.Option(min=0, help="So many images of each class are kept, two or more.")
    ] = 0,
    shard_mib: ShardMib = DEFAULT_OPTIONS.shard_bytes / MIB,
    shuffle: Shuffle = DEFAULT_OPTIONS.shuffle,
    max_bad: MaxBad = DEFAULT_OPTIONS.max_bad,
    processes: Processes = 0,
    address: AddressOption = "",
) -> None:
    """Convert a folder of images; they stay byte for byte, and bad ones are left out.

    A class is a folder, with all that is below it, or what a table says, or a label of the .lst
    file (number, label, path or aligned, path, label; tabs between them). classes.tsv and files.tsv
    beside the tars say which class and which file is which.

    With --heldout-classes (other identities) or --heldout-images (other images of the same ones),
    OUT/train and OUT/heldout are made; the choice is the same each time.

    Example: mhe data folder --root photos --out data/photos --heldout-classes 100

    Example: mhe data folder --root photos --table labels.csv --out s3://bucket/photos
    """
    from pipelines.sources.heldout_split import HeldoutSplit
    from pipelines.sources.image_folder import import_folder, import_split_folder

    given = {"--lst": bool(lst), "--table": bool(table), "--no-classes": no_classes}
    _refuse_both(*(name for name, is_given in given.items() if is_given))
    held = {"--heldout-classes": heldout_classes, "--heldout-images": heldout_images}
    _refuse_both(*([n for n, v in held.items() if v] + ["--no-classes"] * no_classes))
    if heldout_images == 1:
        raise UserError("--heldout-images 1: a class needs two, one to find and one to look up")
    split = HeldoutSplit(heldout_classes, heldout_images)
    with (
        resumable(),
        choose_workers(processes, address=address) as workers,
        ProgressDisplay().counting("writing tars") as written,
    ):
        how = (lst or None, ImportOptions(round(shard_mib * MIB), shuffle, workers, max_bad))
        if any(split):
            sets = import_split_folder(root, out, split, *how, written, table or None)
        else:
            sets = [import_folder(root, out, *how, written, table or None, no_classes)]
    tell(*sets, can_train=not no_classes)


def _refuse_both(*names: str) -> None:
    """Refuse options of which one excludes the other."""
    if len(names) > 1:
        raise UserError(f"{' and '.join(names)} exclude each other; leave one of them out")


def tell(*sets: ImportResult, can_train: bool = True) -> None:
    """Say what data sets hold, what is odd about them, and what to type next.

    Args:
        sets: that were made together: one, or the held-out set and that to train on.
        can_train: whether the last of them has classes.
    """
    for made in sets:
        console.say(describe(made.index))
        for note in made.notes:
            console.say(f"{escape(as_typed(made.index.folder))}: {escape(note)}")
        for warning in made.warnings:
            console.say(f"[yellow]warning:[/] {escape(warning)}")
        if made.faults:
            listing = f"{as_typed(made.index.folder)}/skipped.tsv"
            count = counted(len(made.faults), "bad sample")
            console.say(f"[yellow]{count} left out[/], see {escape(listing)}")
    *heldout, folder = [as_typed(made.index.folder) for made in sets]
    source = folder.rpartition("/")[0] if heldout else folder
    console.list_next(
        [
            ("look at it", ["mhe", "data", "show", folder]),
            ("check it", ["mhe", "data", "verify", folder]),
            _how_to_train(source, folder) if can_train else first_config(sets[-1].index),
        ]
    )


def _how_to_train(source: str, folder: str) -> tuple[str, list[str]]:
    """What to type: with the config that `mhe init` wrote here before it, or to have it write one.

    Args:
        source: folder of the data set, or of what is held out and `folder`.
        folder: of the training set.
    """
    file = Path(f"{make_name(source)}.yaml")
    if file.is_file():
        with suppress(yaml.YAMLError, UnicodeDecodeError, AttributeError):
            settings = yaml.safe_load(file.read_text(encoding="utf-8"))
            if settings.get("data", {}).get("shards", "").rstrip("/") == folder:
                return "train on it", ["mhe", "train", str(file)]
    return "a config for it", ["mhe", "init", source]


def first_config(index: ShardIndex) -> tuple[str, list[str]]:
    """What to type for a config that trains on a data set alone."""
    words = ["mhe", "init", as_typed(index.folder)]
    return "a config for it", [*words, *(["--classes", "N"] if index.meta.get(UNLABELLED) else [])]


def describe(index: ShardIndex) -> str:
    """A data set in a line of markup."""
    size = sum(shard.bytes for shard in index.shards) / MIB
    classes = f"of {index.num_classes:,} class{'es' if index.num_classes != 1 else ''}"
    return (
        f"[bold]{escape(as_typed(index.folder))}[/]: {counted(index.samples, 'image')} "
        f"{'in no class' if index.meta.get(UNLABELLED) else classes}, "
        f"{counted(len(index.shards), 'tar')}, {size:,.1f} MiB"
    )
