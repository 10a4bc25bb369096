"""Who does the tasks: processes of this machine with a GPU each or none, or a cluster's nodes."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from launcher import cli
from launcher.ray_cluster import ray_internals
from launcher.tasks.choose import choose_workers
from launcher.tasks.ray_tasks import RayTasks
from mhe_dist.distributed.device import choose_device
from mhe_dist.errors import RunError, UserError
from mhe_dist.limits import available_cores
from pipelines.storage.worker_pool import LazyTasks, Processes, run_tasks


def test_processes_see_no_gpu_or_one_each(monkeypatch: pytest.MonkeyPatch) -> None:
    with choose_workers(0) as workers:
        assert workers == Processes(available_cores(), [choose_device(False).environment])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a,GPU-b")
    with choose_workers(0, gpu=True) as workers:
        assert isinstance(workers, Processes) and workers.count == 2
        devices = [each["CUDA_VISIBLE_DEVICES"] for each in workers.environments]
        assert devices == ["GPU-a", "GPU-b"]
    with pytest.raises(UserError, match=r"2 GPUs are to be seen here for --workers 3"):  # noqa: SIM117
        with choose_workers(3, gpu=True):
            pytest.fail("too many")


def test_a_cluster_that_is_not_there_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise ConnectionError("nobody listens")

    monkeypatch.setattr(ray_internals, "connect", fail)
    words = ["data", "index", str(tmp_path), "--address", "10.0.0.1:6379"]
    assert cli.run(words) == 2
    assert "no Ray cluster at 10.0.0.1:6379: nobody listens" in capsys.readouterr().err


class FakeRay:
    """A cluster of two cores whose tasks end in the order in which they were sent, the last first.

    Attributes:
        peak: tasks that were there together.
    """

    class exceptions:
        class RayError(Exception):
            pass

        class RayTaskError(RayError):
            def __init__(self, cause: Exception) -> None:
                self.cause = cause

    def __init__(self, lost: int = 99) -> None:
        self.peak, self.there, self.lost = 0, 0, lost

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": 2.0}

    def remote(self, **options: Any) -> Callable[..., Any]:
        assert options["max_retries"] > 1

        def send(function: Any, task: Any, folder: str) -> Any:
            self.there += 1
            self.peak = max(self.peak, self.there)
            return (task, lambda: call(function, task, folder))

        call: Any = None

        def wrap(given: Any) -> Any:
            nonlocal call
            call = given
            return SimpleNamespace(remote=send)

        return wrap

    def wait(self, references: list[Any], timeout: float) -> tuple[list[Any], list[Any]]:
        return references[-1:], references[:-1]

    def get(self, reference: Any) -> Any:
        self.there -= 1
        if reference[0] == self.lost:
            raise self.exceptions.RayError("the worker died\nand so on")
        try:
            return reference[1]()
        except Exception as error:
            raise self.exceptions.RayTaskError(error) from error


def square(number: int) -> int:
    if number < 0:
        raise UserError("no negative number")
    return number * number


@pytest.mark.parametrize(("count", "peak"), [(0, 4), (3, 3)])
def test_tasks_on_a_cluster_give_what_they_give_here(
    monkeypatch: pytest.MonkeyPatch, count: int, peak: int
) -> None:
    ray, taken = FakeRay(), list[int]()
    monkeypatch.setitem(__import__("sys").modules, "ray", ray)

    def task(number: int) -> int:
        taken.append(number)
        assert len(taken) - len(seen) <= 4 + 1, "made only when there is room"
        return number

    seen: list[tuple[int, int]] = []
    results = run_tasks(
        *(square, LazyTasks(9, task), RayTasks(count), {2: 4}.get),
        record=lambda number, result: seen.append((number, result)),
    )
    assert results == [n * n for n in range(9)] == run_tasks(square, range(9))
    assert sorted(seen) == [(n, n * n) for n in range(9) if n != 2]
    assert ray.peak == peak
    with pytest.raises(UserError, match="no negative number"):
        run_tasks(square, [1, -1], RayTasks())
    monkeypatch.setitem(__import__("sys").modules, "ray", FakeRay(lost=5))
    with pytest.raises(RunError, match=r"lost its worker 11 times .RayError: the worker died., "):
        run_tasks(square, range(9), RayTasks())


def test_what_ray_prints_of_a_lost_node_becomes_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    from ray._private import worker

    nodes: list[str] = []
    before = worker.print_to_stdstream
    dead = "The node with node id: 2f8 and address: 10.0.0.7 and node name: x has been marked dead"
    with ray_internals.lost_nodes_told(nodes.append):
        for line in (f"{dead} because the detector", "Raylet is terminated.\n[state-dump] 1"):
            data = {"lines": [line], "pid": "raylet", "is_err": False}
            worker.print_to_stdstream(data, ignore_prefix=False)
    assert nodes == ["10.0.0.7"]
    assert capsys.readouterr().out == ""
    assert worker.print_to_stdstream is before


def test_a_generator_that_is_left_is_closed_at_once() -> None:
    """Else signal handlers and processes would outlive the command's error."""
    closed: list[bool] = []

    class Workers:
        def map_unordered(
            self, function: Callable[[Any], Any], tasks: Iterable[tuple[int, Any]]
        ) -> Generator[tuple[int, Any]]:
            try:
                for number, each in tasks:
                    yield number, function(each)
            finally:
                closed.append(True)

    def record(number: int, result: Any) -> None:
        raise KeyError

    try:
        run_tasks(square, [1, 2], Workers(), record=record)
    except KeyError as error:
        assert closed == [True], error
