"""What one rank finds out or fails at, all ranks know."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from fsspec.implementations.local import LocalFileSystem

from mhe_dist import storage_retry
from mhe_dist.checkpoint.store import CheckpointStore
from mhe_dist.distributed.failures import decided_by_first, failing_together
from mhe_dist.distributed.topology import Topology
from mhe_dist.errors import Preempted, RunError, StorageUnavailable, UserError
from pipelines.pretrain import finish
from pipelines.pretrain.restarts import read_skipped_steps

KINDS = (UserError, StorageUnavailable, RunError, Preempted, TimeoutError, KeyError)


def decide(topology: Topology) -> dict[str, Any]:
    """What a rank is told of what each would have decided otherwise, and of failures."""
    outcomes: dict[str, Any] = {"rank": decided_by_first(lambda: topology.rank, topology)}
    for kind in KINDS:

        def fail(kind: type[Exception] = kind) -> None:
            raise kind("planted")

        try:
            decided_by_first(fail, topology)
        except Exception as error:
            outcomes[kind.__name__] = f"{type(error).__name__}: {error}"
        try:
            with failing_together(topology):
                if topology.rank == topology.world_size - 1:
                    fail()
        except Exception as error:
            outcomes[f"last {kind.__name__}"] = f"{type(error).__name__}: {error}"
    return outcomes


def test_all_ranks_get_what_the_first_decides_and_failures_keep_their_kind(run_distributed) -> None:
    outcomes, of_the_other = run_distributed(decide, 2)
    assert outcomes == of_the_other and outcomes["rank"] == 0
    for kind in KINDS[:4]:
        assert outcomes[kind.__name__] == f"{kind.__name__}: planted"
    for kind in KINDS[:3]:
        assert outcomes[f"last {kind.__name__}"] == f"{kind.__name__}: planted"
    assert outcomes["TimeoutError"] == "StorageUnavailable: TimeoutError: planted"
    assert outcomes["last KeyError"] == outcomes["KeyError"] == "RunError: KeyError: 'planted'"


def look_where_the_last_rank_reads_nothing(topology: Topology, root: str) -> str:
    storage_retry.FIRST_WAIT_S = 0.0
    read = LocalFileSystem.open

    def failing(self: Any, path: str, *rest: Any, **more: Any) -> Any:
        if topology.rank == topology.world_size - 1 and path.endswith(".distcp"):
            raise OSError(116, "Stale file handle")
        return read(self, path, *rest, **more)

    LocalFileSystem.open = failing
    try:
        found = CheckpointStore(root, topology).newest()
    except StorageUnavailable as error:
        return str(error)
    finally:
        LocalFileSystem.open = read
    return f"{found}"


def test_a_file_that_one_rank_cannot_read_is_passed_over_by_none(
    run_distributed, tmp_path: Path
) -> None:
    store = CheckpointStore(str(tmp_path), Topology())
    store.save(1, {"weight": torch.ones(3)}, {}, {})
    store.wait()
    for said in run_distributed(look_where_the_last_rank_reads_nothing, 2, str(tmp_path)):
        assert "__0_0.distcp: 6 attempts failed" in said and "Stale" in said


def save_where_the_last_rank_fails_at_first(topology: Topology, root: str) -> list[Any]:
    storage_retry.FIRST_WAIT_S = 0.0
    failures, real = [OSError(116, "Stale file handle"), TimeoutError("slow")], LocalFileSystem.open

    def failing(self: Any, path: str, *rest: Any, **more: Any) -> Any:
        if path.endswith("__1_0.distcp") and failures:
            raise failures.pop()
        return real(self, path, *rest, **more)

    store = CheckpointStore(root, topology)
    LocalFileSystem.open = failing
    try:
        store.save(1, {}, {f"rows/{topology.rank}": torch.ones(3) * topology.rank}, {})
        ended = store.wait()
    finally:
        LocalFileSystem.open = real
    found = store.newest()
    assert ended is not None and found is not None
    return [ended.error, len(failures), found.load(lambda name: True)["rows/1"].tolist()]


def test_all_ranks_complete_a_checkpoint_of_which_one_wrote_its_file_twice(
    run_distributed, tmp_path: Path
) -> None:
    first, last = run_distributed(save_where_the_last_rank_fails_at_first, 2, str(tmp_path))
    assert (first, last) == ([None, 2, [1.0] * 3], [None, 0, [1.0] * 3])


def skipped_where_the_last_rank_reads_nothing(topology: Topology, path: str) -> list[int]:
    """The others would take a step that this one leaves out, and wait for it for ever."""
    if topology.rank == topology.world_size - 1:
        path = f"{path}/elsewhere"
    return sorted(read_skipped_steps(path, topology))


def test_all_ranks_leave_out_the_same_steps(run_distributed, tmp_path: Path) -> None:
    assert read_skipped_steps(str(tmp_path), Topology()) == set()
    (tmp_path / "skipped.json").write_text("[6, 7]")
    found = run_distributed(skipped_where_the_last_rank_reads_nothing, 2, str(tmp_path))
    assert found == [[6, 7], [6, 7]]


def finish_where_the_first_cannot_write(topology: Topology) -> str:
    def refuse(*_: object) -> None:
        raise StorageUnavailable("the store is away")

    finish._export = refuse
    run = mock.MagicMock(topology=topology)
    try:
        finish.finish_run(run)
    except StorageUnavailable as error:
        return str(error)
    return "it ended"


def test_no_rank_waits_for_the_one_that_cannot_write_the_results(run_distributed) -> None:
    said = run_distributed(finish_where_the_first_cannot_write, 2)
    assert said == ["the store is away"] * 2


@pytest.mark.parametrize("error", [UserError("a"), OSError(5, "b")])
def test_alone_an_error_stays_what_it_is(error: Exception) -> None:
    def fail() -> None:
        raise error

    with pytest.raises(type(error)) as raised:
        decided_by_first(fail, Topology())
    assert raised.value is error
