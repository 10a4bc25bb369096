"""What a run records of where it ran, on other machines than this one, too."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest
import torch

from mhe_dist.tracking import environment
from mhe_dist.tracking.environment import device_name, environment_tags, processor_name


def test_the_versions_are_among_the_tags() -> None:
    assert environment_tags()["version.torch"].startswith("2.")


@pytest.mark.parametrize(
    ("amx", "bf16", "name"),
    [
        (True, True, "A processor, AMX"),
        (False, True, "A processor, AVX-512 BF16"),
        (False, False, "A processor, AVX2"),
    ],
)
def test_a_device_is_named_with_what_multiplies(
    monkeypatch: pytest.MonkeyPatch, amx: bool, bf16: bool, name: str
) -> None:
    monkeypatch.setattr(environment, "processor_name", lambda: "A processor")
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bf16)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A GPU")
    assert device_name(torch.device("cpu")) == name
    assert device_name(torch.device("cuda", 0)) == "A GPU"


@pytest.mark.parametrize(
    ("info", "name"),
    [
        ("processor\t: 0\nmodel\t\t: 17\nmodel name\t: AMD EPYC 9R14\n\n", "AMD EPYC 9R14"),
        ("processor\t: 0\nBogoMIPS\t: 50.00\n", "aarch64"),
        ("", "aarch64"),
    ],
)
def test_a_processor_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, info: str, name: str
) -> None:
    monkeypatch.setattr(platform, "processor", lambda: "")
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    (tmp_path / "cpuinfo").write_text(info)
    assert processor_name(tmp_path / "cpuinfo") == name
    assert processor_name(tmp_path / "none") == "aarch64"
