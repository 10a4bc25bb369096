"""The routed softmax by kernels, against itself in float64: margins, corrections, odd shapes.

Two micro-batches of a step; the last head has slots without a class, and some samples share their
own head, so that chunks are padded. Samples have one label, or up to three.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from mhe_dist.config.head import HeadConfig
from mhe_dist.distributed.topology import Topology
from mhe_dist.heads.registry import build_head
from mhe_dist.heads.routed import extra_gradient, extra_logits
from mhe_dist.heads.row_head import HeadSpec
from mhe_dist.kernels import dispatch as kernel_dispatch
from mhe_dist.kernels import extra_softmax
from pipelines.bench.gpu.agreement import MARGINS, relative

CLASSES, WIDTH, BATCH, MICRO_BATCHES, STEPS = 38, 8, 9, 2, 2
SHAPES: dict[str, dict[str, Any]] = {
    "own and extra heads": {"length": 5, "extra_heads": 3},
    "correction": {"length": 5, "extra_heads": 2, "correction": True},
    "filter and correction": {"length": 5, "extra_heads": 2, "correction": True},
    "own heads alone": {"length": 5, "negatives": "own"},
    "heads of one class": {"length": 1, "extra_heads": 6},
}
CASES = [
    (name, SHAPES["own and extra heads"], MARGINS[name], 2048)
    for name in ("cosface", "none", "adaface", "filter")
]
# A tile of 16 makes several of a sample's logits.
CASES += [
    (name, shape, MARGINS["filter" if "filter" in name else "arcface"], 16)
    for name, shape in SHAPES.items()
]
SEVERAL: dict[str, dict[str, Any]] = {
    "softmax": {},
    "all heads of a group": {"mhs": {"length": 5, "extra_heads": 9}},
    "adaface": {"margin": MARGINS["adaface"]},
    "multi_label": {"objective": "multi_label", "margin": MARGINS["filter"]},
    "heads of one class": {"mhs": {"length": 1, "extra_heads": 6}, "margin": MARGINS["none"]},
}


def run(
    config: HeadConfig,
    dtype: torch.dtype,
    size: int = 0,
    tf32: bool = False,
    micro_batches: int = MICRO_BATCHES,
) -> dict[str, torch.Tensor]:
    """Losses, accuracies, embeddings' gradients and rows after some steps; lists of `size`."""
    spec = HeadSpec(config, CLASSES, WIDTH, 0, micro_batches, dtype, tf32=tf32)
    head = build_head(spec, Topology())
    random = torch.Generator().manual_seed(3)
    found: dict[str, list[torch.Tensor]] = {"loss": [], "accuracy": [], "gradient": []}
    for step in range(STEPS):
        shape = (micro_batches, BATCH, *[size] * bool(size))
        labels = torch.randint(-size, CLASSES, shape, generator=random).clamp(min=-1)
        labels[:, -1] = CLASSES - 1
        labels[0, :4] = labels[0, 0]
        head.plan(step, labels)
        for row in labels:
            embeddings = torch.randn(BATCH, WIDTH, generator=random).to(dtype)
            embeddings.requires_grad_()
            output = head(embeddings, row)
            output.loss.backward()
            assert embeddings.grad is not None
            found["loss"].append(output.loss.detach())
            found["accuracy"].append(output.metrics["accuracy"])
            found["gradient"].append(embeddings.grad)
        head.step(0.1)
    tensors = {name: torch.stack(values).double() for name, values in found.items()}
    return tensors | {name: rows.double() for name, rows in head.state().tensors.items()}


@pytest.mark.parametrize(
    ("shape", "margin", "tile"), [case[1:] for case in CASES], ids=[case[0] for case in CASES]
)
def test_equals_float64(
    shape: dict[str, Any], margin: dict[str, Any], tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = {"kind": "mhs", "groups": 3, "mhs": shape, "margin": margin}
    assert_kernels_agree(HeadConfig.model_validate(blocks), tile, monkeypatch)


@pytest.mark.parametrize("changes", SEVERAL.values(), ids=SEVERAL)
def test_several_labels_equal_float64(
    changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    called = []
    statistics = extra_logits.extra_statistics
    monkeypatch.setattr(
        extra_logits, "extra_statistics", lambda *a: called.append(a) or statistics(*a)
    )
    blocks = {"kind": "mhs", "groups": 3, "mhs": {"length": 5, "extra_heads": 3}} | changes
    assert_kernels_agree(HeadConfig.model_validate(blocks), 16, monkeypatch, size=3)
    assert len(called) == MICRO_BATCHES * STEPS


# Of a step: extra heads whose update multiplies factors, and own heads scored where they lie.
TF32: dict[str, tuple[dict[str, Any], int, bool, bool]] = {
    "cosface": ({}, 1, True, True),
    "adaface": ({"margin": MARGINS["adaface"]}, 1, True, True),
    "not normalised": ({"margin": MARGINS["none"]}, 1, True, False),
    "own heads alone": ({"mhs": SHAPES["own heads alone"]}, 1, False, True),
    "heads of one class": ({"mhs": SHAPES["heads of one class"]}, 1, True, True),
    "without momentum": ({"optim": {"momentum": 0.0}}, 1, True, True),
    "adamw": ({"optim": {"kind": "adamw"}}, 1, False, True),
    "two micro-batches": ({}, 2, False, True),
}


@pytest.mark.parametrize(("changes", "micro_batches", "factors", "stored"), TF32.values(), ids=TF32)
def test_equals_float64_where_products_may_be_tf32(
    changes: dict[str, Any],
    micro_batches: int,
    factors: bool,
    stored: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In the interpreter TF32 is float32."""
    launched = count_launches(monkeypatch)
    blocks = {"kind": "mhs", "groups": 3, "mhs": {"length": 5, "extra_heads": 1}} | changes
    config = HeadConfig.model_validate(blocks)
    plain = run(config, torch.float64, micro_batches=micro_batches)
    use_kernels_everywhere(monkeypatch)
    found = run(config, torch.float32, tf32=True, micro_batches=micro_batches)
    assert_close(found, plain)
    assert launched["shared"] == (STEPS if factors else 0)
    assert bool(launched["_products_kernel"]) is stored
    assert launched["_products_kernel"] == launched["_sum_kernel"]


@pytest.mark.parametrize("changes", SEVERAL.values(), ids=SEVERAL)
def test_several_labels_equal_float64_where_products_may_be_tf32(
    changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    launched = count_launches(monkeypatch)
    blocks = {"kind": "mhs", "groups": 3, "mhs": {"length": 5, "extra_heads": 3}} | changes
    config = HeadConfig.model_validate(blocks)
    plain = run(config, torch.float64, 3, micro_batches=1)
    use_kernels_everywhere(monkeypatch)
    assert_close(run(config, torch.float32, 3, tf32=True, micro_batches=1), plain)
    assert launched["shared"] == STEPS


def test_many_samples_or_wide_rows_are_multiplied_once(monkeypatch: pytest.MonkeyPatch) -> None:
    launched = count_launches(monkeypatch)
    use_kernels_everywhere(monkeypatch)
    config = HeadConfig.model_validate(
        {"kind": "mhs", "groups": 3, "mhs": {"length": 5, "extra_heads": 3}}
    )
    limits = {"FACTOR_SAMPLES": BATCH, "FACTOR_WIDTH": 1024}
    for changed, shared in (({}, STEPS), ({"FACTOR_SAMPLES": 1}, 0), ({"FACTOR_WIDTH": 1}, 0)):
        for name, limit in (limits | changed).items():
            monkeypatch.setattr(extra_gradient, name, limit)
        launched.clear()
        run(config, torch.float32, tf32=True, micro_batches=1)
        assert launched["shared"] == shared


def count_launches(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each kernel is launched from here on; updates with shared factors apart."""
    launched: Counter[str] = Counter()
    launch = kernel_dispatch.launch

    def counted(kernel: Any, *arguments: Any, **constants: Any) -> None:
        launched["shared" if constants.get("shared") else kernel.__name__] += 1
        launch(kernel, *arguments, **constants)

    monkeypatch.setattr(kernel_dispatch, "launch", counted)
    return launched


def use_kernels_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("bank.bank", "heads.routed.mhs", "heads.margins"):
        monkeypatch.setattr(f"mhe_dist.{module}.use_kernels", lambda *_: True)


def assert_kernels_agree(
    config: HeadConfig, tile: int, monkeypatch: pytest.MonkeyPatch, size: int = 0
) -> None:
    plain = run(config, torch.float64, size)
    monkeypatch.setattr(extra_softmax, "_TILE", tile)
    for module in ("routed.mhs", "margins"):
        monkeypatch.setattr(f"mhe_dist.heads.{module}.use_kernels", lambda *_: True)
    assert_close(run(config, torch.float32, size), plain)


def assert_close(found: dict[str, torch.Tensor], plain: dict[str, torch.Tensor]) -> None:
    errors = {key: relative(found[key], tensor) for key, tensor in plain.items()}
    assert not {key: error for key, error in errors.items() if not error <= 1e-5}
