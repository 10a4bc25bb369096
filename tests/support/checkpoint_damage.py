"""Damage to single tensors of checkpoints."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader

from mhe_dist.checkpoint.reader import Checkpoint


def stored_range(folder: Path, name: str) -> tuple[Path, range]:
    """The file of a tensor, and the bytes in it that store the tensor."""
    stored = FsspecReader(str(folder)).read_metadata().storage_data
    (info,) = [info for index, info in stored.items() if index.fqn == name]
    return folder / info.relative_path, range(info.offset, info.offset + info.length)


def flip_a_byte_of(folder: Path, name: str) -> None:
    """Change a byte of a tensor's values."""
    values = Checkpoint(str(folder), 0).load(lambda each: each == name)[name]
    file, stored = stored_range(folder, name)
    data = bytearray(file.read_bytes())
    data[data.index(values.view(torch.uint8).numpy().tobytes(), stored.start)] ^= 1
    file.write_bytes(data)
