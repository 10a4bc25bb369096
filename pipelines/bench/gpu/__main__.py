"""`python -m pipelines.bench.gpu --out DIR`: each section in a process of its own, then a table.

What one section does to a GPU or to a process, up to a crash, so stays its own. Exit code 0: all
checks hold; 1: some do not; 2: it could not begin.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Final

from mhe_dist.distributed.device import prepare_rank, rank_device
from mhe_dist.errors import UserError
from pipelines.bench.gpu.findings import (
    GpuFindings,
    GpuSettings,
    all_hold,
    gpu_table,
    write_gpu_json,
)
from pipelines.bench.gpu.sections import SECTIONS, measure_section

TOTAL_S: Final = 470.0
LEAST_S: Final = 8.0  # with less a section is not begun


def main(arguments: list[str] | None = None) -> int:
    """Run the command; see the module."""
    options = _parser().parse_args(arguments)
    out = Path(options.out).resolve()
    if options.section:
        return _measure_here(options, out)
    names = options.only.split(",") if options.only else list(SECTIONS)
    try:
        _refuse(names, options.device)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    sections = {}
    for name in names:
        print(f"{time.monotonic() - began:4.0f} s  {name}", flush=True)
        room = min(SECTIONS[name], TOTAL_S - (time.monotonic() - began))
        # A CPU that tests the command may be busy with other things.
        seconds = room if options.device == "cuda" else TOTAL_S
        sections[name] = _measure_apart(name, options, out, seconds)
    table = gpu_table(sections)
    print("\n" + table)
    (out / "gpu.txt").write_text(table, encoding="utf-8")
    write_gpu_json(sections, out / "gpu.json")
    print(f"{out / 'gpu.json'}: {time.monotonic() - began:.0f} s in all")
    return 0 if all_hold(sections) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m pipelines.bench.gpu", description=__doc__)
    parser.add_argument("--out", default="runs/gpu", help="folder of gpu.json, gpu.txt and logs")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="sizes of a self-test")
    parser.add_argument("--only", default="", help=f"some of {','.join(SECTIONS)}")
    parser.add_argument("--section", default="", help=argparse.SUPPRESS)
    return parser


def _refuse(names: list[str], device: str) -> None:
    """Raise where the command cannot begin."""
    if unknown := [name for name in names if name not in SECTIONS]:
        raise UserError(f"--only {','.join(unknown)}: there is {','.join(SECTIONS)}")
    rank_device(device == "cuda")


def _measure_here(options: argparse.Namespace, out: Path) -> int:
    """The process of one section."""
    name = options.section
    prepare_rank(options.device == "cuda")
    settings = GpuSettings(options.device, options.small, out / f"{name}-files")
    found = GpuFindings(file=out / f"{name}.json")
    measure_section(name, settings, found)
    return 0


def _measure_apart(
    name: str, options: argparse.Namespace, out: Path, seconds: float
) -> GpuFindings:
    """What a section finds in a process that has so many seconds."""
    file, log = out / f"{name}.json", out / f"{name}.log"
    file.unlink(missing_ok=True)
    if seconds < LEAST_S:
        found = GpuFindings()
        found.check(f"the section {name}", False, "there was no time left for it")
        return found
    command = [sys.executable, "-m", __package__, "--section", name, "--out", str(out)]
    command += ["--device", options.device] + ["--small"] * options.small
    interpreted = {"TRITON_INTERPRET": "1"} if name == "kernels" and options.device == "cpu" else {}
    end = _run_for(command, interpreted, seconds, log)
    found = GpuFindings.load(file)
    if end or not found.complete:
        found.complete = False
        found.check(f"the section {name}", False, f"{end or 'it failed'}; see {log}")
    return found


def _run_for(command: list[str], environment: dict[str, str], seconds: float, log: Path) -> str:
    """Run a command, and end it and all that it started when its time is over.

    Returns:
        How it ended, in words; empty if all went well.
    """
    with log.open("w", encoding="utf-8") as stream:
        process = subprocess.Popen(
            command,
            env={**os.environ, **environment},
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return f"it was ended after {seconds:.0f} s"
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    return f"its process ended with code {code}" if code else ""


if __name__ == "__main__":
    sys.exit(main())
