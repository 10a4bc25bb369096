"""What the processes of tests have imported before they are forked."""

import gc
from pathlib import Path

import torch

from mhe_dist.engine.deepspeed_import import import_deepspeed
from pipelines.pretrain.main import run_pretraining
from pipelines.report import plots


def draw_nothing(folder: str, *_: object) -> list[Path]:
    """Leave out a fifth of a short run: runs that are commands, or in pytest's process, draw."""
    (Path(folder) / "plots").mkdir(exist_ok=True)
    return []


plots.draw_plots = draw_nothing
torch.set_num_threads(1)
import_deepspeed(torch.device("cpu"))
gc.collect()
gc.freeze()  # or each rank walks through all of it whenever it collects garbage

__all__ = ["run_pretraining"]
