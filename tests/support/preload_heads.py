"""What the processes of tests have imported before they are forked, where they run heads alone."""

import gc

import torch

from mhe_dist.heads.registry import build_head

torch.set_num_threads(1)
gc.collect()
gc.freeze()

__all__ = ["build_head"]
