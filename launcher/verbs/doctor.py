"""`mhe doctor`: what this machine has that a run needs, on one screen."""

from __future__ import annotations

import os
import platform
import shutil
import socket
from collections.abc import Iterator, Sequence
from importlib import metadata
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

from launcher.preflight.machine import ask_driver
from launcher.terminal import console
from mhe_dist.limits import available_cores, available_memory
from mhe_dist.sizes import GIB
from mhe_dist.tracking.environment import LIBRARIES, device_name, processor_name

if TYPE_CHECKING:
    import torch

Row = tuple[str, str, str]
"""What was checked, what was found, and what to do about it; empty if nothing."""
INSTALL = "pip install -c constraints.txt -e ."
NO_ANSWER = "see whether nvidia-smi answers in a terminal; restart the driver or the machine"
NO_CUDA = "install a CUDA build of torch for this driver, or look at CUDA_VISIBLE_DEVICES"


def doctor() -> None:
    """Check this machine: versions, processor, memory, GPUs, shared memory, compiler, ports.

    It changes nothing. For what a run would miss it names the cure.
    """
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    rows = list(findings())
    for name, found, advice in rows:
        mark = "[yellow]![/]" if advice else "[green]ok[/]"
        table.add_row(mark, name, escape(f"{found}. {advice}" if advice else found))
    console.print_table(table)
    count = sum(bool(advice) for *_, advice in rows)
    console.say(f"\n{count} of {len(rows)} need a look." if count else "\nReady.")
    console.list_next([("try it", ["mhe", "train", "quickstart"])])


def findings() -> Iterator[Row]:
    """Everything that was checked."""
    yield "python", platform.python_version(), ""
    for package in LIBRARIES:
        yield _version(package)
    yield "cores", str(available_cores()), ""
    yield _free("memory", available_memory(), 4, "a run needs about 4 GiB")
    yield _free("disk here", shutil.disk_usage(".").free, 5, "data, checkpoints and logs need room")
    yield _shared_memory()
    yield _processor()
    yield _gpus(*ask_driver())
    compiler = shutil.which("c++") or shutil.which("g++")
    yield "C++ compiler", compiler or "none; not needed", ""
    yield _loopback()


def _version(package: str) -> Row:
    try:
        return package, metadata.version(package), ""
    except metadata.PackageNotFoundError:
        return package, "missing", INSTALL


def _processor() -> Row:
    """Its name, what it multiplies with, and the precision that runs on it take by themselves."""
    name = "processor"
    try:
        import torch
    except (ImportError, OSError) as error:
        return name, f"{processor_name()}; torch cannot be imported: {error}", INSTALL
    cpu = torch.device("cpu")
    return name, f"{device_name(cpu)}: {_precision(cpu)}", ""


def _gpus(names: Sequence[str], silence: str = "") -> Row:
    """The GPUs that the driver names, and whether torch sees as many.

    Args:
        names: what the driver says of each.
        silence: why it says nothing.
    """
    if silence:
        return "GPUs", silence, NO_ANSWER
    if not names:
        return "GPUs", "none: runs use the CPU (scale.gpu=false)", ""
    found = "; ".join(names)
    try:
        import torch
    except (ImportError, OSError):  # told with the processor
        return "GPUs", found, ""
    seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if seen != len(names):
        chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
        if not (seen and chosen):
            found = f"{found}; torch {torch.__version__} sees {seen} of {len(names)}"
            return "GPUs", found, NO_CUDA
        found = f"{found}; of these {seen} (CUDA_VISIBLE_DEVICES={chosen})"  # others have the rest
    return "GPUs", f"{found}: {_precision(torch.device('cuda'))}", ""


def _precision(device: torch.device) -> str:
    from mhe_dist.engine.settings import resolve_precision

    return f"train.precision=auto is {resolve_precision('auto', device)}"


def _free(name: str, available: int, wanted: int, why: str) -> Row:
    return name, f"{available / GIB:.1f} GiB free", why if available < wanted * GIB else ""


def _shared_memory() -> Row:
    """Loader processes hand images over through it."""
    name = "shared memory"
    if not os.path.isdir("/dev/shm"):
        return name, "no /dev/shm", "set data.loader_workers=0"
    advice = "give the container more (docker run --shm-size=2g) or set data.loader_workers=0"
    return _free(name, shutil.disk_usage("/dev/shm").free, 1, advice)


def _loopback() -> Row:
    """Ray and gloo talk over 127.0.0.1."""
    try:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
    except OSError as error:
        return "loopback", str(error), "Ray needs to listen on 127.0.0.1"
    return "loopback", "127.0.0.1 can be listened on", ""
