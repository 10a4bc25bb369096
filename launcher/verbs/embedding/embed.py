"""`mhe embed`: images to rows, in a file or in a folder that is mapped."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from enum import Enum
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from launcher.tasks.choose import choose_workers
from launcher.tasks.resumable import resumable
from launcher.terminal import console
from launcher.terminal.commands import as_typed, is_in_store
from launcher.terminal.progress import ProgressDisplay
from launcher.verbs.evaluate.shared import join_ranks, say_left_out, spinner
from launcher.verbs.options import AddressOption, GpuOption, RunName
from launcher.verbs.outputs import usable_file, usable_folder
from mhe_dist.errors import UserError
from pipelines.runs.trained import read_trained_config

if TYPE_CHECKING:
    from pipelines.embedding.embed import EmbeddingsFile
    from pipelines.embedding.folder import EmbeddingsFolder
    from pipelines.embedding.write_folder import FolderOptions
    from pipelines.embedding.write_parquet import ParquetFolder
    from pipelines.storage.worker_pool import Workers

Images = Annotated[str, typer.Option(help="Folder or URL of images, or of shards.")]


class FolderFormat(str, Enum):
    """What a folder of embeddings holds."""

    NPY = "npy"
    PARQUET = "parquet"


def embed(
    run: RunName,
    images: Images,
    out: Annotated[
        str,
        typer.Option(
            help="A file, .npz or .parquet (key, class, vector); without a suffix a folder.",
            callback=lambda out: (usable_file if os.path.splitext(out)[1] else usable_folder)(out),
        ),
    ] = "embeddings.npz",
    flip: Annotated[bool, typer.Option(help="Add the embedding of the mirrored image.")] = False,
    normalize: Annotated[bool, typer.Option("--normalize", help="Embeddings of length 1.")] = False,
    dtype: Annotated[
        str, typer.Option(help="Of the rows in a folder: float32 or float16.")
    ] = "float32",
    format: Annotated[
        FolderFormat,
        typer.Option(help="Of a folder: npy, mapped; or parquet: files of key, class, vector."),
    ] = FolderFormat.NPY,
    workers: Annotated[
        int, typer.Option(min=0, help="Processes that fill a folder; 0: one per core, or per GPU.")
    ] = 0,
    address: AddressOption = "",
    gpu: GpuOption = None,
) -> None:
    """Embed every image below a folder, or every sample of a set of shards.

    A .npz file holds embeddings, classes and, in the same order, paths (of a folder) or keys and
    labels (of shards); it is made in memory.

    A folder is for very many samples of shards: embeddings.npy, to be mapped, one row for each
    sample in the order of the index. Processes fill it part by part, in flat memory, and the same
    command goes on where it was interrupted. With --format parquet the parts are files of their
    own, with the same rows; the folder may be a URL.

    Example: mhe embed quickstart --images photos --out photos.npz

    Example: mhe embed quickstart --images data/photos --out embeddings/photos --workers 8
    """
    images = images.rstrip("/")
    if os.path.splitext(out.rstrip("/"))[1]:
        given: dict[str, object] = {"--workers": workers, "--address": address}
        given |= {"--dtype": dtype != "float32", "--format": format != FolderFormat.NPY}
        for option, is_given in given.items():
            if is_given:
                raise UserError(f"{option} is for a folder: let --out {out} have no suffix")
        _embed_file(run, images, out, flip, normalize, gpu)
        return
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("a folder is filled by --workers N: type mhe embed without torchrun")
    from pipelines.embedding.write_folder import FolderOptions

    gpu = read_trained_config(run).scale.gpu if gpu is None else gpu
    options = FolderOptions(flip, normalize, dtype, gpu)
    with resumable(), choose_workers(workers, gpu, address) as chosen:
        tell = _fill_folder(run, images, out.rstrip("/"), options, format, chosen)
    tell()


def _fill_folder(
    run: str,
    images: str,
    out: str,
    options: FolderOptions,
    format: FolderFormat,
    workers: Workers,
) -> Callable[[], None]:
    """Fill a folder; what says so."""
    from pipelines.embedding.write_folder import write_folder
    from pipelines.embedding.write_parquet import write_parquet_folder

    with ProgressDisplay().counting(f"embedding {images}") as progress:
        where = (run, images, out, options, workers, progress)
        if format == FolderFormat.PARQUET:
            return partial(_tell_parquet, write_parquet_folder(*where))
        return partial(_tell_folder, run, write_folder(*where))


def _tell_parquet(made: ParquetFolder) -> None:
    console.say(
        f"{escape(as_typed(made.path))}: {made.rows:,} embeddings of {made.dim}, {made.files} files"
    )
    load = f"import pandas; pandas.read_parquet({json.dumps(as_typed(made.path))})"
    console.list_next([("use them", ["python", "-c", load])])


def _tell_folder(run: str, made: EmbeddingsFolder) -> None:
    rows, dim = made.rows.shape
    console.say(f"{escape(as_typed(made.path))}: {rows:,} embeddings of {dim}, {made.recipe.dtype}")
    load = f'import numpy; numpy.load({json.dumps(as_typed(made.rows_path))}, mmap_mode="r")'
    compare = ["mhe", "evaluate", "identification", run, "--images", as_typed(made.path)]
    console.list_next([("use them", ["python", "-c", load]), ("compare them", compare)])


def _embed_file(
    run: str, images: str, out: str, flip: bool, normalize: bool, gpu: bool | None
) -> None:
    from pipelines.embedding.embed import write_embeddings
    from pipelines.embedding.made_by import MadeBy
    from pipelines.runs.trained import load_trained_backbone

    topology = join_ranks(run, gpu)
    backbone = load_trained_backbone(run, topology=topology)
    made_by = MadeBy.of(backbone, flip)
    with spinner(topology, f"embedding {images}"):
        written = write_embeddings(backbone.embed, images, out, topology, made_by, normalize)
    if written is not None:
        _tell_file(run, out, written)


def _tell_file(run: str, out: str, written: EmbeddingsFile) -> None:
    console.say(f"{escape(out)}: {written.rows:,} embeddings of {written.dim}")
    say_left_out(written.skipped)
    file = json.dumps(out)
    load = f'import numpy; numpy.load({file})["embeddings"]'
    if is_in_store(out):
        load = f'import fsspec, numpy; numpy.load(fsspec.open({file}).open())["embeddings"]'
    if out.endswith(".parquet"):
        load = f"import pandas; pandas.read_parquet({file})"
    find = ["mhe", "search", run, "--gallery", out, "--query", "PHOTOS"]
    console.list_next([("use them", ["python", "-c", load]), ("search in them", find)])
