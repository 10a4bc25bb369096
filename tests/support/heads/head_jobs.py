"""What a head is run on: small heads of every kind, and the embeddings and labels of a run."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from mhe_dist.config.head import HeadConfig
from mhe_dist.heads.base import NO_SAMPLE
from mhe_dist.heads.row_head import HeadSpec

CLASSES = 46  # of 12 heads of 4, with two padding slots
STEPS, MICRO_BATCHES, BATCH, WIDTH = 3, 6, 4, 5
LR, SEED = 0.1, 3

MARGINS: dict[str, dict] = {
    "cosface": {"kind": "cosface", "m": 0.3, "scale": 8.0},
    "arcface": {"kind": "arcface", "m": 0.5, "scale": 8.0},
    "combined": {"kind": "combined", "m1": 1.1, "m2": 0.2, "m3": 0.1, "scale": 8.0},
    "softmax": {"kind": "softmax", "scale": 8.0},
    "adaface": {"kind": "adaface", "m": 0.4, "ema": 0.9, "scale": 8.0},
    "none": {"kind": "none"},
}
HEADS: dict[str, dict] = {
    "full": {"kind": "full"},
    "partial_fc": {"kind": "partial_fc", "partial_fc": {"rate": 0.4}},
    "route": {"mhs": {"exchange": "route"}},
    "gather": {"mhs": {"exchange": "gather", "negatives": "batch"}},
    "gather_own_plus": {"mhs": {"exchange": "gather", "negatives": "own_plus"}},
}


def head_config(head: str, margin: str = "cosface", /, **changes: object) -> HeadConfig:
    """A small head of `HEADS` with a margin of `MARGINS`; blocks in `changes` are merged."""
    values: dict = {
        "kind": "mhs",
        "margin": MARGINS[margin],
        "optim": {"weight_decay": 0.01},
        "groups": 3,
        "on_bad_label": "ignore",
    }
    if HEADS[head].get("kind", "mhs") == "mhs":
        values["mhs"] = {"length": 4, "extra_heads": 2}
    for key, value in [*HEADS[head].items(), *changes.items()]:
        values[key] = values.get(key, {}) | value if isinstance(value, dict) else value
    return HeadConfig.model_validate(values)


@dataclass(frozen=True)
class Job:
    """One run of a head; see `run`.

    Attributes:
        config: of the head.
        labels: how labels are drawn, see `inputs`.
        dtype: in which the head computes.
        num_classes: C.
        steps: which are run, of the `STEPS` of a run.
        micro_batches: n; the samples of a step are the same for any number.
        cramped: make every buffer so small that rows and logits come in many pieces.
        state: to start from.
        folder: of a bank in file memory.
        predict: k; 0: predict nothing.
        epoch_steps: steps of an epoch.
        on_lists: give each label as a list of one.
    """

    config: HeadConfig
    labels: str = "random"
    dtype: torch.dtype = torch.float64
    num_classes: int = CLASSES
    steps: tuple[int, int] = (0, STEPS)
    micro_batches: int = MICRO_BATCHES
    cramped: bool = False
    state: dict[str, Tensor] = field(default_factory=dict)
    folder: str | None = None
    predict: int = 0
    epoch_steps: float = 0.0
    on_lists: bool = False

    def spec(self) -> HeadSpec:
        """What the head is built from."""
        return HeadSpec(
            self.config,
            self.num_classes,
            WIDTH,
            SEED,
            self.micro_batches,
            self.dtype,
            self.folder,
            self.epoch_steps,
        )

    def inputs(self) -> tuple[Tensor, Tensor]:
        """Embeddings `[STEPS, n, B, D]`, float64, and labels `[STEPS, n, B, ...]`, global."""
        embeddings, labels = inputs(self.labels, self.num_classes)
        labels = labels.unsqueeze(-1) if self.on_lists else labels
        shape = (STEPS, self.micro_batches, -1)
        return embeddings.view(*shape, WIDTH), labels.view(*shape, *labels.shape[3:])


def inputs(kind: str, num_classes: int) -> tuple[Tensor, Tensor]:
    """Embeddings and labels of a run.

    Kinds: random; repeated (three classes); one (class); short (a micro-batch without a sample, one
    with a single sample); bad (some labels are outside `[0, C)`); many (up to three labels
    a sample); neighbours (three labels with the same parent); all (every class is a label).
    """
    rng = torch.Generator().manual_seed(7)
    embeddings = torch.randn(STEPS, MICRO_BATCHES, BATCH, WIDTH, generator=rng, dtype=torch.float64)
    labels = torch.randint(0, num_classes, (STEPS, MICRO_BATCHES, BATCH), generator=rng)
    if kind == "repeated":
        labels = labels % 3
    elif kind == "one":
        labels = torch.full_like(labels, 5)
    elif kind == "short":
        labels[:, -1, 1:] = NO_SAMPLE
        labels[:, 0] = NO_SAMPLE
    elif kind == "bad":
        labels[:, 1, 2], labels[:, 3, 0], labels[:, 4] = -1, num_classes, num_classes + 9
    elif kind == "many":
        labels = torch.randint(-1, num_classes, (*labels.shape, 3), generator=rng)
        labels[:, 1, 0], labels[:, 2, :, 1], labels[:, 5, 1:] = -1, labels[:, 2, :, 0], NO_SAMPLE
        labels[:, 3, 0, 0], labels[:, 3, 1] = num_classes, num_classes + 1
    elif kind == "neighbours":
        labels = (labels % 7 * 6).unsqueeze(-1) + torch.arange(3)
    elif kind == "all":
        labels = torch.arange(num_classes).expand(*labels.shape, num_classes)
    return embeddings, labels
