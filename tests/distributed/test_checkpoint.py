"""Checkpoints between numbers of ranks, through crashes, damage and failing storage."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

import fsspec
import psutil
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from torch import Tensor

from mhe_dist.checkpoint import files as checkpoint_files
from mhe_dist.checkpoint.reader import Checkpoint
from mhe_dist.checkpoint.retention import RetentionPolicy
from mhe_dist.checkpoint.step_folder import MANIFEST
from mhe_dist.checkpoint.store import CheckpointStore, CheckpointWarning, share_by_size
from mhe_dist.distributed.topology import Topology
from mhe_dist.errors import RunError
from tests.support.checkpoint_damage import flip_a_byte_of, stored_range
from tests.support.waiting import WATCHDOG_S, wait_for

GROUPS = 5


def replicated(step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {
        "model.weight": torch.randn(7, 3, generator=generator),
        "model.half": torch.randn(4, generator=generator).bfloat16(),
        "model.count": torch.tensor(step),
        "optim.step": torch.tensor(float(step)),
    }


def group_rows(group: int, step: int) -> Tensor:
    """Groups of different sizes, one of them empty."""
    return torch.full((3 * group, 2), float(group + 100 * step))


def owned(topology: Topology, step: int) -> dict[str, Tensor]:
    return {f"head/rows/{g}/weight": group_rows(g, step) for g in topology.share(GROUPS)}


def save(topology: Topology, root: str, steps: list[int], keep_last: int = 2) -> list[Any]:
    store = CheckpointStore(root, topology, RetentionPolicy(keep_last))
    ends = [
        store.save(s, replicated(s), owned(topology, s), {"step": s, "by": topology.rank})
        for s in steps
    ]
    ends.append(store.wait())
    assert store.wait() is None
    return [[e.step, e.bytes, e.error] for e in ends if e is not None]


def load(topology: Topology, root: str) -> dict[str, Any]:
    """What this rank's share is, read selectively."""
    store = CheckpointStore(root, topology)
    checkpoint = store.newest()
    if checkpoint is None:
        return {"step": None, "rejected": store.rejected}
    mine = {f"head/rows/{g}/weight" for g in topology.share(GROUPS)}
    tensors = checkpoint.load(lambda name: name in mine or not name.startswith("head/"))
    shapes = {name: list(shape) for name, (shape, _) in checkpoint.names().items()}
    return {
        "step": checkpoint.step,
        "run": checkpoint.run,
        "tensors": tensors,
        "shapes": shapes,
        "rejected": store.rejected,
    }


def assert_holds(result: dict[str, Any], step: int, groups: range) -> None:
    expected = replicated(step) | {f"head/rows/{g}/weight": group_rows(g, step) for g in groups}
    assert result["step"] == step
    assert result["tensors"].keys() == expected.keys()
    for name, tensor in expected.items():
        assert result["tensors"][name].dtype == tensor.dtype
        assert torch.equal(result["tensors"][name], tensor), name


ALONE = Topology()


def folders(root: Path) -> list[str]:
    return sorted(entry.name for entry in root.iterdir())


def test_saved_on_two_ranks_loads_on_one_and_three(run_distributed, tmp_path: Path) -> None:
    root = str(tmp_path)
    for ends in run_distributed(save, 2, root, [10, 20, 30]):
        assert [end[0] for end in ends] == [10, 20, 30]
        assert all(size > 0 and error is None for _, size, error in ends)
    assert folders(tmp_path) == ["step_00000020", "step_00000030"], "keep_last"
    alone = load(ALONE, root)
    assert_holds(alone, 30, range(GROUPS))
    assert alone["run"] == {"step": 30, "by": 0}
    assert alone["shapes"]["head/rows/4/weight"] == [12, 2]
    for rank, result in enumerate(run_distributed(load, 3, root)):
        assert_holds(result, 30, Topology(rank, 3).share(GROUPS))


def test_saved_alone_loads_on_two(run_distributed, tmp_path: Path) -> None:
    save(ALONE, str(tmp_path), [1])
    for rank, result in enumerate(run_distributed(load, 2, str(tmp_path))):
        assert_holds(result, 1, Topology(rank, 2).share(GROUPS))


def test_any_fsspec_url() -> None:
    root = "memory://bucket/run/checkpoints"
    save(ALONE, root, [1, 2, 3])
    result = load(ALONE, root)
    assert_holds(result, 3, range(GROUPS))
    names = fsspec.filesystem("memory").ls("/bucket/run/checkpoints", detail=False)
    assert sorted(name.rsplit("/", 1)[1] for name in names) == ["step_00000002", "step_00000003"]


def load_in_shares(topology: Topology, root: str) -> tuple[dict[str, Tensor], int]:
    """The tensors of the backbone, and the bytes of them that this rank reads."""
    read, count = checkpoint_files.CheckpointFolder.read_part, []

    def counted(self: Any, name: str, begin: int, end: int) -> bytes:
        count.append(end - begin)
        return read(self, name, begin, end)

    found = Checkpoint(f"{root}/step_00000007", 7)
    checkpoint_files.CheckpointFolder.read_part = counted  # type: ignore[method-assign]
    try:
        tensors = found.load_together(lambda name: not name.startswith("head/"), topology)
    finally:
        checkpoint_files.CheckpointFolder.read_part = read  # type: ignore[method-assign]
    return tensors, sum(count)


@pytest.mark.parametrize("ranks", [1, 3])
def test_what_all_ranks_want_is_read_once(ranks: int, run_distributed, tmp_path: Path) -> None:
    """Each read all of it, from the files of all ranks."""
    run_distributed(save, 2, str(tmp_path), [7])
    alone, size = load_in_shares(ALONE, str(tmp_path))
    assert alone.keys() == replicated(7).keys() and size > 0
    results = run_distributed(load_in_shares, ranks, str(tmp_path))
    for tensors, _ in results:
        assert list(tensors) == list(alone)
        for name, tensor in replicated(7).items():
            assert tensors[name].dtype == tensor.dtype and torch.equal(tensors[name], tensor)
    assert sum(count for _, count in results) == size
    assert all(count > 0 for _, count in results)


def test_an_empty_or_missing_folder_holds_none(tmp_path: Path) -> None:
    assert CheckpointStore(str(tmp_path), ALONE).newest() is None
    assert CheckpointStore(str(tmp_path / "none"), ALONE).newest() is None


def test_the_caller_may_change_its_tensors_at_once(tmp_path: Path) -> None:
    store = CheckpointStore(str(tmp_path), ALONE)
    weight, rows = torch.ones(1000, 100), torch.ones(1000, 100)
    store.save(1, {"weight": weight}, {"rows": rows}, {})
    weight.zero_()
    rows.zero_()
    store.wait()
    checkpoint = store.newest()
    assert checkpoint is not None
    for tensor in checkpoint.load(lambda name: True).values():
        assert torch.equal(tensor, torch.ones(1000, 100))


def flip_a_byte(folder: Path) -> str:
    file = folder / "__0_0.distcp"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    return "CRC-32"


def cut_short(folder: Path) -> str:
    file = folder / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[:-1])
    return "bytes"


def lose_a_file(folder: Path) -> str:
    (folder / ".metadata").unlink()
    return ".metadata is missing"


def lose_the_manifest(folder: Path) -> str:
    (folder / MANIFEST).unlink()
    return f"no {MANIFEST}"


def tear_the_manifest(folder: Path) -> str:
    file = folder / MANIFEST
    file.write_bytes(file.read_bytes()[:-20])
    return "cannot be read"


def age_the_manifest(folder: Path) -> str:
    file = folder / MANIFEST
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format": 99}))
    return "format 99"


DAMAGES = [
    flip_a_byte,
    cut_short,
    lose_a_file,
    lose_the_manifest,
    tear_the_manifest,
    age_the_manifest,
]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_one_is_passed_over_with_its_reason(tmp_path: Path, damage) -> None:
    save(ALONE, str(tmp_path), [1, 2])
    reason = damage(tmp_path / "step_00000002")
    result = load(ALONE, str(tmp_path))
    assert_holds(result, 1, range(GROUPS))
    assert list(result["rejected"]) == ["step_00000002"]
    assert reason in result["rejected"]["step_00000002"]


def newest_of(topology: Topology, root: str, prefix: str) -> tuple[int | None, dict[str, str]]:
    store = CheckpointStore(root, topology)
    found = store.newest(lambda name: name.startswith(prefix))
    return (None if found is None else found.step), store.rejected


@pytest.mark.parametrize("ranks", [1, 2])
def test_who_reads_some_tensors_finds_their_damage_and_no_other(
    ranks: int, run_distributed, tmp_path: Path
) -> None:
    save(ALONE, str(tmp_path), [1, 2])
    flip_a_byte_of(tmp_path / "step_00000002", "head/rows/3/weight")
    for step, rejected in run_distributed(newest_of, ranks, str(tmp_path), "model."):
        assert (step, rejected) == (2, {})
    for step, rejected in run_distributed(newest_of, ranks, str(tmp_path), "head/"):
        assert step == 1
        assert rejected["step_00000002"].startswith("head/rows/3/weight in __0_0.distcp does not")


def test_no_flipped_bit_of_a_tensor_passes_for_its_values(tmp_path: Path) -> None:
    """It is found, or changes nothing of what is loaded, or loading refuses it."""
    name, folder = "head/rows/3/weight", tmp_path / "step_00000001"
    save(ALONE, str(tmp_path), [1])
    file, stored = stored_range(folder, name)
    checkpoint, whole, found = Checkpoint(str(folder), 1), file.read_bytes(), 0
    for bit in range(8 * stored.start, 8 * stored.stop, 7):
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        file.write_bytes(data)
        if checkpoint.first_damaged_tensor([name]):
            found += 1
            continue
        try:
            loaded = checkpoint.load(lambda each: each == name)[name]
        except RunError:
            continue
        assert torch.equal(loaded, group_rows(3, 1))
    assert found > 100


def test_a_store_that_fails_for_the_moment_damages_no_tensor(monkeypatch) -> None:
    monkeypatch.setattr(checkpoint_files, "_WAITS_S", (0.0, 0.0))
    root, failures = "memory://moment/checkpoints", iter([OSError("reset"), OSError("slow")])
    save(ALONE, root, [1, 2])
    read = MemoryFileSystem.cat_file

    def failing(self, path, start=None, end=None, **kwargs):
        if path.endswith(".distcp") and (failure := next(failures, None)):
            raise failure
        return read(self, path, start=start, end=end, **kwargs)

    monkeypatch.setattr(MemoryFileSystem, "cat_file", failing)
    assert newest_of(ALONE, root, "model.") == (2, {})
    assert next(failures, None) is None


def test_to_check_a_backbone_its_own_bytes_are_read(tmp_path: Path) -> None:
    """Of 10^8 classes, the head is 400 GB and the backbone 100 MB."""
    store = CheckpointStore(str(tmp_path), ALONE)
    rows = {f"head/rows/{group}/weight": torch.ones(1 << 20) for group in range(16)}
    store.save(1, {"model.weight": torch.ones(1 << 18)}, rows, {})
    store.wait()
    before = psutil.Process().io_counters().read_chars
    assert store.newest(lambda name: name.startswith("model.")) is not None
    assert psutil.Process().io_counters().read_chars - before < 2 << 20, "of 65 MB"


def load_then_save_again(topology: Topology, root: str) -> dict[str, Any]:
    store = CheckpointStore(root, topology)
    before = store.newest()
    store.save(2, replicated(2), owned(topology, 2), {})
    store.wait()
    after = store.newest()
    assert before is not None and after is not None
    return {"before": before.step, "after": after.step}


def test_all_ranks_pass_over_the_same_and_write_it_anew(run_distributed, tmp_path: Path) -> None:
    """The damaged file is checked by one rank only; both go back, and may replace it."""
    run_distributed(save, 2, str(tmp_path), [1, 2])
    flip_a_byte(tmp_path / "step_00000002")
    for result in run_distributed(load_then_save_again, 2, str(tmp_path)):
        assert result == {"before": 1, "after": 2}


def test_a_complete_one_is_not_written_again(tmp_path: Path) -> None:
    save(ALONE, str(tmp_path), [1])
    manifest = tmp_path / "step_00000001" / MANIFEST
    written = manifest.stat().st_mtime_ns
    ends = save(ALONE, str(tmp_path), [1])
    assert ends == [[1, 0, None]]
    assert manifest.stat().st_mtime_ns == written


KILLED = """
import sys, time
sys.path[:0] = sys.argv[2:]
import torch
from mhe_dist.checkpoint.files import CheckpointFolder
from mhe_dist.checkpoint.store import CheckpointStore
from mhe_dist.distributed.topology import Topology
store = CheckpointStore(sys.argv[1], Topology())
store.save(1, {"weight": torch.ones(3)}, {}, {})
store.wait()
CheckpointFolder.write_manifest = lambda *args: time.sleep(10_000)
store.save(2, {"weight": torch.zeros(3)}, {}, {})
print("saving", flush=True)
time.sleep(10_000)
"""


def test_killed_before_the_manifest_leaves_the_one_before(tmp_path: Path) -> None:
    repository = str(Path(__file__).parents[2])
    command = [sys.executable, "-c", KILLED, str(tmp_path), repository]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"saving\n"
        wait_for((tmp_path / "step_00000002" / ".metadata").exists)
        process.kill()
    store = CheckpointStore(str(tmp_path), ALONE)
    found = store.newest()
    assert found is not None and found.step == 1
    assert "no manifest.json" in store.rejected["step_00000002"]
    store.save(2, {"weight": torch.full((3,), 2.0)}, {}, {})
    store.wait()
    found = store.newest()
    assert found is not None and found.step == 2
    assert torch.equal(found.load(lambda name: True)["weight"], torch.full((3,), 2.0))
    assert folders(tmp_path) == ["step_00000002"]


class FullDisk(MemoryFileSystem):
    """A store that refuses, on one rank, the files whose names hold `refused`."""

    protocol = "fulldisk"
    refused = ""

    def open(self, path: str, mode: str = "rb", **kwargs: Any) -> Any:
        if "w" in mode and self.refused and self.refused in path:
            raise OSError(28, "No space left on device", path)
        return super().open(path, mode, **kwargs)


REFUSED = ["__1_0.distcp", ".metadata", "manifest.json"]


def save_to_a_full_disk(topology: Topology) -> list[list[Any]]:
    """Memory is each rank's own here, so nothing is looked for afterwards."""
    fsspec.register_implementation("fulldisk", FullDisk, clobber=True)
    store = CheckpointStore("fulldisk://run", topology)
    results = []
    for step, refused in enumerate(REFUSED):
        FullDisk.refused = refused
        store.save(2 * step, replicated(1), owned(topology, 1), {})
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            failed = store.wait()
        warned = [str(w.message) for w in caught if w.category is CheckpointWarning]
        FullDisk.refused = ""
        store.save(2 * step + 1, replicated(2), owned(topology, 2), {})
        good = store.wait()
        assert failed is not None and good is not None
        results.append([failed.error, warned, good.error])
    return results


def test_a_failed_write_is_told_and_the_next_one_works(run_distributed) -> None:
    """Whichever rank fails at whichever file: every rank knows, rank 0 says so, all go on."""
    for rank, results in enumerate(run_distributed(save_to_a_full_disk, 2)):
        for failed, warned, good in results:
            assert "No space left" in failed
            assert good is None
            assert len(warned) == (rank == 0)
            assert all("was not written" in text and "No space left" in text for text in warned)


def test_a_failed_write_leaves_the_last_good_one() -> None:
    fsspec.register_implementation("fulldisk", FullDisk, clobber=True)
    store = CheckpointStore("fulldisk://alone", ALONE)
    store.save(1, replicated(1), {}, {})
    store.wait()
    FullDisk.refused = "step_00000002/manifest.json"
    store.save(2, replicated(2), {}, {})
    with pytest.warns(CheckpointWarning, match="last good checkpoint stands"):
        store.wait()
    FullDisk.refused = ""
    found = store.newest()
    assert found is not None and found.step == 1


def test_files_that_vanish_under_a_load_are_a_run_error(tmp_path: Path) -> None:
    save(ALONE, str(tmp_path), [1])
    found = CheckpointStore(str(tmp_path), ALONE).newest()
    assert found is not None
    found.names()
    os.unlink(tmp_path / "step_00000001" / "__0_0.distcp")
    with pytest.raises(RunError, match=r"step_00000001.*__0_0\.distcp"):
        found.load(lambda name: True)


def test_poll_does_not_wait(tmp_path: Path, monkeypatch) -> None:
    store = CheckpointStore(str(tmp_path), ALONE)
    write, go = store._write, threading.Event()

    def write_later(*args: Any) -> None:
        go.wait(WATCHDOG_S)
        write(*args)

    monkeypatch.setattr(store, "_write", write_later)
    store.save(1, replicated(1), {}, {})
    assert store.poll() is None
    go.set()
    polled = []
    wait_for(lambda: polled.append(store.poll()) or polled[-1])
    ended = polled[-1]
    assert ended is not None and ended.step == 1 and ended.error is None


def test_old_ones_that_cannot_be_deleted_do_not_spoil_the_new(tmp_path: Path, monkeypatch) -> None:
    def refuse(folder: checkpoint_files.CheckpointFolder) -> None:
        if "step_00000001" in folder.url:
            raise PermissionError(folder.url)

    save(ALONE, str(tmp_path), [1])
    monkeypatch.setattr(checkpoint_files.CheckpointFolder, "remove", refuse)
    assert [end[2] for end in save(ALONE, str(tmp_path), [2], keep_last=1)] == [None]
    assert load(ALONE, str(tmp_path))["step"] == 2


def test_shares_are_balanced_and_complete() -> None:
    tensors = {f"t{i}": torch.empty(i) for i in range(20)}
    shares = share_by_size(tensors, 3)
    assert sorted(name for share in shares for name in share) == sorted(tensors)
    loads = [sum(tensors[name].nbytes for name in share) for share in shares]
    assert max(loads) - min(loads) <= 19 * 4


def test_a_damaged_newer_one_does_not_cost_a_good_older_one(tmp_path: Path) -> None:
    """Its sizes are right, so only discovery knows: it must not count as the newest one kept."""
    save(ALONE, str(tmp_path), [1, 5])
    flip_a_byte(tmp_path / "step_00000005")
    store = CheckpointStore(str(tmp_path), ALONE)
    found = store.newest()
    assert found is not None and found.step == 1
    store.save(3, replicated(3), owned(ALONE, 3), {})
    store.wait()
    assert load(ALONE, str(tmp_path))["step"] == 3
    store.save(5, replicated(5), owned(ALONE, 5), {})
    store.wait()
    assert load(ALONE, str(tmp_path))["step"] == 5
    assert folders(tmp_path) == ["step_00000005"]


def test_the_best_one_is_known_by_its_score(tmp_path: Path) -> None:
    store = CheckpointStore(str(tmp_path), ALONE, RetentionPolicy(1, every=30, best="rank1"))
    for step, rank1 in [(10, 0.2), (20, 0.9), (30, 0.3), (40, 0.8), (50, float("nan"))]:
        store.save(step, {"weight": torch.ones(3)}, {}, {"scores": {"rank1": rank1}})
    store.wait()
    assert folders(tmp_path) == ["step_00000020", "step_00000030", "step_00000050"]


def test_a_score_may_come_after_the_checkpoint(tmp_path: Path) -> None:
    store = CheckpointStore(str(tmp_path), ALONE, RetentionPolicy(1, best="rank1"))
    store.save(10, {"weight": torch.ones(3)}, {}, {"scores": {}})
    store.wait()
    store.add_scores(10, {"rank1": 0.9})
    newest = store.newest()
    assert newest is not None and newest.scores == {"rank1": 0.9}
    for step in (20, 30):
        store.save(step, {"weight": torch.ones(3)}, {}, {"scores": {"rank1": 0.5}})
    store.wait()
    assert folders(tmp_path) == ["step_00000010", "step_00000030"]


def test_a_roll_back_deletes_what_is_newer_if_an_older_one_stands(tmp_path: Path) -> None:
    """The one of the step itself stays; a damaged one is no older one to go back to."""
    assert CheckpointStore(str(tmp_path), ALONE).roll_back_to(5), "there is nothing to delete"
    save(ALONE, str(tmp_path), [10, 20, 30, 40], keep_last=9)
    store = CheckpointStore(str(tmp_path), ALONE)
    assert not store.roll_back_to(9)
    assert folders(tmp_path) == [f"step_{step:08d}" for step in (10, 20, 30, 40)]
    lose_the_manifest(tmp_path / "step_00000010")
    assert not store.roll_back_to(15)
    assert store.roll_back_to(35)
    assert folders(tmp_path) == [f"step_{step:08d}" for step in (10, 20, 30)]
    assert store.roll_back_to(20), "there is no other one to go back to"
    assert load(ALONE, str(tmp_path))["step"] == 20
    assert folders(tmp_path) == ["step_00000010", "step_00000020"]
