"""A whole step of training beside a bare loop of PyTorch; see `mhe bench train`.

- `mhe`: loader, engine, routed head and records, as a run has them.
- `bare`: DistributedDataParallel and torch's SGD around the same network on the same images, held
  in memory, and the matrix products of the same head (`BareProducts`). It reads no file, exchanges
  no label and no embedding, has no softmax, updates no row, records nothing, and would not resume.

Both belong to the same ranks and take turns, so that a busy moment of the machine affects both.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import chain
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, Final, cast

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from mhe_dist.backbone.normalization import normalize_images
from mhe_dist.config.schema import Config
from mhe_dist.distributed.collectives import gather_rows
from mhe_dist.distributed.spawn import run_ranks
from mhe_dist.distributed.topology import Topology
from mhe_dist.heads.routed.mhs import MhsRoute
from mhe_dist.train.batch import StepBatch
from mhe_dist.train.stopwatch import Stopwatch
from pipelines.bench.photos import SIDE, make_photos
from pipelines.bench.products import BareProducts
from pipelines.pretrain.recorder import ignore_event
from pipelines.pretrain.run import Run
from pipelines.runs.first_model import initial_model

LR: Final = 0.01
ENGINE: Final = {
    "forward": "forward",
    "backward": "backward, the head's too",
    "step": "reduction and optimizer",
}
WAIT: Final = "waiting for images"
HEAD: Final = "head: plan, loss, rows' update"
PARTS: Final = (WAIT, *ENGINE.values(), HEAD)


@dataclass(frozen=True)
class TrainCase:
    """What is trained.

    Attributes:
        backbone: name of a timm model, or of one of ours.
        micro_batch: B, images of a rank in a step.
        world_size: W.
        length, extra_heads: L and m of the head.
        steps: of each side, in a round.
        rounds: that count; one more comes before them.
        precision: "float32" or "bf16".
        photos: images of the made-up data set.
    """

    backbone: str = "iresnet18"
    micro_batch: int = 16
    world_size: int = 2
    length: int = 1000
    extra_heads: int = 8
    steps: int = 4
    rounds: int = 5
    precision: str = "float32"
    photos: int = 10_000

    def config(self, shards: str, folder: str, gpu: bool) -> Config:
        """Of a run that would never end here."""
        batch = self.micro_batch * self.world_size
        return Config.model_validate(
            {
                "run": {"name": "bench", "dir": folder},
                "data": {"shards": shards, "image_size": SIDE, "streams": batch},
                "model": {"name": self.backbone, "embedding_dim": 512, "neck": "none"},
                "head": {
                    "kind": "mhs",
                    "groups": self.world_size,
                    "mhs": {"length": self.length, "extra_heads": self.extra_heads},
                },
                "optim": {"lr": LR},
                "train": {
                    "global_batch": batch,
                    "micro_batch": self.micro_batch,
                    "precision": self.precision,
                    "max_steps": self.steps * (self.rounds + 1),
                },
                "scale": {"workers": self.world_size, "gpu": gpu},
            }
        )


@dataclass(frozen=True)
class TrainTimes:
    """What `measure_training` measured.

    Attributes:
        case: what was trained.
        mhe, bare: seconds of a step of the slowest rank, one value per round.
        parts: seconds of a step by `PARTS`; medians over the rounds, of the first rank.
    """

    case: TrainCase
    mhe: list[float]
    bare: list[float]
    parts: dict[str, float]

    @property
    def ratio(self) -> float:
        """Our images/s over the bare loop's: the median over the rounds."""
        return median(bare / ours for ours, bare in zip(self.mhe, self.bare, strict=True))

    def images_per_s(self, seconds: list[float]) -> float:
        """Images per second of all ranks."""
        return self.case.micro_batch * self.case.world_size / median(seconds)

    def to_dict(self) -> dict[str, Any]:
        """The measurements as JSON can hold them."""
        return asdict(self) | {"ratio": self.ratio}


def measure_training(case: TrainCase, gpu: bool = False) -> TrainTimes:
    """Let both loops train in turns on fresh ranks, on made-up photos of 112x112.

    Raises:
        UserError: the case is none that could be trained, such as an unknown backbone.
    """
    shards = make_photos(case.photos).folder
    with TemporaryDirectory(prefix="mhe-bench-") as folder:
        config = case.config(shards, folder, gpu)
        args = (case, config.model_dump(mode="json"))
        ranks = run_ranks(_measure_rank, case.world_size, *args, gpu=gpu, timeout_s=900.0)
    slowest = {
        side: [max(seconds) for seconds in zip(*(rank[side] for rank in ranks), strict=True)]
        for side in ("mhe", "bare")
    }
    parts = {part: median(seconds) for part, seconds in ranks[0]["parts"].items()}
    return TrainTimes(case, slowest["mhe"], slowest["bare"], parts)


def _measure_rank(topology: Topology, case: TrainCase, settings: dict[str, Any]) -> dict[str, Any]:
    config = Config.model_validate(settings)
    run = Run(config, topology, ignore_event)
    batches = iter(run.open_loader(0, config.train.max_steps))
    first = next(batches)
    bare = BareLoop(config, topology, first, run)
    ours = OurLoop(run, first, batches)
    found: dict[str, Any] = {"mhe": [], "bare": [], "parts": {part: [] for part in PARTS}}
    for number in range(case.rounds + 1):
        seconds = {
            "mhe": _seconds(ours.steps, case.steps, topology),
            "bare": _seconds(bare.steps, case.steps, topology),
        }
        parts = ours.take_parts()
        if number == 0:
            continue  # it warmed up
        for side, value in seconds.items():
            found[side].append(value / case.steps)
        for part, value in parts.items():
            found["parts"][part].append(value / case.steps)
    run.tracker.close("finished")
    return found


def _seconds(steps: Callable[[int], None], count: int, topology: Topology) -> float:
    topology.barrier()
    begin = time.perf_counter()
    steps(count)
    if topology.device.type == "cuda":
        torch.cuda.synchronize(topology.device)
    return time.perf_counter() - begin


class OurLoop:
    """The steps of a run, and what their parts take."""

    def __init__(self, run: Run, first: StepBatch, rest: Iterator[StepBatch]) -> None:
        self._run = run
        self._clocks = {part: Stopwatch(run.topology.device) for part in ENGINE.values()}
        for method, part in ENGINE.items():
            setattr(run.engine, method, _timed(getattr(run.engine, method), self._clocks[part]))
        self._steps = run.loop.steps(chain([first], rest))
        self._wait = self._head = 0.0

    def steps(self, count: int) -> None:
        """Some steps, with the records that a run writes."""
        for _ in range(count):
            info = next(self._steps)
            self._run.recorder.add_step(info)
            self._wait += info.wait_s
        self._run.recorder.flush()
        self._head = self._run.recorder.last["head_time"] * count

    def take_parts(self) -> dict[str, float]:
        """Seconds of each part of the last steps."""
        wait, self._wait = self._wait, 0.0
        engine = {part: clock.take() for part, clock in self._clocks.items()}
        return {WAIT: wait, **engine, HEAD: self._head}


def _timed(method: Callable[..., Any], clock: Stopwatch) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        with clock.running():
            return method(*args)

    return run


class BareLoop:
    """What any training of this network must do; see the top of this file."""

    def __init__(self, config: Config, topology: Topology, batch: StepBatch, run: Run) -> None:
        device = topology.device
        self._bf16, self._device = config.train.precision == "bf16", device.type
        model = initial_model(config).to(memory_format=torch.channels_last).to(device)
        self._model = DistributedDataParallel(model)
        self._optimizer = torch.optim.SGD(
            self._model.parameters(), LR, config.optim.momentum, weight_decay=1e-4
        )
        (part,) = batch.micro_batches
        self._images = part.images.to(device, copy=True)
        head = cast(MhsRoute, run.head)
        labels = gather_rows(part.labels[None], topology)
        groups = head.layout.group_of(head.layout.locate(labels)[0])
        owned = labels[(groups >= head.groups[0]) & (groups <= head.groups[-1])]
        self._products = BareProducts(head, 0, owned)

    def steps(self, count: int) -> None:
        """Some steps on the same images."""
        for _ in range(count):
            with torch.autocast(self._device, torch.bfloat16, enabled=self._bf16):
                embeddings: Tensor = self._model(normalize_images(self._images))
            self._products.run()
            embeddings.backward(torch.ones_like(embeddings))
            self._optimizer.step()
            self._optimizer.zero_grad()
