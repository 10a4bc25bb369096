"""The bank: lazy, the same in any memory and order, unbiased in bfloat16."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mhe_dist.bank import bank as bank_module
from mhe_dist.bank import row_store, saved_rows
from mhe_dist.bank.bank import Bank, round_stochastically
from mhe_dist.errors import RunError, UserError
from mhe_dist.noise import normal_rows
from tests.support.faults import disk_full

MEMORIES = ("device", "host", "file")
UNITS = range(100, 120)


def initial(units: Tensor) -> Tensor:
    """Rows `[U, 3, 4]` that depend on the unit alone."""
    return normal_rows(1, units, 12, torch.float32).view(-1, 3, 4)


def bank(memory: str = "device", folder: Path | None = None, **options: object) -> Bank:
    fields = {"momentum": None, "age": 1}
    return Bank(UNITS, 3, 4, initial, fields, memory=memory, folder=folder, **options)


def numbers(*units: int) -> Tensor:
    return torch.tensor(units, dtype=torch.int64)


@pytest.mark.parametrize("memory", MEMORIES)
def test_rows_begin_as_their_unit_says_in_any_order_and_memory(memory: str, tmp_path: Path) -> None:
    forth, back = bank(memory, tmp_path / "forth"), bank(memory, tmp_path / "back")
    for units in ([100, 119], [107, 101, 107]):
        forth.touch(numbers(*units))
    for units in ([101, 119], [119, 107, 100]):
        back.touch(numbers(*units))
    expected = numbers(100, 101, 107, 119)
    assert torch.equal(forth.touched, expected)
    assert torch.equal(back.touched, expected)
    for bank_ in (forth, back):
        assert torch.equal(bank_.read(expected), initial(expected))
        assert not bank_.read(expected, "momentum").any()


def test_touching_again_changes_nothing() -> None:
    rows = bank()
    rows.touch(numbers(105))
    rows.write(numbers(105), {"weight": torch.ones(1, 3, 4)}, step=0)
    rows.touch(numbers(104, 105))
    rows.touch(range(103, 107))
    assert torch.equal(rows.read(numbers(105)), torch.ones(1, 3, 4))
    assert torch.equal(rows.touched, numbers(103, 104, 105, 106))


@pytest.mark.parametrize("memory", MEMORIES)
def test_reading_does_not_touch(memory: str, tmp_path: Path) -> None:
    rows = bank(memory, tmp_path)
    rows.touch(numbers(103))
    for units in (numbers(104, 103), range(102, 105)):
        found = rows.read(units)
        assert torch.equal(found, initial(torch.as_tensor(units)))
        found.zero_()
    assert torch.equal(rows.touched, numbers(103))
    assert torch.equal(rows.read(numbers(103, 104)), initial(numbers(103, 104)))


@pytest.mark.parametrize("memory", MEMORIES)
def test_a_touched_range_is_read_and_written_in_place(memory: str, tmp_path: Path) -> None:
    rows = bank(memory, tmp_path)
    rows.touch(UNITS)
    view = rows.read(range(110, 112))
    view.add_(1)
    rows.write(range(110, 112), {"weight": view}, step=0)
    assert rows.read(range(110, 112)).data_ptr() == view.data_ptr()
    assert torch.equal(rows.read(numbers(110, 111)), initial(numbers(110, 111)) + 1)
    assert torch.equal(rows.read(numbers(109, 112)), initial(numbers(109, 112)))


@pytest.mark.parametrize("units", [numbers(112, 103), range(103, 105)], ids=["some", "range"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("memory", MEMORIES)
def test_what_was_written_is_read(
    memory: str, dtype: torch.dtype, units: Tensor | range, tmp_path: Path
) -> None:
    rows = bank(memory, tmp_path, dtype=dtype, compute_dtype=torch.float64)
    rows.touch(units)
    values = torch.arange(24.0, dtype=torch.float64).view(2, 3, 4)
    rows.write(units, {"weight": values, "momentum": -values, "age": values[..., :1]}, step=3)
    assert torch.equal(rows.read(units), values)
    assert torch.equal(rows.read(units, "momentum"), -values)
    assert torch.equal(rows.read(units, "age"), values[..., :1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("memory", MEMORIES)
def test_saved_units_load_bit_for_bit(memory: str, dtype: torch.dtype, tmp_path: Path) -> None:
    first = bank(memory, tmp_path / "first", dtype=dtype)
    units = numbers(101, 117)
    first.touch(units)
    first.write(units, {"momentum": torch.randn(2, 3, 4), "age": torch.ones(2, 3, 1)}, step=1)
    second = bank(memory, tmp_path / "second", dtype=dtype)
    second.touch(numbers(100, 117))
    second.write(numbers(100), {"momentum": torch.ones(1, 3, 4)}, step=1)
    second.forget()
    saved = {field: rows.tensor() for field, rows in first.saved(units).items()}
    second.load(units, saved)
    assert torch.equal(second.touched, units)
    for field in first.fields:
        assert torch.equal(second.read(units, field), first.read(units, field))
    second.touch(numbers(100))
    assert not second.read(numbers(100), "momentum").any()


def test_a_file_bank_of_10_to_the_8_rows_starts_at_once_and_is_sparse(tmp_path: Path) -> None:
    drawn: list[int] = []

    def draw(units: Tensor) -> Tensor:
        drawn.extend(units.tolist())
        return torch.ones(len(units), 100, 64)

    units = range(10**6)
    rows = Bank(
        units,
        100,
        64,
        draw,
        {"momentum": None},
        memory="file",
        folder=tmp_path,
    )
    some = torch.arange(0, 10**6, 10**5)
    rows.touch(some)
    rows.write(some, {"momentum": torch.ones(10, 100, 64)}, step=0)
    rows.forget()
    assert drawn == some.tolist(), "a row is made when it is needed"
    files = open_files(rows)
    assert sum(file.st_size for file in files) == rows.bytes == 2 * 10**8 * 64 * 4
    assert sum(file.st_blocks * 512 for file in files) < 2 * 10 * 100 * 64 * 4 + 2 * 10 * 8192
    assert not list(tmp_path.iterdir()), "they have no names, and end with the process"


def open_files(rows: Bank) -> list[os.stat_result]:
    """The files of a bank."""
    return [os.fstat(store._file.fileno()) for store in rows._store.values()]


@pytest.mark.parametrize("least", [1 << 14, 1 << 40], ids=["used here", "used on a GPU"])
@pytest.mark.parametrize("length", [1, 128])
def test_units_have_room_on_the_disk_before_they_are_written_through_a_mapping(
    length: int, least: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A write without room ended the process with SIGBUS, and named no file."""
    monkeypatch.setattr(row_store, "LEAST_WRITTEN_BYTES", least)
    some = torch.arange(0, 4096, 64)

    def made(folder: str) -> Bank:
        return Bank(
            range(4096),
            length,
            64,
            lambda numbers: torch.zeros(len(numbers), length, 64),
            {"momentum": None},
            memory="file",
            folder=tmp_path / folder,
        )

    rows = made("room")
    rows.touch(some)
    for file in open_files(rows):
        assert file.st_blocks * 512 >= len(some) * min(4096, length * 64 * 4)

    for call in ("pwrite", "posix_fallocate"):
        monkeypatch.setattr(os, call, disk_full)
    with pytest.raises(RunError, match=r"weight.rows.*No space left.*head.bank.path"):
        made("full").touch(some)
    saved = {name: torch.zeros(len(some), length, 64) for name in rows.fields}
    with pytest.raises(RunError, match=r"weight.rows.*No space left.*head.bank.path"):
        made("full").load(some, saved)


def test_file_memory_needs_a_folder() -> None:
    with pytest.raises(ValueError, match="folder"):
        bank("file")


def test_rounding_is_unbiased() -> None:
    values = torch.cat([torch.linspace(-3, 3, 1001), torch.tensor([1e-30, 1e30, 1 / 3])])
    rows = values.repeat(4000, 1).unsqueeze(1)
    rounded = round_stochastically(rows, torch.arange(4000), key=5).double().squeeze(1)
    lower, upper = rounded.amin(0), rounded.amax(0)
    exact = values.double()
    assert (lower <= exact).all()
    assert (exact <= upper).all()
    step = (upper - lower).clamp_min(1e-300)
    # The deviation of the mean of 4000 draws from {0, 1} is at most 0.008.
    assert ((rounded.mean(0) - exact) / step).abs().max() < 5 * 0.008
    assert ((upper - lower) <= exact.abs() * 2.0**-7).all()


def test_what_bfloat16_holds_is_not_changed() -> None:
    values = torch.randn(50, 2, 3).bfloat16().float()
    rounded = round_stochastically(values, torch.arange(50), key=1)
    assert torch.equal(rounded.float(), values)


def test_what_is_not_finite_stays_so() -> None:
    """A GPU's NaN has all bits set: noise would carry over, and make a sound zero of it."""
    bits = torch.tensor([0x7FFFFFFF, -1, 0x7F800001, 0x7F800000, -0x800000], dtype=torch.int32)
    rows = bits.view(torch.float32).repeat(50, 1, 1)
    rounded = round_stochastically(rows, torch.arange(50), key=1)
    assert rounded[..., :3].isnan().all()
    assert torch.equal(rounded[..., 3:].float(), rows[..., 3:])


def test_rounding_depends_on_the_unit_and_the_key_alone() -> None:
    rows, units = torch.randn(8, 5, 16), torch.arange(30, 38)
    rounded = round_stochastically(rows, units, key=9)
    order = torch.tensor([3, 1, 7])
    assert torch.equal(round_stochastically(rows[order], units[order], key=9), rounded[order])
    assert not torch.equal(round_stochastically(rows, units, key=10), rounded)
    same = rows[:1].expand(8, -1, -1)
    assert len(round_stochastically(same, units, key=9).flatten(1).unique(dim=0)) == 8


def test_a_step_and_a_field_have_a_rounding_of_their_own() -> None:
    """With the same noise in every step, a change smaller than bfloat16 tells would be lost."""
    rows = bank(dtype=torch.bfloat16)
    units, third = numbers(103, 109), torch.full((2, 3, 4), 1 / 3)
    rows.touch(units)
    stored: dict[str, list[Tensor]] = {"weight": [], "momentum": []}
    for step in range(400):
        rows.write(units, {field: third for field in stored}, step)
        for field, kept in stored.items():
            kept.append(rows.read(units, field))
    weights, momenta = (torch.stack(kept).double() for kept in stored.values())
    distance = weights.amax() - weights.amin()
    assert 0 < distance < 2.0**-8
    # The deviation of the mean of 400 draws from {0, 1} is at most 0.025.
    for kept in (weights, momenta):
        assert ((kept.mean(0) - 1 / 3) / distance).abs().max() < 5 * 0.025
    assert 0.4 < (weights == momenta).double().mean() < 0.7
    rows.write(units, {"weight": third}, step=7)
    assert torch.equal(rows.read(units), stored["weight"][7]), "a step is rounded as it was"


@pytest.mark.parametrize("units", [numbers(*range(119, 99, -1)), UNITS], ids=["some", "range"])
def test_many_units_are_begun_a_few_at_a_time(
    units: Tensor | range, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bank_module, "chunk_values", lambda device: 3 * 12 + 5)  # three units
    rows, requested = bank(), []
    first = rows._initial

    def counted(some: Tensor) -> Tensor:
        requested.extend(some.tolist())
        assert len(some) <= 3
        return first(some)

    rows._initial = counted
    rows.touch(numbers(104, 118))
    rows.touch(units)
    assert sorted(requested) == list(UNITS)
    assert torch.equal(rows.touched, torch.arange(100, 120))
    assert torch.equal(rows.read(UNITS), initial(torch.arange(100, 120)))


@pytest.mark.parametrize("memory", MEMORIES)
def test_rows_are_saved_a_few_units_at_a_time(
    memory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = bank(memory, tmp_path)
    monkeypatch.setattr(saved_rows, "SAVED_CHUNK_BYTES", 2 * 48 + 5)  # two units of a weight
    units = numbers(101, 102, 105, 111, 119)
    rows.touch(units)
    saved = rows.saved(units)
    assert torch.equal(saved["weight"].tensor(), initial(units))
    assert saved["weight"].nbytes == 5 * 48
    buffer = torch.full((5, 3, 1), 7.0)
    saved["age"].copy_to(buffer)
    assert not buffer.any()


def test_pages_of_a_file_are_let_go_and_the_rows_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_store, "RESIDENT_BYTES", 1 << 20)
    rows = Bank(range(64), 128, 64, big, memory="file", folder=tmp_path)
    every = torch.arange(64)
    rows.touch(every)
    assert not rss_of(tmp_path / "weight.rows"), "what is written alone is not mapped"
    rows.read(every)
    mapped = rss_of(tmp_path / "weight.rows")
    assert mapped >= rows.bytes
    rows.release()
    assert rss_of(tmp_path / "weight.rows") < mapped / 8
    rows.prefetch(numbers(3, 4, 5, 60))
    assert torch.equal(rows.read(every), big(every))


def test_a_folder_that_cannot_be_made_is_a_mistake_in_its_key(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=r"head\.bank\.path: .*file/rows/.* cannot be made \(Not a"):
        Bank(range(8), 128, 64, big, memory="file", folder=tmp_path / "file" / "rows")


def test_a_file_takes_units_in_parts_and_shows_them_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = Bank(range(8), 128, 64, big, memory="file", folder=tmp_path)
    before = rows.read(range(8)).clone()
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, data, at: pwrite(file, data[:5000], at))
    rows.touch(numbers(6, 1))
    rows.write(numbers(1), {"weight": big(numbers(1)) / 3}, step=0)
    expected = torch.cat([before[:1], big(numbers(1)) / 3, before[2:]])
    assert torch.equal(rows.read(range(8)), expected)


def test_a_full_disk_names_the_file_and_the_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = Bank(range(8), 128, 64, big, memory="file", folder=tmp_path)

    monkeypatch.setattr(os, "pwrite", disk_full)
    with pytest.raises(RunError, match=r"weight.rows.*No space left.*head.bank.path"):
        rows.touch(numbers(3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory", MEMORIES)
def test_what_units_become_in_a_block_is_stored(
    memory: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    changed, written = (
        bank(memory, tmp_path / name, dtype=dtype) for name in ("changed", "written")
    )
    units = numbers(117, 100, 105)
    for rows in (changed, written):
        rows.touch(units)
    with changed.changing(units, step=4) as fields:
        assert set(fields) == {"weight", "momentum", "age"}
        for field, values in fields.items():
            for value in values:
                value.add_(len(field)).mul_(1 / 3)
    values = {field: (written.read(units, field) + len(field)) * (1 / 3) for field in fields}
    written.write(units, values, step=4)
    for field in fields:
        assert torch.equal(changed.read(UNITS, field), written.read(UNITS, field))


def big(units: Tensor) -> Tensor:
    return units.float().view(-1, 1, 1).expand(-1, 128, 64).contiguous()


def rss_of(path: Path) -> int:
    """Resident bytes of this process's mapping of a file."""
    lines = iter(Path("/proc/self/smaps").read_text().splitlines())
    next(line for line in lines if f"{path.parent}/{path.stem}-" in line)
    return 1024 * int(next(line for line in lines if line.startswith("Rss:")).split()[1])
