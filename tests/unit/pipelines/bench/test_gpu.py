"""`python -m pipelines.bench.gpu` tests itself on a CPU: its report, and all sections in small."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mhe_dist.distributed.topology import CPU, Topology
from mhe_dist.engine.engine import leave_process_group
from mhe_dist.heads.routed import several_labels
from pipelines.bench.gpu import __main__ as command
from pipelines.bench.gpu import exchange
from pipelines.bench.gpu.agreement import TOLERANCES, differences, head_config, labels_of
from pipelines.bench.gpu.findings import (
    GpuFindings,
    GpuSettings,
    all_hold,
    gpu_table,
    write_gpu_json,
)
from pipelines.bench.gpu.sections import SECTIONS
from pipelines.bench.gpu.waits import ATTEMPTS, waits_for_busy_device
from tests.support.waiting import wait_for

# Each of the others starts processes of its own; the command itself is a long test.
ONE_PROCESS = [name for name in SECTIONS if name not in ("exchange", "runs")]
MEASURE = """
import sys
from pathlib import Path
from pipelines.bench.gpu.findings import GpuFindings, GpuSettings
from pipelines.bench.gpu.sections import measure_section

for name in sys.argv[2:]:
    found = GpuFindings(file=Path(sys.argv[1]) / f"{name}.json")
    measure_section(name, GpuSettings("cpu", True, Path(sys.argv[1]) / name), found)
loaded = {name.partition(".")[0] for name, module in sys.modules.items() if module is not None}
strangers = sorted(loaded & {"ray", "mlflow"})
print("strangers:", strangers)
"""


def some_findings() -> dict[str, GpuFindings]:
    good = GpuFindings(seconds=1.2, complete=True)
    good.figure("copies", 1234.5, "GB/s")
    good.figure("card", "some card")
    good.check("it computes", True)
    good.leave_out("compiled", "no compiler")
    bad = GpuFindings(complete=True)
    bad.check("equal", False, "differs by 1")
    return {"card": good, "heads": bad}


def test_the_table_names_figures_and_what_did_not_hold() -> None:
    table = gpu_table(some_findings())
    assert "copies" in table and "1,234" in table and "GB/s" in table and "some card" in table
    assert "FAILED: equal: differs by 1" in table
    assert "not tried: compiled: no compiler" in table
    assert "1 hold, 0 failed, 1 not tried, 1 s" in table


def test_a_failed_check_and_a_section_cut_short_count() -> None:
    found = some_findings()
    assert all_hold({"card": found["card"]})
    assert not all_hold(found)
    found["card"].complete = False
    assert not all_hold({"card": found["card"]})


def test_the_json_holds_everything(tmp_path: Path) -> None:
    write_gpu_json(some_findings(), tmp_path / "gpu.json")
    heads = json.loads((tmp_path / "gpu.json").read_text())["sections"]["heads"]
    assert heads["checks"] == [{"name": "equal", "passed": False, "detail": "differs by 1"}]


def test_an_error_is_a_failed_check_and_what_was_found_before_it_stays(tmp_path: Path) -> None:
    found = GpuFindings(file=tmp_path / "card.json")
    found.figure("before", 1.0)
    with found.attempt("division"):
        _ = 1 / 0
    read = GpuFindings.load(tmp_path / "card.json")
    assert read.figures == found.figures
    assert "ZeroDivisionError" in read.failed[0].detail and "test_gpu.py" in read.failed[0].detail


def test_a_section_that_takes_too_long_ends_with_all_that_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pid, wait = tmp_path / "pid", subprocess.Popen.wait

    def out_of_time(process: subprocess.Popen[str], timeout: float | None = None) -> int:
        if timeout is None:
            return wait(process)
        wait_for(lambda: pid.exists() and pid.read_text().strip())
        return wait(process, 0.0)

    monkeypatch.setattr(subprocess.Popen, "wait", out_of_time)
    script = f"sleep 10000 & echo $! > {pid}; wait"
    end = command._run_for(["sh", "-c", script], {}, 7.0, tmp_path / "log")
    assert end == "it was ended after 7 s"
    child = Path("/proc", pid.read_text().strip(), "stat")
    wait_for(lambda: not child.exists() or child.read_text().split()[2] == "Z")


def test_what_cannot_begin_says_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.main(["--out", str(tmp_path), "--only", "cards"]) == 2
    assert "--only cards: there is card," in capsys.readouterr().err
    assert command.main(["--out", str(tmp_path)]) == 2
    assert "torch sees no GPU" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("waiting", [0, 1, ATTEMPTS])
def test_a_step_that_waits_for_a_busy_device_each_time_is_seen(
    waiting: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    busy, steps = [False], iter([True] * waiting + [False] * ATTEMPTS)

    class Event:
        def record(self) -> None: ...
        def query(self) -> bool:
            return not busy[0]

    def become(state: bool) -> None:
        busy[0] = state

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: become(False))
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: become(True))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    waits = waits_for_busy_device(lambda: torch.cuda.synchronize() if next(steps) else None)
    assert waits is (waiting == ATTEMPTS)


def test_all_gpus_exchange_and_the_rank_that_finds_something_wrong_is_named() -> None:
    assert [exchange.group_sizes(gpus) for gpus in (1, 2, 8, 9)] == [[1, 2], [2], [2, 8], [2, 8]]
    found = GpuFindings()
    ranks = [{"reduce_scatter": 0.0, "in bf16": 0.01}, {"reduce_scatter": 0.01, "in bf16": 0.01}]
    exchange.check_ranks(found, "NCCL at 2 ranks", ranks)
    (wrong,) = found.failed
    assert wrong.name.endswith("reduce_scatter") and wrong.detail.endswith("rank 1: 1.0e-02")


def test_labels_that_a_device_adds_up_wrongly_are_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = head_config("route several labels", "cosface", "device", "float32", "sgd")
    arguments = (config, GpuSettings("cpu", True, tmp_path), labels_of("route several labels"))
    assert max(differences(*arguments, tf32=False).values()) <= TOLERANCES["float32"]
    counts = several_labels.grid_counts
    wrong = {torch.float32: 1.01, torch.float64: 1.0}  # what stands for the device is in float32
    monkeypatch.setattr(several_labels, "grid_counts", lambda v: counts(v * wrong[v.dtype]))
    assert differences(*arguments, tf32=False)["gradient"] > TOLERANCES["float32"]


@pytest.mark.slow
def test_gradients_that_are_reduced_wrongly_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def error() -> float:
        try:
            return exchange._engine_error(Topology(device=CPU), 1, "float32")
        finally:
            leave_process_group()

    assert error() <= exchange.CLOSE["float32"]
    monkeypatch.setattr(
        "mhe_dist.engine.gradient_sums.reduce_scatter",
        lambda values, share, topology: share.copy_(values).mul_(1.2),
    )
    assert error() > exchange.CLOSE["bf16"]


@pytest.mark.slow
def test_sections_in_small_without_ray_and_mlflow(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path), *ONE_PROCESS],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "strangers: []"
    sections = {name: GpuFindings.load(tmp_path / f"{name}.json") for name in ONE_PROCESS}
    assert all_hold(sections), gpu_table(sections)
    assert not [name for name, found in sections.items() if not found.checks and name != "card"]


@pytest.mark.long
def test_the_command_itself(tmp_path: Path) -> None:
    arguments = ["--device", "cpu", "--small", "--out", str(tmp_path)]
    assert command.main(arguments) == 0, (tmp_path / "gpu.txt").read_text()
    assert list(json.loads((tmp_path / "gpu.json").read_text())["sections"]) == list(SECTIONS)
