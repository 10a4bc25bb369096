"""Weights and optimizer state as whole named tensors, read from and written to any ZeRO stage."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from mhe_dist.checkpoint.entry import Entry
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

    def entries(self, extra: Mapping[str, Tensor]) -> dict[str, Entry]:
        """Every tensor, and `extra`, for `CheckpointStore.save`; not copied yet.

        All ranks must copy those that are no tensors, in this order: each is gathered for it.
        """
        entries: dict[str, Entry] = {}
        for name, parameter in self._trained.items():
            entries[f"model.{name}"] = self._entry(parameter, None)
            for moment in self._moments:
                entries[f"optim.{name}.{moment}"] = self._entry(parameter, moment)
        for name, tensor in self._untrained().items():
            entries[f"model.{name}"] = self._untrained_entry(tensor)
        if self._adamw:
            entries["optim.step"] = next(self._step_counters())
        return entries | dict(extra)

    def gather(self, extra: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies on the host of every tensor, and of `extra`; all ranks must call."""
        return {name: _on_host(entry) for name, entry in self.entries(extra).items()}

    @torch.no_grad()
    def scatter(self, tensors: Mapping[str, Tensor], extra: Mapping[str, Tensor]) -> None:
        """Write what `gather` gave into the model, the optimizer and `extra`; all ranks must call.

        Raises:
            UserError: names or shapes are not those of this model and optimizer; lists them.
        """
        tensors = self._with_own_moments(tensors)
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
        with self._whole_frozen():
            for name, tensor in self._untrained().items():
                tensor.copy_(tensors[f"model.{name}"])
        if self._adamw:
            for counter in self._step_counters():
                counter.copy_(tensors["optim.step"])
        for name, tensor in extra.items():
            tensor.copy_(tensors[name])
        self._update_forward_weights()

    def _with_own_moments(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """What was saved, as a run of this momentum saves it: one of zero has no moments of SGD."""
        moments = {f"optim.{name}.{each}" for name in self._trained for each in MOMENTS["sgd"]}
        if self._adamw or bool(self._moments) == bool(moments & tensors.keys()):
            return tensors
        if not self._moments:
            return {name: tensor for name, tensor in tensors.items() if name not in moments}
        shapes = self._shapes()
        return {**tensors, **{name: torch.zeros(shapes[name]) for name in moments}}

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

    def _entry(self, parameter: Tensor, moment: str | None) -> Entry:
        """The parameter or a moment of it; what ranks hold in parts is gathered when copied."""
        if self._stage == 0:
            return self._whole(parameter, moment)
        shape = torch.Size(_whole_shape(parameter))
        return _GatheredTensor(
            shape, torch.float32, lambda: nullcontext(self._whole(parameter, moment))
        )

    def _untrained_entry(self, tensor: Tensor) -> Entry:
        """A frozen parameter, which ranks hold in parts at ZeRO 3, or a buffer."""
        if self._stage < 3 or not hasattr(tensor, "ds_shape"):
            return tensor

        @contextmanager
        def whole() -> Iterator[Tensor]:
            with self._deepspeed.zero.GatheredParameters([tensor]):
                yield tensor

        return _GatheredTensor(torch.Size(_whole_shape(tensor)), tensor.dtype, whole)

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
    def _whole_frozen(self) -> Iterator[None]:
        """Within, frozen parameters are whole, also at ZeRO 3; what rank 0 writes, all get."""
        if self._stage < 3 or not self._frozen:
            yield
            return
        frozen = list(self._frozen.values())
        with self._deepspeed.zero.GatheredParameters(frozen, modifier_rank=0):
            yield


def _whole_shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(getattr(tensor, "ds_shape", tensor.shape))


def _on_host(entry: Entry) -> Tensor:
    if isinstance(entry, Tensor):
        return entry.detach().to("cpu", copy=True)
    buffer = torch.empty(entry.shape, dtype=entry.dtype)
    entry.copy_to(buffer)
    return buffer


class _GatheredTensor:
    """A tensor that lies on the ranks in parts; see `mhe_dist.checkpoint.entry.DeferredTensor`."""

    def __init__(
        self,
        shape: torch.Size,
        dtype: torch.dtype,
        whole: Callable[[], AbstractContextManager[Tensor]],
    ) -> None:
        """Args:
        shape, dtype: of the whole tensor.
        whole: gathers it for as long as its context lasts; a collective.
        """
        self.shape, self.dtype, self._whole = shape, dtype, whole

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return self.shape.numel() * self.dtype.itemsize

    @torch.no_grad()
    def copy_to(self, buffer: Tensor | None) -> None:
        """Gather it, all ranks together, and fill `buffer` where there is one."""
        with self._whole() as tensor:
            if buffer is not None:
                buffer.copy_(tensor.detach())
