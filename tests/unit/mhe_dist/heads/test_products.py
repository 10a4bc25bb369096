"""`head.matmul` holds for the products of a training step, and for nothing else."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import mhe_dist
from mhe_dist.config.head import HeadConfig
from mhe_dist.distributed.topology import Topology
from mhe_dist.heads.base import Head
from mhe_dist.heads.products import in_tf32, products_in
from mhe_dist.heads.registry import build_head
from mhe_dist.heads.row_head import HeadSpec

aten = torch.ops.aten
PRODUCTS = (aten.mm, aten.bmm, aten.addmm, aten.addmm_, aten.baddbmm, aten.baddbmm_)
HEADS: dict[str, dict[str, Any]] = {
    "route": {"kind": "mhs", "mhs": {"length": 4, "extra_heads": 2}},
    "gather": {"kind": "mhs", "mhs": {"length": 4, "extra_heads": 8, "exchange": "gather"}},
    "full": {"kind": "full"},
    "mhp": {"kind": "mhp"},
    "mhc": {"kind": "mhc"},
}


class ProductFlags(TorchDispatchMode):
    """Whether TF32 was allowed at each matrix product."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[bool] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in PRODUCTS:
            self.seen.append(in_tf32())
        return func(*args, **(kwargs or {}))


def head_of(name: str, tf32: bool | None) -> Head:
    config = HeadConfig.model_validate(HEADS[name] | {"groups": 1})
    return build_head(HeadSpec(config, 40, 8, 0, 1, tf32=tf32), Topology())


@pytest.mark.parametrize("name", HEADS)
def test_a_step_computes_in_tf32_and_evaluation_does_not(name: str) -> None:
    head, labels = head_of(name, tf32=True), torch.arange(6)
    head.plan(0, labels[None])
    embeddings = torch.randn(6, 8).requires_grad_()
    with ProductFlags() as flags:
        head(embeddings, labels).loss.backward()
        head.step(0.1)
    assert len(flags.seen) >= 3 and all(flags.seen)
    with ProductFlags() as flags:
        head.predict(embeddings.detach(), 3)
    assert flags.seen and not any(flags.seen)
    assert not torch.backends.cuda.matmul.allow_tf32  # as it was before


@pytest.mark.parametrize(
    ("matmul", "expected"), [("auto", True), ("float32", False), ("tf32", True)]
)
def test_a_head_in_ones_own_loop_follows_the_process_unless_it_is_told(
    matmul: str, expected: bool
) -> None:
    head = mhe_dist.create_head("full", num_classes=40, dim=8, device="cpu", matmul=matmul)
    with products_in(tf32=True), ProductFlags() as flags:
        head(torch.randn(6, 8).requires_grad_(), torch.arange(6)).loss.backward()
    assert set(flags.seen) == {expected}


@pytest.mark.skipif(
    not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="torch before 2.9"
)
@pytest.mark.parametrize("setting", ["torch.backends", "torch.backends.cuda.matmul"])
def test_a_process_that_names_its_precision_keeps_it(setting: str) -> None:
    """torch refuses to read its older switch there; a process of its own, since that stays."""
    code = f"""
import torch, mhe_dist
{setting}.fp32_precision = "tf32"
for matmul in ("auto", "float32", "tf32"):
    head = mhe_dist.create_head("full", num_classes=40, dim=8, device="cpu", matmul=matmul)
    head(torch.randn(6, 8).requires_grad_(), torch.arange(6)).loss.backward()
    head.step(0.1)
    assert torch.backends.cuda.matmul.fp32_precision == "tf32"
"""
    subprocess.run([sys.executable, "-c", code], check=True)
