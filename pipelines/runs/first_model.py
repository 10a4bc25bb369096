"""The backbone that a run begins with, and whether it can be trained at all."""

from __future__ import annotations

import torch

from mhe_dist.backbone.model import (
    Backbone,
    build_backbone,
    compile_in_place,
    without_pretrained,
)
from mhe_dist.backbone.pretrained import load_pretrained
from mhe_dist.config.schema import Config
from mhe_dist.distributed.topology import Topology
from mhe_dist.engine.first_pass import TRIAL_IMAGES, refuse_untrainable
from mhe_dist.seeds import seed_torch
from pipelines.data.sequential import first_good_images
from pipelines.shards.index import ShardIndex


def initial_model(config: Config, topology: Topology | None = None) -> Backbone:
    """The backbone that a run begins with: drawn from its seed, or with the weights it asks for.

    Args:
        config: of the run.
        topology: see `load_pretrained`.
    """
    seed_torch(config.run.seed, "backbone")
    model = build_backbone(config.model, config.data.image_size)
    if config.model.init_from:
        load_pretrained(model, config.model.init_from, topology)
    return model


def without_first_weights(config: Config) -> Config:
    """The same run with weights drawn from its seed, for whoever replaces or only moves them.

    The weights that a run began with need not be there any more when it goes on.
    """
    model = without_pretrained(config.model).model_copy(update={"init_from": ""})
    return config.model_copy(update={"model": model})


def make_tried_model(config: Config, topology: Topology, index: ShardIndex) -> Backbone:
    """That backbone on the device of its rank, compiled if the config says so.

    Raises:
        UserError: it cannot be made, or cannot train on the first images of the data.
    """
    model, size = initial_model(config, topology), config.data.image_size
    images = first_good_images(index, TRIAL_IMAGES, size, limit=8 * TRIAL_IMAGES)
    if len(images) < TRIAL_IMAGES:  # the loader says what is wrong with them
        images = torch.arange(TRIAL_IMAGES * 3 * size**2).view(-1, 3, size, size).byte()
    refuse_untrainable(model.to(topology.device), config, images)
    if config.model.compile:
        compile_in_place(model, topology.device)
    return model
