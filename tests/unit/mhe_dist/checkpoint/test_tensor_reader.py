"""Of a checkpoint in a store, the wanted bytes arrive, with few requests."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.spec import AbstractBufferedFile

from mhe_dist.checkpoint import tensor_reader
from mhe_dist.checkpoint.reader import Checkpoint
from mhe_dist.checkpoint.store import CheckpointStore
from mhe_dist.distributed.topology import Topology
from mhe_dist.errors import RunError

BLOCK = 1 << 20
ROOT = "blocks://run/checkpoints"


class BlockStore(MemoryFileSystem):
    """A store whose streams read a block ahead, as those of S3 read 50 MB."""

    protocol = "blocks"
    requests: ClassVar[list[int]] = []  # bytes of each

    def _open(self, path: str, mode: str = "rb", **more: Any) -> Any:
        if "w" in mode:
            return super()._open(path, mode, **more)
        return BlockFile(self, path, mode, block_size=BLOCK, size=self.info(path)["size"])

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **_: Any):
        data = self.store[self._strip_protocol(path)].getvalue()[start:end]
        self.requests.append(len(data))
        return data


class BlockFile(AbstractBufferedFile):
    def _fetch_range(self, start: int, end: int) -> bytes:
        return self.fs.cat_file(self.path, start, end)


@pytest.fixture
def checkpoint() -> Iterator[Checkpoint]:
    """Sixty-four small tensors of a backbone among 16 MiB of rows."""
    fsspec.register_implementation("blocks", BlockStore, clobber=True)
    backbone = {f"model.{n:02d}": torch.full((100 + n,), float(n)) for n in range(64)}
    rows = {f"head/rows/{group}/weight": torch.ones(1 << 18) for group in range(16)}
    store = CheckpointStore(ROOT, Topology())
    store.save(1, backbone | {"model.none": torch.empty(0, 2)}, rows, {})
    store.wait()
    yield Checkpoint(f"{ROOT}/step_00000001", 1)
    fsspec.filesystem("blocks").store.clear()


def test_small_tensors_arrive_by_their_own_bytes_with_few_requests(checkpoint: Checkpoint) -> None:
    """64 KB; a stream read five blocks of 1 MiB for them."""
    checkpoint.names()
    BlockStore.requests.clear()
    tensors = checkpoint.load(lambda name: name.startswith("model."))
    assert list(tensors) == [n for n in checkpoint.names() if n.startswith("model.")]
    assert all(bool((tensors[f"model.{n:02d}"] == n).all()) for n in range(64))
    assert tensors["model.none"].shape == (0, 2)
    stored = [each for each in checkpoint._stored.values() if each.name.startswith("model.")]
    assert sum(BlockStore.requests) == sum(each.end - each.begin for each in stored)
    assert len(BlockStore.requests) <= 2


def test_no_request_is_larger_than_its_bound_or_its_tensor(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensor_reader, "_REQUEST_BYTES", 8000)
    checkpoint.names()
    BlockStore.requests.clear()
    tensors = checkpoint.load(lambda name: True)
    large = [size for size in BlockStore.requests if size > 8000]
    assert len(tensors) == 81 and len(large) == 16 and max(large) < BLOCK + 8000


def test_what_is_not_as_the_checkpoint_says_is_named(tmp_path: Any) -> None:
    store = CheckpointStore(str(tmp_path), Topology())
    store.save(1, {"weight": torch.ones(300), "bias": torch.ones(3)}, {}, {})
    store.wait()
    found = Checkpoint(f"{tmp_path}/step_00000001", 1)
    found._stored["weight"] = found._stored["bias"]._replace(name="weight")
    with pytest.raises(RunError, match=r"step_00000001: weight is torch\.float32 \[3\]"):
        found.load(lambda name: name == "weight")
