"""What the processes of tests have imported before they are forked."""

import gc

import torch

from mhe_dist.engine.deepspeed_import import import_deepspeed
from pipelines.pretrain.main import run_pretraining
from pipelines.report.plots import draw_plots

torch.set_num_threads(1)
import_deepspeed(torch.device("cpu"))
gc.collect()
gc.freeze()  # or each rank walks through all of it whenever it collects garbage

__all__ = ["draw_plots", "run_pretraining"]
