"""Weights that a backbone begins with: a `.pth` file, an exported folder, another run."""

from __future__ import annotations

import io
import json
import pickle
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import fsspec
import torch
from torch import Tensor

from mhe_dist.backbone.ema import backbone_weights, is_backbone_weight
from mhe_dist.backbone.iresnet import BLOCKS
from mhe_dist.backbone.model import Backbone
from mhe_dist.backbone.normalization import (
    Normalization,
    normalization_of,
    recorded_normalization,
)
from mhe_dist.backbone.shared_tensors import with_shared_names
from mhe_dist.checkpoint.reader import Checkpoint, open_step_folder
from mhe_dist.checkpoint.shape_check import refuse_mismatch, tensor_shapes
from mhe_dist.checkpoint.step_folder import step_of
from mhe_dist.checkpoint.store import CheckpointStore
from mhe_dist.config.stored import stored_config
from mhe_dist.distributed.failures import decided_by_first
from mhe_dist.distributed.topology import Topology
from mhe_dist.errors import UserError, first_line
from mhe_dist.storage_errors import ABSENT
from mhe_dist.storage_retry import path_exists, with_retries

T = TypeVar("T")

# Of Lightning and many others; of arcface_torch's checkpoint_gpu_0.pt.
_WRAPPERS = ("state_dict", "state_dict_backbone")
_WEIGHTS = "model.safetensors"  # in a folder of mhe export --to timm
_COUNTER = "num_batches_tracked"  # of BatchNorm: torch counts since 0.4.1, and needs it for nothing


def load_pretrained(model: Backbone, source: str, topology: Topology | None = None) -> None:
    """Give a backbone the weights that `model.init_from` names.

    A file or folder holds the timm model alone, so a neck stays as fresh as it is. A run, or one of
    its `step_*` folders, holds both; its number of ranks does not matter.

    Args:
        model: gets the weights.
        source: path or URL of a file that torch saved (weights only), a `.safetensors` file, a
            folder that `mhe export --to timm` wrote, a run or a checkpoint.
        topology: ranks that load the same and share the check of a run's files, which must all
            call; None: this process.

    Raises:
        UserError: there is nothing of the kind, or its names or shapes are not those of the model,
            or its images were normalised in another way.
    """
    source, topology = source.rstrip("/"), topology or Topology()
    checkpoint = _checkpoint(source, topology)
    if checkpoint is not None:
        if values := decided_by_first(lambda: checkpoint.run.get("config"), topology):
            found = normalization_of(stored_config(values).model)
            _refuse_other_normalization(model, found, source)
        tensors = checkpoint.load_together(is_backbone_weight, topology)
        _fill(model, backbone_weights(tensors), source)
    else:
        _refuse_other_normalization(model, _normalization_of_folder(source), source)
        _fill(model.net, _file(source), source)


def _normalization_of_folder(source: str) -> Normalization | None:
    """What the `config.json` of an exported folder says; None: there is none."""
    text = _read(f"{source}/config.json") if _is_folder(source) else None
    if text is None:
        return None
    values = json.loads(text)
    return recorded_normalization(values.get("pretrained_cfg", values))


def _refuse_other_normalization(model: Backbone, found: Normalization | None, source: str) -> None:
    if found is None or found == model.normalization:
        return
    raise UserError(
        f"model.init_from={source}: its weights were trained with "
        f"model.mean={list(found.mean)} and model.std={list(found.std)}, and this run has "
        f"{list(model.normalization.mean)} and {list(model.normalization.std)}: set both keys; or, "
        "to begin with the weights all the same, name their file alone"
    )


def _checkpoint(source: str, topology: Topology) -> Checkpoint | None:
    """The checkpoint that the source names, or None where it is no run."""

    def holds(name: str) -> bool:
        """The same on all ranks: a run is read together."""
        filesystem, path = fsspec.core.url_to_fs(f"{source}/{name}")
        return decided_by_first(lambda: path_exists(filesystem, path), topology)

    is_folder = decided_by_first(lambda: _is_folder(source), topology)
    if step_of(source) is not None and not (is_folder and holds(_WEIGHTS)):
        return decided_by_first(lambda: open_step_folder(source), topology)
    if not is_folder or not holds("checkpoints"):
        return None
    newest = CheckpointStore(f"{source}/checkpoints", topology).newest(is_backbone_weight)
    if newest is None:
        raise UserError(f"model.init_from={source}: the run has no complete checkpoint")
    return newest


def _file(source: str) -> dict[str, Tensor]:
    """The tensors of a file or of an exported folder, by name."""
    if _is_folder(source):
        source = f"{source}/{_WEIGHTS}"
    if (weights := _read(source)) is None:
        raise UserError(
            f"model.init_from={source}: does not exist; give a .pth or .safetensors file, a folder "
            f"of mhe export --to timm, or a run"
        )
    if source.endswith(".safetensors"):
        from safetensors import SafetensorError
        from safetensors.torch import load as parse

        try:
            return parse(weights)
        except SafetensorError as error:
            raise UserError(
                f"model.init_from={source}: no whole .safetensors file ({first_line(error)}): it "
                "is cut off, or a pointer of Git LFS (git lfs pull)"
            ) from error
    try:
        found = torch.load(io.BytesIO(weights), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise UserError(
            f"model.init_from={source}: not a file of weights alone ({_reason(error)}); "
            f"nothing in it was run"
        ) from error
    return _state(found, source)


def _reason(error: Exception) -> str:
    """What torch found, without its advice to run what a file holds."""
    reason = str(error).partition("WeightsUnpickler error: ")[2].strip()
    return reason.partition("\n")[0] or first_line(error)


def _is_folder(url: str) -> bool:
    """Whether there is a folder; raises as `_if_there`."""
    filesystem, path = fsspec.core.url_to_fs(url)
    about = _if_there(lambda: filesystem.info(path), url)
    return about is not None and about["type"] == "directory"


def _read(url: str) -> bytes | None:
    """A file as a whole, or None; raises as `_if_there`."""
    filesystem, path = fsspec.core.url_to_fs(url)
    return _if_there(lambda: bytes(filesystem.cat_file(path)), url)


def _if_there(call: Callable[[], T], url: str) -> T | None:
    """What a call gives of a file or folder; None: there is none.

    Raises:
        UserError: it may not be read.
        StorageUnavailable: the disk or the store gives no answer.
    """
    try:
        return with_retries(call, url)
    except ABSENT:
        return None
    except PermissionError as error:
        raise UserError(f"model.init_from={url}: may not be read: {error}") from error


def _state(found: Any, source: str) -> dict[str, Tensor]:
    """The state dict in what a file holds; wrappers of others are taken off."""
    for wrapper in _WRAPPERS:
        if isinstance(found, dict) and isinstance(found.get(wrapper), dict):
            found = found[wrapper]
    if not isinstance(found, dict) or not all(isinstance(v, Tensor) for v in found.values()):
        raise UserError(f"model.init_from={source}: holds {type(found).__name__}, no state dict")
    if all(name.startswith("module.") for name in found):
        found = {name.removeprefix("module."): tensor for name, tensor in found.items()}
    return found


def _fill(module: torch.nn.Module, tensors: dict[str, Tensor], source: str) -> None:
    """Copy the tensors in; every name must be there, with its shape, and no other.

    The counters of BatchNorm may be missing: older files have none.
    """
    fresh = module.state_dict()
    absent = {n: t for n, t in fresh.items() if n.endswith(_COUNTER) and n not in tensors}
    tensors = with_shared_names(module, tensors | absent)
    refuse_mismatch(
        tensor_shapes(fresh),
        tensor_shapes(tensors),
        f"model.init_from={source} is not of this model (model.name, model.kwargs, "
        f"model.embedding_dim, model.neck){_likely_model(fresh, tensors)}",
        ("the model", "the file"),
        limit=6,
    )
    module.load_state_dict(tensors)


def _likely_model(fresh: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> str:
    """Of an IResNet, the one whose blocks a file has; empty: none, or that of the model itself."""

    def blocks(names: Iterable[str]) -> tuple[int, ...]:
        """How many each stage has."""
        found = {match[0] for name in names if (match := re.match(r"layer[1-4]\.\d+\.prelu", name))}
        return tuple(
            sum(name.startswith(f"layer{stage}.") for name in found) for stage in range(1, 5)
        )

    there = blocks(tensors)
    named = [name for name, layers in BLOCKS.items() if layers == there]
    return (
        f"; its blocks are those of model.name={named[0]}"
        if named and there != blocks(fresh)
        else ""
    )
