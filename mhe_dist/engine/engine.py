"""The backbone's engine: mixed precision, ZeRO, accumulation. The only file that imports deepspeed.

A step is `forward` and `backward` for each micro-batch of this rank, then `step`. The gradients are
averaged over the micro-batches of a rank and over the ranks; heads scale their losses for that
(heads/base.py). In float32 the sum does not depend on the number of ranks (gradient_sum.py).
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mhe_dist.backbone.ema import EMA_PREFIX, AveragedWeights
from mhe_dist.backbone.model import compile_in_place, normalize_images
from mhe_dist.checkpoint.shape_check import refuse_mismatch, shapes
from mhe_dist.config.schema import Config
from mhe_dist.distributed import topology as places
from mhe_dist.distributed.collectives import all_reduce
from mhe_dist.distributed.topology import Topology
from mhe_dist.engine.batchnorm import RunningStatistics
from mhe_dist.engine.exact_reduce import PRECISE, PreciseSum, sum_dtype, sum_precisely
from mhe_dist.engine.settings import deepspeed_settings, make_optimizer, resolve_precision
from mhe_dist.seeds import seed_torch

MOMENTS = {"sgd": ("momentum_buffer",), "adamw": ("exp_avg", "exp_avg_sq")}


class Engine:
    """Trains a model from images to embeddings.

    Attributes:
        model: the bare module. At ZeRO 3 its parameters are empty between the steps.
        precision: "bf16" or "float32", what `train.precision` came to on this hardware.
    """

    def __init__(self, model: nn.Module, config: Config, topology: Topology) -> None:
        """Wrap `model`; all ranks must call, with the same model (rank 0's weights win).

        Args:
            model: uint8-range images, normalised to [-1, 1], `[B, 3, H, W]` -> embeddings `[B, D]`.
            config: `optim`, `train`, `model.compile`, `scale.zero_stage` and `run.seed` are used.
            topology: this rank's place.
        """
        self.model = model.to(topology.device)
        if config.model.compile:
            compile_in_place(self.model, topology.device)
        self.precision = resolve_precision(config.train.precision, topology.device)
        self._topology = topology
        self._seed = config.run.seed
        self._optim = config.optim
        self._stage = int(config.scale.zero_stage)
        self._accumulated = config.train.micro_batches // topology.world_size
        self._backwards = 0
        # Micro-batches in what `_gradient_pieces` gives: DeepSpeed averages over the ranks in bf16.
        exact = sum_dtype(self.precision) == PRECISE
        self._addends = config.train.micro_batches if exact else self._accumulated
        self._norm: Tensor | None = None
        self._names = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
        persistent = model.state_dict().keys()
        self._buffer_names = [n for n, _ in model.named_buffers() if n in persistent]
        self._deepspeed = import_deepspeed(topology.device)
        self._ds = self._initialise(config)
        self._sum = self._sum_precisely() if exact else None
        self._statistics = RunningStatistics(model)
        decay = config.optim.ema
        self._average = AveragedWeights(self._names, decay) if decay else None
        self._make_optimizer_state()

    def _initialise(self, config: Config) -> Any:
        if not dist.is_initialized():
            places.connect(device=self._topology.device)
        numel = sum(p.numel() for p in self.model.parameters())
        settings = deepspeed_settings(config, self.precision, self._accumulated, numel)
        optimizer = make_optimizer(self.model, config.optim)
        return self._deepspeed.initialize(
            model=self.model, optimizer=optimizer, config=settings, dist_init_required=None
        )[0]

    def _sum_precisely(self) -> PreciseSum | None:
        if self._stage > 0:
            sum_precisely(self._ds.optimizer, self._stage)
            return None
        self._ds.enable_backward_allreduce = False
        return PreciseSum(self._names.values())

    # -- the step ------------------------------------------------------------------------------

    def forward(self, images: Tensor, step: int, micro_batch: int) -> Tensor:
        """Embeddings of one micro-batch, for training.

        Args:
            images: uint8 `[B, 3, H, W]`, anywhere.
            step: number of the step.
            micro_batch: canonical number of the micro-batch in the step, `[0, n)`; with the step
                it keys dropout and stochastic depth.

        Returns:
            float32 `[B, D]` on the device, with gradient.
        """
        inputs = self._pixels(images)
        if not self.model.training:
            self.model.train()
        seed_torch(self._seed, "dropout", step, micro_batch)
        self._statistics.begin()
        embeddings: Tensor = self._ds(inputs)
        self._statistics.end()
        return embeddings.float()

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradients of a micro-batch's loss, a scalar (its scale: heads/base.py)."""
        self._ds.backward(loss, scale_wrt_gas=False)  # divided later: here it would round
        self._backwards += 1
        if self._backwards < self._accumulated:
            self._ds.step()  # not at the boundary: counts the micro-batch and updates nothing

    def step(self, lr: float) -> None:
        """Clip and apply the gradients of the step's micro-batches at learning rate `lr`."""
        if self._backwards != self._accumulated:
            raise RuntimeError(
                f"step after {self._backwards} of this rank's {self._accumulated} micro-batches"
            )
        for group in self._inner_optimizer.param_groups:
            group["lr"] = lr
        self._statistics.finish(self._topology)
        if self._sum is not None:
            self._sum.reduce(self._topology)
        self._norm = self._average_and_clip()
        if self._sum is not None:
            self._sum.give()
        self._ds.step()
        self._backwards = 0
        if self._average is not None:
            self._average.update()

    def grad_norm(self) -> Tensor | None:
        """L2 norm of the last step's gradient before clipping, a device scalar; None before a step.

        A gradient that is not finite is applied, except at ZeRO 3, where DeepSpeed skips the step.
        """
        return self._norm

    @torch.no_grad()
    def _average_and_clip(self) -> Tensor:
        """Divide what was reduced by its micro-batches and clip that mean to `clip_norm`.

        Returns its norm before clipping; never waits for the device. The norm is rounded to float32
        before it is used: the order of its own sum depends on the partition.
        """
        pieces = self._gradient_pieces()
        norm = torch.nn.utils.get_total_norm(pieces) / self._addends
        if self._stage > 0 and self._topology.world_size > 1:
            norm = all_reduce(norm.square(), self._topology).sqrt()
        norm = norm.float()
        factor = torch.full_like(norm, 1 / self._addends, dtype=pieces[0].dtype)
        if self._optim.clip_norm > 0:
            factor *= torch.clamp(self._optim.clip_norm / (norm + 1e-6), max=1.0)
        torch._foreach_mul_(pieces, factor)
        return norm

    def _gradient_pieces(self) -> list[Tensor]:
        """The reduced gradients that this rank holds: all at ZeRO 0, else its own share."""
        if self._sum is not None:
            return [self._sum.flat]
        if self._stage == 0:
            return [p.grad for p in self._names.values() if p.grad is not None]
        return [g for group in self._ds.optimizer.averaged_gradients.values() for g in group]

    # -- evaluation ----------------------------------------------------------------------------

    @torch.no_grad()
    def embed(self, images: Tensor) -> Tensor:
        """Embeddings for evaluation: averaged weights (`optim.ema`) where there are some, running
        statistics, float32, no autocast.

        At ZeRO 3 all ranks must call equally often.

        Args:
            images: uint8 `[B, 3, H, W]`, anywhere.

        Returns:
            float32 `[B, D]` on the device.
        """
        if self._statistics.in_step:
            raise RuntimeError("embed within a step: ranks would disagree")
        if self.model.training:
            self.model.eval()
        weights = nullcontext() if self._average is None else self._average.in_place()
        with weights, torch.autocast(self._topology.device.type, enabled=False):
            embeddings: Tensor = self.model(self._pixels(images))
        return embeddings.float()

    def _pixels(self, images: Tensor) -> Tensor:
        return normalize_images(images.to(self._topology.device, non_blocking=True))

    # -- state ---------------------------------------------------------------------------------

    @torch.no_grad()
    def state(self) -> dict[str, Tensor]:
        """Copies on the host of everything that a resumed run needs; all ranks must call.

        Names do not depend on W or on the ZeRO stage: `model.<parameter>`, `model.<buffer>`,
        `optim.<parameter>.<moment>`, for AdamW `optim.step`, with `optim.ema` `ema.<parameter>`.
        """
        tensors = {}
        for name, parameter in self._names.items():
            tensors[f"model.{name}"] = _on_host(self._get(parameter, None))
            for moment in self._moments:
                tensors[f"optim.{name}.{moment}"] = _on_host(self._get(parameter, moment))
        with self._whole_frozen():
            for name, tensor in (self._frozen | self._buffers()).items():
                tensors[f"model.{name}"] = _on_host(tensor)
        if self._optim.kind == "adamw":
            tensors["optim.step"] = _on_host(next(self._counters()))
        return tensors | {n: _on_host(tensor) for n, tensor in self._averages().items()}

    @torch.no_grad()
    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Restore what `state` gave, on any W and ZeRO stage; all ranks must call.

        Raises:
            UserError: names or shapes are not those of this model and optimizer; lists them.
        """
        wanted = self._shapes()
        refuse_mismatch(
            wanted,
            shapes(tensors),
            "the checkpoint is not of this model and optimizer (model.*, optim.kind)",
            ("this run", "the checkpoint"),
        )
        for name, parameter in self._names.items():
            self._set(parameter, None, tensors[f"model.{name}"])
            for moment in self._moments:
                self._set(parameter, moment, tensors[f"optim.{name}.{moment}"])
        with self._whole_frozen(writes=True):
            for name, tensor in (self._frozen | self._buffers()).items():
                tensor.copy_(tensors[f"model.{name}"])
        if self._optim.kind == "adamw":
            for counter in self._counters():
                counter.copy_(tensors["optim.step"])
        for name, average in self._averages().items():
            average.copy_(tensors[name])
        self._publish()

    @property
    def _moments(self) -> tuple[str, ...]:
        if self._optim.kind == "sgd" and self._optim.momentum == 0:
            return ()
        return MOMENTS[self._optim.kind]

    @property
    def _inner_optimizer(self) -> torch.optim.Optimizer:
        return self._ds.optimizer if self._stage == 0 else self._ds.optimizer.optimizer

    def _optimized_tensors(self) -> list[Tensor]:
        """What the inner optimizer keeps state for: parameters, or this rank's flat partitions."""
        if self._stage == 0:
            return list(self._names.values())
        if self._stage < 3:
            return list(self._ds.optimizer.single_partition_of_fp32_groups)
        return list(self._ds.optimizer.fp32_partitioned_groups_flat)

    def _make_optimizer_state(self) -> None:
        """Create the state that the first step would, so that it can be read and set before it.

        Zeros change nothing: a momentum of zero after one step is the gradient.
        """
        for tensor in self._optimized_tensors():
            state = self._inner_optimizer.state[tensor]
            state.update({moment: torch.zeros_like(tensor) for moment in self._moments})
            if self._optim.kind == "adamw":
                state["step"] = torch.zeros((), dtype=torch.float32)
        if self._stage in (1, 2) and self._moments:
            self._ds.optimizer._lazy_init_hp_params_optimizer_state()

    def _counters(self) -> Iterator[Tensor]:
        """AdamW's step counters; all equal."""
        return (self._inner_optimizer.state[t]["step"] for t in self._optimized_tensors())

    def _buffers(self) -> dict[str, Tensor]:
        buffers = dict(self.model.named_buffers())
        return {name: buffers[name] for name in self._buffer_names}

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of `state`, without communication."""
        shapes: dict[str, tuple[int, ...]] = {}
        for name, parameter in self._names.items():
            shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
            shapes[f"model.{name}"] = shape
            shapes |= {f"optim.{name}.{moment}": shape for moment in self._moments}
        for name, tensor in (self._frozen | self._buffers()).items():
            shapes[f"model.{name}"] = tuple(getattr(tensor, "ds_shape", tensor.shape))
        if self._optim.kind == "adamw":
            shapes["optim.step"] = ()
        return shapes | {name: tuple(t.shape) for name, t in self._averages().items()}

    def _averages(self) -> dict[str, Tensor]:
        tensors = {} if self._average is None else self._average.tensors
        return {EMA_PREFIX + name: tensor for name, tensor in tensors.items()}

    def _get(self, parameter: Tensor, moment: str | None) -> Tensor:
        """The whole float32 parameter, or a moment of it; a collective at ZeRO 1 to 3."""
        if self._stage == 0:
            return self._inner_optimizer.state[parameter][moment] if moment else parameter
        if moment is None:
            return self._deepspeed.utils.safe_get_full_fp32_param(parameter)
        return self._deepspeed.utils.safe_get_full_optimizer_state(parameter, moment)

    def _set(self, parameter: Tensor, moment: str | None, value: Tensor) -> None:
        value = value.to(self._topology.device, torch.float32)
        utils = self._deepspeed.utils
        if self._stage == 0:
            self._get(parameter, moment).copy_(value)
        elif self._stage == 3:
            self._set_partition(parameter, moment, value)
        elif moment is None:
            utils.safe_set_full_fp32_param(parameter, value)
        else:
            utils.safe_set_full_optimizer_state(parameter, value, moment)

    def _set_partition(self, parameter: Any, moment: str | None, value: Tensor) -> None:
        """At ZeRO 3: this rank's cut. The twin for whole tensors fails where W does not divide."""
        utils, numel = self._deepspeed.utils, parameter.ds_tensor.numel()
        padded = value.new_zeros(numel * self._topology.world_size)
        padded[: value.numel()] = value.flatten()
        mine = padded[numel * self._topology.rank :][:numel]
        if moment is None:
            utils.safe_set_local_fp32_param(parameter, mine)
        else:
            utils.safe_set_local_optimizer_state(parameter, mine, moment)

    def _publish(self) -> None:
        """Bring the weights that the forward pass reads up to the optimizer's float32 weights."""
        optimizer = self._ds.optimizer
        if self._stage in (1, 2):
            optimizer.update_lp_params()
        elif self._stage == 3:
            for index in range(len(optimizer.fp16_groups)):
                optimizer._reassign_or_swap_out_partitioned_parameters(index)
            if optimizer.persistent_parameters:
                optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)

    @contextmanager
    def _whole_frozen(self, writes: bool = False) -> Iterator[None]:
        """Within, parameters that are not trained are whole, also at ZeRO 3."""
        if self._stage < 3 or not self._frozen:
            yield
            return
        gather = self._deepspeed.zero.GatheredParameters
        with gather(list(self._frozen.values()), modifier_rank=0 if writes else None):
            yield


def _on_host(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)


def import_deepspeed(device: torch.device) -> Any:
    """DeepSpeed, set up for `device`, without its comm extension and without its chatter.

    It chooses its accelerator when it is imported, hence not at the top of this file. The
    extension would need a C++ compiler on every machine and gains nothing over gloo here.
    """
    if "deepspeed" not in sys.modules:
        os.environ["DS_ACCELERATOR"] = device.type
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.utils.logger.setLevel("ERROR")
    # Its calls of torch functions that were renamed would warn on every rank.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    return deepspeed
