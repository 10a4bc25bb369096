"""Weights and optimizer state as whole named tensors, read from and written to any ZeRO stage."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mhe_dist.checkpoint.shape_check import Shapes, refuse_mismatch, tensor_shapes
from mhe_dist.config.schema import OptimConfig
from mhe_dist.distributed.topology import Topology

MOMENTS = {"sgd": ("momentum_buffer",), "adamw": ("exp_avg", "exp_avg_sq")}


class ZeroState:
    """What a resumed run needs of a DeepSpeed engine.

    Names do not depend on W or on the ZeRO stage: `model.<parameter>`, `model.<buffer>`,
    `optim.<parameter>.<moment>`, for AdamW `optim.step`, and the names of `extra`.
    """

    def __init__(
        self,
        model: nn.Module,
        deepspeed: Any,
        deepspeed_engine: Any,
        optim: OptimConfig,
        zero_stage: int,
        topology: Topology,
    ) -> None:
        """Create the optimizer state that the first step would, so that it can be read before it.

        Args:
            model: the module that `deepspeed_engine` wraps.
            deepspeed: the package, which the engine imports.
            deepspeed_engine: what `deepspeed.initialize` made.
            optim: kind and momentum of the optimizer.
            zero_stage: 0 to 3.
            topology: this rank's position.
        """
        self._trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
        persistent = model.state_dict().keys()
        self._buffer_names = [n for n, _ in model.named_buffers() if n in persistent]
        self._model, self._topology = model, topology
        self._stage, self._adamw = zero_stage, optim.kind == "adamw"
        self._deepspeed, self._zero_optimizer = deepspeed, deepspeed_engine.optimizer
        self._moments = MOMENTS[optim.kind]
        if optim.kind == "sgd" and optim.momentum == 0:
            self._moments = ()
        self._make_optimizer_state()

    @property
    def torch_optimizer(self) -> torch.optim.Optimizer:
        """The optimizer of torch, below DeepSpeed's."""
        return self._zero_optimizer if self._stage == 0 else self._zero_optimizer.optimizer

    @torch.no_grad()
    def gather(self, extra: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies on the host of every tensor, and of `extra`; all ranks must call."""
        tensors = {}
        for name, parameter in self._trained.items():
            tensors[f"model.{name}"] = _on_host(self._whole(parameter, None))
            for moment in self._moments:
                tensors[f"optim.{name}.{moment}"] = _on_host(self._whole(parameter, moment))
        with self._whole_frozen():
            for name, tensor in self._untrained().items():
                tensors[f"model.{name}"] = _on_host(tensor)
        if self._adamw:
            tensors["optim.step"] = _on_host(next(self._step_counters()))
        return tensors | {name: _on_host(tensor) for name, tensor in extra.items()}

    @torch.no_grad()
    def scatter(self, tensors: Mapping[str, Tensor], extra: Mapping[str, Tensor]) -> None:
        """Write what `gather` gave into the model, the optimizer and `extra`; all ranks must call.

        Raises:
            UserError: names or shapes are not those of this model and optimizer; lists them.
        """
        refuse_mismatch(
            self._shapes() | tensor_shapes(extra),
            tensor_shapes(tensors),
            "the checkpoint is not of this model and optimizer (model.*, optim.kind)",
            ("this run", "the checkpoint"),
        )
        for name, parameter in self._trained.items():
            self._write(parameter, None, tensors[f"model.{name}"])
            for moment in self._moments:
                self._write(parameter, moment, tensors[f"optim.{name}.{moment}"])
        with self._whole_frozen(writes=True):
            for name, tensor in self._untrained().items():
                tensor.copy_(tensors[f"model.{name}"])
        if self._adamw:
            for counter in self._step_counters():
                counter.copy_(tensors["optim.step"])
        for name, tensor in extra.items():
            tensor.copy_(tensors[name])
        self._update_forward_weights()

    def _shapes(self) -> Shapes:
        """Names and shapes of what `gather` gives, without communication."""
        shapes: Shapes = {}
        for name, parameter in self._trained.items():
            shape = _whole_shape(parameter)
            shapes[f"model.{name}"] = shape
            shapes |= {f"optim.{name}.{moment}": shape for moment in self._moments}
        for name, tensor in self._untrained().items():
            shapes[f"model.{name}"] = _whole_shape(tensor)
        return shapes | ({"optim.step": ()} if self._adamw else {})

    def _optimized_tensors(self) -> list[Tensor]:
        """What torch's optimizer keeps state for: parameters, or this rank's flat partitions."""
        if self._stage == 0:
            return list(self._trained.values())
        if self._stage < 3:
            return list(self._zero_optimizer.single_partition_of_fp32_groups)
        return list(self._zero_optimizer.fp32_partitioned_groups_flat)

    def _make_optimizer_state(self) -> None:
        """Zeros change nothing: a momentum of zero after one step is the gradient."""
        for tensor in self._optimized_tensors():
            state = self.torch_optimizer.state[tensor]
            state.update({moment: torch.zeros_like(tensor) for moment in self._moments})
            if self._adamw:
                state["step"] = torch.zeros((), dtype=torch.float32)
        if self._stage in (1, 2) and self._moments:
            self._zero_optimizer._lazy_init_hp_params_optimizer_state()

    def _step_counters(self) -> Iterator[Tensor]:
        """AdamW's step counters; all equal."""
        return (self.torch_optimizer.state[t]["step"] for t in self._optimized_tensors())

    def _untrained(self) -> dict[str, Tensor]:
        """Frozen parameters and persistent buffers by name."""
        buffers = dict(self._model.named_buffers())
        return self._frozen | {name: buffers[name] for name in self._buffer_names}

    def _whole(self, parameter: Tensor, moment: str | None) -> Tensor:
        """The whole float32 parameter, or a moment of it; a collective at ZeRO 1 to 3."""
        if self._stage == 0:
            return self.torch_optimizer.state[parameter][moment] if moment else parameter
        if moment is None:
            return self._deepspeed.utils.safe_get_full_fp32_param(parameter)
        return self._deepspeed.utils.safe_get_full_optimizer_state(parameter, moment)

    def _write(self, parameter: Tensor, moment: str | None, value: Tensor) -> None:
        """Set the whole float32 parameter, or a moment of it."""
        value = value.to(self._topology.device, torch.float32)
        if self._stage == 0:
            self._whole(parameter, moment).copy_(value)
        elif self._stage == 3:
            self._write_partition(parameter, moment, value)
        elif moment is None:
            self._deepspeed.utils.safe_set_full_fp32_param(parameter, value)
        else:
            self._deepspeed.utils.safe_set_full_optimizer_state(parameter, value, moment)

    def _write_partition(self, parameter: Any, moment: str | None, value: Tensor) -> None:
        """Set this rank's partition at ZeRO 3.

        DeepSpeed's function for whole tensors fails where W does not divide them.
        """
        numel = parameter.ds_tensor.numel()
        padded = value.new_zeros(numel * self._topology.world_size)
        padded[: value.numel()] = value.flatten()
        partition = padded[numel * self._topology.rank :][:numel]
        if moment is None:
            self._deepspeed.utils.safe_set_local_fp32_param(parameter, partition)
        else:
            self._deepspeed.utils.safe_set_local_optimizer_state(parameter, partition, moment)

    def _update_forward_weights(self) -> None:
        """Bring the weights that the forward pass reads up to the optimizer's float32 weights."""
        optimizer = self._zero_optimizer
        if self._stage in (1, 2):
            optimizer.update_lp_params()
        elif self._stage == 3:
            for index in range(len(optimizer.fp16_groups)):
                optimizer._reassign_or_swap_out_partitioned_parameters(index)
            if optimizer.persistent_parameters:
                optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)

    @contextmanager
    def _whole_frozen(self, writes: bool = False) -> Iterator[None]:
        """Within, frozen parameters are whole, also at ZeRO 3."""
        if self._stage < 3 or not self._frozen:
            yield
            return
        frozen = list(self._frozen.values())
        with self._deepspeed.zero.GatheredParameters(frozen, modifier_rank=0 if writes else None):
            yield


def _whole_shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(getattr(tensor, "ds_shape", tensor.shape))


def _on_host(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)
