"""Reads tensors out of the files of a checkpoint: their bytes, and no others.

`torch.distributed.checkpoint` reads through streams, which in a store read a whole block ahead (50
MB of S3) for the few small tensors that a file may hold. Here neighbours arrive with one request.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from mhe_dist.checkpoint.files import CheckpointFolder
from mhe_dist.errors import RunError, describe_error
from mhe_dist.storage_errors import ABSENT

_REQUEST_BYTES = 1 << 26  # of small tensors that are read together


class StoredTensor(NamedTuple):
    """Where a tensor lies: the bytes `[begin, end)` of a file, which `torch.save` wrote."""

    file: str
    begin: int
    end: int
    name: str


def read_tensors(
    folder: CheckpointFolder, wanted: Iterable[StoredTensor]
) -> Iterator[tuple[str, Tensor]]:
    """Yield each tensor by its name, on the host; the bytes of one request are in memory meanwhile.

    Raises:
        StorageUnavailable: the disk or the store gives no answer.
        RunError: a file has vanished, or does not hold what it should.
    """
    for request in _requests(wanted):
        file, begin, end = request[0].file, request[0].begin, request[-1].end
        try:
            data = folder.read_part(file, begin, end)
        except ABSENT as error:
            raise RunError(f"{folder.url}: {file} cannot be read: {error}") from error
        for each in request:
            whole = len(request) == 1  # a stream shares such bytes, and copies parts of them
            own = data if whole else memoryview(data)[each.begin - begin : each.end - begin]
            yield each.name, _parse(io.BytesIO(own), each, folder.url)


def _requests(wanted: Iterable[StoredTensor]) -> Iterator[list[StoredTensor]]:
    """Tensors that are read together: neighbours in a file, up to `_REQUEST_BYTES`."""
    together: list[StoredTensor] = []
    for each in sorted(wanted):
        fits = together and each.end - together[0].begin <= _REQUEST_BYTES
        if fits and (each.file, each.begin) == (together[-1].file, together[-1].end):
            together.append(each)
            continue
        if together:
            yield together
        together = [each]
    if together:
        yield together


def _parse(stream: io.BytesIO, stored: StoredTensor, url: str) -> Tensor:
    try:
        found = torch.load(stream, map_location="cpu", weights_only=True)
    except Exception as error:  # of what is damaged, torch raises many kinds
        where = f"{stored.name} in {stored.file}"
        raise RunError(f"{url}: {where} cannot be read: {describe_error(error)}") from error
    tensor: Tensor = found
    return tensor
