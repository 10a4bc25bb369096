"""Images per second of this project's loader beside other readers; see `mhe bench data`.

- `bare`: one process reads each tar from beginning to end with tarfile and decodes with simplejpeg.
  It does not shuffle, check or batch.
- `decoder`: the same without tarfile: it reads from header to header, so that hardly more than the
  decoder is measured.
- `webdataset`: the pipeline of webdataset's documentation, with its Pillow decoder and torch's
  DataLoader.
- `mhe`: this project's loader as a run uses it, with shuffling, checks and substitution.

All readers take turns and read the same shards completely, so that a busy moment of the machine
affects each of them. On a machine that others use, CPU seconds are more reliable than wall time.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import resource
import statistics
import tarfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

import simplejpeg
import webdataset
from torch.utils.data import DataLoader

from mhe_dist.config.schema import Config
from mhe_dist.errors import UserError
from mhe_dist.limits import available_cores
from pipelines.data.order import ShardSpan
from pipelines.data.sample import parse_members, read_span
from pipelines.loader.loader import Loader
from pipelines.shards.index import ShardIndex
from pipelines.storage.urls import is_local, resolve_url
from pipelines.storage.worker_pool import Progress, no_progress

MICRO_BATCH: Final = 128  # the default of a run
_BLOCK: Final = 512


@dataclass
class Timing:
    """Times of one reader, one value per repetition.

    Attributes:
        images: read in a repetition.
        wall: seconds of wall time.
        cpu: CPU seconds of all processes.
        worker: CPU seconds of the loader processes, or of the one process that reads.
    """

    images: int = 0
    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    worker: list[float] = field(default_factory=list)

    def rate(self, clock: str) -> float:
        """Median images per second by `wall`, `cpu` or `worker`."""
        return statistics.median(self.images / seconds for seconds in getattr(self, clock))


@dataclass(frozen=True)
class LoaderComparison:
    """What `measure_loaders` measured.

    Attributes:
        timings: by reader: `bare`, `decoder`, `webdataset`, `mhe`.
        setting: what it was measured on.
    """

    timings: dict[str, Timing]
    setting: dict[str, Any]

    def ratios(self) -> dict[str, dict[str, float]]:
        """Our loader's rates over those of each other reader: reader -> measure -> ratio.

        `bare` and `decoder` are single processes; they are compared with one loader process.
        """
        mhe, workers = self.timings["mhe"], self.setting["workers"]
        ratios = {}
        for name in ("bare", "decoder"):
            other = self.timings[name]
            ratios[name] = {
                "per worker": mhe.rate("wall") / workers / other.rate("wall"),
                "per CPU second of a worker": mhe.rate("worker") / other.rate("worker"),
            }
        other = self.timings["webdataset"]
        ratios["webdataset"] = {
            "per second": mhe.rate("wall") / other.rate("wall"),
            "per CPU second": mhe.rate("cpu") / other.rate("cpu"),
        }
        return ratios

    def to_dict(self) -> dict[str, Any]:
        """The measurements as JSON can hold them."""
        timings = {
            name: {
                "images": timing.images,
                "wall_s": timing.wall,
                "cpu_s": timing.cpu,
                "worker_cpu_s": timing.worker,
            }
            for name, timing in self.timings.items()
        }
        return {"setting": self.setting, "timings": timings, "ratios": self.ratios()}


def measure_loaders(
    index: ShardIndex, workers: int, repeats: int, progress: Progress = no_progress
) -> LoaderComparison:
    """Let all readers read a data set, in turns.

    Args:
        index: shards on this machine that hold square JPEGs of one size.
        workers: number of loader processes.
        repeats: how often each reader reads everything.
        progress: called with the number of readings done and of all readings.

    Raises:
        UserError: the shards are remote, hold other images, or too few.
    """
    tars, side = _local_tars(index), _image_side(index)
    readers: dict[str, Callable[[], int]] = {
        "bare": lambda: read_with_tarfile(tars),
        "decoder": lambda: decode_only(tars),
        "webdataset": lambda: read_with_webdataset(tars, workers),
        "mhe": lambda: read_with_mhe(index, workers, side),
    }
    timings = {name: Timing() for name in readers}
    decode_only(tars)  # brings the files into memory
    for repetition in range(repeats):
        for number, (name, reader) in enumerate(readers.items()):
            _time_reader(reader, timings[name])
            progress(repetition * len(readers) + number + 1, repeats * len(readers))
    setting = {
        "shards": index.folder,
        "images": index.samples,
        "mean_bytes": sum(shard.bytes for shard in index.shards) // index.samples,
        "side": side,
        "workers": workers,
        "repeats": repeats,
        "cores": available_cores(),
        "load": os.getloadavg()[0],
    }
    return LoaderComparison(timings, setting)


def read_with_tarfile(tars: list[str]) -> int:
    """Decode every `.jpg` of the tars with tarfile; return the number of images."""
    images = 0
    for path in tars:
        with tarfile.open(path, "r|") as tar:
            for member in tar:
                if member.name.endswith(".jpg") and (file := tar.extractfile(member)):
                    simplejpeg.decode_jpeg(file.read())
                    images += 1
    return images


def decode_only(tars: list[str]) -> int:
    """Decode every `.jpg` without tarfile and without checks; return the number of images."""
    images = 0
    for path in tars:
        with open(path, "rb") as stream:
            while (header := stream.read(_BLOCK)) and header[0]:
                size = int(header[124:135], 8)
                data = stream.read(-(-size // _BLOCK) * _BLOCK)
                if header[:100].rstrip(b"\0").endswith(b".jpg"):
                    simplejpeg.decode_jpeg(data[:size])
                    images += 1
    return images


def read_with_webdataset(tars: list[str], workers: int) -> int:
    """Read the tars as webdataset's documentation does; return the number of images."""
    dataset = (
        webdataset.WebDataset(tars, shardshuffle=False, empty_check=False)
        .decode("torchrgb8")
        .to_tuple("jpg", "cls")
    )
    loader = DataLoader(dataset, batch_size=MICRO_BATCH, num_workers=workers)
    return sum(len(labels) for _, labels in loader)


def read_with_mhe(index: ShardIndex, workers: int, side: int) -> int:
    """Read about one epoch with this project's loader; return the number of images."""
    config = Config.model_validate(
        {
            "data": {"shards": index.folder, "image_size": side, "loader_workers": workers},
        }
    )
    train = config.train
    loader = Loader(
        index,
        config.data,
        global_batch=train.global_batch,
        micro_batches=train.micro_batches,
        stop_step=index.samples // train.global_batch,
        seed=config.run.seed,
    )
    return sum(len(micro.labels) for batch in loader for micro in batch.micro_batches)


def _local_tars(index: ShardIndex) -> list[str]:
    """Paths of the tars."""
    if index.samples < MICRO_BATCH:
        raise UserError(f"{index.folder}: {index.samples} images are too few to measure anything")
    found = [resolve_url(index.url(number)) for number in range(len(index.shards))]
    if not all(is_local(filesystem) for filesystem, _ in found):
        raise UserError(
            f"{index.folder}: the loader is measured, not a network; give shards on this machine"
        )
    return [path for _, path in found]


def _image_side(index: ShardIndex) -> int:
    """Width and height of the first image, which must be a square JPEG."""
    number = next(number for number, shard in enumerate(index.shards) if shard.samples)
    [raw, *_] = read_span(index, ShardSpan(number, 0, 1))
    members = parse_members(raw, alone=False)
    if "jpg" not in members:
        raise UserError(f"{index.folder}: its images are no .jpg, which the bare loop decodes")
    height, width = simplejpeg.decode_jpeg_header(members["jpg"])[:2]
    if height != width:
        raise UserError(
            f"{index.folder}: images of {width}x{height}; only square ones are compared, because "
            "our loader would cut others"
        )
    return int(height)


def _time_reader(reader: Callable[[], int], timing: Timing) -> None:
    gc.collect()
    wall = time.perf_counter()
    own, children = _cpu_seconds()
    timing.images = reader()
    gc.collect()  # ends the loader processes
    multiprocessing.active_children()  # waits for them, so that their CPU time is counted
    timing.wall.append(time.perf_counter() - wall)
    own, children = (now - then for now, then in zip(_cpu_seconds(), (own, children), strict=True))
    timing.cpu.append(own + children)
    timing.worker.append(children or own)


def _cpu_seconds() -> tuple[float, float]:
    """CPU seconds of this process, and of its children that have ended."""
    own, children = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return own.ru_utime + own.ru_stime, children.ru_utime + children.ru_stime
