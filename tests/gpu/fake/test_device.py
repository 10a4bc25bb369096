"""The device that computes nothing notices what a real one would make the host pay for."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from mhe_dist.bank.bank import Bank
from mhe_dist.bank.row_optim import LowRank, RowSGD
from mhe_dist.distributed.collectives import all_gather, all_to_all
from mhe_dist.distributed.topology import Topology
from mhe_dist.distributed.transfer import to_device
from pipelines.bench.fake_cuda.autograd import backward
from pipelines.bench.fake_cuda.device import STAGED_BYTES, FakeCuda, fake_cuda
from pipelines.bench.fake_cuda.lone_rank import lone_rank

CUDA = torch.device("cuda", 0)


def on_device(*shape: int) -> Tensor:
    return torch.empty(*shape, device=CUDA)


def pinned(count: int) -> Tensor:
    return torch.zeros(count, pin_memory=True)


def positions() -> Tensor:
    return torch.zeros(2, dtype=torch.int64, device=CUDA)


WAITS: dict[str, Callable[[], object]] = {
    "item": lambda: on_device(1).item(),
    "bool": lambda: bool(on_device(1) > 0),
    "cpu": lambda: on_device(4).cpu(),
    "tolist": lambda: on_device(1).tolist(),
    "blocking copy to the device": lambda: torch.zeros(4).to(CUDA),
    "blocking copy from pinned memory": lambda: pinned(4).to(CUDA),
    "a large copy from pageable memory": lambda: torch.zeros(STAGED_BYTES).to(
        CUDA, non_blocking=True
    ),
    "copy to pageable memory": lambda: torch.zeros(4).copy_(on_device(4), non_blocking=True),
    "nonzero": lambda: on_device(4).nonzero(),
    "a mask": lambda: on_device(4)[on_device(4) > 0],
    "a mask that is written to": lambda: on_device(4).__setitem__(on_device(4) > 0, on_device(1)),
    "an index on the host": lambda: on_device(4)[torch.tensor([0, 1])],
    "a number at an index": lambda: on_device(4).__setitem__(positions(), 0.0),
    "synchronize": lambda: torch.cuda.synchronize(CUDA),
}
WAITS_NOT: dict[str, Callable[[], object]] = {
    "a product": lambda: on_device(4, 4) @ on_device(4, 4),
    "a small copy": lambda: torch.zeros(4).to(CUDA, non_blocking=True),
    "a copy from pinned memory": lambda: pinned(STAGED_BYTES).to(CUDA, non_blocking=True),
    "a copy from a pinned clone": lambda: (
        torch.zeros(STAGED_BYTES).pin_memory().to(CUDA, non_blocking=True)
    ),
    "a copy to pinned memory": lambda: on_device(4).to("cpu", non_blocking=True),
    "a filled mask": lambda: on_device(4).masked_fill_(on_device(4) > 0, 0.0),
    "a number at a mask": lambda: on_device(4).__setitem__(on_device(4) > 0, 0.0),
    "an index on the device": lambda: on_device(4)[positions()],
    "values at an index": lambda: on_device(4).__setitem__(positions(), on_device(2)),
    "a number in a slice": lambda: on_device(4).__setitem__(slice(2), 0.0),
    "work on the host": lambda: (torch.ones(4) > 0).nonzero().tolist(),
}


def run(call: Callable[[], object]) -> FakeCuda:
    with fake_cuda() as gpu:
        call()
    return gpu


@pytest.mark.parametrize("name", WAITS)
def test_a_wait_for_the_device_is_noted_with_its_line(name: str) -> None:
    (event,) = run(WAITS[name]).ledger.of("sync")
    assert event.line.startswith("tests/gpu/fake/test_device.py:")


@pytest.mark.parametrize("name", WAITS_NOT)
def test_work_without_a_wait_is_not_taken_for_one(name: str) -> None:
    assert run(WAITS_NOT[name]).ledger.of("sync") == []


def test_a_mix_of_devices_raises() -> None:
    with fake_cuda(), pytest.raises(RuntimeError, match="device"):
        on_device(2, 2) @ torch.zeros(2, 2)


def test_host_tensors_are_real() -> None:
    with fake_cuda():
        assert torch.arange(3).cumsum(0).tolist() == [0, 1, 3]


def test_what_a_copy_to_the_host_gives_can_be_chosen() -> None:
    with fake_cuda(lambda zeros: zeros + 7):
        assert on_device(2).cpu().tolist() == [7, 7]


def test_launches_bytes_and_flops_of_a_product() -> None:
    with fake_cuda() as gpu:
        a, b = on_device(8, 16), on_device(16, 32)
        _ = a @ b
    (event,) = gpu.ledger.of("kernel")
    assert event.flops == 2 * 8 * 16 * 32
    assert (event.read, event.written) == (4 * (8 * 16 + 16 * 32), 4 * 8 * 32)


def test_views_and_empty_tensors_launch_nothing() -> None:
    with fake_cuda() as gpu:
        on_device(4, 4).t()[2:].unsqueeze(0).expand(2, 2, 4)
    assert gpu.ledger.events == []


def test_a_gather_moves_the_rows_that_it_takes() -> None:
    with fake_cuda() as gpu:
        rows, index = on_device(1000, 8), torch.empty(3, dtype=torch.int64, device=CUDA)
        rows.index_copy_(0, index, rows.index_select(0, index))
    taken = 3 * 8 * 4
    assert [e.written for e in gpu.ledger.of("kernel")] == [taken, taken]
    assert gpu.ledger.moved == 4 * taken + 2 * 3 * 8


def test_the_peak_is_that_of_the_tensors_that_live_together() -> None:
    with fake_cuda() as gpu:
        for _ in range(3):
            on_device(1000).add(1)  # two at a time, then none
        kept = on_device(10)
        assert gpu.peak == 2 * 4000
        assert gpu.allocated == kept.nbytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_units_of_more_rows_than_a_grid_has_programs_are_updated_too(dtype: torch.dtype) -> None:
    with fake_cuda():
        length, width = 600_000, 512
        optimizer = RowSGD(0.9, 1e-4)

        def zeros(numbers: Tensor) -> Tensor:
            return on_device(len(numbers), length, width)

        bank = Bank(range(2), length, width, zeros, optimizer.fields, dtype=dtype, device=CUDA)
        units = torch.tensor([1])
        bank.touch(units)
        rows, _ = bank.read_for_products(units, normalise=True)
        gradient = LowRank(on_device(1, 1, length), on_device(1, 1, width), None)
        optimizer.update(bank, units, gradient, 0.1, 0)
    assert rows.shape == (1, length, width)


def test_a_backward_pass_reaches_the_leaves() -> None:
    with fake_cuda() as gpu:
        weight, bias = on_device(4, 3).requires_grad_(), on_device(3).requires_grad_()
        hidden = on_device(5, 4) @ weight + bias
        gpu.clear()
        backward((hidden.relu() * hidden).sum())
        assert weight.grad is not None and weight.grad.shape == (4, 3)
        assert bias.grad is not None and bias.grad.shape == (3,)
        assert gpu.ledger.flops == 2 * 5 * 4 * 3


def test_autograd_grad_gives_what_the_engine_would() -> None:
    with fake_cuda():
        x = on_device(3, 2).requires_grad_()
        (gradient,) = torch.autograd.grad([x * 2], [x], [on_device(3, 2)])
        assert gradient.shape == x.shape and gradient.device == CUDA


def test_threads_work_on_the_device_too() -> None:
    with fake_cuda() as gpu, ThreadPoolExecutor(1) as pool:
        assert pool.submit(lambda: on_device(2).add(1)).result().device == CUDA
    assert len(gpu.ledger.of("kernel")) == 1


def test_a_lone_rank_exchanges_nothing_on_the_device_and_echoes_on_the_host() -> None:
    topology = Topology(1, 3, CUDA)
    with fake_cuda() as gpu, lone_rank(topology, gpu.ledger):
        assert all_gather(on_device(2, 4), topology).shape == (6, 4)
        assert all_to_all(on_device(4, 4), [1, 2, 1], [2, 0, 3], topology).shape == (5, 4)
        host = all_to_all(torch.arange(4), [1, 2, 1], [2, 2, 2], topology)
    assert host.tolist() == [1, 2] * 3
    assert [e.op for e in gpu.ledger.of("kernel")] == ["nccl.all_gather", "nccl.all_to_all"]


@pytest.mark.parametrize("count", [4, STAGED_BYTES])
def test_what_is_handed_to_the_device_is_not_waited_for(count: int) -> None:
    with fake_cuda() as gpu:
        assert to_device(torch.zeros(count), CUDA).device == CUDA
    assert gpu.ledger.of("sync") == []


def test_memory_that_was_pinned_once_is_pageable_in_its_next_life() -> None:
    with fake_cuda() as gpu:
        for _ in range(50):
            pinned(4)
            torch.zeros(4).copy_(on_device(4), non_blocking=True)
    assert len(gpu.ledger.of("sync")) == 50
