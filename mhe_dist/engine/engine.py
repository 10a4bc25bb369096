"""The backbone's engine: mixed precision, ZeRO, accumulation. The only file that imports deepspeed.

A step is `forward` and `backward` for each micro-batch of this rank, then `step`. The gradients are
averaged over the micro-batches of a rank and over the ranks; heads scale their losses for that
(heads/base.py). In float32 the sum does not depend on the number of ranks (exact_reduce.py).
"""

from __future__ import annotations

import sys
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mhe_dist.backbone.ema import EMA_PREFIX, AveragedWeights
from mhe_dist.backbone.normalization import SYMMETRIC, normalize_images
from mhe_dist.checkpoint.entry import Entry
from mhe_dist.config.schema import OptimConfig, TrainConfig
from mhe_dist.distributed.collectives import all_reduce
from mhe_dist.distributed.topology import Topology, connect, disconnect
from mhe_dist.distributed.transfer import to_device
from mhe_dist.engine.batchnorm import RunningStatistics
from mhe_dist.engine.deepspeed_import import import_deepspeed
from mhe_dist.engine.exact_reduce import EXACT_DTYPE, sum_dtype, sum_in_float64
from mhe_dist.engine.gradient_sums import GradientSum, SharedSum, WholeSum
from mhe_dist.engine.settings import (
    agree_precision,
    deepspeed_settings,
    make_optimizer,
    set_float_kernels,
)
from mhe_dist.engine.zero_state import ZeroState
from mhe_dist.seeds import seed_torch


class Engine:
    """Trains a model from images to embeddings.

    Attributes:
        model: the bare module. At ZeRO 3 its parameters are empty between the steps.
        precision: "bf16" or "float32", what `train.precision` came to on this hardware.
    """

    def __init__(
        self,
        model: nn.Module,
        optim: OptimConfig,
        train: TrainConfig,
        topology: Topology,
        zero_stage: int = 1,
        seed: int = 0,
    ) -> None:
        """Wrap `model`; all ranks must call, with the same model (rank 0's weights win).

        Args:
            model: uint8-range images, normalised to [-1, 1], `[B, 3, H, W]` -> embeddings `[B, D]`.
            optim: the optimizer, clipping and averaging.
            train: the sizes of a step and the precision.
            topology: this rank's position; its W must divide `train.micro_batches`.
            zero_stage: 0 to 3.
            seed: keys dropout and stochastic depth.
        """
        self.model = model.to(topology.device)
        self._normalization = getattr(model, "normalization", SYMMETRIC)
        self.precision = agree_precision(train.precision, topology)
        set_float_kernels(self.precision)
        self._topology, self._stage, self._seed = topology, zero_stage, seed
        self._clip_norm = optim.clip_norm
        self._accumulation_steps = train.micro_batches // topology.world_size
        self._backwards = 0
        self._norm: Tensor | None = None
        self._trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        deepspeed = import_deepspeed(topology.device)
        self._deepspeed_engine = self._initialize(deepspeed, optim, train)
        exact = sum_dtype(self.precision) == EXACT_DTYPE
        self._sum = self._make_sum(exact)
        # Micro-batches in what `_reduced_gradients` gives: DeepSpeed averages over ranks in bf16.
        self._summed = train.micro_batches if exact or self._sum else self._accumulation_steps
        self._statistics = RunningStatistics(model)
        self._average = AveragedWeights(self._trained, optim.ema) if optim.ema else None
        self._zero_state = ZeroState(
            model, deepspeed, self._deepspeed_engine, optim, zero_stage, topology
        )

    def _initialize(self, deepspeed: Any, optim: OptimConfig, train: TrainConfig) -> Any:
        if not dist.is_initialized():
            connect(device=self._topology.device)
        settings = deepspeed_settings(
            train.micro_batch,
            self._accumulation_steps,
            self._stage,
            self.precision,
            sum(p.numel() for p in self.model.parameters()),
        )
        return deepspeed.initialize(
            model=self.model,
            optimizer=make_optimizer(self.model, optim),
            config=settings,
            dist_init_required=None,
        )[0]

    def _make_sum(self, exact: bool) -> GradientSum | None:
        """At ZeRO 0 the exact sum is ours, at ZeRO 1 any; above, DeepSpeed's, told its dtype."""
        engine = self._deepspeed_engine
        if self._stage > 1:
            if exact:
                sum_in_float64(engine.optimizer, self._stage)
            return None
        if self._stage == 0 and not exact:
            return None
        engine.enable_backward_allreduce = False
        if self._stage == 0:
            return WholeSum(self._trained.values(), self._topology)
        return SharedSum(engine.optimizer, self._accumulation_steps, self.precision, self._topology)

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
        inputs = self._normalize(images)
        if not self.model.training:
            self.model.train()
        seed_torch(self._seed, "dropout", step, micro_batch)
        self._statistics.begin_micro_batch()
        embeddings: Tensor = self._deepspeed_engine(inputs)
        self._statistics.end_micro_batch()
        return embeddings.float()

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradients of a micro-batch's loss, a scalar (its scale: heads/base.py)."""
        # The division by the micro-batches comes later: here it would round.
        self._deepspeed_engine.backward(loss, scale_wrt_gas=False)
        self._backwards += 1
        if self._backwards < self._accumulation_steps:
            self._deepspeed_engine.step()  # counts the micro-batch and updates nothing

    def step(self, lr: float) -> None:
        """Clip and apply the gradients of the step's micro-batches at learning rate `lr`."""
        if self._backwards != self._accumulation_steps:
            raise RuntimeError(
                f"step after {self._backwards} of this rank's {self._accumulation_steps} "
                "micro-batches"
            )
        for group in self._zero_state.torch_optimizer.param_groups:
            group["lr"] = lr
        self._statistics.finish_step(self._topology)
        if self._sum is not None:
            self._sum.reduce()
        self._norm = self._average_and_clip()
        if self._sum is not None:
            self._sum.hand_over()
        self._deepspeed_engine.step()
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
        gradients = self._reduced_gradients()
        norm = torch.nn.utils.get_total_norm(gradients) / self._summed
        if self._stage > 0 and self._topology.world_size > 1:
            norm = all_reduce(norm.square(), self._topology).sqrt()
        norm = norm.float()
        factor = torch.full_like(norm, 1 / self._summed, dtype=gradients[0].dtype)
        if self._clip_norm > 0:
            factor *= torch.clamp(self._clip_norm / (norm + 1e-6), max=1.0)
        torch._foreach_mul_(gradients, factor)
        return norm

    def _reduced_gradients(self) -> list[Tensor]:
        """The reduced gradients that this rank holds: all at ZeRO 0, else its own share."""
        if self._sum is not None:
            return self._sum.sums
        if self._stage == 0:
            return [p.grad for p in self._trained.values() if p.grad is not None]
        groups = self._deepspeed_engine.optimizer.averaged_gradients.values()
        return [gradient for group in groups for gradient in group]

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
        weights = nullcontext() if self._average is None else self._average.applied()
        with weights, torch.autocast(self._topology.device.type, enabled=False):
            embeddings: Tensor = self.model(self._normalize(images))
        return embeddings.float()

    def _normalize(self, images: Tensor) -> Tensor:
        pixels = to_device(images, self._topology.device)
        return normalize_images(pixels, self._normalization)

    # -- state ---------------------------------------------------------------------------------

    def state(self) -> dict[str, Tensor]:
        """Copies on the host of everything that a resumed run needs; all ranks must call.

        Names do not depend on W or on the ZeRO stage: see `ZeroState`; with `optim.ema` there is
        `ema.<parameter>` too.
        """
        return self._zero_state.gather(self._averages())

    def entries(self) -> dict[str, Entry]:
        """What `state` copies, not copied yet, for `CheckpointStore.save` before the next step.

        All ranks must save them, in this order.
        """
        return self._zero_state.entries(self._averages())

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Restore what `state` gave, on any W and ZeRO stage; all ranks must call.

        Raises:
            UserError: names or shapes are not those of this model and optimizer; lists them.
        """
        self._zero_state.scatter(tensors, self._averages())

    def _averages(self) -> dict[str, Tensor]:
        tensors = {} if self._average is None else self._average.tensors
        return {EMA_PREFIX + name: tensor for name, tensor in tensors.items()}


def leave_process_group() -> None:
    """Leave the process group, and let DeepSpeed forget it: else no later engine would work."""
    deepspeed: Any = sys.modules.get("deepspeed")
    if deepspeed is not None and deepspeed.comm.is_initialized():
        deepspeed.comm.destroy_process_group()
    disconnect()
