"""What every head over a bank of class centres shares: rows, their state, prediction."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from mhe_dist import seeds
from mhe_dist.bank.bank import Bank
from mhe_dist.bank.initial_rows import noise_rows
from mhe_dist.bank.remote_rows import RemoteTraffic
from mhe_dist.bank.repartition import Permutations, move_rows
from mhe_dist.bank.row_optim import build_row_optimizer
from mhe_dist.bank.saved_rows import SavedRows
from mhe_dist.config.head import HeadConfig
from mhe_dist.distributed.collectives import all_reduce, gather_rows
from mhe_dist.distributed.topology import Topology
from mhe_dist.distributed.transfer import to_device
from mhe_dist.heads.base import Head, HeadState, TopK
from mhe_dist.heads.class_rows import ClassRows
from mhe_dist.heads.margins import INITIAL_NORMS, Margin, norm_statistics, running_norms

PREDICT_BYTES = 1 << 26


@dataclass(frozen=True)
class HeadSpec:
    """What a head is built from.

    Attributes:
        config: the head's block of the config.
        num_classes: C.
        width: D of the embeddings.
        seed: of the run.
        micro_batches: n of a step, over all ranks.
        dtype: type in which the head computes (float64 in proofs).
        folder: where `file` memory puts the rows.
        epoch_steps: steps of an epoch.
        steps: of the run; 0: without an end.
        tf32: whether a GPU computes the products of a training step in TF32; None: as the process
            is set.
    """

    config: HeadConfig
    num_classes: int
    width: int
    seed: int
    micro_batches: int
    dtype: torch.dtype = torch.float32
    folder: str | Path | None = None
    epoch_steps: float = 0.0
    steps: int = 0
    tf32: bool | None = None

    @property
    def repartition_steps(self) -> int:
        """Steps after which `mhs` moves classes to other heads; 0: never."""
        every = self.config.mhs.repartition_every
        return max(1, round(every * self.epoch_steps)) if every else 0


def initial_std(spec: HeadSpec) -> float:
    """Deviation of the first rows' noise: rows have about the length `bank.init_length`.

    The step of a normalised row's direction is the learning rate over its squared length. At length
    1 the rows turn at the pace of the learning rate, whatever D is. Rows of a ninth of that length
    learnt half as well in as many steps on the glyph identities.
    """
    return float(spec.config.bank.init_length * spec.width**-0.5)


def features_of(embeddings: Tensor, margin: Margin) -> Tensor:
    """What rows are multiplied with `[B, width]`: unit embeddings, or embeddings and a 1."""
    if margin.normalised:
        return F.normalize(embeddings, dim=1)
    return F.pad(embeddings, (0, 1), value=1.0)


class NormTracker:
    """AdaFace's running mean and deviation of the embeddings' norms, the same on every rank.

    All micro-batches of a step use the statistics from before it, and the step's norms enter
    together, so that neither depends on W.
    """

    def __init__(self, spec: HeadSpec, topology: Topology) -> None:
        self.needed = spec.config.margin.kind == "adaface"
        self._ema, self._topology = spec.config.margin.ema, topology
        start = torch.tensor(INITIAL_NORMS, dtype=torch.float64, device=topology.device)
        self.running = start
        self._sums = torch.zeros(3, dtype=torch.float64, device=topology.device)

    def begin(self) -> None:
        """Drop what was counted of a step that is begun again."""
        if self.needed:
            self._sums = torch.zeros_like(self._sums)

    def add(self, norms: Tensor) -> None:
        """Count the norms `[B]` of a micro-batch."""
        self._sums += norm_statistics(norms)

    def step(self) -> None:
        """Let the step's norms enter; all ranks must call."""
        if self.needed:
            sums = all_reduce(self._sums, self._topology)
            self.running = torch.stack(
                running_norms(self.running[0], self.running[1], sums, self._ema)
            )


class RowHead(Head):
    """A head whose classes are rows of a bank, cut into canonical groups.

    Args:
        spec: what to build.
        topology: the ranks; each owns whole groups.
        length: L, classes of a unit.
        every: steps after which the classes move to other units; 0: never.

    Attributes:
        layout: where each class lives now.
        permutation: its number.
    """

    def __init__(self, spec: HeadSpec, topology: Topology, length: int, every: int = 0) -> None:
        self.spec, self.topology = spec, topology
        groups = spec.config.chosen_groups
        self.permutations = Permutations(
            spec.num_classes, length, groups, spec.seed, every, spec.steps
        )
        self.permutation, self.layout = 0, self.permutations.layout(0)
        self.margin = Margin(spec.config.margin).at(0)
        self.optimizer = build_row_optimizer(spec.config.optim)
        self.groups = topology.share(groups)
        self.accumulation_steps = spec.micro_batches // topology.world_size
        self.bank = self._make_bank()
        self.norms = NormTracker(spec, topology)
        self.step_number = 0

    def prefetch(self, step: int, labels: Tensor) -> None:
        """Fetch the rows of this rank that `step` needs, if the bank prefetches; see `Head`."""
        if self.bank.prefetches:
            units = self.units_of_step(step, labels)
            self.bank.prefetch(units[self.bank.held(units)])

    def units_of_step(self, step: int, labels: Tensor) -> Tensor:
        """Distinct units that a step needs, of this rank at least; -1 may be among them.

        Here none: a full softmax needs all rows, and prefetching single rows does not pay.
        """
        return torch.empty(0, dtype=torch.int64)

    def host_metrics(self) -> dict[str, float]:
        """Where a GPU uses rows of the host: the share that was fetched ahead, and waits.

        `rows_ahead` is that share of the rows read in the step, `rows_wait_s` the seconds that the
        host waited until rows were stored.
        """
        if self.spec.config.bank.memory == "device" or self.topology.device.type == "cpu":
            return {}
        traffic = self.bank.take_traffic() or RemoteTraffic()
        ahead = traffic.ahead / traffic.units if traffic.units else 1.0
        return {"rows_ahead": ahead, "rows_wait_s": traffic.wait_s}

    def begin(self, step: int) -> None:
        """Set what depends on the number of the step; all ranks must call."""
        self.step_number = step
        self.margin = self.margin.at(step)
        self.norms.begin()
        if self.permutations.number(step) != self.permutation:
            before, old = self.layout, self.bank
            self._arrange(self.permutations.number(step))
            move_rows(old, self.bank, before, self.layout, self.topology)

    def _arrange(self, permutation: int) -> None:
        """An empty bank, of a permutation."""
        self.permutation, self.layout = permutation, self.permutations.layout(permutation)
        self.bank = self._make_bank()

    @property
    def class_rows(self) -> ClassRows:
        """The rows as they are in this step."""
        return ClassRows(self.bank, self.layout, self.margin, self.norms.running)

    @property
    def width(self) -> int:
        """Columns of a row: D, and one for the bias where rows are not normalised."""
        return self.spec.width + (0 if self.margin.normalised else 1)

    def _make_bank(self) -> Bank:
        config, heads = self.spec.config.bank, self._heads_of(self.groups)
        stored = getattr(torch, config.dtype)
        return Bank(
            heads,
            self.layout.length,
            self.width,
            self.initial_rows,
            self.optimizer.fields,
            dtype=self.spec.dtype if config.dtype == "float32" else stored,
            compute_dtype=self.spec.dtype,
            memory=config.memory,
            device=self.topology.device,
            folder=self.spec.folder,
            seed=self.spec.seed,
        )

    def _heads_of(self, groups: range) -> range:
        if not groups:
            return range(0)
        first, last = groups[0], groups[-1]
        return range(self.layout.group_heads(first).start, self.layout.group_heads(last).stop)

    def initial_rows(self, heads: Tensor) -> Tensor:
        """Rows `[U, L, width]` of `heads` (host) before any step: noise keyed by (seed, class)."""
        slots = torch.arange(self.layout.length)
        # On the host, because the permutation asks which values it has to pass through once more.
        classes = self.layout.classes(heads[:, None], slots[None, :])
        classes = to_device(classes, self.topology.device)
        key = seeds.derive(self.spec.seed, "class centres")
        std = initial_std(self.spec)
        return noise_rows(key, classes, self.spec.width, std, self.width).to(self.spec.dtype)

    def features(self, embeddings: Tensor) -> Tensor:
        """What rows are multiplied with; see `features_of`."""
        return features_of(embeddings.to(self.spec.dtype), self.margin)

    def payload(self, embeddings: Tensor) -> Tensor:
        """What travels of a micro-batch `[B, width]`: features, and norms if the margin needs them.

        The norms are counted on the way; see `NormTracker`.
        """
        features = self.features(embeddings)
        if not self.norms.needed:
            return features
        norms = embeddings.detach().norm(dim=1, keepdim=True).to(features)
        self.norms.add(norms)
        return torch.cat([features, norms], dim=1)

    def unpack(self, payload: Tensor) -> tuple[Tensor, Tensor | None]:
        """Features and norms of what arrived; see `payload`."""
        if not self.norms.needed:
            return payload, None
        return payload[:, :-1], payload[:, -1].detach()

    def classes_in(self, heads: Tensor) -> Tensor:
        """Number of classes in each of `heads`; the last one may have fewer than L."""
        length = self.layout.length
        return (self.spec.num_classes - heads * length).clamp(max=length)

    @torch.no_grad()
    def predict(self, embeddings: Tensor, k: int) -> TopK:
        """Top-k over all classes; see `Head`. Scores are logits without a margin."""
        features = gather_rows(self.features(embeddings), self.topology)
        local = self._best_of_partition(features, k)
        scores = gather_rows(local.scores, self.topology)
        classes = gather_rows(local.classes, self.topology)
        world_size, mine = self.topology.world_size, len(embeddings)
        rows = slice(self.topology.rank * mine, (self.topology.rank + 1) * mine)
        scores = scores.view(world_size, -1, k)[:, rows].transpose(0, 1).reshape(mine, -1)
        classes = classes.view(world_size, -1, k)[:, rows].transpose(0, 1).reshape(mine, -1)
        best, where = scores.topk(k, dim=1)
        return TopK(classes.gather(1, where), best)

    def _best_of_partition(self, features: Tensor, k: int) -> TopK:
        """Top-k of this rank's classes, padded with class -1 and score -inf."""
        layout, class_rows, device = self.layout, self.class_rows, self.topology.device
        scores = features.new_full((len(features), k), float("-inf"))
        classes = torch.full((len(features), k), -1, device=device)
        row_bytes = layout.length * (self.width + len(features)) * features.element_size()
        units, chunk = self.bank.units, max(1, PREDICT_BYTES // row_bytes)
        for start in range(0, len(units), chunk):
            rows = self.bank.read(units[start : start + chunk])
            heads = torch.arange(start, start + len(rows), device=device) + units.start
            logits = features @ rows.flatten(0, 1).T
            logits *= class_rows.inverse_norms(rows).view(1, -1) * self.margin.scale
            slots = torch.arange(layout.length, device=device)
            ids = layout.classes(heads[:, None], slots[None, :]).view(-1)
            logits.masked_fill_(ids < 0, float("-inf"))
            scores, where = torch.cat([scores, logits], dim=1).topk(k, dim=1)
            ids = torch.cat([classes, ids.expand(len(features), -1)], dim=1)
            classes = ids.gather(1, where)
        return TopK(classes, scores)

    def state(self) -> HeadState:
        """Touched units of each group: `rows/<group>/units` and a tensor for each field."""
        replicated: dict[str, Tensor] = {}
        owned: dict[str, Tensor | SavedRows] = {}
        touched = self.bank.touched
        for group in self.groups:
            heads = self.layout.group_heads(group)
            units = touched[(touched >= heads.start) & (touched < heads.stop)]
            owned[f"rows/{group:05d}/units"] = units
            for field, rows in self.bank.saved(units).items():
                owned[f"rows/{group:05d}/{field}"] = rows
        if self.norms.needed:
            replicated["norms"] = self.norms.running.cpu()
        # Also where rows came here as a head with repartitions left them.
        if self.permutations.every or self.permutation:
            replicated["permutation"] = torch.tensor(self.permutation)
        return HeadState(replicated, owned)

    def loads(self, name: str) -> bool:
        """Whether `name` is replicated or a tensor of one of this rank's groups."""
        parts = name.split("/")
        return parts[0] != "rows" or int(parts[1]) in self.groups

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Restore the rows of this rank's groups; nothing is changed where a tensor is missing."""
        prefixes = [f"rows/{group:05d}/" for group in self.groups]
        units = [tensors[prefix + "units"] for prefix in prefixes]
        if self.norms.needed:
            self.norms.running = tensors["norms"].to(self.topology.device)
        permutation = int(tensors["permutation"]) if "permutation" in tensors else 0
        if permutation != self.permutation:
            self._arrange(permutation)
        self.bank.forget()
        for prefix, of_group in zip(prefixes, units, strict=True):
            self.bank.load(of_group, tensors, prefix)

    def row_ranges(self) -> dict[str, tuple[int, int]]:
        """Global row range of each group; see `Head`."""
        length, ranges = self.layout.length, {}
        for group in range(self.layout.groups):
            heads = self.layout.group_heads(group)
            ranges[f"rows/{group:05d}"] = (heads.start * length, heads.stop * length)
        return ranges
