"""Triton kernels against the eager code that defines them: the same results, and how much faster.

On a CPU they run in Triton's interpreter, which `__main__` switches on before Triton is imported.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Final
from unittest import mock

import torch
from torch import Tensor

from mhe_dist.bank.bank import Bank, round_stochastically
from mhe_dist.bank.initial_rows import noise_rows
from mhe_dist.bank.row_optim import Dense, RowSGD, SharedFactors
from mhe_dist.config.head import HeadConfig, MarginConfig
from mhe_dist.distributed.topology import Topology
from mhe_dist.heads.batch_invariant import product
from mhe_dist.heads.margins import Margin
from mhe_dist.heads.products import products_in
from mhe_dist.heads.registry import build_head
from mhe_dist.heads.row_head import HeadSpec
from mhe_dist.kernels.dispatch import SWITCH
from pipelines.bench.gpu.agreement import relative
from pipelines.bench.gpu.findings import GpuFindings, GpuSettings, seconds_of

CLOSE: Final = 1e-5
TF32_CLOSE: Final = 2e-3  # each factor is off by 2**-10 of itself at most


def measure(settings: GpuSettings, found: GpuFindings) -> None:
    """Each kernel."""
    if find_spec("triton") is None:
        found.leave_out("kernels", "Triton is not installed")
        return
    if settings.torch_device.type == "cpu":
        from mhe_dist.kernels.interpreter import mend_interpreter

        mend_interpreter()
    kernels = {
        "row read": _row_read,
        "row update": _row_update,
        "rounding": _rounding,
        "first rows": _first_rows,
        "angular margin": _angular_margin,
        "routed softmax": _routed_softmax,
        "update by factors": _factor_update,
        "own heads where they lie": _stored_heads,
    }
    for name, measure_kernel in kernels.items():
        with found.attempt(name):
            measure_kernel(settings, found)


def _row_read(settings: GpuSettings, found: GpuFindings) -> None:
    """Normalised rows of a bank, every other unit."""
    from mhe_dist.kernels.row_read import read_rows

    bank = _touched_bank(settings)
    every_other = torch.arange(0, len(bank.units), 2)
    weight, local = bank.stored["weight"], every_other.to(settings.torch_device)

    def by_definition() -> Tensor:
        return bank.read_for_products(every_other, True, scaled=True)[0]

    with eager():
        error = relative(read_rows(weight, local, True)[0], by_definition())
        found.check("row read equals its definition", error <= CLOSE, f"differs by {error:.1e}")
        moved = weight.nbytes  # half of the rows, read and written
        _speed(
            settings,
            found,
            "row read",
            lambda: read_rows(weight, local, True)[0],
            by_definition,
            moved,
        )


def _touched_bank(settings: GpuSettings) -> Bank:
    """A bank of noise with momentum."""
    units, length, width = (4, 4, 16) if settings.small else (2048, 128, 512)
    random = torch.Generator(settings.torch_device).manual_seed(1)
    rows = torch.randn(units, length, width, generator=random, device=settings.torch_device)
    bank = Bank(
        range(units),
        length,
        width,
        lambda numbers: rows[numbers.to(rows.device)],
        {"momentum": None},
        device=settings.torch_device,
    )
    bank.touch(bank.units)
    return bank


def _row_update(settings: GpuSettings, found: GpuFindings) -> None:
    """Momentum SGD on dense gradients of the normalised rows, as extra heads have them."""
    from mhe_dist.kernels.row_update import RowFactors, sgd_rows

    bank = _touched_bank(settings)
    every = torch.arange(len(bank.units))
    weight, local = bank.read(every), every.to(settings.torch_device)
    velocity, g = torch.zeros_like(weight), torch.randn_like(weight)

    def by_kernel() -> None:
        gradient = RowFactors(g, None, None, None, of_normalised=True)
        sgd_rows(weight, velocity, local, gradient, 0.1, 0.9, 1e-4)

    def by_definition() -> None:
        RowSGD(0.9, 1e-4).update(bank, every, Dense(g.clone(), None, True), 0.1, 0)

    by_kernel()
    with eager():
        by_definition()
        error = relative(weight, bank.read(every))
        found.check("row update equals its definition", error <= CLOSE, f"differs by {error:.1e}")
        _speed(settings, found, "row update", by_kernel, by_definition, 4 * weight.nbytes)


def _rounding(settings: GpuSettings, found: GpuFindings) -> None:
    from mhe_dist.kernels.row_update import round_rows

    units, size = (3, 100) if settings.small else (2048, 65536)
    rows = torch.randn(units, 1, size, device=settings.torch_device)
    numbers = torch.arange(units, device=settings.torch_device)
    expected = round_stochastically(rows, numbers, 7).view(torch.int16)
    same = torch.equal(round_rows(rows, numbers, 7).view(torch.int16), expected)
    found.check("rounding has the bits of its definition", same)
    _speed(
        settings,
        found,
        "rounding",
        lambda: round_rows(rows, numbers, 7),
        lambda: round_stochastically(rows, numbers, 7),
        rows.nbytes * 3 // 2,
    )


def _first_rows(settings: GpuSettings, found: GpuFindings) -> None:
    """The bits are the same where both take exact square roots, as a GPU does."""
    from mhe_dist.kernels.first_rows import first_rows

    units, length, width = (2, 3, 16) if settings.small else (2048, 128, 512)
    classes = torch.arange(units * length, device=settings.torch_device).view(units, length)

    def by_kernel() -> Tensor:
        return first_rows(7, classes, width, 0.1, width)

    def by_definition() -> Tensor:
        return noise_rows(7, classes, width, 0.1, width)

    with eager():
        kernel, definition = by_kernel(), by_definition()
        error = relative(kernel, definition)
        found.check("first rows equal their definition", error <= 1e-6, f"differ by {error:.1e}")
        if settings.on_gpu:
            found.check(
                "first rows have the bits of their definition", torch.equal(kernel, definition)
            )
        _speed(settings, found, "first rows", by_kernel, by_definition, kernel.nbytes)


def _angular_margin(settings: GpuSettings, found: GpuFindings) -> None:
    margin = Margin(MarginConfig(kind="arcface"))
    cosine = torch.linspace(-0.99, 0.99, 128, device=settings.torch_device)
    with eager():
        expected = torch.stack(margin.target(cosine))
    with kernels_in("mhe_dist.heads.margins"):
        error = relative(torch.stack(margin.target(cosine)), expected)
    found.check("angular margin equals its definition", error <= CLOSE, f"differs by {error:.1e}")


def _routed_softmax(settings: GpuSettings, found: GpuFindings) -> None:
    """A micro-batch over own and extra heads of eight groups, forward and backward, no update."""
    classes, width, batch, length = (600, 16, 16, 5) if settings.small else (2**18, 512, 128, 128)
    mhs = {"length": length, "extra_heads": 64}
    config = HeadConfig.model_validate({"kind": "mhs", "groups": 8, "mhs": mhs})
    topology = Topology(device=settings.torch_device)
    head = build_head(HeadSpec(config, classes, width, 0, 1), topology)
    random = torch.Generator().manual_seed(1)
    labels = torch.randint(0, classes, (1, batch), generator=random)
    embeddings = torch.randn(batch, width, generator=random).to(settings.torch_device)
    embeddings.requires_grad_()

    def gradient() -> Tensor:
        head.plan(0, labels)
        return torch.autograd.grad(head(embeddings, labels[0]).loss, embeddings)[0]

    def by_kernels() -> Tensor:
        with kernels_in("mhe_dist.heads.routed.mhs"):
            return gradient()

    def by_definition() -> Tensor:
        with eager():
            return gradient()

    error = relative(by_kernels(), by_definition())
    found.check("routed softmax equals its definition", error <= CLOSE, f"differs by {error:.1e}")
    rows = classes * width * 4
    _speed(settings, found, "routed softmax", by_kernels, by_definition, 4 * rows)


def _factor_update(settings: GpuSettings, found: GpuFindings) -> None:
    """An update that multiplies factors in TF32, against a product by cuBLAS and the update."""
    bank = _touched_bank(settings)
    heads, samples = torch.arange(len(bank.units)), 9 if settings.small else 128
    e = torch.randn(samples, bank.width, device=settings.torch_device)
    a = torch.randn(samples, len(heads) * bank.length, device=settings.torch_device)
    places = torch.stack([heads, *(torch.full_like(heads, n) for n in (len(heads), 0, samples))])
    factors, optimizer = SharedFactors(a, e, places, bank.length, True), RowSGD(0.9, 1e-4)

    def by_factors() -> None:
        optimizer.update(bank, heads, factors, 0.1, 0)

    def by_product() -> None:
        summed = (a.T @ e).view(len(heads), bank.length, bank.width)
        optimizer.update(bank, heads, Dense(summed, None, True), 0.1, 0)

    velocities = []
    with kernels_in("mhe_dist.bank.bank"), products_in(tf32=True):
        for update in (by_factors, by_product):
            bank.write(heads, {"momentum": torch.zeros_like(bank.read(heads))}, 0)
            update()
            velocities.append(bank.read(heads, "momentum").clone())
            bank.forget()
            bank.touch(bank.units)
        error = relative(*velocities)
        found.check(
            "update by factors equals its definition",
            error <= TF32_CLOSE,
            f"differs by {error:.1e}",
        )
        moved = 4 * bank.stored["weight"].nbytes + a.nbytes
        _speed(settings, found, "update by factors", by_factors, by_product, moved)


def _stored_heads(settings: GpuSettings, found: GpuFindings) -> None:
    """Both products of own heads on rows where they lie, against copies of them and cuBLAS."""
    from mhe_dist.kernels.own_products import StoredHeads, own_products, sum_own_rows

    bank = _touched_bank(settings)
    units = torch.arange(0, len(bank.units), 2)
    features = torch.randn(len(units), bank.width, device=settings.torch_device)
    index = torch.arange(len(units), device=settings.torch_device).unsqueeze(1)
    found_gradient, gradient = torch.zeros_like(features), torch.zeros_like(features)

    def by_kernels() -> Tensor:
        """No row is copied."""
        heads = StoredHeads(bank.stored["weight"], bank.positions(units), index)
        products, _ = own_products(heads, features)
        sum_own_rows(heads, products, found_gradient)
        return products

    def by_definition() -> Tensor:
        """Rows are copied first."""
        rows, _ = bank.read_for_products(units, True)
        products = product(features[index], rows.transpose(1, 2))
        gradient[index] = product(products, rows)
        return products

    with kernels_in("mhe_dist.bank.bank"):
        error = max(relative(by_kernels(), by_definition()), relative(found_gradient, gradient))
        found.check("own heads equal their definition", error <= CLOSE, f"differ by {error:.1e}")
        with products_in(tf32=True):
            rows = bank.stored["weight"].nbytes  # half of them, twice
            _speed(settings, found, "own heads", by_kernels, by_definition, rows)


def _speed(
    settings: GpuSettings,
    found: GpuFindings,
    name: str,
    kernel: Callable[[], Tensor | None],
    definition: Callable[[], Tensor | None],
    moved: int,
) -> None:
    """Milliseconds of both, and the bytes per second of what a kernel must move."""
    if not settings.on_gpu:
        return
    seconds = seconds_of(settings, kernel)
    found.figure(f"{name}: kernel", seconds * 1e3, "ms")
    found.figure(f"{name}: definition", seconds_of(settings, definition) * 1e3, "ms")
    found.figure(f"{name}: kernel moves", moved / seconds / 1e9, "GB/s")


@contextmanager
def eager() -> Iterator[None]:
    """Kernels are switched off inside."""
    with mock.patch.dict(os.environ, {SWITCH: "0"}):
        yield


@contextmanager
def kernels_in(module: str) -> Iterator[None]:
    """A module uses kernels inside, on a CPU too."""
    with mock.patch(f"{module}.use_kernels", lambda *_: True):
        yield
