"""A function on several ranks, each in a fresh process: what it measures is its own."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

from mhe_dist.distributed.device import choose_device, prepare_rank, rank_device
from mhe_dist.distributed.interface import hold_port
from mhe_dist.distributed.topology import connect, disconnect
from mhe_dist.errors import RunError, UserError


def run_ranks(
    fn: Callable[..., Any],
    world_size: int,
    *args: Any,
    gpu: bool = False,
    shared: bool = False,
    timeout_s: float = 60.0,
    start_method: str = "spawn",
) -> list[Any]:
    """Run `fn(topology, *args)` on `world_size` ranks of one thread each; its results by rank.

    Args:
        fn: a function of a module, that returns tensors and plain containers.
        world_size: W.
        args: of the function; they are pickled.
        gpu: whether each rank has a GPU, with NCCL; else it sees none, with gloo.
        shared: whether all ranks have the same GPU, the first one.
        timeout_s: of a collective.
        start_method: of `multiprocessing`; "forkserver" is quicker and shares what was imported.

    Raises:
        UserError: a rank raised it.
        RunError: a rank failed otherwise; its cause holds the rank's traceback.
    """
    with hold_port() as holder, tempfile.TemporaryDirectory() as folder:
        port = holder.getsockname()[1]
        settings = (folder, fn, world_size, port, gpu, shared, timeout_s, args)
        with _variables(choose_device(gpu).environment if start_method == "spawn" else {}):
            try:
                mp.start_processes(
                    _rank_main, settings, nprocs=world_size, start_method=start_method
                )
            except mp.ProcessRaisedException as error:
                raise _error_of(Path(folder), error) from error
        return [
            torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(world_size)
        ]


def _error_of(folder: Path, error: mp.ProcessRaisedException) -> Exception:
    """What ranks raised, without their tracebacks, which are no message for a user.

    A mistake comes first: other ranks may have failed for want of the one that found it.
    """
    said = {int(file.stem): json.loads(file.read_text()) for file in folder.glob("*.json")}
    for is_mistake, _, message in said.values():
        if is_mistake:
            return UserError(message)
    _, kind, message = said[error.error_index]
    return RunError(f"rank {error.error_index} failed: {kind}: {message}")


@contextmanager
def _variables(variables: dict[str, str]) -> Iterator[None]:
    """Environment variables for processes that begin meanwhile."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _rank_main(rank: int, folder: str, *settings: Any) -> None:
    try:
        _run_rank(rank, folder, *settings)
    except Exception as error:
        said = [isinstance(error, UserError), type(error).__name__, str(error)]
        Path(folder, f"{rank}.json").write_text(json.dumps(said))
        raise


def _run_rank(
    rank: int,
    folder: str,
    fn: Callable[..., Any],
    world_size: int,
    port: int,
    gpu: bool,
    shared: bool,
    timeout_s: float,
    args: tuple[Any, ...],
) -> None:
    prepare_rank(gpu)
    torch.set_num_threads(1)
    local_rank = 0 if shared else rank
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(local_rank))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    topology = connect(timeout_s, rank_device(gpu))
    result = fn(topology, *args)
    torch.save(result, Path(folder) / f"{rank}.pt")
    topology.barrier()
    disconnect()
