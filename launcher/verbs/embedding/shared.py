"""Shared by the verbs that embed a data set and go on with its embeddings."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from launcher.tasks.choose import choose_workers
from launcher.terminal.progress import ProgressDisplay
from launcher.verbs.outputs import run_words
from mhe_dist.checkpoint.step_folder import step_of
from mhe_dist.config.load import load_config
from mhe_dist.config.shipped import find_config
from mhe_dist.errors import UserError
from pipelines.runs.folder import find_checkpoint_folder, find_run, newest_checkpoint
from pipelines.runs.trained import read_trained_config
from pipelines.shards.index import ShardIndex

if TYPE_CHECKING:
    from pipelines.clustering.state import Watch
    from pipelines.embedding.folder import EmbeddingsFolder

MODEL_SUFFIX, EMBEDDINGS_SUFFIX = "-model", "-embeddings"  # of folders beside what is made


EmbeddingsOption = Annotated[
    str,
    typer.Option(
        help="Folder of the embeddings; those of before are used. Left out: OUT-embeddings."
    ),
]


class EmbeddingOptions(NamedTuple):
    """Where embeddings lie and who makes them, as the options of these verbs say."""

    embeddings: str = ""
    workers: int = 0
    gpu: bool | None = None
    address: str = ""


def embed_shards(shards: str, model: str, out: str, how: EmbeddingOptions) -> EmbeddingsFolder:
    """The embeddings of the shards: those that are there, or made now.

    Raises:
        UserError: nothing says what embeds the images, or those that are there are of other images.
    """
    from pipelines.embedding.folder import EmbeddingsFolder
    from pipelines.embedding.write_folder import FolderOptions, write_folder

    target = how.embeddings or f"{out}{EMBEDDINGS_SUFFIX}"
    if not model:
        if not how.embeddings:
            raise UserError(
                "--model is missing: name the run, or the YAML file, whose backbone embeds the "
                "images; or --embeddings FOLDER, which mhe embed made"
            )
        found = EmbeddingsFolder.open(target)
        if found.recipe.index_digest != ShardIndex.load(shards).digest:
            raise UserError(
                f"--embeddings {target}: they are of {found.recipe.source}, whose images are not "
                f"those of {shards} in their order; name these shards, or embed them with --model"
            )
        return found
    run = find_model(model, f"{out}{MODEL_SUFFIX}", shards)
    gpu = read_trained_config(run).scale.gpu if how.gpu is None else how.gpu
    with (
        choose_workers(how.workers, gpu, how.address) as chosen,
        ProgressDisplay().counting(f"embedding {shards}") as progress,
    ):
        return write_folder(run, shards, target, FolderOptions(gpu=gpu), chosen, progress)


def find_model(model: str, folder: str, shards: str, option: str = "--model ") -> str:
    """The run that is named; of a YAML file, a run in `folder` that no step was made of.

    Args:
        model: run, `step_*` checkpoint or YAML file.
        folder: of a run that is made.
        shards: of its config; empty: those that the YAML file names.
        option: how messages name what was given.

    Raises:
        UserError: it is none of them.
    """
    from pipelines.runs.untrained import write_untrained_run

    if step_of(model) is not None:
        return find_checkpoint_folder(model)
    file = find_config(model)
    try:
        path = find_run(model)
        if newest_checkpoint(path) or not file.is_file():
            return model
    except UserError as error:
        if not file.is_file():
            raise UserError(f"{option}{model}: no YAML file, and {error}") from error
    words = run_words(folder, "--out, beside which there would be")
    words += [f"data.shards={shards}"] if shards else []
    return write_untrained_run(load_config(model, words))


def embedded_by(folder: EmbeddingsFolder) -> dict[str, Any]:
    """What tells embeddings from others, wherever they lie: JSON-able."""
    parts = json.dumps([part.checksum for part in folder.parts])
    recipe = folder.recipe
    return {
        "rows": "sha256:" + hashlib.sha256(parts.encode()).hexdigest(),
        "model": recipe.model_digest,
        "step": recipe.step,
        "dtype": recipe.dtype,
        "dim": recipe.dim,
    }


def watch_stages(expected: int, progress: Callable[[int, int], None]) -> Watch:
    """Shows pieces of work as a share of the whole, of about so many stages that count the same."""
    stages: list[str] = []

    def _watch(stage: str, done: int, total: int) -> None:
        if stage not in stages:
            stages.append(stage)
        share = len(stages) - 1 + done / max(1, total)
        progress(round(100 * share), 100 * max(expected, len(stages)))

    return _watch
