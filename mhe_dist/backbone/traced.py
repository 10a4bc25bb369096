"""A network as an ONNX file or as a program of torch.export: traced for any number of images."""

from __future__ import annotations

import json
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import Tensor, nn

from mhe_dist.atomic_file import replaced_file
from mhe_dist.errors import UserError

METADATA_FILE: Final = "metadata.json"  # inside a `.pt2` program
LARGEST_BATCH: Final = 1 << 31  # a program refuses more images; nothing is allocated

Outputs = Sequence[Tensor]
Run = Callable[[Tensor], Outputs]


def write_onnx(
    network: nn.Module,
    example: Tensor,
    path: str,
    outputs: Sequence[str],
    about: Mapping[str, str],
    opset: int = 0,
) -> Run:
    """Write a network of one input, `images`, to an ONNX file, which holds its weights.

    Args:
        network: in evaluation mode, on the CPU.
        example: two images to trace with; the number of images is free.
        path: of the file; its folder is made.
        outputs: names of what the network returns.
        about: metadata, which ONNX Runtime gives as
            `session.get_modelmeta().custom_metadata_map`.
        opset: operator set; 0: the exporter's own choice.

    Returns:
        What computes the outputs with the file, in ONNX Runtime.

    Raises:
        UserError: the exporter has no such operator set.
    """
    with replaced_file(path) as temporary:
        with warnings.catch_warnings(), _silent_exporter(), _plain_attention(network):
            warnings.simplefilter("ignore")
            torch.onnx.export(
                network,
                (example,),
                temporary,
                dynamo=True,
                dynamic_shapes=({0: _any_number()},),
                input_names=["images"],
                output_names=list(outputs),
                opset_version=_requested_opset(opset),
                external_data=False,
                verbose=False,
            )
        _finish_onnx(temporary, about, opset)
    return open_onnx(path)


def open_onnx(path: str) -> Run:
    """What computes the outputs of an ONNX file with one input, `images`, on the CPU."""
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, settings, providers=["CPUExecutionProvider"])
    return lambda images: [
        torch.from_numpy(found) for found in session.run(None, {"images": images.numpy()})
    ]


def write_program(
    network: nn.Module, example: Tensor, path: str, about: Mapping[str, str]
) -> Callable[[Tensor], Any]:
    """Write a network to a program for `torch.export.load(PATH).module()`.

    Args:
        network, example, path: as for `write_onnx`.
        about: metadata, in the file as `metadata.json`; see
            `torch.export.load(extra_files=...)`.

    Returns:
        The program, loaded from the file.
    """
    program = torch.export.export(network, (example,), dynamic_shapes=({0: _any_number()},))
    with replaced_file(path, ".pt2") as temporary:
        torch.export.save(program, temporary, extra_files={METADATA_FILE: json.dumps(dict(about))})
    return torch.export.load(path).module()


@contextmanager
def _plain_attention(network: nn.Module) -> Iterator[None]:
    """Within, timm's attention layers are products and a softmax.

    The exporter of torch 2.14 cannot take PyTorch's own attention with a mask apart (BEiT).
    """
    fused: list[Any] = [
        module for module in network.modules() if getattr(module, "fused_attn", False) is True
    ]
    for module in fused:
        module.fused_attn = False
    try:
        yield
    finally:
        for module in fused:
            module.fused_attn = True


@contextmanager
def _silent_exporter() -> Iterator[None]:
    """Within, the exporter logs nothing of operator sets that it cannot convert to.

    It goes on with another one, which `_finish_onnx` looks at.
    """
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _requested_opset(wanted: int) -> int | None:
    """The operator set to ask the exporter for; below 18, torch 2.8 finds not one operator.

    Newer ones convert what they have written, or leave it as it is.
    """
    if wanted and torch.__version__ < "2.9":
        return max(wanted, 18)
    return wanted or None


def _any_number() -> Any:
    """A free number of images."""
    return torch.export.Dim("batch", min=1, max=LARGEST_BATCH)


def _finish_onnx(path: str, about: Mapping[str, str], wanted: int) -> None:
    """Add the metadata; refuse another operator set, of which the exporter says nothing."""
    import onnx

    model = onnx.load(path)
    found = {each.domain: each.version for each in model.opset_import}[""]
    if wanted and found != wanted:
        os.unlink(path)
        raise UserError(
            f"--opset {wanted}: this model cannot be written in it; left out, it would be {found}"
        )
    onnx.helper.set_model_props(model, dict(about))
    onnx.save(model, path)
