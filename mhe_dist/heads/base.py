"""The contract of a head, so that the loop never asks which one it has.

Scale of the gradient: the engine averages the backbone's gradients over the `k` micro-batches that
a rank accumulates and over the `W` ranks. A head therefore returns, for each micro-batch,
`W * k / N` times the sum of the losses of the samples that this rank scores, where `N` is the
number of samples of the step. Whatever is sharded, the backbone then receives the gradient of the
mean loss over the global batch. The rows receive that same gradient, undoing the engine's `1 / k`;
no caller rescales anything.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from mhe_dist.bank.saved_rows import SavedRows
from mhe_dist.config.head import HeadConfig
from mhe_dist.errors import RunError

NO_SAMPLE = torch.iinfo(torch.int64).min


class LabelError(RunError):
    """A label outside `[0, C)`.

    Attributes:
        label, num_classes: the label, and C.
        micro_batch: canonical number of the sample's micro-batch in the step.
        position: of the sample in that micro-batch.
    """

    def __init__(self, label: int, num_classes: int, micro_batch: int, position: int) -> None:
        self.label, self.num_classes = label, num_classes
        self.micro_batch, self.position = micro_batch, position
        super().__init__(self._message(f"{position} of micro-batch {micro_batch}"))

    def with_key(self, key: str | None) -> LabelError:
        """The same error, naming the sample's key where it is known."""
        if key is not None:
            self.args = (self._message(f"'{key}'"),)
        return self

    def _message(self, sample: str) -> str:
        return (
            f"label {self.label} of sample {sample} is outside [0, {self.num_classes}): "
            "run `mhe data verify` on the shards, or set head.on_bad_label=ignore"
        )


class HeadOutput(NamedTuple):
    """What a head returns for one micro-batch.

    Attributes:
        loss: scalar on the device; see the module for its scale.
        metrics: name -> scalar on the device, already an average over this rank's samples.
    """

    loss: Tensor
    metrics: dict[str, Tensor]


def check_labels(labels: Tensor, num_classes: int, on_bad: str) -> Tensor:
    """`labels` `[n, B, ...]` with -1 where there is no sample and, if allowed, for bad labels.

    Raises:
        LabelError: a label is outside `[0, C)` and `on_bad` is not "ignore".
    """
    empty = labels == NO_SAMPLE
    bad = ((labels < 0) | (labels >= num_classes)) & ~empty
    if on_bad != "ignore" and bad.any():
        where = bad.nonzero()[0].tolist()
        raise LabelError(int(labels[tuple(where)]), num_classes, where[0], where[1])
    return labels.masked_fill(empty | bad, -1)


def check_label_lists(labels: Tensor, num_classes: int, on_bad: str) -> Tensor:
    """Checked `labels` `[n, B, K]`: -1 for none, `NO_SAMPLE` for all of what does not count.

    A sample does not count if it is absent, or if it has bad labels and no good one; it may have
    no label at all.

    Raises:
        LabelError: see `check_labels`; -1 stands for no label.
    """
    padding = labels == -1
    known = check_labels(labels.masked_fill(padding, NO_SAMPLE), num_classes, on_bad)
    bad = ((known < 0) & ~padding).any(-1, keepdim=True)
    return known.masked_fill(bad & ~(known >= 0).any(-1, keepdim=True), NO_SAMPLE)


def sample_labels(labels: Tensor, num_classes: int, config: HeadConfig) -> tuple[Tensor, Tensor]:
    """The distinct labels of samples `[n, B, K]`, -1 for none, and which samples count `[n, B]`.

    With `objective: softmax` a sample counts if it has a label. With `multi_label` it also counts
    if its list `[K]` is empty: every class is then its negative.

    Args:
        labels: `[n, B]`, one for each sample, or `[n, B, K]`, padded with -1.
        num_classes: C.
        config: `on_bad_label` and `objective`.

    Raises:
        LabelError: see `check_labels`.
    """
    if labels.dim() == 2:
        found = check_labels(labels, num_classes, config.on_bad_label).unsqueeze(-1)
        return found, found[..., 0] >= 0
    found = check_label_lists(labels, num_classes, config.on_bad_label)
    empty_counts = config.objective == "multi_label"
    kept = (found != NO_SAMPLE).any(-1) if empty_counts else (found >= 0).any(-1)
    return without_repetition(found.clamp_min(-1)), kept


def without_repetition(values: Tensor) -> Tensor:
    """`values` `[..., K]`, sorted along K, -1 in place of those that came before."""
    values = values.sort(dim=-1).values
    again = torch.zeros_like(values, dtype=torch.bool)
    again[..., 1:] = (values[..., 1:] == values[..., :-1]) & (values[..., 1:] >= 0)
    return values.masked_fill(again, -1)


class TopK(NamedTuple):
    """Top-k classes of a batch: `classes` int64 `[B, k]`, `scores` `[B, k]`, best first."""

    classes: Tensor
    scores: Tensor

    @staticmethod
    def join(parts: list[TopK]) -> TopK:
        """Those of several batches, one after the other."""
        classes = torch.cat([part.classes for part in parts])
        return TopK(classes, torch.cat([part.scores for part in parts]))


class HeadState(NamedTuple):
    """Named tensors of one rank for the checkpoint. The names do not depend on W.

    Attributes:
        replicated: equal on all ranks.
        owned: on this rank alone, rows not copied yet. They are named by canonical group,
            `rows/<group>/<field>` (or `rows/<group>/<level>/<field>`); a group lies on one rank as
            a whole.
    """

    replicated: dict[str, Tensor]
    owned: dict[str, Tensor | SavedRows]

    @property
    def nbytes(self) -> int:
        """Bytes of all of them; nothing is copied for it."""
        return sum(entry.nbytes for entry in (self.replicated | self.owned).values())

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All of them, copied: the rows are on the host."""
        rows = {
            name: entry.tensor() if isinstance(entry, SavedRows) else entry
            for name, entry in self.owned.items()
        }
        return self.replicated | rows

    def with_prefix(self, prefix: str) -> HeadState:
        """The same tensors, `prefix` before every name."""
        return HeadState(
            {prefix + name: tensor for name, tensor in self.replicated.items()},
            {prefix + name: entry for name, entry in self.owned.items()},
        )


class Head(ABC):
    """A classifier over all classes, sharded over the ranks.

    A step is `plan`, then one call per micro-batch of this rank, then `step`.
    """

    @abstractmethod
    def plan(self, step: int, labels: Tensor) -> None:
        """Prepare a step: draw negatives, compute split sizes, prefetch rows.

        Args:
            step: number of the step; every draw is keyed by it.
            labels: int64 `[n, B]` on the host, the labels of the *global* batch by canonical
                micro-batch; `NO_SAMPLE` where a micro-batch is short. Rank r computes the
                micro-batches `[r * n / W, (r + 1) * n / W)`. A head for many labels per sample
                takes `[n, B, K]`, padded with -1 where a sample has fewer than K.

        Raises:
            LabelError: a label is outside `[0, C)` and the config does not ignore that.
        """

    @abstractmethod
    def prefetch(self, step: int, labels: Tensor) -> None:
        """Start to fetch the rows that the next step needs; may be called before this one's `step`.

        Takes the arguments of `plan`, but checks nothing. Returns at once.
        """

    @abstractmethod
    def __call__(self, embeddings: Tensor, labels: Tensor) -> HeadOutput:
        """Loss of the next planned micro-batch of this rank.

        Args:
            embeddings: `[B, D]` on the device; gradients flow back to it.
            labels: int64 `[B]` (or `[B, K]`) on the host, as planned.
        """

    @abstractmethod
    def step(self, lr: float) -> None:
        """Update the rows touched since the last call; accumulated micro-batches sum."""

    def host_metrics(self) -> dict[str, float]:
        """Figures of the step that ended which the host knows; the same names on every rank."""
        return {}

    @abstractmethod
    def predict(self, embeddings: Tensor, k: int) -> TopK:
        """Top-k over all classes; `embeddings` `[B, D]` are this rank's, all ranks must call."""

    @abstractmethod
    def state(self) -> HeadState:
        """Tensors of this rank for the checkpoint."""

    @abstractmethod
    def loads(self, name: str) -> bool:
        """Whether this rank loads the tensor of that name: what is replicated or its own."""

    @abstractmethod
    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Restore from the tensors that `loads` selects, saved on any number of ranks."""

    @abstractmethod
    def row_ranges(self) -> dict[str, tuple[int, int]]:
        """Global row range `[start, stop)` of every `rows/<group>` prefix, for all groups."""
