"""What `mhe audit` costs at any number of images, and whether it finds the same when it is killed.

Embeddings are synthetic: a class is a direction with noise. Their labels have the faults that `mhe
reproduce noise` plants. They are audited twice, in processes of their own: once in peace, and once
killed in the middle of some stages, and begun again after each kill.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import simplejpeg

from mhe_dist.errors import RunError, UserError
from mhe_dist.limits import available_cores, peak_memory
from mhe_dist.sizes import GIB
from pipelines.audit.findings import FINDINGS_FILE, write_findings
from pipelines.audit.job import AuditJob
from pipelines.audit.record import SampleNames, list_findings
from pipelines.audit.settings import AuditSettings
from pipelines.bench.scale.bounds import BoundedFigure
from pipelines.shards.index import ShardIndex
from pipelines.shards.writer import Sample, ShardWriter
from pipelines.sources.planted.faults import FaultRates, plan_faults
from pipelines.storage.mapped_file import create_mapped_array
from pipelines.storage.worker_pool import Progress, no_progress

KILLED: Final = ("first_cut", "centres", "class_pairs", "strays", "mixed", "recall")
"""Stages that an audit is killed in, each once."""
IMAGES_PER_CLASS: Final = 10
_MILLION: Final = 10**6  # images that the bounds are given for
_SECONDS, _MEMORY_GIB, _TIMES_AS_LONG = 600, 4, 2
_PER_SHARD: Final = 10_000
_PICTURES: Final = 997  # that differ
_SIDE: Final = 16  # of a picture, in pixels
_BYTES: Final = 3 << 10  # of an image beside its embedding: in a tar, and while it is audited
_NOISE, _FAR_NOISE, _FAR = 0.8, 2.0, 0.02  # lengths, and the share of images far from their class
_SHARDS, _ROWS, _LABELS = "shards", "rows.npy", "labels.npy"

_PROCESS: Final = """
import sys
from pipelines.bench.scale.audit import audit_in_process
audit_in_process(sys.argv[1], sys.argv[2])
"""


class _Ended(NamedTuple):
    """A process that audited.

    Attributes:
        seconds: from its start to its end.
        peak: bytes of memory at its peak, pages of files included.
        killed: the stage that it was killed in; empty: it came to its end.
    """

    seconds: float
    peak: int
    killed: str


def measure_audit(
    folder: Path, images: int, dim: int, progress: Progress = no_progress
) -> list[BoundedFigure]:
    """Write synthetic data into a folder, audit them twice, and compare.

    Args:
        folder: gets all files.
        images: about N; there are N / 10 classes before faults are planted.
        dim: D.
        progress: is called with the audits that came to their end or were killed, and their number.

    Returns:
        Seconds and memory of the audit in peace; how many times as long the killed one took, with
        all its beginnings; and whether it found anything else, byte for byte (0: no, 1: yes).

    Raises:
        UserError: the disk has too little room.
        RunError: an audit failed.
    """
    needed, free = images * (4 * dim + _BYTES), shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"--folder {folder}: {free:,} bytes are free, {images:,} images need {needed:,}; "
            "choose another folder, or fewer --images"
        )
    write_synthetic_set(folder, images, dim)
    total, rest = 2 + len(KILLED), list(KILLED)
    peaceful = _audit(folder, "peaceful", ())
    progress(1, total)
    beginnings: list[_Ended] = []
    while not beginnings or beginnings[-1].killed:
        beginnings.append(_audit(folder, "killed", rest))
        rest = [stage for stage in rest if stage != beginnings[-1].killed]
        progress(1 + len(beginnings), total)
    if rest:
        raise RunError(f"the audit has no stage {', '.join(rest)} to be killed in")
    found = [(folder / name / FINDINGS_FILE).read_bytes() for name in ("peaceful", "killed")]
    scale = max(1.0, images / _MILLION * dim / 512)
    return [
        BoundedFigure("an audit", peaceful.seconds, _SECONDS * scale, "s"),
        BoundedFigure(
            "memory at its peak, files included", peaceful.peak / GIB, _MEMORY_GIB * scale, "GiB"
        ),
        BoundedFigure(
            f"killed {len(KILLED)} times and begun again, of that time",
            sum(each.seconds for each in beginnings) / peaceful.seconds,
            _TIMES_AS_LONG,
            "",
        ),
        BoundedFigure("other findings then", float(found[0] != found[1]), 0, ""),
    ]


def write_synthetic_set(folder: Path, images: int, dim: int) -> None:
    """Write shards of small pictures, their embeddings `[N, D]`, and labels with faults."""
    rates = FaultRates()
    shown = max(1, round(images / (1 + rates.foreign)))
    classes = max(1, images // IMAGES_PER_CLASS)
    true = np.random.default_rng(0).permutation(shown) % classes
    foreign = [f"foreign {number}" for number in range(images - shown)]
    keys = [str(number) for number in range(shown)]
    planted = plan_faults(true, keys, classes, (), foreign, 0, rates)
    labels = np.concatenate([planted.labels, planted.foreign_labels])
    np.save(folder / _LABELS, labels.astype(np.int32))
    rows = create_mapped_array(folder / _ROWS, np.float32, (images, dim))
    directions = np.random.default_rng(1).standard_normal((classes, dim), np.float32)
    directions /= np.float32(dim**0.5)
    for start in range(0, images, _PER_SHARD):
        numbers = np.arange(start, min(start + _PER_SHARD, images))
        rows[numbers] = _embed(true[numbers[numbers < shown]], len(numbers), directions, start)
    del rows
    with ShardWriter(str(folder / _SHARDS), "synthetic") as writer:
        for samples in _samples(labels):
            writer.write(samples)
        writer.finish(planted.classes.num_classes)


def _embed(
    labels: npt.NDArray[Any], count: int, directions: npt.NDArray[Any], seed: int
) -> npt.NDArray[np.float32]:
    """float32 `[n, D]`: near the direction of their class; those without one are anywhere.

    Their lengths say nothing: an audit looks at directions (`UnitRows`).
    """
    rng, dim = np.random.default_rng([2, seed]), directions.shape[1]
    rows = rng.standard_normal((count, dim), np.float32)
    length = np.where(rng.random(len(labels)) < _FAR, _FAR_NOISE, _NOISE).astype(np.float32)
    rows[: len(labels)] *= length[:, None] / np.float32(dim**0.5)
    rows[: len(labels)] += directions[labels]
    return rows


def _samples(labels: npt.NDArray[Any]) -> Iterator[list[Sample]]:
    """The samples of each tar; their pictures are noise, and return after a while."""
    noise = np.random.default_rng(3).integers(0, 256, (_PICTURES, _SIDE, _SIDE, 3), np.uint8)
    pictures = [simplejpeg.encode_jpeg(pixels) for pixels in noise]
    for start in range(0, len(labels), _PER_SHARD):
        numbers = range(start, min(start + _PER_SHARD, len(labels)))
        yield [
            Sample(
                f"{number:09d}",
                {"jpg": pictures[number % _PICTURES], "cls": str(labels[number]).encode()},
            )
            for number in numbers
        ]


def _audit(folder: Path, name: str, kill_in: Sequence[str]) -> _Ended:
    """Audit in a process of its own, and kill it in the middle of the first of some stages."""
    command = [sys.executable, "-c", _PROCESS, str(folder), name]
    began, killed = time.monotonic(), ""
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        last: dict[str, Any] = {}
        for line in process.stdout:
            last = json.loads(line)
            if last.get("stage") in kill_in and 2 * last["done"] >= last["total"] and not killed:
                killed = last["stage"]
                process.kill()
    if not killed and process.returncode:
        raise RunError(f"an audit ended with {process.returncode}; its last words stand above")
    return _Ended(time.monotonic() - began, last.get("peak", 0), killed)


def audit_in_process(folder: str, name: str) -> None:
    """Audit the data of `write_synthetic_set`, and print lines of JSON: its stages, and its peak.

    Args:
        folder: of the data.
        name: of the audit's folder in it; what an earlier process did there is kept.
    """
    home = Path(folder)
    index = ShardIndex.load(str(home / _SHARDS))
    labels = np.load(home / _LABELS, mmap_mode="r")
    rows = np.load(home / _ROWS, mmap_mode="r")
    with AuditJob(
        str(home / name),
        index,
        rows,
        lambda start, stop: labels[start:stop],
        index.num_classes,
        (),
        {"data": index.digest},
        AuditSettings(),
        _SIDE,
    ) as job:
        result = job.run(_print_stage, available_cores())
        names = SampleNames(index, lambda wanted: {number: str(number) for number in wanted}, {})
        if result is not None:
            write_findings(job.folder, list_findings(result, names))
        job.publish()
    print(json.dumps({"peak": peak_memory()}), flush=True)


def _print_stage(stage: str, done: int, total: int) -> None:
    print(json.dumps({"stage": stage, "done": done, "total": total}), flush=True)
