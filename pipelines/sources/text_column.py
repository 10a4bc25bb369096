"""Very many texts, such as paths: their bytes one after the other, and how long each is."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

_BLOCK: Final = 64  # texts whose beginning is known without adding lengths


class TextColumn(Sequence[str]):
    """Texts by number; of each its UTF-8 is kept, and 2 bytes.

    Args:
        texts: the first ones, each of 65,535 bytes at most; names of files that are no UTF-8 come
            back as they were.
    """

    def __init__(self, texts: Iterable[str] = ()) -> None:
        self._bytes, self._lengths, self._begins = bytearray(), array("H"), array("q")
        for text in texts:
            self.append(text)

    def append(self, text: str) -> None:
        """Add a text."""
        if len(self) % _BLOCK == 0:
            self._begins.append(len(self._bytes))
        data = text.encode(errors="surrogateescape")
        self._lengths.append(len(data))
        self._bytes += data

    def __len__(self) -> int:
        return len(self._lengths)

    def __getitem__(self, number: Any) -> Any:
        number = range(len(self))[number]
        block = number // _BLOCK
        begin = self._begins[block] + sum(self._lengths[block * _BLOCK : number])
        data = self._bytes[begin : begin + self._lengths[number]]
        return data.decode(errors="surrogateescape")

    def choose(self, numbers: npt.NDArray[np.int64]) -> TextColumn:
        """Some of the texts, in the order of their numbers."""
        return TextColumn(self[int(number)] for number in numbers)
