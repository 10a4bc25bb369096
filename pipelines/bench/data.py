"""Images per second of our loader beside two others; see `mhe bench data`.

- `bare`: one process reads a tar from its beginning to its end with tarfile and decodes with
  simplejpeg. No shuffle, no checks, no batches.
- `decoder`: the same without tarfile, from header to header: hardly more than the decoder itself.
- `webdataset`: its documentation's pipeline, its own Pillow decoder and torch's DataLoader.
- `mhe`: our loader, with shuffling, checks and substitution, as a run uses it.

All read the same shards completely, in turns, so that a busy moment of the machine hits each. On a
machine that others use, CPU seconds say more than the clock.
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
from pipelines.data.order import Piece
from pipelines.data.sample import parse, read_piece
from pipelines.loader.loader import Loader
from pipelines.shards.index import ShardIndex
from pipelines.storage import urls
from pipelines.storage.worker_pool import Progress, ignore

MICRO_BATCH: Final = 128  # the default of a run
_BLOCK: Final = 512


@dataclass
class Timing:
    """Of one contestant, by repetition.

    Attributes:
        images: read in a repetition.
        wall: seconds of the clock.
        cpu: CPU seconds of all processes.
        worker: CPU seconds of the loader processes, or of the one process that reads.
    """

    images: int = 0
    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    worker: list[float] = field(default_factory=list)

    def rate(self, clock: str) -> float:
        """Images per second of one of the three, the median."""
        return statistics.median(self.images / seconds for seconds in getattr(self, clock))


@dataclass(frozen=True)
class Result:
    """What was measured.

    Attributes:
        timings: by contestant: `bare`, `decoder`, `webdataset`, `mhe`.
        setting: what it was measured on.
    """

    timings: dict[str, Timing]
    setting: dict[str, Any]

    def ratios(self) -> dict[str, dict[str, float]]:
        """What our loader's rates are multiples of: other -> measure -> ratio.

        The single processes `bare` and `decoder` are compared with one loader process of ours.
        """
        ours, workers = self.timings["mhe"], self.setting["workers"]
        ratios = {}
        for name in ("bare", "decoder"):
            other = self.timings[name]
            ratios[name] = {
                "per worker": ours.rate("wall") / workers / other.rate("wall"),
                "per CPU second of a worker": ours.rate("worker") / other.rate("worker"),
            }
        other = self.timings["webdataset"]
        ratios["webdataset"] = {
            "per second": ours.rate("wall") / other.rate("wall"),
            "per CPU second": ours.rate("cpu") / other.rate("cpu"),
        }
        return ratios

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
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


def measure(index: ShardIndex, workers: int, repeats: int, progress: Progress = ignore) -> Result:
    """Let the contestants read a data set in turns.

    Args:
        index: square JPEGs of one size on this machine.
        workers: loader processes.
        repeats: how often.
        progress: called with what is done.

    Raises:
        UserError: the shards are of another kind.
    """
    tars, side = _local(index), _side(index)
    contestants: dict[str, Callable[[], int]] = {
        "bare": lambda: bare(tars),
        "decoder": lambda: decoder(tars),
        "webdataset": lambda: plain_webdataset(tars, workers),
        "mhe": lambda: ours(index, workers, side),
    }
    timings = {name: Timing() for name in contestants}
    decoder(tars)  # brings the files into memory
    for turn in range(repeats):
        for place, (name, contestant) in enumerate(contestants.items()):
            _time(contestant, timings[name])
            progress(turn * len(contestants) + place + 1, repeats * len(contestants))
    setting = {
        "shards": index.folder,
        "images": index.samples,
        "mean_bytes": sum(shard.bytes for shard in index.shards) // index.samples,
        "side": side,
        "workers": workers,
        "repeats": repeats,
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
    }
    return Result(timings, setting)


def bare(tars: list[str]) -> int:
    """Decode every `.jpg` of the tars; the number of images."""
    images = 0
    for path in tars:
        with tarfile.open(path, "r|") as tar:
            for member in tar:
                if member.name.endswith(".jpg") and (file := tar.extractfile(member)):
                    simplejpeg.decode_jpeg(file.read())
                    images += 1
    return images


def decoder(tars: list[str]) -> int:
    """The same from header to header, without a check; the number of images."""
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


def plain_webdataset(tars: list[str], workers: int) -> int:
    """Read the tars as webdataset's documentation does; the number of images."""
    dataset = (
        webdataset.WebDataset(tars, shardshuffle=False, empty_check=False)
        .decode("torchrgb8")
        .to_tuple("jpg", "cls")
    )
    loader = DataLoader(dataset, batch_size=MICRO_BATCH, num_workers=workers)
    return sum(len(labels) for _, labels in loader)


def ours(index: ShardIndex, workers: int, side: int) -> int:
    """Read about one epoch with our loader; the number of images."""
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


def _local(index: ShardIndex) -> list[str]:
    """Paths of the tars."""
    if index.samples < MICRO_BATCH:
        raise UserError(f"{index.folder}: {index.samples} images are too few to measure anything")
    found = [urls.find(index.url(number)) for number in range(len(index.shards))]
    if not all(urls.is_local(filesystem) for filesystem, _ in found):
        raise UserError(
            f"{index.folder}: the loader is measured, not a network; give shards on this machine"
        )
    return [path for _, path in found]


def _side(index: ShardIndex) -> int:
    """Width and height of the images, which must be square JPEGs; the first one is asked."""
    number = next(number for number, shard in enumerate(index.shards) if shard.samples)
    [raw, *_] = read_piece(index, Piece(number, 0, 1))
    members = parse(raw, alone=False)
    if "jpg" not in members:
        raise UserError(f"{index.folder}: its images are no .jpg, which the bare loop decodes")
    height, width = simplejpeg.decode_jpeg_header(members["jpg"])[:2]
    if height != width:
        raise UserError(
            f"{index.folder}: images of {width}x{height}; only square ones are compared, because "
            "our loader would cut others"
        )
    return int(height)


def _time(contestant: Callable[[], int], timing: Timing) -> None:
    gc.collect()
    wall, own, children = time.perf_counter(), *_cpu_seconds()
    timing.images = contestant()
    gc.collect()  # ends loader processes
    multiprocessing.active_children()  # and counts their time
    timing.wall.append(time.perf_counter() - wall)
    own, children = (now - then for now, then in zip(_cpu_seconds(), (own, children), strict=True))
    timing.cpu.append(own + children)
    timing.worker.append(children or own)


def _cpu_seconds() -> tuple[float, float]:
    """Of this process, and of its children that have ended."""
    own, children = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return own.ru_utime + own.ru_stime, children.ru_utime + children.ru_stime
