"""Row-sparse SGD and AdamW: only the touched rows of a bank, and their state, are read or written.

The difference from a dense optimizer: a row that no sample selected keeps its weight, momentum and
moments. A dense optimizer would move it by its momentum and shrink it by weight decay. AdamW's bias
correction counts the updates of each row.

The loss depends on a row only through its products with embeddings. So the gradient of a row is a
sum of embeddings `e` weighted by `a`, plus a multiple `b` of the row itself (from normalising it).
Gradients arrive in that form. For rows that few samples selected the sum is never written to memory
on its own: SGD adds it to the momentum in one product.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim.sgd import sgd

from mhe_dist.bank.bank import Bank, Units, inverse_norms
from mhe_dist.config.head import HeadOptimConfig
from mhe_dist.distributed.transfer import to_device


class LowRank(NamedTuple):
    """Gradient of rows `w` `[U, L, D]` that few samples selected: `a^T e + b * w`.

    Attributes:
        a: `[U, c, L]`, weights of the embeddings.
        e: `[U, c, D]`, the embeddings that the rows were compared with.
        b: `[U, L]`, the radial part, along each row; None for rows that are not normalised.
    """

    a: Tensor
    e: Tensor
    b: Tensor | None

    def add_to(self, velocity: Tensor, momentum: float) -> Tensor:
        """`momentum * velocity + a^T e`, in place."""
        return velocity.baddbmm_(self.a.transpose(1, 2), self.e, beta=momentum)

    def product(self) -> Tensor:
        """`a^T e` `[U, L, D]`, a new tensor."""
        return torch.bmm(self.a.transpose(1, 2), self.e)

    def at(self, rows: Tensor) -> LowRank:
        """The same; see `Dense.at`."""
        return self

    def of(self, part: slice) -> LowRank:
        """The gradient of some of the units."""
        return LowRank(self.a[part], self.e[part], None if self.b is None else self.b[part])


class Dense(NamedTuple):
    """Gradient of rows `w` `[U, L, D]` that many samples selected: `g + b * w`.

    Attributes:
        g: `[U, L, D]`, the sum over samples, already formed; it is consumed by the update.
        b: `[U, L]`, the radial part, along each row; None: there is none.
        of_normalised: whether `g` is the gradient of the normalised rows `w / |w|` instead; `b` is
            None then.
    """

    g: Tensor
    b: Tensor | None
    of_normalised: bool = False

    def add_to(self, velocity: Tensor, momentum: float) -> Tensor:
        """`momentum * velocity + g`, in place."""
        return velocity.mul_(momentum).add_(self.g)

    def product(self) -> Tensor:
        """`g` itself; it is consumed by the update."""
        return self.g

    def at(self, rows: Tensor) -> Dense:
        """The gradient of `rows` `[U, L, D]` themselves: `(g - (g u) u) / |w|` if of normalised."""
        if not self.of_normalised:
            return self
        inverse = inverse_norms(rows)
        radial = (self.g * rows).sum(-1).mul_(inverse.pow(3)).neg_()
        return Dense(self.g.mul_(inverse.unsqueeze(-1)), radial)

    def of(self, part: slice) -> Dense:
        """The gradient of some of the units."""
        b = None if self.b is None else self.b[part]
        return Dense(self.g[part], b, self.of_normalised)


class SharedFactors(NamedTuple):
    """Gradient of rows of which many units were compared with the same samples: `a^T e`.

    It is that of the normalised rows `w / |w|`, or of rows that are not normalised.

    Attributes:
        a: float32, weights of the embeddings, in one buffer. A sample's weights of the L rows of a
            unit are side by side.
        e: `[n, D]`, embeddings of all samples.
        places: int64 `[4, U]` on the host, for each unit: where its weights of its first sample
            are, how far those of the next sample are from them, both in multiples of L; its first
            sample, and how many it has.
        length: L.
        of_normalised: whether it is the gradient of the normalised rows.
    """

    a: Tensor
    e: Tensor
    places: Tensor
    length: int
    of_normalised: bool

    def add_to(self, velocity: Tensor, momentum: float) -> Tensor:
        """`momentum * velocity + a^T e`, in place."""
        return velocity.mul_(momentum).add_(self.product())

    def product(self) -> Tensor:
        """`a^T e` `[U, L, D]`, a new tensor."""
        products = self.e.new_empty(self.places.shape[1], self.length, self.e.shape[1])
        for product, where in zip(products, self.places.T.tolist(), strict=True):
            first, stride, sample, count = where
            shape, strides = (self.length, count), (1, stride * self.length)
            a = self.a.as_strided(shape, strides, first * self.length)
            torch.mm(a, self.e[sample : sample + count], out=product)
        return products

    def at(self, rows: Tensor) -> Dense:
        """The gradient of the rows themselves; see `Dense.at`."""
        return Dense(self.product(), None, self.of_normalised).at(rows)

    def of(self, part: slice) -> SharedFactors:
        """The gradient of some of the units."""
        return self._replace(places=self.places[:, part])

    @property
    def b(self) -> None:
        """There is no radial part."""
        return None


RowGradient = LowRank | Dense | SharedFactors


class RowOptimizer(ABC):
    """Updates touched rows of a bank that was made with its `fields`."""

    @property
    @abstractmethod
    def fields(self) -> dict[str, int | None]:
        """Name -> columns, as `Bank` takes them."""

    def update(self, bank: Bank, units: Units, gradient: RowGradient, lr: float, step: int) -> None:
        """Update the distinct, touched `units`."""
        for part, part_units in bank.parts(units):
            self._update(bank, part_units, gradient.of(part), lr, step)

    @abstractmethod
    def _update(
        self, bank: Bank, units: Units, gradient: RowGradient, lr: float, step: int
    ) -> None: ...


@dataclass(frozen=True)
class RowSGD(RowOptimizer):
    """`v <- momentum v + g + weight_decay w; w <- w - lr v`, as torch.optim.SGD does."""

    momentum: float
    weight_decay: float

    @property
    def fields(self) -> dict[str, int | None]:
        """The momentum, if there is any."""
        return {"momentum": None} if self.momentum else {}

    def update(self, bank: Bank, units: Units, gradient: RowGradient, lr: float, step: int) -> None:
        """Update the distinct, touched `units`."""
        if isinstance(units, Tensor) and len(units) and bank.lists_units:
            self._update_listed(bank, units, gradient, lr, step)
        else:
            super().update(bank, units, gradient, lr, step)

    def _update_listed(
        self, bank: Bank, units: Tensor, gradient: RowGradient, lr: float, step: int
    ) -> None:
        """One pass over rows and momentum, where they lie, once the gradient is complete."""
        if not isinstance(gradient, LowRank) and gradient.of_normalised:
            gradient = gradient.at(bank.read(units))
        with bank.changing(units, step) as fields:
            rows, summed = fields["weight"], list(gradient.product().unbind())
            velocities: list[Tensor | None] = [*fields.get("momentum", [None] * len(rows))]
            if gradient.b is not None:
                torch._foreach_addcmul_(summed, rows, list(gradient.b.unsqueeze(-1).unbind()))
            sgd(
                rows,
                summed,
                velocities,
                fused=True,
                weight_decay=self.weight_decay,
                momentum=self.momentum,
                lr=lr,
                dampening=0.0,
                nesterov=False,
                maximize=False,
            )

    def _update(
        self, bank: Bank, units: Units, gradient: RowGradient, lr: float, step: int
    ) -> None:
        if bank.takes_kernels:
            self._update_in_one_pass(bank, units, gradient, lr, step)
            return
        rows = bank.read(units)
        gradient = gradient.at(rows)
        radial = self._radial(gradient, rows)
        if self.momentum:
            velocity = gradient.add_to(bank.read(units, "momentum"), self.momentum)
        else:
            velocity = gradient.product()
        if radial is not None:
            velocity.addcmul_(rows, radial)
        rows.add_(velocity, alpha=-lr)
        bank.write(units, {"weight": rows} | dict.fromkeys(self.fields, velocity), step)

    def _update_in_one_pass(
        self, bank: Bank, units: Units, gradient: RowGradient, lr: float, step: int
    ) -> None:
        from mhe_dist.kernels.row_update import RowFactors, sgd_rows

        if isinstance(gradient, Dense):
            factors = RowFactors(gradient.g, None, None, gradient.b, gradient.of_normalised)
        elif isinstance(gradient, SharedFactors):
            places = to_device(gradient.places, bank.device)
            of_normalised = gradient.of_normalised
            factors = RowFactors(None, gradient.a, gradient.e, None, of_normalised, places)
        else:
            factors = RowFactors(None, gradient.a, gradient.e, gradient.b)
        sgd_rows(
            bank.stored["weight"],
            bank.stored.get("momentum"),
            bank.positions(units),
            factors,
            lr,
            self.momentum,
            self.weight_decay,
            bank.units.start,
            (bank.rounding_key("weight", step), bank.rounding_key("momentum", step)),
        )

    def _radial(self, gradient: RowGradient, rows: Tensor) -> Tensor | None:
        """Factor of the row itself: the gradient's radial part and the weight decay."""
        if gradient.b is not None:
            return gradient.b.add(self.weight_decay).unsqueeze(-1)
        return rows.new_full((1, 1, 1), self.weight_decay) if self.weight_decay else None


@dataclass(frozen=True)
class RowAdamW(RowOptimizer):
    """AdamW (Loshchilov and Hutter, 2019) on touched rows, as torch.optim.AdamW does."""

    betas: tuple[float, float]
    eps: float
    weight_decay: float

    @property
    def fields(self) -> dict[str, int | None]:
        """Both moments, and the number of updates of each row."""
        return {"exp_avg": None, "exp_avg_sq": None, "age": 1}

    def _update(
        self, bank: Bank, units: Units, gradient: RowGradient, lr: float, step: int
    ) -> None:
        beta1, beta2 = self.betas
        rows = bank.read(units)
        state = {field: bank.read(units, field) for field in self.fields}
        gradient = gradient.at(rows)
        g = gradient.product()
        if gradient.b is not None:
            g = g.addcmul_(rows, gradient.b.unsqueeze(-1))
        age = state["age"].add_(1)
        mean = state["exp_avg"].lerp_(g, 1 - beta1)
        square = state["exp_avg_sq"].mul_(beta2).addcmul_(g, g, value=1 - beta2)
        root = square.div(1 - beta2**age).sqrt_().add_(self.eps)
        rows.mul_(1 - lr * self.weight_decay)
        rows.addcdiv_(mean / (1 - beta1**age), root, value=-lr)
        bank.write(units, {"weight": rows} | state, step)


def build_row_optimizer(config: HeadOptimConfig) -> RowOptimizer:
    """The row optimizer of the config."""
    if config.kind == "adamw":
        return RowAdamW(config.betas, config.eps, config.weight_decay)
    return RowSGD(config.momentum, config.weight_decay)
