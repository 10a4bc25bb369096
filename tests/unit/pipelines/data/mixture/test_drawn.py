"""Draws in files: one process draws, all map; a file that is not the right one is drawn again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from mhe_dist.config.data import DataConfig
from mhe_dist.errors import UserError
from mhe_dist.seeds import generator
from pipelines.bench.scale.index import write_synthetic_index
from pipelines.data.mixture import dataset
from pipelines.data.mixture.dataset import DatasetPass, draw_at_most
from pipelines.data.mixture.index import Mixture, open_training_index
from pipelines.data.order import SampleOrder
from pipelines.shards.index import ShardIndex
from pipelines.storage.cache import FileCache
from tests.support.faults import disk_full


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("set")
    write_synthetic_index(str(path), 500, 60)
    return str(path)


@pytest.fixture
def draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Epochs that were drawn, in a node of its own."""
    found: list[int] = []
    plain = DatasetPass._numbers

    def counted(part: DatasetPass, epoch: int) -> np.ndarray:
        found.append(epoch)
        return plain(part, epoch)

    monkeypatch.setattr(DatasetPass, "_numbers", counted)
    monkeypatch.setenv("MHE_CACHE_DIR", str(tmp_path / "node"))
    yield found


def opened(folder: str, **data: object) -> Mixture:
    found = open_training_index(DataConfig(shards=folder, **data), seed=5)
    assert isinstance(found, Mixture)
    return found


def listed(found: Mixture, epoch: int) -> list[list[int]]:
    return [numbers.tolist() for numbers in found.draw(epoch)]


def files_of(tmp_path: Path) -> list[Path]:
    return sorted(p for p in (tmp_path / "node" / "draws").iterdir() if p.name != "lock")


def test_an_epoch_is_drawn_once_on_a_node(folder: str, draws: list[int], tmp_path: Path) -> None:
    first = listed(opened(folder, images_per_class=3), 1)
    assert listed(opened(folder, images_per_class=3), 1) == first
    assert draws == [1]
    (file,) = files_of(tmp_path)
    assert file.stat().st_size == 64 + 2 * sum(map(len, first))
    assert listed(opened(folder, images_per_class=3), 2) != first
    assert draws == [1, 2]
    opened(folder, images_per_class=2).draw(1)
    open_training_index(DataConfig(shards=folder, images_per_class=3), seed=6).draw(1)
    assert draws == [1, 2, 1, 1] and len(files_of(tmp_path)) == 4


def test_what_is_taken_whole_needs_no_file(folder: str, draws: list[int], tmp_path: Path) -> None:
    drawn = opened(folder, mix=[{"shards": folder}]).draw(0)
    assert list(drawn) == [None] * 18
    assert drawn.sizes.tolist() == [*[60] * 8, 20] * 2
    drawn = opened(folder, mix=[{"shards": folder, "weight": 1.5}]).draw(0)
    assert [numbers is None for numbers in drawn] == [True] * 18 + [False] * 9
    assert drawn.sizes[18:].sum() == 250
    assert draws == [0]
    with pytest.raises(IndexError):
        drawn[27]


def remove(file: Path, other: bytes) -> None:
    file.unlink()


def truncate(file: Path, other: bytes) -> None:
    file.unlink()
    file.write_bytes(other[:-2])


def of_another_epoch(file: Path, other: bytes) -> None:
    assert len(other) == file.stat().st_size
    file.unlink()
    file.write_bytes(other)


@pytest.mark.parametrize("damage", [remove, truncate, of_another_epoch])
def test_what_lies_in_the_way_is_drawn_again(
    folder: str, draws: list[int], tmp_path: Path, damage: Callable[[Path, bytes], None]
) -> None:
    mapped = opened(folder, images_per_class=3).draw(1)  # by a process that goes on
    first = [numbers.tolist() for numbers in mapped]
    (file,) = files_of(tmp_path)
    opened(folder, images_per_class=3).draw(2)
    (other,) = (each for each in files_of(tmp_path) if each != file)
    damage(file, other.read_bytes())
    assert listed(opened(folder, images_per_class=3), 1) == first
    assert draws == [1, 2, 1]
    assert [numbers.tolist() for numbers in mapped] == first


def test_a_full_disk_is_told_before_a_sample_of_the_epoch(
    folder: str, draws: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = opened(folder, images_per_class=3)
    with monkeypatch.context() as patch:
        patch.setattr(FileCache, "open", lambda *_: None)  # no room beside what others make
        with pytest.raises(UserError, match="other processes are drawing there"):
            found.draw(0)
    order = SampleOrder(found.sizes, 4, 16, 5, found)
    monkeypatch.setattr(FileCache, "open", disk_full)
    with pytest.raises(UserError, match=r"draws: the samples of an epoch cannot be kept") as caught:
        order.batch(0, 8)
    assert "No space left" in str(caught.value) and "MHE_CACHE_DIR" in str(caught.value)


@pytest.mark.parametrize(("pool", "part"), [(1, 1 << 20), (7, 77), (1 << 23, 13)])
@pytest.mark.parametrize("choice", [{"images_per_class": 3}, {"images_per_class": 2, "mix": True}])
def test_a_draw_in_parts_is_the_draw_of_the_whole(
    folder: str, monkeypatch: pytest.MonkeyPatch, pool: int, part: int, choice: dict[str, object]
) -> None:
    """As it was made when all labels were sorted in memory."""
    monkeypatch.setattr(dataset, "_POOL", pool)
    monkeypatch.setattr(dataset, "_PART", part)
    if choice.get("mix"):
        choice = choice | {"mix": [{"shards": folder, "weight": 0.7}]}
    found = opened(folder, **choice)
    labels = np.concatenate([shard.labels for shard in ShardIndex.load(folder).shards])
    numbers = np.argsort(labels, kind="stable")
    counts = np.unique(labels, return_counts=True)[1]
    for each in found.passes:
        limit, keys = each.source.per_class, (each.number, 4)
        chosen = numbers[draw_at_most(counts, limit, generator(5, "view/classes", *keys))]
        assert each.source.pass_samples == len(chosen)
        if len(chosen) > each.samples:
            rng = generator(5, "view/share", *keys)
            chosen = chosen[draw_at_most([len(chosen)], each.samples, rng)]
        assert each._numbers(4).tolist() == np.sort(chosen).tolist()
