"""The one-pass row update against a float64 definition, the eager optimizer, and its rounding."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mhe_dist.bank.bank import Bank, round_stochastically
from mhe_dist.bank.row_optim import Dense, LowRank, RowGradient, RowSGD, SharedFactors
from mhe_dist.kernels import row_update
from mhe_dist.kernels.row_update import RowFactors, round_rows, sgd_rows

UNITS, FIRST, LR, KEYS = 7, 40, 0.5, (0x1234_5678_9ABC, 0x7FFF_8765_4321)
SHAPES = [(1, 33), (5, 96), (9, 512), (40, 33), (3, 1)]  # L, D; L is not a multiple of a tile
KINDS = ("dense", "low rank", "of normalised rows", "not normalised")


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def factors(kind: str, units: int, length: int, width: int) -> RowFactors:
    g, b = noise(units, length, width), noise(units, length)
    if kind == "low rank":
        return RowFactors(None, noise(units, 3, length), noise(units, 3, width), b)
    if kind == "dense":
        return RowFactors(g, None, None, b)
    return RowFactors(g, None, None, None, of_normalised=kind == "of normalised rows")


def definition(weight: Tensor, velocity: Tensor, gradient: RowFactors, decay: float) -> Tensor:
    """The new momentum of rows in float64; autograd differentiates the normalisation."""
    w = weight.double().requires_grad_()
    g, a, e, b = (None if part is None else part.double() for part in gradient[:4])
    if gradient.of_normalised:
        (torch.nn.functional.normalize(w, dim=-1) * g).sum().backward()
        total = w.grad
    else:
        total = torch.einsum("ucl,ucd->uld", a, e) if g is None else g
        total = total if b is None else total + b.unsqueeze(-1) * w.detach()
    return 0.9 * velocity.double() + total + decay * w.detach()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("length", "width"), SHAPES)
def test_equals_float64(length: int, width: int, kind: str) -> None:
    weight, velocity = noise(UNITS, length, width), noise(UNITS, length, width) / 2
    before = weight.clone(), velocity.clone()
    local = torch.tensor([5, 0, 3])
    gradient = factors(kind, 3, length, width)
    expected = definition(weight[local], velocity[local], gradient, 0.01)
    sgd_rows(weight, velocity, local, gradient, LR, 0.9, 0.01)
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(velocity[local].double(), expected, **close)
    rows = before[0][local].double() - LR * expected
    torch.testing.assert_close(weight[local].double(), rows, **close)
    others = torch.tensor([1, 2, 4, 6])
    assert torch.equal(weight[others], before[0][others])
    assert torch.equal(velocity[others], before[1][others])


def test_no_units_and_no_samples() -> None:
    weight = noise(UNITS, 5, 33)
    before = weight.clone()
    none = torch.empty(0, dtype=torch.int64)
    sgd_rows(weight, None, none, factors("dense", 0, 5, 33), LR, 0.0, 0.01)
    assert torch.equal(weight, before)
    empty = RowFactors(None, torch.zeros(2, 0, 5), torch.zeros(2, 0, 33), None)
    sgd_rows(weight, None, torch.tensor([1, 2]), empty, LR, 0.0, 0.0)
    assert torch.equal(weight, before)
    assert round_rows(torch.zeros(0, 5, 33), none, 1).shape == (0, 5, 33)


@pytest.mark.parametrize(("length", "width"), [*SHAPES, (64, 96)])
def test_rounding_is_that_of_the_bank_bit_for_bit(length: int, width: int) -> None:
    rows = noise(4, length, width) * torch.logspace(-30, 30, 4)[:, None, None]
    units = torch.tensor([0, 3, 2_000_000_011, 5_000_000_000])
    for key in (0, 1, 0x8000_0000, *KEYS):
        expected = round_stochastically(rows, units, key)
        assert torch.equal(
            round_rows(rows, units, key).view(torch.int16), expected.view(torch.int16)
        )


def test_rounding_leaves_what_is_not_finite() -> None:
    bits = torch.tensor([0x7FFFFFFF, -1, 0x7F800001, 0x7F800000, -0x800000], dtype=torch.int32)
    rows = bits.view(torch.float32).repeat(20, 1, 1)
    rounded = round_rows(rows, torch.arange(20), 1)
    assert rounded[..., :3].isnan().all()
    assert torch.equal(rounded[..., 3:].float(), rows[..., 3:])


@pytest.mark.parametrize(("length", "width"), SHAPES)
def test_the_update_rounds_like_the_bank_bit_for_bit(length: int, width: int) -> None:
    """Where float32 is exact, the order of operations is not seen and the noise is all there is."""
    weight = (noise(UNITS, length, width) * 64).round().div(64).bfloat16()
    velocity = torch.zeros_like(weight)
    local = torch.tensor([6, 1])
    fine = (noise(2, length, width) * 4096).round() / 2**18 + 0.0  # no negative zeros
    gradient = RowFactors(fine, None, None, None)
    rows = weight[local].float() - LR * fine
    assert torch.equal(rows.double(), weight[local].double() - LR * fine.double()), "exact"
    sgd_rows(weight, velocity, local, gradient, LR, 0.5, 0.0, FIRST, KEYS)
    for stored, exact, key in ((weight, rows, KEYS[0]), (velocity, fine, KEYS[1])):
        expected = round_stochastically(exact, local + FIRST, key)
        assert torch.equal(stored[local].view(torch.int16), expected.view(torch.int16))


# Samples of three groups, which have 2, 1 and 2 of the units; NaN lies between what is used.
COUNTS = [(1, 1, 1), (3, 0, 17), (16, 33, 2)]


def shared_factors(
    counts: tuple[int, ...], length: int, width: int, of_normalised: bool
) -> SharedFactors:
    """Factors of five units."""
    a, e, places = [], [], []
    for count, units in zip(counts, (2, 1, 2), strict=True):
        first, sample = sum(len(block) for block in a) // length, sum(len(block) for block in e)
        block = torch.full((count + 1, units + 1, length), torch.nan)
        block[:count, :units] = noise(count, units, length)
        places += [(first + unit, units + 1, sample, count) for unit in range(units)]
        a.append(block.flatten())
        e += [noise(count, width), torch.full((1, width), torch.nan)]
    # Nothing follows the last group's last sample: there a load too many leaves the memory.
    a[-1], e[-1] = a[-1][: -4 * length], e[-1][:0]
    table = torch.tensor(places).T.contiguous()
    return SharedFactors(torch.cat(a), torch.cat(e), table, length, of_normalised)


@pytest.mark.parametrize("tile", [16384, 1024])
@pytest.mark.parametrize("of_normalised", [True, False])
@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize(("length", "width"), SHAPES)
def test_shared_factors_equal_float64(
    length: int,
    width: int,
    counts: tuple[int, ...],
    of_normalised: bool,
    tile: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In the interpreter TF32 is float32."""
    monkeypatch.setattr(row_update, "_SHARED_TILE", tile)
    weight, velocity = noise(UNITS, length, width), noise(UNITS, length, width) / 2
    before = weight.clone()
    local = torch.tensor([5, 0, 3, 6, 1])
    shared = shared_factors(counts, length, width, of_normalised)
    exact = shared._replace(a=shared.a.double(), e=shared.e.double()).product()
    gradient = RowFactors(exact, None, None, None, of_normalised)
    expected = definition(weight[local], velocity[local], gradient, 0.01)
    factors = RowFactors(None, shared.a, shared.e, None, of_normalised, shared.places)
    sgd_rows(weight, velocity, local, factors, LR, 0.9, 0.01)
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(velocity[local].double(), expected, **close)
    rows = before[local].double() - LR * expected
    torch.testing.assert_close(weight[local].double(), rows, **close)
    others = torch.tensor([2, 4])
    assert torch.equal(weight[others], before[others])


@pytest.mark.parametrize(("length", "width"), SHAPES)
def test_an_update_by_shared_factors_rounds_like_the_bank_bit_for_bit(
    length: int, width: int
) -> None:
    """One sample, and factors whose product is exact."""
    weight = (noise(UNITS, length, width) * 64).round().div(64).bfloat16()
    local = torch.tensor([6, 1])
    a, e = (noise(2, length) * 64).round() / 4096, (noise(1, width) * 64).round() / 64 + 0.0
    places = torch.tensor([[0, 1], [2, 2], [0, 0], [1, 1]])
    fine = a.unsqueeze(-1) * e + 0.0
    rows = weight[local].float() - LR * fine
    assert torch.equal(rows.double(), weight[local].double() - LR * fine.double()), "exact"
    sgd_rows(
        weight, None, local, RowFactors(None, a, e, None, False, places), LR, 0.0, 0.0, FIRST, KEYS
    )
    expected = round_stochastically(rows, local + FIRST, KEYS[0])
    assert torch.equal(weight[local].view(torch.int16), expected.view(torch.int16))


def eager_and_kernel(
    monkeypatch: pytest.MonkeyPatch, optimizer: RowSGD, dtype: torch.dtype, given: RowGradient
) -> list[Bank]:
    """Two banks after four updates of some of units 42 to 45; the second by the kernel."""
    banks = []
    for kernels in (False, True):
        monkeypatch.setattr("mhe_dist.bank.bank.use_kernels", lambda *_, on=kernels: on)
        units = range(FIRST, FIRST + UNITS)
        bank = Bank(
            units,
            5,
            33,
            lambda units: noise(UNITS, 5, 33)[units - FIRST],
            optimizer.fields,
            dtype=dtype,
            seed=3,
        )
        bank.touch(units)
        for step, updated in enumerate([torch.tensor([45, 42])] * 3 + [range(44, 46)]):
            copy = type(given)(*(p.clone() if isinstance(p, Tensor) else p for p in given))
            optimizer.update(bank, updated, copy, 0.1, step)
        banks.append(bank)
    return banks


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("kind", [*KINDS, "shared"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bank_is_updated_as_by_the_eager_optimizer(
    dtype: torch.dtype, kind: str, momentum: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: RowGradient
    if kind == "shared":
        given = shared_factors((3, 0, 17), 5, 33, True).of(slice(0, 5, 4))
    else:
        g, a, e, b, normalised, _ = factors(kind, 2, 5, 33)
        given = Dense(g, b, normalised) if a is None else LowRank(a, e, b)
    banks = eager_and_kernel(monkeypatch, RowSGD(momentum, 0.01), dtype, given)
    for field in banks[0].fields:
        eager, kernel = (bank.read(bank.units, field) for bank in banks)
        if dtype == torch.float32:
            torch.testing.assert_close(kernel, eager, rtol=1e-5, atol=1e-5)
        else:  # the last bit of a float32 sum may turn a rounding; one unit in the last place
            assert (kernel == eager).float().mean() > 0.99
            torch.testing.assert_close(kernel, eager, rtol=2**-6, atol=1e-2)
