"""`mhe search` in a file of embeddings: its model and settings are those of the queries."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from pyarrow import parquet

from tests.support import tiny
from tests.support.terminal import said

Captured = pytest.CaptureFixture[str]
KINDS = ["npz", "parquet"]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.write_shards(tmp_path_factory.mktemp("data") / "shards", classes=2)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, shards: str) -> list[str]:
    """Two runs whose embeddings are equally wide."""
    folder = tmp_path_factory.mktemp("runs")
    model = {"name": "resnet10t", "kwargs": {"channels": [8, 16, 16, 48]}, "embedding_dim": 32}
    one = tiny.trained_run(folder / "one", shards)
    other = tiny.trained_run(folder / "other", shards, model=model)
    return [one.run.path, other.run.path]


def embed(run: str, shards: str, file: Path, capsys: Captured, *more: str) -> str:
    said(["embed", run, "--images", shards, "--out", str(file), *more], capsys)
    return str(file)


def search(run: str, gallery: str, shards: str, tmp_path: Path) -> list[str]:
    words = ["search", run, "--gallery", gallery, "--query", shards]
    return [*words, "--out", f"{tmp_path}/found"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_gallery_of_another_model_is_refused(
    kind: str, runs: list[str], shards: str, tmp_path: Path, capsys: Captured
) -> None:
    """Its rows are as wide: the scores were nonsense, without a word."""
    gallery = embed(runs[1], shards, tmp_path / f"g.{kind}", capsys)
    message = said(search(runs[0], gallery, shards, tmp_path), capsys, 2)
    other, own = (f"{run}/checkpoints/step_00000024 (step 24, sha256:" for run in runs[::-1])
    assert f"--gallery {gallery}: holds embeddings of {other}" in message
    assert f", not of {own}" in message and "name that checkpoint as RUN" in message
    assert "warning" not in said(search(runs[1], gallery, shards, tmp_path), capsys)


@pytest.mark.parametrize("kind", KINDS)
def test_a_gallery_with_mirrored_images_is_refused(
    kind: str, runs: list[str], shards: str, tmp_path: Path, capsys: Captured
) -> None:
    gallery = embed(runs[0], shards, tmp_path / f"g.{kind}", capsys, "--flip")
    message = said(search(runs[0], gallery, shards, tmp_path), capsys, 2)
    assert f"--gallery {gallery}: was embedded with flip True, not False" in message


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_of_before_is_searched_with_a_warning(
    kind: str, runs: list[str], shards: str, tmp_path: Path, capsys: Captured
) -> None:
    gallery = embed(runs[0], shards, tmp_path / f"g.{kind}", capsys)
    if kind == "npz":
        with np.load(gallery) as found:
            arrays = {name: found[name] for name in found.files if name != "made_by"}
        np.savez(gallery, **arrays)
    else:
        table = parquet.read_table(gallery)
        about = {"source": table.schema.metadata[b"source"]}
        parquet.write_table(table.replace_schema_metadata(about), gallery)
    shown = said(search(runs[0], gallery, shards, tmp_path), capsys)
    assert f"warning: {gallery}: an older mhe embed wrote it" in shown


def test_a_folder_of_rows_is_no_gallery_and_says_what_is(
    runs: list[str], shards: str, tmp_path: Path, capsys: Captured
) -> None:
    """It was searched for images, of which it held none."""
    words = ["embed", runs[0], "--images", shards, "--out", f"{tmp_path}/rows", "--workers", "1"]
    compare = f"mhe evaluate identification {runs[0]} --images {tmp_path}/rows"
    assert compare in said(words, capsys)
    message = said(search(runs[0], f"{tmp_path}/rows", shards, tmp_path), capsys, 2)
    assert f"--gallery {tmp_path}/rows: is a folder of rows; a search takes a file of" in message


def test_files_of_a_folder_say_what_made_them(
    runs: list[str], shards: str, tmp_path: Path, capsys: Captured
) -> None:
    """As a file of one piece does: either is a gallery."""
    more = "--workers", "1", "--format", "parquet"
    folder = Path(embed(runs[0], shards, tmp_path / "rows", capsys, *more))
    (part,) = folder.glob("*.parquet")
    assert len(pd.read_parquet(folder)) == 2 * tiny.IMAGES
    assert "warning" not in said(search(runs[0], str(part), shards, tmp_path), capsys)
    assert "holds embeddings of" in said(search(runs[1], str(part), shards, tmp_path), capsys, 2)
