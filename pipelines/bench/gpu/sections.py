"""The sections of `make gpu`, in their order, and how one is measured in this process."""

from __future__ import annotations

import importlib
import shutil
import sys
import time
from typing import Final

from pipelines.bench.gpu.findings import GpuFindings, GpuSettings

ROOM: Final = __package__
# Seconds that a section may take on a GPU; together they are more than the command has.
SECTIONS: Final = {
    "card": 40.0,
    "kernels": 60.0,
    "agreement": 110.0,
    "waits": 90.0,
    "exchange": 100.0,
    "runs": 220.0,
    "memory": 60.0,
    "steps": 70.0,
    "backbone": 150.0,
}
STRANGERS: Final = ("ray", "mlflow")  # libraries that the machine need not have


def measure_section(name: str, settings: GpuSettings, found: GpuFindings) -> None:
    """Measure one of `SECTIONS`; an error that ends it is a failed check.

    Ray and MLflow cannot be imported any more by this process: where they are installed, too, a
    section works without them. (Other libraries look whether they are there.)
    """
    sys.modules.update(dict.fromkeys(STRANGERS))  # type: ignore[arg-type]
    begin = time.perf_counter()
    settings.folder.mkdir(parents=True, exist_ok=True)
    with found.attempt(f"the section {name}"):
        importlib.import_module(f"{ROOM}.{name}").measure(settings, found)
        found.complete = True
    shutil.rmtree(settings.folder, ignore_errors=True)
    found.seconds = time.perf_counter() - begin
    found.save()
