"""Shards that are made when they are asked for are those that a list would hold."""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mhe_dist.config.data import DataConfig, RemoteConfig
from mhe_dist.errors import UserError
from pipelines.bench.scale.index import write_synthetic_index
from pipelines.data.mixture.index import open_training_index
from pipelines.data.order import SampleOrder
from pipelines.loader.prefetch import WindowReader
from pipelines.shards.index import ShardIndex
from pipelines.shards.shard import MappedShard, Shard
from pipelines.shards.shard_list import digest_text
from tests.support.data.shard_sets import PACKED


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("set")
    write_synthetic_index(str(path), 25, 4)
    return str(path)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """URLs of the shards that were made."""
    found: list[str] = []
    plain = MappedShard.__post_init__

    def counted(shard: MappedShard) -> None:
        found.append(shard.url)
        plain(shard)

    monkeypatch.setattr(MappedShard, "__post_init__", counted)
    return found


def test_it_is_a_list_of_shards(folder: str) -> None:
    index = ShardIndex.load(folder)
    shards, listed = index.shards, list(index.shards)
    assert [shard.samples for shard in listed] == [4] * 6 + [1] == index.sizes.tolist()
    assert [shard.first for shard in listed if isinstance(shard, MappedShard)] == [*range(0, 25, 4)]
    assert len(shards) == 7
    assert (shards[2], shards[-1], shards[1:3]) == (listed[2], listed[6], listed[1:3])
    assert shards == listed and listed == shards and shards != listed[:6]
    for wrong in (7, -8):
        with pytest.raises(IndexError):
            shards[wrong]
    again = pickle.loads(pickle.dumps(shards))
    assert again == shards
    assert len(pickle.dumps(shards)) == len(pickle.dumps(ShardIndex.load(folder).shards))


def test_no_shard_is_made_to_open_an_index(folder: str, made: list[str]) -> None:
    index = ShardIndex.load(folder)
    assert (index.samples, index.is_packed, len(index.digest)) == (25, False, 71)
    mixed = open_training_index(DataConfig(shards=folder, mix=[{"shards": folder}]), 0)
    assert mixed.samples == 50
    assert index.is_local and mixed.is_local
    order = SampleOrder(mixed.sizes, 2, 4, 0)
    with WindowReader(mixed, order, RemoteConfig(), range(9)):
        pass
    assert len(made) <= 4, "one of each pass, to know the columns"
    assert mixed.shards[9].url == f"{folder}/synthetic-000002.tar"
    assert mixed.url(9) == mixed.shards[9].url


def test_a_shard_of_a_store_is_not_local_whatever_the_folder_is(folder: str) -> None:
    index = ShardIndex.load(folder)
    for urls, is_local in (
        (["a.tar", f"{folder}/b.tar"], True),
        (["a.tar", "s3://b/c.tar"], False),
    ):
        shards = [Shard(url, 1, 512, "") for url in urls]
        assert replace(index, shards=shards).is_local is is_local
    assert not replace(index, folder="memory://set").is_local


def test_those_that_were_asked_for_are_kept_but_not_all(
    folder: str, made: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = ShardIndex.load(folder).shards
    monkeypatch.setattr(type(shards), "kept", 3)
    made.clear()
    for number in (0, 1, 0, 1, 2, 0):
        shards[number]
    assert len(made) == 2, "the first one was made when the index was loaded"
    for number in range(7):
        shards[number]
    assert len(shards._made) <= 3


def test_tables_that_take_time_to_unpack_are_kept() -> None:
    own = str(PACKED / "own")
    mixed = open_training_index(DataConfig(shards=own, mix=[{"shards": own}]), 0)
    assert mixed.shards.kept == 4
    assert mixed.shards[3] is mixed.shards[3]


@settings(deadline=None, max_examples=20)
@given(st.lists(st.tuples(st.text(), st.integers(0, 2**40), st.text()), max_size=5))
def test_the_text_of_a_digest_is_json(rows: list[tuple[str, int, str]]) -> None:
    """As it was made when it was written with `json.dumps`."""
    shards = [Shard(url, samples, 0, checksum) for url, samples, checksum in rows]
    text = json.dumps([list(row) for row in rows])
    assert digest_text(shards) == text
    digest = hashlib.sha256(f"[7, {text}]".encode()).hexdigest()
    assert ShardIndex("x", 7, shards).digest == f"sha256:{digest}"


def change(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda row: row.update({key: value})


@pytest.mark.parametrize(
    "damage",
    [
        change("url", 3),
        change("checksum", None),
        change("samples", "4"),
        change("samples", 4.0),
        change("samples", 5),
        change("samples", -4),
        change("bytes", 2**63),
        change("bytes", True),
        change("end", 10**9),
        change("end", -1),
        change("more", 1),
        lambda row: row.pop("end"),
    ],
)
def test_a_damaged_row_is_refused_when_the_index_is_loaded(
    folder: str, tmp_path: Path, damage: Callable[[dict[str, Any]], None]
) -> None:
    content = json.loads(Path(folder, "index.json").read_text())
    damage(content["shards"][1])
    (tmp_path / "index.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"index\.json: damaged"):
        ShardIndex.load(str(tmp_path))
