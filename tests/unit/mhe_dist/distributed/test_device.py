"""Device, backend and environment follow the config, whatever the machine has."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from launcher.ray_cluster.environment import worker_environment
from mhe_dist.config.schema import Config
from mhe_dist.distributed import device
from mhe_dist.distributed.device import choose_device, default_device, prepare_rank, rank_device
from mhe_dist.distributed.spawn import run_ranks
from mhe_dist.distributed.topology import Topology, connect
from mhe_dist.errors import RunError, UserError
from tests.support import tiny


@pytest.fixture
def one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with one GPU, as torch tells it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)


def test_a_run_without_a_gpu_computes_on_the_cpu_of_a_machine_that_has_one(one_gpu) -> None:
    assert rank_device(gpu=False) == torch.device("cpu")
    assert choose_device(gpu=False).backend == "gloo"


def test_a_run_with_a_gpu_takes_that_of_its_number(one_gpu, monkeypatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert rank_device(gpu=True) == torch.device("cuda", 0)
    assert choose_device(gpu=True).backend == "nccl"


def test_more_ranks_than_gpus_are_refused(one_gpu, monkeypatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(UserError, match="rank 1 of this node has no GPU: torch sees 1"):
        rank_device(gpu=True)


def test_cuda_without_a_number_is_the_current_gpu_of_the_process(monkeypatch) -> None:
    """As in `create_head(..., device="cuda")` beside a model that is there."""
    chosen = []

    def set_device(gpu: torch.device) -> None:
        chosen.append(gpu)
        raise InterruptedError("the group is not made")

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 5)
    monkeypatch.setattr(torch.cuda, "set_device", set_device)
    with pytest.raises(InterruptedError):
        connect(device=torch.device("cuda"))
    assert chosen == [torch.device("cuda", 5)]


def test_a_gpu_that_is_not_there_is_refused(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(
        UserError, match=r"scale.gpu=true or --gpu, but torch sees no GPU.*scale.gpu=false"
    ):
        rank_device(gpu=True)


def test_a_rank_without_a_gpu_sees_none(monkeypatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    prepare_rank(gpu=True)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0,1"
    prepare_rank(gpu=False)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""


def _see_tunables(topology: Topology) -> str:
    return os.environ["GLIBC_TUNABLES"]


def test_a_rank_on_a_cpu_begins_with_huge_pages(monkeypatch) -> None:
    """It must be told before it begins, and this process is not changed by that."""
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    assert "GLIBC_TUNABLES" not in choose_device(gpu=True).environment
    assert run_ranks(_see_tunables, 1) == ["glibc.malloc.hugetlb=1"]
    assert "GLIBC_TUNABLES" not in os.environ


def _raise(topology: Topology, kind: type[Exception]) -> None:
    raise kind("a sentence\nof two lines")


def test_what_a_rank_raises_comes_without_its_traceback() -> None:
    with pytest.raises(UserError) as mistake:
        run_ranks(_raise, 1, UserError)
    assert str(mistake.value) == "a sentence\nof two lines"
    with pytest.raises(RunError) as failure:
        run_ranks(_raise, 1, ZeroDivisionError)
    assert str(failure.value) == "rank 0 failed: ZeroDivisionError: a sentence\nof two lines"
    assert "in _raise" in str(failure.value.__cause__)


@pytest.mark.parametrize("gpu", [False, True])
def test_workers_of_ray_get_that_environment(gpu: bool) -> None:
    config = Config.model_validate({"data": {"shards": "x"}, "scale": {"gpu": gpu}})
    variables = worker_environment(config)
    assert variables.items() >= choose_device(gpu).environment.items()
    assert ("CUDA_VISIBLE_DEVICES" in variables) is not gpu


@pytest.mark.parametrize(
    ("backends", "expected"), [("cpu:gloo,cuda:gloo", "cpu"), ("cpu:gloo,cuda:nccl", "cuda:0")]
)
def test_a_loop_without_a_config_follows_its_process_group(
    one_gpu, monkeypatch, backends: str, expected: str
) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)
    assert default_device() == torch.device("cuda", 0)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(device, "_backends", lambda: backends)
    assert default_device() == torch.device(expected)


@pytest.mark.slow
def test_torchrun_says_that_there_is_no_gpu(tmp_path: Path) -> None:
    shards = tiny.write_shards(tmp_path / "train")
    words = ["configs/quickstart.yaml", "data.glyphs=null", f"data.shards={shards}"]
    words += ["scale.gpu=true", "scale.workers=1", "evaluate.shards=", "evaluate.typefaces={}"]
    done = subprocess.run(
        [sys.executable, "-m", "pipelines.pretrain", *words, f"run.dir={tmp_path}"],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "RANK": "0", "LOCAL_RANK": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "error: scale.gpu=true or --gpu, but torch sees no GPU here" in done.stderr
