"""float32 means float32 on a GPU, too; the flags are torch's, so they are seen without one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mhe_dist.config.schema import OptimConfig, TrainConfig
from mhe_dist.distributed.topology import Topology
from mhe_dist.engine import settings
from mhe_dist.engine.engine import Engine
from mhe_dist.engine.settings import (
    explain_slow_precision,
    make_optimizer,
    resolve_head_matmul,
    resolve_precision,
)
from tests.conftest import run_ranks


def flags_of_engines(topology: Topology) -> dict[str, list[bool]]:
    """Flags after an engine of each precision was made in one process."""
    found = {}
    for precision in ("bf16", "float32"):
        train = TrainConfig.model_validate(
            {"global_batch": 2, "micro_batch": 2, "precision": precision}
        )
        Engine(nn.Linear(2, 2), OptimConfig(), train, topology)
        backends = torch.backends
        found[precision] = [
            backends.cuda.matmul.allow_tf32,
            backends.cudnn.allow_tf32,
            backends.cudnn.deterministic,
            backends.cudnn.benchmark,
        ]
    return found


@pytest.fixture(scope="module")
def flags() -> dict[str, list[bool]]:
    """Whether TF32 is allowed in products and convolutions; deterministic; benchmark."""
    return run_ranks(flags_of_engines, 1)[0]


@pytest.mark.parametrize(("decay_vectors", "of_vectors"), [(False, 0.0), (True, 0.01)])
def test_vectors_decay_if_the_config_says_so(decay_vectors: bool, of_vectors: float) -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    chosen = OptimConfig(weight_decay=0.01, decay_vectors=decay_vectors)
    matrices, vectors = make_optimizer(model, chosen).param_groups
    assert [len(group["params"]) for group in (matrices, vectors)] == [1, 3]
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.01, of_vectors)


@pytest.mark.parametrize(
    ("computes", "avx512", "multiplies", "best"),
    [
        (True, True, True, "bf16"),  # AMX, Zen 4
        (True, True, False, "float32"),  # Skylake to Ice Lake: oneDNN computes it in float32
        (True, False, False, "bf16"),  # ARM with bf16
        (False, False, False, "float32"),  # AVX2
    ],
)
def test_a_cpu_that_cannot_multiply_bf16_takes_float32(
    monkeypatch: pytest.MonkeyPatch, computes: bool, avx512: bool, multiplies: bool, best: str
) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: computes)
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: multiplies)
    assert resolve_precision("auto", torch.device("cpu")) == best


@pytest.mark.parametrize(
    ("setting", "best", "device", "said"),
    [
        ("bf16", "float32", "cpu", "this CPU has no bf16 instructions, so bf16 is 2 to 40 times"),
        ("bf16", "float32", "cuda", "this GPU has no bf16 instructions"),
        ("bf16", "bf16", "cpu", ""),
        ("auto", "float32", "cpu", ""),
        ("float32", "bf16", "cuda", ""),
    ],
)
def test_a_slow_precision_is_named_with_its_cure(
    monkeypatch: pytest.MonkeyPatch, setting: str, best: str, device: str, said: str
) -> None:
    monkeypatch.setattr(settings, "resolve_precision", lambda *_: best)
    found = explain_slow_precision(setting, torch.device(device))
    assert said in found and bool(found) == bool(said)
    assert not found or found.startswith("train.precision=bf16: ")


@pytest.mark.slow
def test_a_float32_run_has_no_tf32_and_deterministic_kernels(flags) -> None:
    assert flags["float32"] == [False, False, True, False]


@pytest.mark.slow
def test_a_bf16_run_looks_for_the_fastest_kernels(flags) -> None:
    assert flags["bf16"] == [False, False, False, True]


@pytest.mark.parametrize(
    ("setting", "precision", "device", "tf32"),
    [
        ("auto", "bf16", "cuda", True),
        ("auto", "float32", "cuda", False),
        ("tf32", "float32", "cuda", True),
        ("float32", "bf16", "cuda", False),
        ("tf32", "bf16", "cpu", False),
    ],
)
def test_what_head_matmul_comes_to(setting: str, precision: str, device: str, tf32: bool) -> None:
    assert resolve_head_matmul(setting, precision, torch.device(device)) is tf32
