"""The learned rows of heads that score a class digit by digit, level by level.

A *unit* holds the rows of consecutive local classes that are scored together: all of a level that
has no parents, or the children of one parent. Few rows are replicated on every rank, their
gradient summed over the ranks once per step; many are sharded by canonical groups of units and
updated sparsely. The `bank` block of the config (memory, dtype) concerns sharded rows alone.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mhe_dist import seeds
from mhe_dist.bank.bank import Bank
from mhe_dist.bank.class_layout import LabelLayout
from mhe_dist.bank.initial_rows import noise_rows
from mhe_dist.bank.row_optim import Dense, LowRank, RowOptimizer
from mhe_dist.bank.saved_rows import SavedRows
from mhe_dist.distributed.collectives import all_reduce
from mhe_dist.distributed.topology import Topology
from mhe_dist.distributed.transfer import to_device
from mhe_dist.heads.base import HeadState
from mhe_dist.heads.grouping import GradientFactors, chunks_by_head
from mhe_dist.heads.row_head import HeadSpec, initial_std


class ReplicatedRows:
    """Rows `[R, width]` that every rank holds, equal on all of them.

    Args:
        count, width: R and the columns of a row.
        initial: int64 unit numbers -> first rows `[U, R, width]`; there is one unit, number 0.
        optimizer: updates all rows in every step.
        spec: gives the type.
        topology: the ranks whose gradients are summed.
    """

    def __init__(
        self,
        count: int,
        width: int,
        initial: Callable[[Tensor], Tensor],
        optimizer: RowOptimizer,
        spec: HeadSpec,
        topology: Topology,
    ) -> None:
        self.optimizer, self.topology, self.unit = optimizer, topology, torch.zeros(1).long()
        self.bank = Bank(
            range(1),
            count,
            width,
            initial,
            optimizer.fields,
            dtype=spec.dtype,
            compute_dtype=spec.dtype,
            device=topology.device,
            seed=spec.seed,
        )
        self.bank.touch(self.unit)
        self._gradient: Tensor | None = None
        self._radial: Tensor | None = None

    def read(self) -> Tensor:
        """A copy of all rows `[R, width]`."""
        return self.bank.read(self.unit)[0]

    def add_gradient(self, gradient: Tensor, radial: Tensor | None = None) -> None:
        """Add `gradient + radial * rows` (`[R, width]`, `[R]`), summed over this rank's samples."""
        self._gradient = gradient if self._gradient is None else self._gradient + gradient
        if radial is not None:
            self._radial = radial if self._radial is None else self._radial + radial

    def update(self, lr: float, step: int, radial: bool = False) -> None:
        """Sum the gradients over the ranks and apply them; all ranks must call.

        Args:
            lr, step: see `RowOptimizer`.
            radial: whether the gradient has a part along the rows.
        """
        gradient = self._summed(self._gradient, (1, self.bank.length, self.bank.width))
        part = self._summed(self._radial, (1, self.bank.length)) if radial else None
        self.optimizer.update(self.bank, self.unit, Dense(gradient, part), lr, step)
        self.clear_gradient()

    def clear_gradient(self) -> None:
        """Forget the gradient."""
        self._gradient, self._radial = None, None

    def _summed(self, values: Tensor | None, shape: tuple[int, ...]) -> Tensor:
        if values is None:
            values = torch.zeros(shape, dtype=self.bank.compute_dtype, device=self.topology.device)
        return all_reduce(values.view(shape), self.topology)

    def state(self, name: str) -> HeadState:
        """All fields, replicated, as `<name>/<field>`."""
        fields = self.bank.saved(self.unit)
        return HeadState({f"{name}/{field}": rows.tensor() for field, rows in fields.items()}, {})

    def load(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Restore the tensors that `state` gave."""
        self.bank.load(self.unit, tensors, f"{name}/")


class SharedLevel:
    """A level whose local classes are one unit, replicated.

    Attributes:
        layout: one head that holds all classes of the level.
        topology: the rank alone, since it scores its own samples.
        bank: where the unit's rows are.
    """

    def __init__(
        self,
        classes: int,
        purpose: str,
        optimizer: RowOptimizer,
        spec: HeadSpec,
        topology: Topology,
    ) -> None:
        self.layout = LabelLayout(classes, classes, 1, 0)
        self.topology = Topology(device=topology.device)
        self.normalised = spec.config.margin.kind != "none"
        initial = initial_rows(purpose, self.layout, spec, topology.device)
        width = spec.width + (not self.normalised)
        self.rows = ReplicatedRows(classes, width, initial, optimizer, spec, topology)
        self.bank = self.rows.bank

    def add_gradient(self, units: Tensor, factors: GradientFactors) -> None:
        """Add the rows' gradient of pairs of samples and the unit, all `[n]`."""
        gradient = factors.weights.T @ factors.features
        self.rows.add_gradient(gradient, factors.radial.sum(0) if self.normalised else None)

    def update(self, lr: float, step: int) -> None:
        """Apply the gradient kept since the last call; all ranks must call."""
        self.rows.update(lr, step, self.normalised)

    def clear_gradient(self) -> None:
        """Forget the gradient."""
        self.rows.clear_gradient()

    def state(self, name: str) -> HeadState:
        """All rows, replicated."""
        return self.rows.state(name)

    def load(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Restore the tensors that `state` gave."""
        self.rows.load(name, tensors)

    def row_ranges(self, name: str) -> dict[str, tuple[int, int]]:
        """Nothing is sharded."""
        return {}


class ShardedLevel:
    """A level whose units, the children of each parent, are sharded by canonical groups.

    Attributes:
        layout: unit u holds the classes `[u * L, (u + 1) * L)`; the last has padding. (Its
            permutation is not used: the children of a parent are known by their digits.)
        topology: the ranks.
        bank: the units of this rank's groups.
    """

    def __init__(
        self,
        layout: LabelLayout,
        purpose: str,
        optimizer: RowOptimizer,
        spec: HeadSpec,
        topology: Topology,
    ) -> None:
        self.layout, self.topology, self.optimizer = layout, topology, optimizer
        self.normalised = spec.config.margin.kind != "none"
        self.groups = topology.share(layout.groups)
        units = [layout.group_heads(group) for group in self.groups]
        config = spec.config.bank
        stored = spec.dtype if config.dtype == "float32" else torch.bfloat16
        self.bank = Bank(
            range(units[0].start, units[-1].stop) if units else range(0),
            layout.length,
            spec.width + (not self.normalised),
            initial_rows(purpose, layout, spec, topology.device),
            optimizer.fields,
            dtype=stored,
            compute_dtype=spec.dtype,
            memory=config.memory,
            device=topology.device,
            folder=spec.folder,
            seed=seeds.derive(spec.seed, purpose),
        )
        self._pending: list[tuple[Tensor, GradientFactors]] = []

    def add_gradient(self, units: Tensor, factors: GradientFactors) -> None:
        """Keep the rows' gradient of pairs of samples and units, all `[n]`, for `update`.

        The units must have been touched.
        """
        self._pending.append((units, factors))

    def update(self, lr: float, step: int) -> None:
        """Apply the gradients kept since the last call."""
        if self._pending:
            units = torch.cat([units for units, _ in self._pending])
            factors = GradientFactors.join([factors for _, factors in self._pending])
            for chunk in chunks_by_head(units, self.bank.units_per_chunk):
                index = to_device(chunk.index, factors.weights.device)
                weights, radial = factors.weights[index], factors.radial[index]
                if chunk.padding is not None:
                    padding = to_device(chunk.padding, index.device).unsqueeze(-1)
                    weights = weights.masked_fill(padding, 0)
                    radial = radial.masked_fill(padding, 0)
                part = radial.sum(1) if self.normalised else None
                gradient = LowRank(weights, factors.features[index], part)
                self.optimizer.update(self.bank, chunk.heads, gradient, lr, step)
        self.clear_gradient()

    def clear_gradient(self) -> None:
        """Forget the gradients."""
        self._pending = []

    def state(self, name: str) -> HeadState:
        """Touched units of each group of this rank, owned, as `rows/<group>/<name>/<field>`."""
        tensors: dict[str, Tensor | SavedRows] = {}
        touched = self.bank.touched
        for group in self.groups:
            heads, prefix = self.layout.group_heads(group), f"rows/{group:05d}/{name}/"
            units = touched[(touched >= heads.start) & (touched < heads.stop)]
            tensors[prefix + "units"] = units
            tensors |= {prefix + field: rows for field, rows in self.bank.saved(units).items()}
        return HeadState({}, tensors)

    def load(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Restore the units of this rank's groups."""
        self.bank.forget()
        for group in self.groups:
            prefix = f"rows/{group:05d}/{name}/"
            self.bank.load(tensors[prefix + "units"], tensors, prefix)

    def row_ranges(self, name: str) -> dict[str, tuple[int, int]]:
        """Range of the level's classes in each group."""
        length, ranges = self.layout.length, {}
        for group in range(self.layout.groups):
            units = self.layout.group_heads(group)
            ranges[f"rows/{group:05d}/{name}"] = (units.start * length, units.stop * length)
        return ranges


Level = SharedLevel | ShardedLevel


def initial_rows(
    purpose: str, layout: LabelLayout, spec: HeadSpec, device: torch.device
) -> Callable[[Tensor], Tensor]:
    """Function from units (host) to first rows `[U, L, width]` on the device.

    They are noise keyed by (seed, purpose, class). Padding rows and biases are zero.
    """
    key = seeds.derive(spec.seed, purpose)

    def rows_of(units: Tensor) -> Tensor:
        """The first rows; see above."""
        units = to_device(units, device)
        classes = units[:, None] * layout.length + torch.arange(layout.length, device=units.device)
        classes.masked_fill_(classes >= layout.num_classes, -1)
        columns = spec.width + (spec.config.margin.kind == "none")
        rows = noise_rows(key, classes, spec.width, initial_std(spec), columns)
        return rows.to(spec.dtype)

    return rows_of
