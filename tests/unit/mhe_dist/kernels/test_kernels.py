"""Every kernel in Triton's interpreter, and compiled for real cards; no card is needed.

Triton reads TRITON_INTERPRET when it is imported, and other tests need it without. So the tests in
the `interpreted_*.py` beside this file run in a process of their own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from mhe_dist.kernels.dispatch import KernelTraffic, launch, use_kernels
from pipelines.bench.fake_cuda.device import fake_cuda

HERE = Path(__file__).parent
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")


def run(*arguments: str, **environment: str) -> str:
    """Output of a Python process, which must succeed."""
    done = subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@needs_triton
@pytest.mark.slow
def test_in_the_interpreter() -> None:
    files = map(str, sorted(HERE.glob("interpreted_*.py")))
    output = run("-m", "pytest", "-q", "-p", "no:cacheprovider", *files, TRITON_INTERPRET="1")
    assert " passed" in output and "skipped" not in output


@needs_triton
@pytest.mark.slow
def test_compiles_for_cards_of_two_generations_within_their_shared_memory() -> None:
    assert run(str(HERE / "compile_kernels.py")).strip().endswith("all compiled")


@pytest.mark.slow
def test_the_cpu_path_never_imports_triton() -> None:
    code = (
        "import sys, torch; from mhe_dist.kernels.dispatch import use_kernels;"
        "import mhe_dist.heads.registry, mhe_dist.bank.row_optim;"
        "assert not use_kernels(torch.zeros(1));"
        "print([name for name in sys.modules if name.startswith('mhe_dist.kernels.')])"
    )
    assert run("-c", code).strip() == "['mhe_dist.kernels.dispatch']"


def test_fake_tensors_and_the_switch_keep_to_eager_code(monkeypatch: pytest.MonkeyPatch) -> None:
    class Elsewhere(torch.Tensor):
        is_cuda = True

    monkeypatch.setattr("mhe_dist.kernels.dispatch._triton_installed", lambda: True)
    assert not use_kernels(torch.zeros(1).as_subclass(Elsewhere))
    assert not use_kernels(torch.zeros(1))
    assert use_kernels(), "nothing speaks against it"
    monkeypatch.setenv("MHE_KERNELS", "0")
    assert not use_kernels()


def test_a_kernel_is_launched_on_the_gpu_of_its_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton takes the process's current one, here the first."""
    current, used = [0], []

    def exchange(index: int) -> int:
        before, current[0] = current[0], index
        return before

    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return lambda *arguments: used.append(current[0])

    for name in ("_exchange_device", "_maybe_exchange_device"):
        monkeypatch.setattr(torch.cuda, name, exchange)
    with fake_cuda():
        tensor = torch.empty(1, device="cuda:1")
    launch(Kernel(), (1,), KernelTraffic(0, 0), tensor)
    assert (used, current) == ([1], [0])
