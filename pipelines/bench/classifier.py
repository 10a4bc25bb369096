"""Size and time of each head's exported classifier; see `mhe bench classifier`.

The classifiers are exported without a backbone: embeddings in, the best classes out. Their rows are
random, and an embedding is the sum of the rows on the path of a class, with noise of the same
length. That is easier than what a trained head meets: it checks the files, not the heads.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mhe_dist.backbone.traced import write_onnx, write_program
from mhe_dist.bank.class_layout import digits
from mhe_dist.config.head import HeadConfig, MarginConfig
from mhe_dist.distributed.spawn import run_ranks
from mhe_dist.distributed.topology import Topology
from mhe_dist.heads.classifier import (
    PIECE,
    CascadeClassifier,
    ProductClassifier,
    RowClassifier,
    classifier_bytes,
)
from mhe_dist.heads.margins import Margin
from mhe_dist.heads.multilevel.base import MixedRadix
from mhe_dist.heads.row_head import features_of
from mhe_dist.limits import available_memory

KINDS: Final = ("full", "mhp", "mhc")  # mhs and partial_fc are written as full is
FORMATS: Final = ("onnx", "onnx-fp16", "torch-export")
BATCHES: Final = (1, 64)
_CANDIDATES: Final = 8
_MARGIN: Final = Margin(MarginConfig())
_LEAST, _SECONDS = 5, 3.0  # runs that are timed: at least so many, and for so long
_CHUNK: Final = 16  # embeddings whose scores of all classes are computed together


@dataclass(frozen=True)
class ClassifierCase:
    """What is measured.

    Attributes:
        kind: of `KINDS`.
        classes: C.
        dim: D of the embeddings.
        top: k.
        checked: embeddings whose best class is compared with that of all classes in float64.
        threads: of the processor.
        formats: of `FORMATS`.
    """

    kind: str
    classes: int = 1_000_000
    dim: int = 512
    top: int = 5
    checked: int = 256
    threads: int = 1
    formats: tuple[str, ...] = FORMATS

    @property
    def radix(self) -> MixedRadix:
        """Two digits, of mhp and mhc."""
        return MixedRadix.of(self.classes, (), "")

    @property
    def row_bytes(self) -> int:
        """Bytes of all rows, in float32."""
        config = HeadConfig.model_validate({"kind": self.kind})
        return classifier_bytes(config, self.classes, self.dim)

    @property
    def needed_bytes(self) -> int:
        """Approximate main memory of the case: an exporter holds the rows four times."""
        return 4 * self.row_bytes + (1 << 30)


@dataclass(frozen=True)
class ClassifierCost:
    """What a file costs.

    Attributes:
        kind, format: of the head and of the file.
        file_bytes: its size.
        seconds: of an answer, median, by number of embeddings.
        same: share of the embeddings whose best class is the best of all classes in float64.
    """

    kind: str
    format: str
    file_bytes: int
    seconds: dict[int, float]
    same: float


def measure_classifier(case: ClassifierCase, folder: str) -> list[ClassifierCost]:
    """Write and measure a case in every format, in a process of its own.

    Args:
        case: what to measure.
        folder: for the files, each of which is removed when it has been measured.
    """
    (found,) = run_ranks(_measure, 1, case, folder, timeout_s=1800.0)
    return [ClassifierCost(**values) for values in found]


def fits_in_memory(case: ClassifierCase) -> bool:
    """Whether the memory that is free now suffices."""
    return case.needed_bytes < available_memory()


def _measure(topology: Topology, case: ClassifierCase, folder: str) -> list[dict[str, Any]]:
    torch.set_num_threads(case.threads)
    network = random_classifier(case)
    embeddings = class_embeddings(network, case, max(case.checked, *BATCHES))
    expected = best_of_all(network, embeddings[: case.checked])
    found = []
    for name in sorted(case.formats, key=lambda name: name == "onnx-fp16"):
        path = f"{folder}/{case.kind}.{'pt2' if name == 'torch-export' else 'onnx'}"
        if name == "onnx-fp16":
            network.half()  # the last one: it cannot be undone
        run = _write(name, network, case, path)
        with torch.no_grad():
            classes = torch.cat(
                [run(part)[0][:, 0] for part in embeddings[: case.checked].split(max(BATCHES))]
            )
            seconds = {count: _time(run, embeddings[:count]) for count in BATCHES}
        same = (classes == expected).double().mean().item()
        found.append(
            {
                "kind": case.kind,
                "format": name,
                "file_bytes": os.path.getsize(path),
                "seconds": seconds,
                "same": same,
            }
        )
        os.unlink(path)
    return sorted(found, key=lambda values: FORMATS.index(values["format"]))


def _write(name: str, network: nn.Module, case: ClassifierCase, path: str) -> Callable[..., Any]:
    example = torch.zeros(2, case.dim)
    if name != "torch-export":
        return write_onnx(network, example, path, ["classes", "scores"], {})
    return write_program(network, example, path, {})


def _time(run: Callable[[Tensor], Any], embeddings: Tensor) -> float:
    """Median seconds."""
    run(embeddings)
    taken: list[float] = []
    while len(taken) < _LEAST or sum(taken) < _SECONDS:
        begin = time.perf_counter()
        run(embeddings)
        taken.append(time.perf_counter() - begin)
    return statistics.median(taken)


def random_classifier(case: ClassifierCase) -> nn.Module:
    """A classifier of random rows; the projection of a cascade is the identity."""
    draw = torch.Generator().manual_seed(0)

    def rows(count: int) -> Tensor:
        return F.normalize(torch.randn(count, case.dim, generator=draw), dim=1)

    if case.kind == "full":
        starts = range(0, case.classes, PIECE)
        pieces = [rows(min(PIECE, case.classes - start)) for start in starts]
        return RowClassifier(pieces, _MARGIN, case.top).eval()
    radix = case.radix
    if case.kind == "mhp":
        levels = [rows(length) for length in radix.lengths]
        return ProductClassifier(levels, radix, _MARGIN, case.top).eval()
    units, length = radix.prefixes(0), radix.lengths[1]
    lower = torch.empty(units, length, case.dim)
    for unit in range(units):
        lower[unit] = rows(length)
    projection = F.pad(torch.eye(case.dim), (0, 1))
    width = max(case.top, _CANDIDATES)
    return CascadeClassifier(
        rows(units), [lower], [projection], radix, _MARGIN, None, case.top, width
    ).eval()


def class_embeddings(network: nn.Module, case: ClassifierCase, count: int) -> Tensor:
    """`[count, D]` of random classes: the sum of the rows on their paths, and noise as long."""
    draw = torch.Generator().manual_seed(1)
    classes = torch.randint(0, case.classes, (count,), generator=draw)
    if isinstance(network, RowClassifier):
        chosen = torch.stack([network.rows[int(c) // PIECE][int(c) % PIECE] for c in classes])
    else:
        first, second = digits(classes, case.radix.lengths).unbind(1)
        if isinstance(network, ProductClassifier):
            chosen = network.rows[0][first] + network.rows[1][second]
        else:
            assert isinstance(network, CascadeClassifier)
            chosen = network.first[0][first] + network.lower[0][first, second]
    noise = F.normalize(torch.randn(count, case.dim, generator=draw), dim=1)
    return (chosen + noise * chosen.norm(dim=1, keepdim=True)).detach()


@torch.no_grad()
def best_of_all(network: nn.Module, embeddings: Tensor) -> Tensor:
    """The best class of each embedding `[N]`: every class is scored, in float64."""
    unit = features_of(embeddings.double(), _MARGIN)
    if isinstance(network, RowClassifier):
        return _best_row(unit, list(network.rows), torch.zeros(len(unit), 1).double())
    if isinstance(network, ProductClassifier):
        logits = [unit @ rows.double().T for rows in network.rows]
        best = [
            (first[:, :, None] + second[:, None, :]).flatten(1)[:, : network.radix.num_classes]
            for first, second in zip(*(each.split(_CHUNK) for each in logits), strict=True)
        ]
        return torch.cat([sums.argmax(1) for sums in best])
    assert isinstance(network, CascadeClassifier)
    parents = unit @ network.first[0].double().T
    count, length = network.radix.num_classes, network.lower[0].shape[1]
    pieces = list(network.lower[0].flatten(0, 1)[:count].split(length))
    return _best_row(unit, pieces, parents)  # which is the projection's input, too


def _best_row(unit: Tensor, pieces: list[nn.Parameter] | list[Tensor], above: Tensor) -> Tensor:
    """The best of all rows in pieces; `above` `[N, 1 or pieces]` is added to a piece's cosines."""
    best = torch.full((len(unit),), float("-inf"), dtype=torch.float64)
    classes, first = torch.full((len(unit),), -1), 0
    for number, rows in enumerate(pieces):
        rows_64 = rows.double()
        for start in range(0, len(unit), 1024):
            part = slice(start, start + 1024)
            scores, where = (unit[part] @ rows_64.T).max(dim=1)
            scores = scores + above[part, min(number, above.shape[1] - 1)]
            better = scores > best[part]
            best[part] = torch.where(better, scores, best[part])
            classes[part] = torch.where(better, where + first, classes[part])
        first += len(rows)
    return classes
