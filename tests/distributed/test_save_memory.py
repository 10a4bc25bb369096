"""A save takes the memory of one copy of what it saves, wherever the rows are."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch

from mhe_dist.checkpoint.store import CheckpointStore
from mhe_dist.config.head import HeadConfig
from mhe_dist.config.schema import OptimConfig, TrainConfig
from mhe_dist.distributed.topology import Topology
from mhe_dist.engine.engine import Engine
from mhe_dist.heads.registry import build_head
from mhe_dist.heads.row_head import HeadSpec

CLASSES, WIDTH, GROUPS = 100_000, 128, 8  # 102 MB with momentum
PAGE = 4096
M_MMAP_THRESHOLD = -3  # of mallopt(3)


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


def peak_resident() -> int:
    """The most bytes since `forget_peak`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024


def forget_peak() -> None:
    """Begin to look for the peak anew."""
    Path("/proc/self/clear_refs").write_text("5")


def give_back_what_is_freed() -> None:
    """Let glibc map each large tensor on its own.

    It learns to take them from its heap, where freed ones leave holes that count as resident.
    """
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**16)


def touched_head(folder: str, memory: str, dtype: str, classes: int = CLASSES):
    """A head all of whose rows were trained, as far as memory goes."""
    bank = {"memory": memory, "dtype": dtype}
    values = {
        "kind": "mhs",
        "groups": GROUPS,
        "bank": bank,
        "mhs": {"length": 100, "extra_heads": 8},
    }
    spec = HeadSpec(HeadConfig.model_validate(values), classes, WIDTH, 0, 1, folder=folder)
    head = build_head(spec, Topology())
    bank = head.bank
    for start in range(bank.units.start, bank.units.stop, 64):
        units = range(start, min(start + 64, bank.units.stop))
        bank.touch(units)
        bank.write(units, {name: bank.read(units, name).clone() for name in bank.fields}, step=0)
    return head


def save_head(topology: Topology, folder: str, memory: str, dtype: str) -> dict[str, int]:
    """Peak memory of two saves beyond what was there, and the bytes that were saved."""
    give_back_what_is_freed()
    head = touched_head(folder, memory, dtype)
    store = CheckpointStore(f"{folder}/checkpoints", topology)
    store.save(0, {"small": torch.ones(3)}, {}, {})  # loads what a save needs
    store.wait()
    before = resident()
    forget_peak()
    saved = []
    for step in (1, 2):
        state = head.state()
        store.save(step, state.replicated, state.owned, {})
        end = store.wait()
        assert end is not None and end.error is None
        saved.append(end.bytes)
    return {"extra": peak_resident() - before, "saved": saved[-1]}


@pytest.mark.parametrize(
    ("memory", "dtype"), [("device", "float32"), ("host", "bfloat16"), ("file", "float32")]
)
def test_of_rows(run_distributed, tmp_path: Path, memory: str, dtype: str) -> None:
    (found,) = run_distributed(save_head, 1, str(tmp_path), memory, dtype)
    assert found["saved"] > 50e6
    assert found["extra"] <= 1.1 * found["saved"]


def save_backbone(topology: Topology, folder: str, zero_stage: int) -> dict[str, int]:
    """The same of a network; what the save must hold is this rank's share."""
    give_back_what_is_freed()
    model = torch.nn.Sequential(
        torch.nn.Flatten(), *(torch.nn.Linear(1600, 1600) for _ in range(6))
    )
    model.append(torch.nn.Linear(1600, 8))
    model.insert(1, torch.nn.Linear(3 * 4 * 4, 1600))
    train = TrainConfig.model_validate(
        {"global_batch": 4, "micro_batch": 2, "precision": "float32", "max_steps": 1}
    )
    engine = Engine(model, OptimConfig(), train, topology, zero_stage)
    store = CheckpointStore(f"{folder}/checkpoints", topology)
    store.save(0, {"small": torch.ones(3)}, {}, {})
    store.wait()
    before = resident()
    forget_peak()
    store.save(1, engine.entries(), {}, {})
    store.wait()
    size = sum(entry.nbytes for entry in engine.entries().values())
    return {"extra": peak_resident() - before, "saved": size // topology.world_size}


@pytest.mark.parametrize(("world_size", "zero_stage"), [(1, 0), (2, 1), (2, 3)])
def test_of_the_backbone(run_distributed, tmp_path: Path, world_size: int, zero_stage: int) -> None:
    gathered = 1600 * 1600 * 4 * 3  # one parameter, which the ranks make together
    for found in run_distributed(save_backbone, world_size, str(tmp_path), zero_stage):
        assert found["saved"] > 50e6
        assert found["extra"] <= 1.1 * found["saved"] + (gathered if zero_stage else 0)
