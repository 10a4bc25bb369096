"""Files of embeddings: what is written is read again, and what is damaged is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torch import Tensor

from mhe_dist.distributed.topology import Topology
from mhe_dist.errors import UserError
from pipelines.embedding.embed import read_embeddings, write_embeddings
from pipelines.embedding.made_by import MadeBy
from tests.support import tiny
from tests.support.terminal import said

MADE_BY = MadeBy("runs/a/checkpoints/step_00000001", 1, "sha256:0", tiny.SIDE, False)


def embed(images: Tensor) -> Tensor:
    return images.float().flatten(1)[:, :7]


@pytest.fixture
def written(tmp_path: Path) -> Path:
    shards = tiny.write_shards(tmp_path / "shards", classes=2)
    write_embeddings(embed, shards, f"{tmp_path}/a.npz", Topology(), MADE_BY)
    return tmp_path / "a.npz"


@pytest.mark.parametrize("kind", ["cut off", "empty", "an array", "text"])
def test_a_file_that_is_damaged_is_the_users_mistake(kind: str, written: Path) -> None:
    whole = written.read_bytes()
    damaged = {"cut off": whole[: len(whole) // 2], "empty": b"", "text": b"key,class\n"}
    if kind == "an array":
        with written.open("wb") as stream:
            np.save(stream, np.zeros((3, 7), np.float32))
    else:
        written.write_bytes(damaged[kind])
    with pytest.raises(UserError, match=r"a\.npz: not a file that mhe embed wrote"):
        read_embeddings(str(written))


@pytest.mark.parametrize("name", ["a.npz", "a.parquet"])
def test_a_file_in_a_store_is_used_as_the_command_says(
    name: str, run: str, shards: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """NumPy takes no URL."""
    shown = said(["embed", run, "--images", shards, "--out", f"memory://shelf/{name}"], capsys)
    code = shown.partition("python -c '")[2].partition("'")[0]
    modules, _, expression = code.partition("; ")
    names: dict[str, Any] = {}
    exec(modules, names)
    assert len(eval(expression, names)) == tiny.CLASSES * tiny.IMAGES


def test_a_file_name_that_is_no_utf8_is_written_to_parquet(tmp_path: Path) -> None:
    """It was an error after all images were embedded."""
    folder = tmp_path / "photos"
    folder.mkdir()
    name = b"\xff.png".decode(errors="surrogateescape")
    Image.new("RGB", (tiny.SIDE, tiny.SIDE)).save(folder / name)
    out = str(tmp_path / "a.parquet")
    write_embeddings(embed, str(folder), out, Topology(), MADE_BY)
    assert read_embeddings(out).keys == ["\\udcff.png"]
