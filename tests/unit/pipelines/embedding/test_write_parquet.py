"""Embeddings as Parquet files: the rows of `embeddings.npy`, whoever writes them and how often."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from pyarrow import parquet

from launcher import cli
from mhe_dist.errors import UserError
from pipelines.data.mixture import class_list
from pipelines.embedding import write_folder as folder_module
from pipelines.embedding import write_parquet as module
from pipelines.embedding.write_folder import FolderOptions, write_folder
from pipelines.embedding.write_parquet import write_parquet_folder
from pipelines.storage.worker_pool import Processes
from tests.support import tiny
from tests.support.files import contents

OPTIONS = FolderOptions()


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A file for each of the four shards, of 100, 100, 100 and 60 samples, in groups of 64 rows."""
    monkeypatch.setattr(folder_module, "PART_ROWS", 100)
    monkeypatch.setattr(folder_module, "BLOCK", 32)
    monkeypatch.setattr(module, "_GROUP", 2)
    yield


@pytest.mark.parametrize("options", [OPTIONS, FolderOptions(flip=True, dtype="float16")])
def test_files_hold_the_rows_of_the_mapped_folder_with_key_and_class(
    run: str, shards: str, tmp_path: Path, options: FolderOptions
) -> None:
    made = write_parquet_folder(run, shards, str(tmp_path / "out"), options)
    assert made[1:] == (4, 360, 32)
    mapped = write_folder(run, shards, str(tmp_path / "mapped"), options)
    table = parquet.read_table(tmp_path / "out")
    rows = np.stack(table.column("vector").to_numpy())
    assert rows.dtype == mapped.rows.dtype
    np.testing.assert_array_equal(rows, mapped.rows)
    classes = [str(label) for label in mapped.labels.tolist()]
    assert [name.split()[-1] for name in table.column("class").to_pylist()] == classes
    assert len(set(table.column("key").to_pylist())) == 360
    assert list(contents(tmp_path / "out")) == [f"part-{n:06d}.parquet" for n in range(4)]
    assert parquet.ParquetFile(tmp_path / "out" / "part-000000.parquet").num_row_groups == 2


def test_the_file_of_names_is_read_once_for_a_part(
    run: str, shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not once for each of its groups of rows."""
    named, read = shutil.copytree(shards, tmp_path / "named"), []
    lines = [f"{number}\tname {number}\n" for number in range(tiny.CLASSES)]
    (named / "classes.tsv").write_text("class\tname\n" + "".join(lines))
    rows = class_list._rows
    monkeypatch.setattr(class_list, "_rows", lambda url: (read.append(url), rows(url))[1])
    write_parquet_folder(run, str(named), str(tmp_path / "out"), OPTIONS)
    assert read == [f"{named}/classes.tsv"] * 4
    table = parquet.read_table(tmp_path / "out")
    labels = [int(key) % tiny.CLASSES for key in table.column("key").to_pylist()]
    assert [name.split()[-1] for name in table.column("class").to_pylist()] == [
        f"{label}" for label in labels
    ]
    assert set(table.column("class").to_pylist()) == {line.split("\t")[1].strip() for line in lines}


@pytest.mark.slow
def test_processes_write_the_same_bytes(run: str, shards: str, tmp_path: Path) -> None:
    """In parts and groups of their own size, which processes know by themselves."""
    whole, other = tmp_path / "a", tmp_path / "b"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(folder_module, "BLOCK", 128)
        patch.setattr(module, "_GROUP", 64)
        write_parquet_folder(run, shards, str(whole), OPTIONS)
    write_parquet_folder(run, shards, str(other), OPTIONS, Processes(2))
    assert contents(whole) == contents(other)


def test_what_was_broken_off_goes_on_and_a_damaged_file_is_made_again(
    run: str, shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    write_parquet_folder(run, shards, str(whole), OPTIONS)
    made: list[str] = []
    make: Callable[[Any], int] = module.make_file

    def _break_off(task: Any) -> int:
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(Path(task.path).name)
        return make(task)

    monkeypatch.setattr(module, "make_file", _break_off)
    with pytest.raises(KeyboardInterrupt):
        write_parquet_folder(run, shards, str(out), OPTIONS)
    assert not out.exists()
    with pytest.raises(UserError, match="other settings"):
        write_parquet_folder(run, shards, str(out), FolderOptions(flip=True))
    (cut,) = tmp_path.glob(".out*/part-000001.parquet")
    cut.write_bytes(cut.read_bytes()[:-9])
    made[:] = ["not counted"] * 3
    write_parquet_folder(run, shards, str(out), OPTIONS)
    assert made[3:] == [f"part-{n:06d}.parquet" for n in (1, 2, 3)]
    assert contents(out) == contents(whole)


def test_a_folder_in_a_store_goes_on_where_it_was_broken_off(
    run: str, shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, filesystem = "memory://shelf/rows", fsspec.filesystem("memory")
    write_parquet_folder(run, shards, str(tmp_path / "whole"), OPTIONS)
    made: list[str] = []
    make: Callable[[Any], int] = module.make_file

    def _break_off(task: Any) -> int:
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(task.path)
        return make(task)

    monkeypatch.setattr(module, "make_file", _break_off)
    words = ["embed", run, "--images", shards, "--format", "parquet", "--workers", "1"]
    words += ["--out", out]
    assert cli.run(words) == 130
    assert cli.run([*words, "--flip"]) == 2
    made[:] = ["not counted"] * 3
    assert cli.run(words) == 0
    assert made[3:] == [f"{out}/part-{n:06d}.parquet" for n in (2, 3)]
    found = {
        name.rpartition("/")[2]: filesystem.cat_file(name)
        for name in filesystem.find("/shelf/rows")
    }
    assert found == contents(tmp_path / "whole"), "no journal is left, nor a trial"
    assert cli.run(words) == 2, "it is complete"


def test_the_command_says_how_to_use_them(
    run: str, shards: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["embed", run, "--images", shards, "--format", "parquet", "--workers", "1", "--out"]
    assert cli.run([*words, str(tmp_path / "rows")]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "rows: 360 embeddings of 32, 4 files" in said and "pandas.read_parquet" in said
    assert cli.run([*words, str(tmp_path / "rows.npz")]) == 2
