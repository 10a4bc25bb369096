"""Row-sparse SGD and AdamW against torch.optim on the touched rows, and a row at a time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mhe_dist.bank import bank as bank_module
from mhe_dist.bank.bank import Bank
from mhe_dist.bank.row_optim import (
    Dense,
    LowRank,
    RowGradient,
    RowOptimizer,
    SharedFactors,
    build_row_optimizer,
)
from mhe_dist.config.head import HeadOptimConfig

UNITS, LENGTH, WIDTH, LR = 6, 2, 3, 0.05
ALL = range(10, 10 + UNITS)  # of a rank that has not the first ones
CONFIGS = {
    "sgd": HeadOptimConfig(kind="sgd", momentum=0.9, weight_decay=0.01),
    "sgd without momentum": HeadOptimConfig(kind="sgd", momentum=0.0, weight_decay=0.01),
    "sgd without decay": HeadOptimConfig(kind="sgd", momentum=0.5, weight_decay=0.0),
    "plain sgd": HeadOptimConfig(kind="sgd", momentum=0.0, weight_decay=0.0),
    "adamw": HeadOptimConfig(kind="adamw", weight_decay=0.1),
}


@pytest.fixture(params=["copied", "listed", "one by one"])
def listed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ways to update units: small ones as a copy, large ones where they are stored.

    The latter as a list, which SGD takes, or one after the other.
    """
    large = {"listed": "LISTED_UNIT_BYTES", "one by one": "LARGE_UNIT_BYTES"}
    for name in large.values():
        monkeypatch.setattr(bank_module, name, 1 if large.get(request.param) == name else 1 << 30)


def first_rows(units: Tensor) -> Tensor:
    rng = torch.Generator().manual_seed(0)
    rows = torch.randn(UNITS, LENGTH, WIDTH, generator=rng, dtype=torch.float64)
    return rows[units - ALL.start]


def make(config: HeadOptimConfig) -> tuple[Bank, RowOptimizer]:
    optimizer = build_row_optimizer(config)
    types = {"dtype": torch.float64, "compute_dtype": torch.float64}
    bank = Bank(ALL, LENGTH, WIDTH, first_rows, optimizer.fields, **types)
    bank.touch(ALL)
    return bank, optimizer


def torch_optimizer(config: HeadOptimConfig, rows: Tensor) -> torch.optim.Optimizer:
    if config.kind == "sgd":
        return torch.optim.SGD(
            [rows], LR, momentum=config.momentum, weight_decay=config.weight_decay
        )
    return torch.optim.AdamW(
        [rows], LR, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay
    )


def gradient(kind: str, rows: Tensor, step: int) -> tuple[RowGradient, Tensor]:
    """A gradient in the form that is asked for, and the same as a plain tensor."""
    rng = torch.Generator().manual_seed(100 + step)
    count = len(rows)
    a, e, b = (
        torch.randn(*shape, generator=rng, dtype=torch.float64)
        for shape in ((count, 4, LENGTH), (count, 4, WIDTH), (count, LENGTH))
    )
    plain = torch.einsum("ucl,ucd->uld", a, e)
    if kind == "low rank":
        return LowRank(a, e, b), plain + b.unsqueeze(-1) * rows
    if kind == "low rank, not normalised":
        return LowRank(a, e, None), plain
    if kind == "dense":
        return Dense(plain.clone(), b), plain + b.unsqueeze(-1) * rows
    return Dense(plain.clone(), None), plain


def shared(units: int, length: int) -> SharedFactors:
    """Factors of units in two groups, one of which has no sample: the other's weights follow."""
    rng = torch.Generator().manual_seed(7)
    e = torch.randn(5, WIDTH, generator=rng, dtype=torch.float64)
    a = torch.randn(3 * units * length, generator=rng, dtype=torch.float64)
    table = [[unit, units, 2, 3] for unit in range(units)]
    table[1] = [0, 1, 0, 0]
    places = torch.tensor(table).T
    return SharedFactors(a, e, places, length, of_normalised=True)


@pytest.mark.usefixtures("listed")
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_shared_factors_update_as_their_product(config: HeadOptimConfig) -> None:
    factors = shared(UNITS, LENGTH)
    weights = factors.a.view(3, UNITS, LENGTH)
    product = torch.einsum("nul,nd->uld", weights, factors.e[2:])
    product[1] = 0.0
    updated = []
    for given in (factors, Dense(product, None, True)):
        bank, optimizer = make(config)
        optimizer.update(bank, torch.tensor(ALL), given, LR, 0)
        updated.append(bank.read(ALL))
    torch.testing.assert_close(*updated, rtol=1e-12, atol=1e-12)
    part = factors.of(slice(2, 4)).product()
    torch.testing.assert_close(part, torch.einsum("nul,nd->uld", weights[:, 2:4], factors.e[2:]))


GRADIENTS = ("low rank", "low rank, not normalised", "dense", "dense, not normalised")


@pytest.mark.usefixtures("listed")
@pytest.mark.parametrize("units", [torch.tensor(ALL), ALL], ids=["some", "range"])
@pytest.mark.parametrize("kind", GRADIENTS)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_equals_torch_when_all_rows_are_touched(
    config: HeadOptimConfig, kind: str, units: Tensor | range
) -> None:
    bank, optimizer = make(config)
    rows = first_rows(torch.tensor(ALL)).requires_grad_()
    dense = torch_optimizer(config, rows)
    for step in range(5):
        given, rows.grad = gradient(kind, rows.detach(), step)
        optimizer.update(bank, units, given, LR, step)
        dense.step()
    torch.testing.assert_close(bank.read(ALL), rows.detach(), rtol=1e-12, atol=1e-12)
    for field in set(optimizer.fields) - {"age"}:
        name = "momentum_buffer" if field == "momentum" else field
        expected = dense.state[rows][name]
        torch.testing.assert_close(bank.read(ALL, field), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("listed")
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_each_row_is_as_if_its_own_updates_were_all(config: HeadOptimConfig) -> None:
    """A touched row follows torch's optimizer over the steps that touched it; others lie still."""
    bank, optimizer = make(config)
    turns = [[10, 13], [13], [15, 13, 10], [15], [10, 15]]
    alone = {unit: first_rows(torch.tensor([unit])).requires_grad_() for unit in ALL}
    dense = {unit: torch_optimizer(config, rows) for unit, rows in alone.items()}
    for step, units in enumerate(turns):
        rows = torch.cat([alone[unit].detach() for unit in units])
        given, plain = gradient("dense", rows, step)
        optimizer.update(bank, torch.tensor(units), given, LR, step)
        for unit, own in zip(units, plain, strict=True):
            alone[unit].grad = own.unsqueeze(0)
            dense[unit].step()
    expected = torch.cat([rows.detach() for rows in alone.values()])
    torch.testing.assert_close(bank.read(ALL), expected, rtol=1e-12, atol=1e-12)
    untouched = torch.tensor([11, 12, 14])
    assert torch.equal(bank.read(untouched), first_rows(untouched))
    if config.kind == "adamw":
        ages = bank.read(torch.tensor([10, 13, 15, 11]), "age")[:, 0, 0]
        assert ages.tolist() == [3, 3, 3, 0]


@pytest.mark.usefixtures("listed")
@pytest.mark.parametrize("kind", GRADIENTS)
def test_no_units_are_no_update(kind: str) -> None:
    bank, optimizer = make(CONFIGS["sgd"])
    none = torch.empty(0, dtype=torch.int64)
    optimizer.update(bank, none, gradient(kind, first_rows(none), 0)[0], LR, 0)
    assert torch.equal(bank.read(ALL), first_rows(torch.tensor(ALL)))
