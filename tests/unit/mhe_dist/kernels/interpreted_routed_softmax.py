"""The routed softmax by kernels, against itself in float64: margins, corrections, odd shapes.

Two micro-batches of a step; the last head has slots without a class, and some samples share their
own head, so that chunks are padded.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mhe_dist.config.head import HeadConfig
from mhe_dist.distributed.topology import Topology
from mhe_dist.heads.registry import build_head
from mhe_dist.heads.row_head import HeadSpec
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


def run(config: HeadConfig, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Losses, accuracies, embeddings' gradients and rows after some steps."""
    head = build_head(HeadSpec(config, CLASSES, WIDTH, 0, MICRO_BATCHES, dtype), Topology())
    random = torch.Generator().manual_seed(3)
    found: dict[str, list[torch.Tensor]] = {"loss": [], "accuracy": [], "gradient": []}
    for step in range(STEPS):
        labels = torch.randint(0, CLASSES, (MICRO_BATCHES, BATCH), generator=random)
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
    config = HeadConfig.model_validate(blocks)
    plain = run(config, torch.float64)
    monkeypatch.setattr(extra_softmax, "_TILE", tile)
    for module in ("routed.mhs", "margins"):
        monkeypatch.setattr(f"mhe_dist.heads.{module}.use_kernels", lambda *_: True)
    found = run(config, torch.float32)
    errors = {key: relative(found[key], tensor) for key, tensor in plain.items()}
    assert not {key: error for key, error in errors.items() if not error <= 1e-5}
