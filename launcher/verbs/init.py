"""`mhe init`: a first YAML for what one has."""

from __future__ import annotations

import shlex
import sys
import tempfile
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from launcher.preflight.checks import check_data, check_names
from launcher.preflight.first_config import Machine, write_first_config
from launcher.preflight.machine import list_gpus
from launcher.preflight.own_data import OwnData, make_name, survey_data
from launcher.terminal import console
from launcher.verbs.outputs import usable_file
from mhe_dist.config.load import COMMAND_LINE, Check, load_config
from mhe_dist.config.mistakes import ConfigErrors
from mhe_dist.errors import UserError
from mhe_dist.limits import available_cores
from mhe_dist.redact import scrub
from pipelines.storage.urls import atomic_write, is_local_url

MOST_WORKERS = 8  # of a machine without GPUs, unless told otherwise
MOST_CPUS = 8  # of a worker with a GPU


def init(
    source: Annotated[
        str,
        typer.Argument(
            metavar="DATA",
            help="Folder of shards, of images (a folder per class) or of tars; a .rec file; a CSV "
            "or Parquet table of path and class.",
        ),
    ],
    out: Annotated[
        str, typer.Option(help="The file; NAME.yaml if left out.", callback=usable_file)
    ] = "",
    name: Annotated[str, typer.Option(help="Of the run; that of the data if left out.")] = "",
    root: Annotated[
        str, typer.Option(help="Folder that a table's paths are below; its own if left out.")
    ] = "",
    heldout: Annotated[str, typer.Option(help="Held-out shards, if there are any.")] = "",
    classes: Annotated[
        int,
        typer.Option(min=0, max=10**12, help="Number of classes, where the data does not say it."),
    ] = 0,
    workers: Annotated[
        int, typer.Option(min=0, max=2**16, help="Workers; 0: one per GPU, or per core, at most 8.")
    ] = 0,
    gpu: Annotated[
        bool | None, typer.Option(help="For GPUs or not; left out: as this machine is.")
    ] = None,
) -> None:
    """Write a first YAML for what you have, with the reason of each value beside it.

    Head, lengths, groups and batch follow from the number of classes and workers. Where the data
    are no shards yet, the command that makes them stands in the file, too. Of shards without
    classes, --classes says how many mhe cluster shall make.

    Example: mhe init photos

    Example: mhe init labels.csv --root photos --workers 8 --gpu
    """
    if not is_local_url(out):
        raise UserError(f"--out {out}: mhe train reads files of this machine; name one here")
    data = survey_data(source, root, classes)
    name = name or make_name(source)
    target = out or f"{name}.yaml"
    if Path(target).exists():
        raise UserError(f"{target}: exists already; give another name with --out, or delete it")
    data = _completed(data, heldout, target)
    machine = _machine(workers, gpu)
    text = write_first_config(data, machine, name, _header(data, machine, target))
    _refuse_mistakes(text, [check_names] if data.command else [check_names, check_data])
    with atomic_write(target) as stream:
        stream.write(text.encode())
    console.say(f"{escape(target)}: {escape(_describe(data, machine))}")
    steps = [(f"make the {_made(data)}", data.command)] if data.command else []
    console.list_next(
        [
            *steps,
            ("will it work, and what will it cost", ["mhe", "preflight", target]),
            ("train", ["mhe", "train", target]),
        ]
    )


def _refuse_mistakes(text: str, checks: Sequence[Check]) -> None:
    """Refuse settings that no run could begin with, before a file of the user's holds them.

    Raises:
        ConfigErrors: options of the command make them wrong.
    """
    with tempfile.TemporaryDirectory(prefix="mhe-init-") as folder:
        draft = Path(folder, "draft.yaml")
        draft.write_text(text, encoding="utf-8")
        try:
            load_config(str(draft), [], checks)
        except ConfigErrors as errors:
            found = [mistake._replace(source=COMMAND_LINE) for mistake in errors.mistakes]
            raise ConfigErrors(found) from None


def _machine(workers: int, gpu: bool | None) -> Machine:
    gpus, cores = len(list_gpus()), available_cores()
    if gpu if gpu is not None else gpus > 0:
        workers = workers or max(1, gpus)
        here = max(1, min(workers, gpus or workers))
        return Machine(workers, True, max(1, min(MOST_CPUS, cores // here)))
    return Machine(workers or min(MOST_WORKERS, cores), False)


def _describe(data: OwnData, machine: Machine) -> str:
    images = f"{data.images:,} images" if data.images else "images"
    side = f" of about {data.side} pixels" if data.side else ""
    kind = "GPU" if machine.gpu else "CPU"
    plural = "s" if machine.workers > 1 else ""
    return (
        f"For {data.kind}: {images}{side} in {data.classes:,} classes to train on, and "
        f"{machine.workers} {kind} worker{plural}"
    )


def _completed(data: OwnData, heldout: str, target: str) -> OwnData:
    """With the held-out set that is named, and the file for the command that needs it."""
    if data.labels:
        data = data._replace(command=[*data.command, "--model", target])
    return data._replace(heldout=heldout, same_classes=False) if heldout else data


def _made(data: OwnData) -> str:
    """What the command of some data makes."""
    return "classes" if data.labels else "shards"


def _header(data: OwnData, machine: Machine, target: str) -> list[str]:
    """The comment at the top; the file may go elsewhere, so programs have no path in it."""
    rows = [("Written by", ["mhe", *sys.argv[1:]]), (_made(data).title(), data.command)]
    rows += [("Command", ["mhe", "train", target]), ("Every key", ["mhe", "config", target])]
    about = textwrap.wrap(f"{_describe(data, machine)}.", 96)
    commands = [(what, shlex.join(words)) for what, words in rows if words]
    return [*about, "", *(f"{what + ':':<12}{scrub(command)}" for what, command in commands)]
