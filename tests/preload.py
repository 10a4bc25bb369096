"""What the processes of tests have imported before they are forked."""

import torch

from mhe_dist.engine.deepspeed_import import import_deepspeed
from pipelines.pretrain.main import run_pretraining

torch.set_num_threads(1)
import_deepspeed(torch.device("cpu"))

__all__ = ["run_pretraining"]
