"""What a run of many GPUs needs: shapes of a real head and checkpoint, and sums by hand."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest
import torch
from torch.torch_version import TorchVersion

from mhe_dist.backbone.model import build_backbone
from mhe_dist.config.schema import Config
from mhe_dist.errors import UserError
from pipelines.bench.counted.launches import CASES, count_step
from pipelines.bench.counted.run_costs import RunCost, cost_of_run
from pipelines.bench.fake_cuda.autograd import missing_driver
from tests.support import tiny

GB = 1e9
RINGS = "backbone: gradients and weights sent, by rings"
WIDTH, GROUPS, LENGTH, CLASSES = 32, 8, 4, 4000


def costs(
    folder: Path, workers: int, classes: int = CLASSES, **head: object
) -> dict[str, dict[str, RunCost]]:
    config = tiny.config(
        folder,
        "unused",
        scale={"workers": workers},
        train={"global_batch": 64 * workers, "micro_batch": 64, "precision": "float32"},
        head={"kind": "mhs", "groups": GROUPS, "mhs": {"length": LENGTH, "extra_heads": 8}, **head},
    )
    assert config.model.embedding_dim == WIDTH
    if missing := missing_driver():
        pytest.skip(missing)
    tables = cost_of_run(config, classes, 10**9, per_node=4, write_gb_s=0.5)
    return {title: {line.name: line for line in lines} for title, lines in tables.items()}


def size(line: RunCost) -> float:
    figure, unit = line.figure.split()
    return float(figure.replace(",", "")) * {"GB": GB, "MB": 1e6}[unit]


def parameters(folder: Path) -> int:
    config: Config = tiny.config(folder, "unused")
    model = build_backbone(config.model, config.data.image_size)
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("version", ["2.8.0+cu128", "2.9.1+cu128", "2.10.0+cu128"])
def test_a_torch_that_would_abort_without_a_driver_is_refused(
    version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "__version__", TorchVersion(version))
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    if version.startswith("2.10"):
        assert not missing_driver()
        return
    with pytest.raises(UserError, match=r"torch 2\.\d\.\d\+cu128 .*: install torch 2\.10 or newer"):
        count_step(CASES["route"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert not missing_driver()


def test_a_ring_sends_gradients_and_ranks_send_embeddings(tmp_path: Path) -> None:
    step = costs(tmp_path, 8)["a step of a rank"]
    # Sums of float32 gradients are of float64; weights are gathered at ZeRO 1.
    expected = 7 / 8 * parameters(tmp_path) * (8 + 4)
    assert size(step[RINGS]) == pytest.approx(expected, abs=5e3)
    sent = 64 * (WIDTH + 1) * 4 + 64 * WIDTH * 4  # embeddings with norms, gradients back
    assert size(step["head: all_to_all sends"]) == pytest.approx(sent, rel=0.3)
    assert step["head: waits of the host"].figure == "0"
    assert step["labels and requests: messages"].figure == "3 of 8 bytes"


def test_a_rank_alone_sends_nothing(tmp_path: Path) -> None:
    step = costs(tmp_path, 1)["a step of a rank"]
    assert size(step[RINGS]) == 0
    assert "head: all_to_all sends" not in step


@pytest.mark.parametrize("memory", ["device", "host", "file"])
def test_a_checkpoint_holds_rows_once_on_any_ranks(memory: str, tmp_path: Path) -> None:
    rows = CLASSES * WIDTH * 4 * 2  # with momentum
    for workers in (1, 8):
        saved = costs(tmp_path, workers, bank={"memory": memory})["a checkpoint"]
        assert size(saved[f"rows and their state, in {GROUPS} groups"]) == pytest.approx(
            rows, abs=5e3
        )


def test_rows_in_host_memory_are_a_nodes(tmp_path: Path) -> None:
    found = costs(tmp_path, 8, bank={"memory": "host"})
    assert "rows" not in found["a GPU holds"]
    there = size(found["a node holds"]["rows and their state"])
    assert there == pytest.approx(4 / 8 * CLASSES * WIDTH * 8, abs=5e3)


def test_the_sum_is_that_of_the_lines(tmp_path: Path) -> None:
    device = costs(tmp_path, 8)["a GPU holds"]
    together = size(device.pop("together"))
    assert together == pytest.approx(sum(map(size, device.values())), rel=0.02)


def test_what_is_counted_takes_no_memory_for_each_class(tmp_path: Path) -> None:
    """A byte for each head of a rank was written: 125 GB for 10^12 classes on 2 workers."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    costs(tmp_path, 1, classes=10**10)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20
