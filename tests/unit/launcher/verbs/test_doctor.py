"""`mhe doctor`: what it says of the processor, and of GPUs that torch does not see."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from launcher.preflight import machine
from launcher.verbs import doctor
from mhe_dist.engine.settings import resolve_precision
from mhe_dist.tracking.environment import device_name, processor_name

CARDS = ["NVIDIA H200, 143771 MiB", "NVIDIA H200, 143771 MiB"]


def test_the_processor_is_named_with_the_precision_that_runs_on_it_take() -> None:
    cpu = torch.device("cpu")
    expected = f"{device_name(cpu)}: train.precision=auto is {resolve_precision('auto', cpu)}"
    assert ("processor", expected, "") in list(doctor.findings())


def test_a_torch_that_cannot_be_imported_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setattr(doctor, "ask_driver", lambda: (CARDS, ""))
    rows = {name: (found, advice) for name, found, advice in doctor.findings()}
    found, advice = rows["processor"]
    assert found.startswith(f"{processor_name()}; torch cannot be imported: ")
    assert advice == doctor.INSTALL
    assert rows["GPUs"] == ("; ".join(CARDS), "")


@pytest.mark.parametrize(
    ("available", "count", "seen"), [(False, 0, 0), (False, 2, 0), (True, 1, 1)]
)
def test_gpus_that_torch_does_not_see_need_a_look(
    monkeypatch: pytest.MonkeyPatch, available: bool, count: int, seen: int
) -> None:
    """A CPU build of torch beside a driver: a run with scale.gpu=true found it, a minute later."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    _, found, advice = doctor._gpus(CARDS)
    assert f"sees {seen} of 2" in found
    assert advice == doctor.NO_CUDA


def test_gpus_that_torch_sees_are_fine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    expected = "; ".join(CARDS) + ": train.precision=auto is bf16"
    assert doctor._gpus(CARDS) == ("GPUs", expected, "")


def test_gpus_that_were_left_to_others_need_no_look(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    _, found, advice = doctor._gpus(CARDS)
    assert found.endswith("; of these 1 (CUDA_VISIBLE_DEVICES=1): train.precision=auto is bf16")
    assert not advice


def test_without_a_driver_there_is_nothing_to_see() -> None:
    assert doctor._gpus([]) == ("GPUs", "none: runs use the CPU (scale.gpu=false)", "")


@pytest.mark.parametrize(
    ("program", "found"),
    [
        ("#!/bin/sh\nexec sleep 600\n", "the driver does not answer within 0 s"),
        ("no program", "nvidia-smi cannot be started: "),
    ],
)
def test_a_driver_that_does_not_answer_is_a_finding(
    program: str, found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "nvidia-smi"
    file.write_text(program)
    file.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(machine, "ANSWER_S", 0.1)
    assert machine.list_gpus() == []
    name, said, advice = doctor._gpus(*machine.ask_driver())
    assert (name, advice) == ("GPUs", doctor.NO_ANSWER)
    assert said.startswith(found)
