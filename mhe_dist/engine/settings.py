"""What the engine is made of: precision, optimizer and DeepSpeed's settings, from the config."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from mhe_dist.config.schema import OptimConfig
from mhe_dist.distributed.collectives import all_reduce
from mhe_dist.distributed.topology import Topology
from mhe_dist.engine.exact_reduce import EXACT_DTYPE, sum_dtype

_LARGEST_BUCKET = 50_000_000  # elements of one gradient reduction; DeepSpeed allocates that many


def resolve_precision(setting: str, device: torch.device) -> str:
    """What `train.precision` comes to: "bf16" or "float32".

    A CPU without bfloat16 instructions computes 2 to 40 times slower in bfloat16 than in float32,
    so `auto` does not ask it to.
    """
    if setting != "auto":
        return setting
    if device.type == "cuda":
        supported = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        supported = _cpu_multiplies_bf16()
    return "bf16" if supported else "float32"


def agree_precision(setting: str, topology: Topology) -> str:
    """What `train.precision` comes to for all ranks; all must call.

    `auto` is float32 where one of them has no bf16 instructions: a rank sends its gradients in a
    type that follows from the precision.
    """
    lacking = resolve_precision(setting, topology.device) == "float32"
    found = all_reduce(torch.tensor(int(lacking)), topology, "max")
    return "float32" if found.item() else "bf16"


def _cpu_multiplies_bf16() -> bool:
    """Whether this CPU has instructions for products of bfloat16.

    oneDNN says yes on every CPU with AVX-512, where it computes in float32 what is missing. All
    with AMX have AVX-512 BF16, too.
    """
    emulated = torch.cpu._is_avx512_supported() and not torch.cpu._is_avx512_bf16_supported()
    return torch.ops.mkldnn._is_mkldnn_bf16_supported() and not emulated


def explain_slow_precision(setting: str, device: torch.device) -> str:
    """Why `train.precision` is slow on a device, and the cure, in a line; empty: it is not."""
    if setting != "bf16" or resolve_precision("auto", device) == "bf16":
        return ""
    lacking = (
        "this GPU has no bf16 instructions, so bf16 is slower than float32"
        if device.type == "cuda"
        else "this CPU has no bf16 instructions, so bf16 is 2 to 40 times slower than float32"
    )
    return f"train.precision=bf16: {lacking}; give train.precision=auto or train.precision=float32"


def resolve_head_matmul(setting: str, precision: str, device: torch.device) -> bool:
    """Whether the head's products are computed in TF32: what `head.matmul` comes to.

    Args:
        setting: of the config.
        precision: "bf16" or "float32", of the run.
        device: where the head computes; CPUs know no TF32.
    """
    chosen = setting == "tf32" or (setting == "auto" and precision == "bf16")
    return chosen and device.type == "cuda"


def set_float_kernels(precision: str) -> None:
    """Choose the GPU kernels of this process for a precision, "bf16" or "float32".

    float32 is float32: torch would compute its convolutions in TF32, with 10 bits. In a float32 run
    cuDNN's kernels are deterministic, too, for equal bits; in a bf16 run, which promises none, they
    are the fastest that it finds. On a CPU this changes nothing.
    """
    exact = precision == "float32"
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic = exact
    torch.backends.cudnn.benchmark = not exact


def make_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """SGD or AdamW over the trained parameters; `decay_vectors`: biases and norms decay too."""
    of_vectors = config.weight_decay if config.decay_vectors else 0.0
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": of_vectors},
    ]
    groups = [g for g in groups if g["params"]]
    if config.kind == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum)
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas)


def deepspeed_settings(
    micro_batch: int, accumulation_steps: int, zero_stage: int, precision: str, numel: int
) -> dict[str, Any]:
    """DeepSpeed's configuration.

    Gradients are reduced (at precision float32 even in float64: exact_reduce.py) and weights
    gathered in float32 (no "safe modules"), so that evaluation sees the true weights. Norm and
    clipping are the engine's: DeepSpeed's own wait for the device, and at stage 3 its norm, which
    cannot be switched off, watches for overflow only.

    Args:
        micro_batch: B.
        accumulation_steps: micro-batches of a step on one rank.
        zero_stage: 0 to 3.
        precision: "bf16" or "float32".
        numel: elements of all parameters.
    """
    exact = sum_dtype(precision) == EXACT_DTYPE
    zero: dict[str, Any] = {"stage": zero_stage, "reduce_bucket_size": min(numel, _LARGEST_BUCKET)}
    if zero_stage in (1, 2):
        zero["compute_grad_norm"] = False
    return {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation_steps,
        "gradient_clipping": 0.0,
        "gradient_allreduce_op": "sum" if exact and zero_stage < 3 else "mean",
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "torch_autocast": {
            "enabled": precision == "bf16",
            "dtype": "bfloat16",
            "lower_precision_safe_modules": [],
        },
        "timers": {"throughput": {"enabled": False}},
        "steps_per_print": None,
    }
