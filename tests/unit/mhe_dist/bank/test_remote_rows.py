"""Rows of the host that a GPU uses, on a CPU: any interleaving of its threads gives the same."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mhe_dist.bank import remote_rows
from mhe_dist.bank.remote_rows import RemoteRows
from mhe_dist.bank.row_store import RowStore
from pipelines.bench.fake_cuda.device import fake_cuda

UNITS = 12


class Queue:
    """A pool of one thread whose jobs run when the test says so, or when they are waited for."""

    def __init__(self) -> None:
        self.jobs: list[tuple[Future, Callable[[], Any]]] = []

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future:
        queue = self

        class Waiting(Future):
            def result(self, timeout: float | None = None) -> Any:
                while not self.done():
                    queue.run_one()
                return super().result(timeout)

        job: Future = Waiting()
        self.jobs.append((job, lambda: function(*arguments)))
        return job

    def run_one(self) -> None:
        if self.jobs:
            job, function = self.jobs.pop(0)
            try:
                job.set_result(function())
            except Exception as error:
                job.set_exception(error)


def remote(rows: Tensor) -> RemoteRows:
    found = RemoteRows(rows, torch.device("cpu"))
    found._reader, found._writer = Queue(), Queue()
    return found


def values(*units: int) -> Tensor:
    return torch.tensor(units).float().view(-1, 1, 1).repeat(1, 2, 3)


def units(*numbers: int) -> np.ndarray:
    return np.array(numbers, dtype=np.int64)


def test_what_was_fetched_ahead_is_given_and_only_outdated_rows_are_replaced() -> None:
    rows = remote(values(*range(UNITS)))
    rows.prefetch(units(4, 1, 2))
    rows._reader.run_one()
    rows.put(units(2, 7), values(20, 70))  # of the step before, which ends now
    rows.end_step()
    rows.rows[4] = -1  # what nobody tells the copies of
    assert torch.equal(rows.get(units(2, 4, 1)), values(20, 4, 1))
    assert (rows.traffic.units, rows.traffic.ahead) == (3, 3)


def test_missing_rows_are_read_and_hardly_any_hit_reads_all() -> None:
    rows = remote(values(*range(UNITS)))
    rows.prefetch(units(1, 2))
    rows.end_step()
    assert torch.equal(rows.get(units(1, 9, 2)), values(1, 9, 2))
    assert torch.equal(rows.get(units(1, 9, 8)), values(1, 9, 8))
    assert (rows.traffic.units, rows.traffic.ahead) == (6, 2)


def test_copies_serve_the_step_that_they_are_for_beside_those_of_the_next() -> None:
    rows = remote(values(*range(UNITS)))
    rows.prefetch(units(1, 2))  # in step 0, for step 1
    rows.end_step()
    rows.prefetch(units(3, 4))  # in step 1, for step 2
    assert torch.equal(rows.get(units(2, 1)), values(2, 1))
    rows.put(units(2, 1), values(22, 11))
    assert torch.equal(rows.get(units(1, 2)), values(11, 22))
    rows.end_step()
    assert torch.equal(rows.get(units(3, 4)), values(3, 4))
    assert rows.traffic.ahead == 6


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("limit", [10**9, 200])
def test_any_interleaving_equals_rows_in_place(
    seed: int, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_rows, "WRITTEN_BYTES", limit)
    rng = np.random.default_rng(seed)
    expected = values(*range(UNITS))
    rows, written = remote(expected.clone()), 100
    for _ in range(60):
        some = rng.permutation(UNITS)[: rng.integers(0, UNITS)]
        start, stop = np.sort(rng.integers(0, UNITS + 1, 2)).tolist()
        local = slice(start, stop) if rng.random() < 0.2 else some
        action = rng.integers(0, 6)
        if action == 0:
            rows.prefetch(some)
        elif action == 1:
            rows.end_step()
        elif action == 2:
            new = values(*range(written, written + len(expected[local])))
            written += len(new)
            expected[local] = new
            rows.put(local, new)
        elif action == 3:
            (rows._reader if rng.random() < 0.5 else rows._writer).run_one()
        elif action == 4 and rng.random() < 0.2:
            rows.wait_until_stored()
            assert torch.equal(rows.rows, expected)
        else:
            assert torch.equal(rows.get(local), expected[local])
    rows.wait_until_stored()
    assert torch.equal(rows.rows, expected)


def test_rows_that_are_kept_on_the_device_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_rows, "WRITTEN_BYTES", 3 * values(0).nbytes)
    rows = remote(values(*range(UNITS)))
    for number in range(UNITS):
        rows.put(units(number), values(number + 50))
        assert rows._written_bytes <= remote_rows.WRITTEN_BYTES
    assert torch.equal(rows.get(units(0, 11)), values(50, 61))


def test_what_goes_wrong_on_a_thread_is_raised() -> None:
    rows = remote(values(*range(UNITS)))
    rows.put(units(UNITS + 1), values(1))
    with pytest.raises(IndexError):
        rows.wait_until_stored()


@pytest.mark.parametrize("memory", ["host", "file"])
def test_a_store_of_the_host_makes_a_gpu_wait_for_nothing(memory: str, tmp_path) -> None:
    cuda = torch.device("cuda", 0)
    with fake_cuda() as gpu:
        store = RowStore((UNITS, 64, 512), torch.float32, memory, cuda, tmp_path / "rows")
        store.prefetch(units(3, 4, 5))
        store.release()
        for local in (units(5, 3), units(7, 8), slice(2, 6)):
            rows = store.get(local)
            assert rows.device == cuda
            store.put(local, rows + 1)
        store.release()
    assert gpu.ledger.of("sync") == []
    assert store.traffic.ahead == 2


def test_threads_work_on_the_gpu_of_their_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """A new thread is on the first GPU, where to come back opens a context of each rank."""
    chosen: dict[str, torch.device] = {}

    def set_device(device: torch.device) -> None:
        chosen[threading.current_thread().name] = device

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "set_device", set_device)
    rows = RemoteRows(values(1), gpu := torch.device("cuda", 3))
    for pool in (rows._reader, rows._writer):
        pool.submit(int).result()
    assert chosen == {"row reader_0": gpu, "row writer_0": gpu}
