"""How long a run is, and its learning rate at each step. Pure."""

from __future__ import annotations

import math

from mhe_dist.config.schema import Config, OptimConfig


def total_steps(config: Config, samples: int) -> int:
    """Optimizer steps of a run over a data set of `samples` images, at least 1.

    `train.epochs` passes of `train.global_batch` images, rounded up; `train.max_steps`, where it is
    set, is the most.
    """
    steps = max(1, math.ceil(config.train.epochs * samples / config.train.global_batch))
    return min(steps, config.train.max_steps or steps)


def epochs_ended(config: Config, samples: int, steps: int) -> int:
    """Epochs of `samples` images that the first `steps` steps have completed."""
    return steps * config.train.global_batch // samples


def learning_rate(step: int, total_steps: int, optim: OptimConfig) -> float:
    """Learning rate of a step, counted from 0.

    The first `warmup_steps` grow linearly and the one after them has all of `optim.lr`; from there
    the schedule falls to `final_lr`, which the last step of the run has. A run that is not longer
    than its warm-up only grows.
    """
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / (optim.warmup_steps + 1)
    falling = total_steps - 1 - optim.warmup_steps
    progress = min(1.0, (step - optim.warmup_steps) / falling) if falling > 0 else 0.0
    return optim.final_lr + (optim.lr - optim.final_lr) * _remaining(progress, optim)


def _remaining(progress: float, optim: OptimConfig) -> float:
    """The part of the fall that is still ahead, from 1 at progress 0 to 0 at progress 1."""
    if optim.schedule == "constant":
        return 1.0
    if optim.schedule == "cosine":
        return (1 + math.cos(math.pi * progress)) / 2
    return (1 - progress) ** optim.power
