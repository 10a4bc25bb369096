"""What the processes of tests have imported before they are forked."""

import gc

import torch

from mhe_dist.engine.deepspeed_import import import_deepspeed
from pipelines.pretrain.main import run_pretraining
from pipelines.report import plots


def draw_nothing(*_: object) -> list[str]:
    """Leave out a fifth of a short run: runs that are commands, or in pytest's process, draw."""
    return []


plots.draw_plots = draw_nothing
torch.set_num_threads(1)
import_deepspeed(torch.device("cpu"))
gc.collect()
gc.freeze()  # or each rank walks through all of it whenever it collects garbage

__all__ = ["run_pretraining"]
