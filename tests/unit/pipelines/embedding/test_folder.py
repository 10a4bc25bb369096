"""A folder of embeddings: the same bytes whoever writes it and however often that is broken off."""

from __future__ import annotations

import json
import pickle
import random
import shutil
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from mhe_dist.distributed.topology import Topology
from mhe_dist.errors import RunError, UserError
from pipelines.embedding import write_folder as module
from pipelines.embedding.embeddings import BLOCK, embed_set, normalize_embeddings
from pipelines.embedding.folder import MANIFEST, ROWS_FILE, EmbeddingsFolder
from pipelines.embedding.write_folder import FolderOptions, part_bounds, write_folder
from pipelines.runs.trained import load_trained_backbone
from pipelines.shards.index import ShardIndex
from pipelines.storage.worker_pool import Processes
from tests.support import tiny
from tests.support.files import contents

OPTIONS = FolderOptions()


@pytest.fixture(autouse=True)
def small_parts() -> Iterator[None]:
    """A part ends with each of the four shards, of 100, 100, 100 and 60 samples: 14 blocks."""
    with small():
        yield


load_once = lru_cache(load_trained_backbone)


@contextmanager
def small() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "load_trained_backbone", load_once)
        patch.setattr(module, "PART_ROWS", 100)
        patch.setattr(module, "BLOCK", 32)
        yield


@pytest.fixture(scope="module")
def whole(run: str, shards: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an attempt gives that nothing breaks off."""
    out = tmp_path_factory.mktemp("whole") / "out"
    with small():
        write_folder(run, shards, str(out), OPTIONS)
    return out


class Shuffled:
    """Workers that take the tasks in another order."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def map_unordered(
        self, function: Callable[[Any], Any], tasks: Iterable[tuple[int, Any]]
    ) -> Generator[tuple[int, Any]]:
        for number, task in random.Random(self.seed).sample(found := list(tasks), len(found)):
            yield number, function(task)


class Lost(Exception):
    pass


def test_rows_are_those_of_the_backbone_and_labels_those_of_the_index(
    run: str, shards: str, whole: Path
) -> None:
    folder, index = EmbeddingsFolder.open(str(whole)), ShardIndex.load(shards)
    expected = embed_set(load_trained_backbone(run).embed, index, Topology(), tiny.SIDE)
    assert expected is not None
    np.testing.assert_allclose(folder.rows, expected.embeddings, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(folder.labels, expected.labels)
    np.testing.assert_array_equal(np.load(whole / ROWS_FILE), folder.rows)
    assert folder.rows.dtype == np.float32 and not folder.rows.flags.writeable
    assert [part.rows for part in folder.parts] == [100, 100, 100, 60]
    assert not folder.find_faults()
    assert sorted(path.name for path in whole.iterdir()) == [MANIFEST, ROWS_FILE]
    assert len(pickle.dumps(folder)) < 3_000, "no rows travel"


def test_neither_the_order_of_parts_nor_the_threads_of_the_caller_change_a_bit(
    run: str, shards: str, whole: Path, tmp_path: Path
) -> None:
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        write_folder(run, shards, str(tmp_path / "out"), OPTIONS, Shuffled(1))
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)
    assert contents(tmp_path / "out") == contents(whole)


@pytest.mark.parametrize("seed", range(4))
def test_broken_off_anywhere_and_typed_again_it_is_the_same(
    run: str, shards: str, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    out, blocks = tmp_path / "out", module.stored_blocks
    left = random.Random(seed).randrange(14)  # in the middle of a part, too

    def some_blocks(*args: Any) -> Iterator[Any]:
        nonlocal left
        for rows in blocks(*args):
            left -= 1
            if left < 0:
                raise Lost
            yield rows

    monkeypatch.setattr(module, "stored_blocks", some_blocks)
    with pytest.raises(Lost):
        write_folder(run, shards, str(out), OPTIONS, Shuffled(seed))
    with pytest.raises(UserError, match=r"of 360 embeddings are missing: type the mhe embed"):
        EmbeddingsFolder.open(str(out))
    finished = len(list((out / ".partial" / "parts").glob("0*.json")))
    made: list[int] = []
    left = 14
    monkeypatch.setattr(module, "_PartWriter", counted(module._PartWriter, made))
    write_folder(run, shards, str(out), OPTIONS, Shuffled(seed + 9))
    assert contents(out) == contents(whole)
    assert len(made) == 4 - finished, "what was finished was not made again"


def counted(writer: Any, made: list[int]) -> Any:
    def count(folder: EmbeddingsFolder, first: int) -> Any:
        made.append(first)
        return writer(folder, first)

    return count


@pytest.mark.parametrize("damage", ["truncated", "foreign", "missing", "header", "longer"])
def test_parts_that_are_damaged_are_noticed_and_made_again(
    run: str,
    shards: str,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    damage: str,
) -> None:
    out, made = tmp_path / "out", list[int]()
    shutil.copytree(whole, out)
    file = out / ROWS_FILE
    data = file.read_bytes()
    size = 128 + 250 * 32 * 4  # in the third part
    bad = {
        "truncated": data[:size],
        "foreign": data[:size] + bytes(8) + data[size + 8 :],
        "missing": b"",
        "header": bytes(128) + data[128:],
        "longer": data + b"more",
    }[damage]
    file.write_bytes(bad)
    if damage == "missing":
        file.unlink()
    if damage == "foreign":
        assert [p.first for p in EmbeddingsFolder.open(str(out)).find_faults()] == [200]
    else:
        with pytest.raises(UserError, match=r"embeddings\.npy: .*type the mhe embed that made it"):
            EmbeddingsFolder.open(str(out))
    monkeypatch.setattr(module, "_PartWriter", counted(module._PartWriter, made))
    write_folder(run, shards, str(out), OPTIONS)
    assert contents(out) == contents(whole)
    expected = {"truncated": [200, 300], "foreign": [200], "missing": [0, 100, 200, 300]}
    assert made == expected.get(damage, [])


def test_another_model_data_set_or_setting_is_refused_by_name(
    run: str, shards: str, whole: Path, tmp_path: Path
) -> None:
    others = tiny.write_shards(tmp_path / "others", first=5)
    with pytest.raises(UserError, match=rf"with data set {shards}, not {others}; type what made"):
        write_folder(run, others, str(whole), OPTIONS)
    trained = tiny.trained_run(tmp_path / "runs", shards, model={"kwargs": {"channels": [8] * 4}})
    words = rf"with model {run}/checkpoints/step_00000024 \(step 24, sha256:\w+\), not {tmp_path}"
    with pytest.raises(UserError, match=words):
        write_folder(trained.run.path, shards, str(whole), OPTIONS)
    with pytest.raises(UserError, match="holds embeddings with flip False, not True"):
        write_folder(run, shards, str(whole), OPTIONS._replace(flip=True))
    moved = shutil.move(shards, tmp_path / "moved")
    try:
        with pytest.raises(UserError, match=rf"{shards}: no shards here"):
            _ = EmbeddingsFolder.open(str(whole)).labels
        write_folder(run, str(moved), str(whole), OPTIONS)
        assert len(EmbeddingsFolder.open(str(whole)).labels) == 360, "it may lie elsewhere"
    finally:
        shutil.move(moved, shards)
        write_folder(run, shards, str(whole), OPTIONS)


def test_what_cannot_work_is_refused_before_any_worker_starts(
    run: str, shards: str, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(out: Path | str, match: str, source: str = shards, **options: Any) -> None:
        with pytest.raises(UserError, match=match):
            write_folder(run, source, str(out), OPTIONS._replace(**options), NoWorkers())

    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(b"")
    refused(tmp_path / "photos", "is a folder of something else")
    refused(tmp_path / "photos" / "a.jpg", "is a file; name a folder")
    refused(tmp_path / "a", "follows the index of shards", str(tmp_path / "photos"))
    refused(tmp_path / "a", "--dtype float8: choose float32 or float16", dtype="float8")
    refused("/proc/made", "^/proc/made: is not there, and nothing can be made below /proc/")
    refused("memory://bucket/a", "written in place and mapped, which a store cannot")
    lock = module.lock_folder(whole / ".partial", "held")
    refused(whole, "another process is making it right now")
    assert lock is not None
    module.os.close(lock)
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / MANIFEST).write_text(json.dumps({"format": "mhe-embeddings-9"}))
    refused(tmp_path / "old", "not embeddings of format mhe-embeddings-1")
    (tmp_path / "old" / MANIFEST).write_text(json.dumps({"format": "mhe-embeddings-1"}))
    refused(tmp_path / "old", "damaged .KeyError")
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: SimpleNamespace(free=1 << 14))
    refused(tmp_path / "b", "1 MiB are still to be written and 1 MiB are free: make room")


class NoWorkers:
    def map_unordered(self, *_: object) -> Generator[Any]:
        raise AssertionError("no worker is started")


def test_rows_of_length_one_in_half_the_bytes(
    run: str, shards: str, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = FolderOptions(normalize=True, dtype="float16")
    folder = write_folder(run, shards, str(tmp_path / "out"), options)
    rows = normalize_embeddings(EmbeddingsFolder.open(str(whole)).rows)
    np.testing.assert_array_equal(folder.rows, rows.astype(np.float16))
    assert Path(folder.rows_path).stat().st_size == 128 + 360 * 32 * 2
    embedder = module.load_embedder
    monkeypatch.setattr(module, "load_embedder", lambda *a: lambda x: embedder(*a)(x) * 1e6)
    with pytest.raises(RunError, match="beyond the range of float16; embed with --normalize"):
        write_folder(run, shards, str(tmp_path / "b"), FolderOptions(dtype="float16"))


def test_a_checkpoint_that_changes_meanwhile_is_noticed(
    run: str, shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = module._recipe
    monkeypatch.setattr(module, "_recipe", lambda *a: replace(recipe(*a), model_digest="sha256:0"))
    with pytest.raises(RunError, match="the checkpoint was changed"):
        write_folder(run, shards, str(tmp_path / "out"), OPTIONS)


def test_part_bounds_follow_whole_shards() -> None:
    index = ShardIndex("x", 1, [SimpleNamespace(samples=n) for n in (60, 50, 0, 200, 1, 3)])  # type: ignore[list-item]
    assert part_bounds(index) == [0, 2, 4, 6]


@pytest.mark.slow
@pytest.mark.long
def test_any_number_of_processes_writes_the_same_bytes(
    run: str, shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BLOCK", BLOCK)  # as in new processes
    for count in (1, 2):
        write_folder(run, shards, str(tmp_path / str(count)), OPTIONS, Processes(count))
    assert contents(tmp_path / "1") == contents(tmp_path / "2")
