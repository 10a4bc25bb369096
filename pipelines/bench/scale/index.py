"""What an index costs at any number of samples: synthetic columns, no tars, and each bound.

The bounds are those of docs/scale.md. Every figure is measured on this machine, in processes that
are started for it.
"""

from __future__ import annotations

import json
import multiprocessing
import shutil
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Iterator
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any, Final

import numpy as np

from mhe_dist.errors import UserError
from mhe_dist.seeds import GOLDEN
from mhe_dist.sizes import MIB
from pipelines.bench.scale.bounds import BoundedFigure
from pipelines.shards.columns import Column, write_column
from pipelines.shards.index import INDEX_FILE, ShardIndex
from pipelines.shards.shard import BEGINS, LABELS, IndexColumns, Ints
from pipelines.shards.shard_list import ShardTable

PER_SHARD: Final = 10_000  # samples
_SAMPLE_BLOCKS: Final = 24  # 12 KiB: an image of 112x112 and its label
_MOST_BYTES: Final = 12  # per sample, of columns with room for more
_OPENINGS: Final = 5
STEP_SAMPLES, STEP_STREAMS, STEP_WINDOW = 65_536, 1024, 1024  # those of 1,024 ranks
_STEPS: Final = 12
_STEP_CLASSES, _WIDTH = 10**8, 128
_WARM_UP: Final = 8  # steps: the first ones make pages and tables
_IMAGES_PER_CLASS: Final = 5  # of the view that is drawn
_SAMPLES_PER_READ: Final = 256
_SMALLER: Final = 10**8  # samples; the bounds are given for this number
_LARGER: Final = 10**9  # and for this one

_PROCESS: Final = """
import json, sys
from pipelines.bench.scale.index import measure_process
print(json.dumps(measure_process(sys.argv[1], sys.argv[2])))
"""


def measure_index(folder: Path, samples: int) -> list[BoundedFigure]:
    """Write a synthetic index into a folder, and measure what it costs to use.

    Raises:
        UserError: the disk has too little room.
    """
    free = shutil.disk_usage(folder).free
    if free < samples * _MOST_BYTES:
        raise UserError(
            f"--folder {folder}: {free:,} bytes are free, {samples:,} samples need "
            f"{samples * _MOST_BYTES:,}; choose another folder, or fewer --samples"
        )
    write_synthetic_index(str(folder), samples)
    openings = [_in_new_process(folder, "open") for _ in range(_OPENINGS)]
    walked = _in_new_process(folder, "walk")
    drawn = _in_new_process(folder, "draw")
    columns = sum(path.stat().st_size for path in folder.glob("*.npy"))
    scale = max(samples, _SMALLER) / _SMALLER
    private, draws = _between(samples, 32, 128), _between(samples, 1000, 8000)
    return [
        BoundedFigure(INDEX_FILE, (folder / INDEX_FILE).stat().st_size / 1e6, 4 * scale, "MB"),
        BoundedFigure("columns on disk, one label each", columns / 1e9, scale, "GB"),
        BoundedFigure(
            "open, per process, CPU",
            median(opening["open_s"] for opening in openings) * 1000,
            50 * scale,
            "ms",
        ),
        BoundedFigure(
            "private memory of a rank, after all shards", walked["rank"] / MIB, private, "MiB"
        ),
        BoundedFigure(
            "private memory of a loader process, after all shards",
            walked["loader"] / MIB,
            private,
            "MiB",
        ),
        BoundedFigure(
            f"labels and plan of a step of {STEP_SAMPLES:,} samples, {STEP_STREAMS:,} ranks, CPU",
            _in_new_process(folder, "labels")["step_s"] * 1000,
            20,
            "ms",
        ),
        BoundedFigure(
            f"draw of {_IMAGES_PER_CLASS} images of each class, per epoch and node",
            drawn["draw_s"],
            15 * scale,
            "s",
        ),
        BoundedFigure("memory of that, at the peak", drawn["draw"] / 1e6, draws, "MB"),
    ]


def _between(samples: int, smaller: float, larger: float) -> float:
    """A bound that grows from that of 10^8 samples to that of 10^9."""
    return smaller + max(0, samples - _SMALLER) / (_LARGER - _SMALLER) * (larger - smaller)


def write_synthetic_index(folder: str, samples: int, per_shard: int = PER_SHARD) -> None:
    """Write an index of tars that are nowhere: as many classes as a tenth of the samples."""
    sizes = [min(per_shard, samples - start) for start in range(0, samples, per_shard)]
    num_classes = max(1, samples // 10)
    entries = {
        BEGINS: write_column(f"{folder}/{BEGINS}.npy", "uint32", samples, _begins(sizes)),
        LABELS: write_column(
            f"{folder}/{LABELS}.npy", "uint32", samples, _labels(sizes, num_classes)
        ),
    }
    columns = IndexColumns(*(Column(folder, entry) for entry in entries.values()))
    shards = ShardTable(
        columns,
        [
            {
                "url": f"synthetic-{number:06d}.tar",
                "samples": size,
                "bytes": 512 * (size * _SAMPLE_BLOCKS + 2),
                "checksum": f"sha256:{number:064x}",
                "end": 512 * size * _SAMPLE_BLOCKS,
            }
            for number, size in enumerate(sizes)
        ],
    )
    index = ShardIndex(folder, num_classes, shards, {"source": "synthetic"})
    index.write_table({name: asdict(entry) for name, entry in entries.items()})


def _begins(sizes: list[int]) -> Iterator[Ints]:
    for size in sizes:
        yield np.arange(size, dtype=np.int64) * _SAMPLE_BLOCKS


def _labels(sizes: list[int], num_classes: int) -> Iterator[Ints]:
    """Labels in an order that is none: a multiplicative hash of the sample's number."""
    first = 0
    for size in sizes:
        numbers = np.arange(first, first + size, dtype=np.uint64)
        yield (numbers * np.uint64(GOLDEN) % np.uint64(num_classes)).astype(np.int64)
        first += size


def walk(index: ShardIndex) -> None:
    """Look up where every sample is and what its label is, as an epoch of training does."""
    for shard in index.shards:
        for start in range(0, shard.samples, _SAMPLES_PER_READ):
            shard.bounds(start, min(start + _SAMPLES_PER_READ, shard.samples))
            shard.label(start)
        shard.labels  # noqa: B018, reads all of them


def private_bytes() -> int:
    """Memory that this process shares with no other, and that is not a page of a file."""
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Private_Dirty:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/smaps_rollup has no line Private_Dirty")


def measure_process(folder: str, what: str) -> dict[str, Any]:
    """Open an index in this process, which has not done so yet, and use it.

    Args:
        folder: of the index.
        what: `open` alone; `walk`, look up where every sample is; `labels` of steps; or `draw` an
            epoch of a view.

    Returns:
        `open_s`, CPU seconds until the index can be used; `rank` and `loader`, bytes of private
        memory that this process and one that is forked from it have more after a walk; `step_s`,
        CPU seconds for the labels of a step and a rank's plan of it (the median); `draw_s`, seconds
        of a draw, and `draw`, bytes that it has allocated at the peak.
    """
    before = private_bytes()
    begin = time.process_time()
    index = ShardIndex.load(folder)
    index.starts, index.digest  # noqa: B018, which a rank needs
    found: dict[str, Any] = {"open_s": time.process_time() - begin}
    if what == "labels":
        found["step_s"] = _step_seconds(index)
    if what == "draw":
        found["draw_s"], found["draw"] = _draw(folder)
    if what == "walk":
        found["loader"] = _walk_in_fork(index)
        walk(index)
        found["rank"] = private_bytes() - before
    return found


def _step_seconds(index: ShardIndex) -> float:
    """CPU seconds for the labels of a step and their plan, after the first ones.

    The plan is that of one rank of `STEP_STREAMS`, of routed MHS over 10^8 classes.
    """
    # They import torch, whose memory is no matter of an index.
    import torch

    from mhe_dist.config.head import HeadConfig
    from mhe_dist.distributed.topology import Topology
    from mhe_dist.heads.registry import build_head
    from mhe_dist.heads.row_head import HeadSpec
    from pipelines.data.order import SampleOrder
    from pipelines.data.step_labels import StepLabels

    torch.set_num_threads(1)
    streams = min(STEP_STREAMS, index.samples)
    labels = StepLabels(index, SampleOrder(index.sizes, streams, STEP_WINDOW, 0), STEP_SAMPLES)
    sizes = {"length": 100, "extra_heads": 8}
    config = HeadConfig.model_validate({"kind": "mhs", "groups": STEP_STREAMS, "mhs": sizes})
    spec = HeadSpec(config, _STEP_CLASSES, _WIDTH, 0, STEP_STREAMS)
    head = build_head(spec, Topology(0, STEP_STREAMS, torch.device("cpu")))
    seconds = []
    for step in range(_WARM_UP + _STEPS):
        begin = time.process_time()
        found = torch.from_numpy(labels.of(step)) * (_STEP_CLASSES // index.num_classes)
        head.plan(step, found.view(STEP_STREAMS, -1))
        seconds.append(time.process_time() - begin)
    return median(seconds[_WARM_UP:])


def _draw(folder: str) -> tuple[float, int]:
    """Seconds of an epoch's draw, and bytes that it has allocated at the peak."""
    from mhe_dist.config.data import DataConfig
    from pipelines.data.mixture.index import Mixture, open_training_index

    settings = {"images_per_class": _IMAGES_PER_CLASS, "remote": {"cache_dir": f"{folder}/cache"}}
    view = open_training_index(DataConfig.model_validate({"shards": folder} | settings), 0)
    assert isinstance(view, Mixture)
    # Counted by the allocators: samples of private memory miss the peak of a quick draw.
    tracemalloc.start()
    begin = time.monotonic()
    view.draw(0)
    seconds = time.monotonic() - begin
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return seconds, peak


def _walk_in_fork(index: ShardIndex) -> int:
    """Bytes of private memory that a loader process has more after a walk."""
    fork = multiprocessing.get_context("fork")
    receiver, sender = fork.Pipe(duplex=False)
    process = fork.Process(target=_walk_and_tell, args=(index, sender))
    process.start()
    found = int(receiver.recv())
    process.join()
    return found


def _walk_and_tell(index: ShardIndex, sender: Connection) -> None:
    before = private_bytes()
    walk(index)
    sender.send(private_bytes() - before)


def _in_new_process(folder: Path, what: str) -> dict[str, Any]:
    command = [sys.executable, "-c", _PROCESS, str(folder), what]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found
