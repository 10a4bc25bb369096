"""An exponential moving average of the backbone's weights, which is evaluated and exported.

Parameters are averaged; BatchNorm's running statistics are an average already and stay the model's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

EMA_PREFIX = "ema."


class AveragedWeights:
    """The average of some parameters over the steps.

    Attributes:
        tensors: name -> average, on the parameters' device; at first what the parameters are.
    """

    def __init__(self, parameters: Mapping[str, Tensor], decay: float) -> None:
        """Args:
        parameters: name -> parameter, whole on every rank.
        decay: weight of the old average in each step, below 1.
        """
        self._parameters = {name: parameter.detach() for name, parameter in parameters.items()}
        self._decay = decay
        self.tensors = {name: tensor.clone() for name, tensor in self._parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """After a step: `average = decay * average + (1 - decay) * parameter`."""
        pairs = list(self.tensors.values()), list(self._parameters.values())
        torch._foreach_lerp_(*pairs, 1 - self._decay)

    @contextmanager
    @torch.no_grad()
    def applied(self) -> Iterator[None]:
        """Within, the parameters hold their averages; afterwards, their own values again."""
        saved = {name: tensor.clone() for name, tensor in self._parameters.items()}
        self._fill(self.tensors)
        try:
            yield
        finally:
            self._fill(saved)

    @torch.no_grad()
    def _fill(self, values: Mapping[str, Tensor]) -> None:
        for name, tensor in self._parameters.items():
            tensor.copy_(values[name])


def backbone_weights(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a backbone by name, out of `Engine.state()`: averages where there are some."""
    names = ("model.", EMA_PREFIX)  # the second over the first
    return {
        name.removeprefix(prefix): tensor
        for prefix in names
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }


def is_backbone_weight(name: str) -> bool:
    """Whether `averaged` needs a tensor of that name."""
    return name.startswith(("model.", EMA_PREFIX))
