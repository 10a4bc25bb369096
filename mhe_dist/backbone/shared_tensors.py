"""Tensors that a network has under several names: CoaT has one encoding in many blocks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn


def with_shared_names(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, and each of them under the other names that it has in the model, too.

    A checkpoint names a tensor once (`named_parameters`), `load_state_dict` wants all names.

    Args:
        model: whose `state_dict` the tensors are to fill.
        tensors: name -> tensor; names that the model does not know stay as they are.
    """
    names: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        names.setdefault(id(tensor), []).append(name)
    filled = dict(tensors)
    for same in names.values():
        found = next((tensors[name] for name in same if name in tensors), None)
        if found is not None:
            filled |= {name: found for name in same if name not in tensors}
    return filled


def write_shared_apart(model: nn.Module) -> None:
    """Let the model's `state_dict` hold copies, which safetensors asks for, from now on."""
    model.register_state_dict_post_hook(_copy_shared)


def _copy_shared(
    module: nn.Module, tensors: dict[str, Any], prefix: str, about: dict[str, Any]
) -> None:
    seen: set[int] = set()
    for name, tensor in tensors.items():
        if tensor.data_ptr() in seen:
            tensors[name] = tensor.clone()
        seen.add(tensor.data_ptr())
