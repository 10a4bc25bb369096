"""One run's folder has one holder at a time, who is named; a dead one's lock is taken over."""

from __future__ import annotations

import errno
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import fsspec
import pytest

from mhe_dist.distributed.topology import Topology
from mhe_dist.errors import Preempted, RunError, StorageUnavailable, UserError
from pipelines.pretrain import preemption
from pipelines.pretrain.exclusive import run_locked
from pipelines.pretrain.main import run_pretraining
from pipelines.runs import lease, lock
from pipelines.runs.lease import Lease
from pipelines.runs.lock import FileLock, Holder, refuse_locked
from tests.support import tiny
from tests.support.waiting import WATCHDOG_S, Clock, wait_for

OTHER = Holder("theirs", "other-host", 4242, "2026-01-02T03:04:05+00:00")
NAMED = "process 4242 on other-host, since 2026-01-02T03:04:05"


@pytest.fixture(autouse=True)
def quick(prompt_retries: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lease lives, since a pause of this machine must not look like a dead holder."""
    for name, seconds in {"BEAT_S": 0.05, "STALE_S": WATCHDOG_S, "SETTLE_S": 0.0}.items():
        monkeypatch.setattr(lease, name, seconds)
    monkeypatch.setattr(lease, "POLL_S", 0.01)


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Of whoever waits for a lock."""
    clock = Clock()
    monkeypatch.setattr(lock, "time", clock)
    return clock


@pytest.fixture
def store() -> Iterator[str]:
    """URL of a run in a store."""
    yield "memory://lock/run"
    fsspec.filesystem("memory").store.clear()


def not_told() -> bool:
    return False


def test_the_second_run_is_told_who_trains_the_first_and_what_to_do(tmp_path: Path) -> None:
    first = FileLock(str(tmp_path), OTHER)
    assert first.acquire(not_told) is None
    (line,) = (tmp_path / "run.lock").read_text().splitlines()
    assert json.loads(line).items() >= {"host": "other-host", "pid": 4242}.items()
    with pytest.raises(UserError, match=f"{NAMED}.*run.name=") as refused:
        FileLock(str(tmp_path), Holder()).acquire(not_told)
    assert str(tmp_path) in str(refused.value)
    first.release()
    assert list(tmp_path.iterdir()) == []


def test_it_waits_for_a_process_that_is_about_to_end(tmp_path: Path) -> None:
    first = FileLock(str(tmp_path), OTHER)
    first.acquire(not_told)
    looks: list[int] = []

    def end_at_the_third_look() -> bool:
        looks.append(1)
        if len(looks) == 3:
            first.release()
        return False

    second = FileLock(str(tmp_path), Holder())
    assert second.acquire(end_at_the_third_look) is None, "given back, not taken over"
    assert len(looks) == 3
    second.release()


def test_two_that_wait_for_one_never_both_have_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside, together = 0, 0

    def work() -> None:
        nonlocal inside, together
        for _ in range(20):
            own = FileLock(str(tmp_path), Holder())
            own.acquire(not_told)
            inside += 1
            together = max(together, inside)
            inside -= 1
            own.release()

    monkeypatch.setattr(lock, "time", time)
    monkeypatch.setattr(lock, "WAIT_S", WATCHDOG_S)
    monkeypatch.setattr(lock, "POLL_S", 0.0)
    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == 1
    assert list(tmp_path.iterdir()) == []


def test_a_forked_child_does_not_keep_the_lock(tmp_path: Path) -> None:
    first = FileLock(str(tmp_path), OTHER)
    first.acquire(not_told)
    here, there = socket.socketpair()
    child = os.fork()
    if child == 0:  # lives on while its parent dies
        here.close()
        there.send(b"begun")
        there.recv(1)
        os._exit(0)
    there.close()
    assert here.recv(5) == b"begun"
    first._close()  # as the kernel does it
    second = FileLock(str(tmp_path), Holder())
    assert second.acquire(not_told) == OTHER, "taken over"
    second.release()
    here.close()
    os.waitpid(child, 0)


def test_a_lost_worker_of_the_same_command_is_waited_for_and_then_replaced(
    tmp_path: Path, clock: Clock
) -> None:
    lost = FileLock(str(tmp_path), Holder("ours", "lost-node", 1))
    lost.acquire(not_told)
    restarted = FileLock(str(tmp_path), Holder("ours"))
    restarted.acquire(not_told)
    assert lock.WAIT_S <= clock.now < lock.WAIT_S + 3 * lock.POLL_S
    with pytest.raises(UserError):
        FileLock(str(tmp_path), OTHER).acquire(not_told)
    lost.release()
    assert (tmp_path / "run.lock").exists(), "it is not that one's any more"
    restarted.release()


def test_a_look_before_anything_is_started(tmp_path: Path, store: str) -> None:
    said: list[str] = []
    for path in (str(tmp_path / "nowhere"), str(tmp_path), store):
        refuse_locked(path, said.append)
    (tmp_path / "run.lock").write_bytes(OTHER.to_line())
    refuse_locked(str(tmp_path), said.append)
    assert said == [], "nobody holds it"
    first = FileLock(str(tmp_path), OTHER)
    first.acquire(not_told)
    with pytest.raises(UserError, match=NAMED):
        refuse_locked(str(tmp_path), said.append)
    assert said == [f"waiting for {OTHER} to leave {tmp_path}"]
    first.release()


@pytest.mark.slow
def test_training_refuses_and_takes_over(tmp_path: Path) -> None:
    config = tiny.config(
        tmp_path,
        tiny.write_shards(tmp_path / "shards"),
        run={"name": "held"},
        train={"max_steps": 1},
        checkpoint={"every_steps": 0},
    )
    path = Path(config.run.path)
    first = FileLock(str(path), OTHER)
    first.acquire(not_told)
    with pytest.raises(UserError, match=NAMED):
        run_pretraining(config)
    assert [file.name for file in path.iterdir()] == ["run.lock"], "nothing was written"
    first._close()  # killed
    events: list[dict[str, object]] = []
    run_pretraining(config, events.append)
    taken_over = {"event": "lock_taken_over", "run": config.run.path, "holder": str(OTHER)}
    assert events[0] == taken_over
    assert not (path / "run.lock").exists()


def test_who_is_told_to_stop_waits_no_longer(tmp_path: Path, store: str) -> None:
    FileLock(str(tmp_path), OTHER).acquire(not_told)
    fsspec.filesystem("memory").pipe_file(f"{store}/run.lock", OTHER.to_line(beat=1))
    for path in (str(tmp_path), store):
        preemption.request()
        with pytest.raises(Preempted), run_locked(path, Topology(), "", print):
            pass
    preemption.clear()


def test_a_folder_that_cannot_be_written_is_a_users_mistake(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UserError, match=r"run\.lock cannot be written"),
        run_locked(f"{tmp_path}/file/run", Topology(), "", print),
    ):
        pass


def test_a_lease_is_kept_and_given_back(store: str) -> None:
    first = Lease(store, OTHER)
    assert first.acquire(not_told) is None
    for _ in range(2):  # it changes under the eyes of whoever looks at it
        with pytest.raises(UserError, match=NAMED):
            Lease(store, Holder()).acquire(not_told)
    first.check()
    first.release()
    assert not fsspec.filesystem("memory").exists(f"{store}/run.lock")


def test_a_lease_that_stays_the_same_is_taken_over_whatever_the_clocks_say(
    store: str, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "time", clock)
    monkeypatch.setattr(lease, "STALE_S", 30.0)
    future = Holder("theirs", "other-host", 4242, "2999-01-01T00:00:00+00:00")
    fsspec.filesystem("memory").pipe_file(f"{store}/run.lock", future.to_line(beat=7))
    second = Lease(store, Holder())
    assert second.acquire(not_told) == future
    assert lease.STALE_S <= clock.now < lease.STALE_S + 3 * lease.POLL_S
    second.release()


def test_workers_that_ray_starts_again_do_not_wait_for_a_lease(
    store: str, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "time", clock)
    fsspec.filesystem("memory").pipe_file(f"{store}/run.lock", OTHER.to_line(beat=1))
    second = Lease(store, Holder("theirs"))
    assert second.acquire(not_told) == OTHER
    assert clock.now == lease.SETTLE_S, "that of any lease"
    second.release()


def test_who_lost_a_lease_stops_and_leaves_it(store: str) -> None:
    suspended = Lease(store, Holder())
    suspended.acquire(not_told)

    def has_noticed() -> bool:
        """Written again, for a beat that had begun may follow it."""
        fsspec.filesystem("memory").pipe_file(f"{store}/run.lock", OTHER.to_line(beat=1))
        return not suspended._thread.is_alive()

    wait_for(has_noticed)
    with pytest.raises(RunError, match=f"{NAMED}.*has taken the run over"):
        suspended.check()
    suspended.release()
    assert fsspec.filesystem("memory").exists(f"{store}/run.lock")


def test_of_two_that_take_a_free_lease_at_once_one_gets_it(
    store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both find none, then both write, then both look whose stands."""
    both, write, settled = threading.Barrier(2, timeout=WATCHDOG_S), Lease._write, []
    got: list[Lease] = []
    refused: list[UserError] = []

    def write_together(own: Lease) -> None:
        both.wait()
        write(own)

    def settling(seconds: float) -> None:
        both.wait()
        settled.append(seconds)

    def take() -> None:
        own = Lease(store, Holder())
        try:
            own.acquire(not_told)
            got.append(own)
        except UserError as error:
            refused.append(error)

    monkeypatch.setattr(Lease, "_write", write_together)
    monkeypatch.setattr(lease, "time", SimpleNamespace(monotonic=time.monotonic, sleep=settling))
    monkeypatch.setattr(lease, "SETTLE_S", 1.0)
    monkeypatch.setattr(lease, "BEAT_S", WATCHDOG_S)
    threads = [threading.Thread(target=take) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert settled == [lease.SETTLE_S] * 2
    assert (len(got), len(refused)) == (1, 1)
    got[0].release()


def test_a_store_that_fails_for_a_moment_does_not_end_the_lease(
    store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = Lease(store, Holder())
    own.acquire(not_told)
    failed: list[str] = []

    def fail(path: str) -> bytes:
        failed.append(path)
        raise ZeroDivisionError

    with monkeypatch.context() as patch:
        patch.setattr(own._filesystem, "cat_file", fail)
        wait_for(lambda: len(failed) > 1)
    beat = own._beat
    wait_for(lambda: own._beat > beat)
    own.check()
    own.release()
    assert not fsspec.filesystem("memory").exists(f"{store}/run.lock")


class StoreError(Exception):
    """As gcsfs has one, which is no OSError."""


@pytest.mark.parametrize("method", ["cat_file", "pipe_file"])
@pytest.mark.parametrize("error", [TimeoutError("slow"), StoreError("503"), PermissionError(13)])
def test_a_lease_is_not_refused_for_a_store_that_fails(
    method: str, error: Exception, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That was a user's mistake, after which nothing is tried again."""
    filesystem = fsspec.filesystem("memory")
    real, left = getattr(filesystem, method), [error] * (0 if isinstance(error, OSError) else 3)

    def failing(*args: object) -> object:
        if left:
            raise left.pop()
        return real(*args)

    monkeypatch.setattr(filesystem, method, failing)
    with run_locked(store, Topology(), "", print):
        assert filesystem.exists(f"{store}/run.lock")
    left += [error] * 99
    with pytest.raises(StorageUnavailable), run_locked(store, Topology(), "", print):
        pass


def test_a_disk_that_fails_for_a_moment_neither_refuses_the_lock_nor_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    stale, real, left = OSError(errno.ESTALE, "Stale file handle"), os.open, [1, 2]

    def failing(path: str, *rest: int) -> int:
        if left and str(path).endswith("run.lock"):
            left.pop()
            raise stale
        return real(path, *rest)

    def refuse(path: str) -> None:
        raise stale

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", failing)
        with run_locked(str(tmp_path), Topology(), "", print):
            patch.setattr(os, "unlink", refuse)
    assert "run.lock cannot be removed" in caplog.text
    left += range(99)
    monkeypatch.setattr(os, "open", failing)
    with pytest.raises(StorageUnavailable), run_locked(str(tmp_path), Topology(), "", print):
        pass
