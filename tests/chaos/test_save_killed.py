"""A process that is killed while it saves, at any byte, leaves the checkpoint before."""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fsspec.implementations.local import LocalFileOpener
from torch import Tensor

from mhe_dist.checkpoint.store import CheckpointStore
from mhe_dist.distributed.topology import Topology
from tests.support.waiting import WATCHDOG_S

pytestmark = pytest.mark.chaos

SEED, POINTS = 20, 50


def tensors(step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {f"model.{i}": torch.randn(40 + i, generator=generator) for i in range(5)}


def save(root: str, step: int) -> None:
    store = CheckpointStore(root, Topology())
    store.save(step, tensors(step), {}, {"step": step})
    store.wait()


class Executioner:
    """Counts the bytes that are written, a rename as one more, and ends the process in between."""

    def __init__(self, at: int) -> None:
        self._left, self.seen = at, 0
        self._write, self._replace = LocalFileOpener.write, os.replace
        LocalFileOpener.write = lambda file, data: self.write(file, bytes(data))
        os.replace = self.replace

    def write(self, file: Any, data: bytes) -> int:
        self._count(len(data), lambda left: (self._write(file, data[:left]), file.flush()))
        return self._write(file, data)

    def replace(self, source: Any, target: Any) -> None:
        self._count(1, lambda left: None)
        self._replace(source, target)

    def _count(self, size: int, last_words: Callable[[int], Any]) -> None:
        if self._left < size:
            last_words(self._left)
            os.kill(os.getpid(), signal.SIGKILL)
        self._left -= size
        self.seen += size


def save_and_die(root: str, at: int, sender: Any) -> None:
    executioner = Executioner(at)
    save(root, 2)
    sender.send(executioner.seen)


def killed_at(root: str, at: int) -> int:
    """Bytes that a saving process wrote; 0 if it was killed before."""
    context = multiprocessing.get_context("forkserver")
    ours, theirs = context.Pipe()
    process = context.Process(target=save_and_die, args=(root, at, theirs))
    process.start()
    process.join(WATCHDOG_S)
    assert process.exitcode in (0, -signal.SIGKILL)
    return ours.recv() if ours.poll() else 0


def test_killed_at_any_byte_of_a_save_the_one_before_stands(tmp_path: Path) -> None:
    save(str(tmp_path / "before"), 1)
    total = killed_at(str(shutil.copytree(tmp_path / "before", tmp_path / "whole")), 1 << 40)
    assert total > 1000
    draw = random.Random(SEED)
    points = [0, total - 1, *(draw.randrange(total) for _ in range(POINTS - 2))]
    for at in points:
        root = str(shutil.copytree(tmp_path / "before", tmp_path / f"at_{at}", dirs_exist_ok=True))
        assert killed_at(root, at) == 0, f"survived byte {at} of {total}"
        found = CheckpointStore(root, Topology()).newest()
        assert found is not None and found.step == 1, f"byte {at} of {total}"
        for name, tensor in found.load(lambda name: True).items():
            assert torch.equal(tensor, tensors(1)[name])
    save(root, 2)
    found = CheckpointStore(root, Topology()).newest()
    assert found is not None and found.step == 2
    assert sorted(os.listdir(root)) == ["step_00000002"]
