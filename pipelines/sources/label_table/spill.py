"""Records that are too many for the memory, dealt to files by a bucket number."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Records = npt.NDArray[Any]


class SpillFiles:
    """A file for each bucket; the records of a bucket keep the order in which they came."""

    def __init__(self, folder: Path, name: str, dtype: np.dtype[Any]) -> None:
        """Nothing is written yet.

        Args:
            folder: for the files.
            name: which all of them begin with.
            dtype: of a record.
        """
        self._folder, self._name, self._dtype = folder, name, dtype

    def add(self, records: Records, buckets: npt.NDArray[Any]) -> None:
        """Append records to the files of their buckets."""
        order = np.argsort(buckets, kind="stable")
        records, buckets = records[order], buckets[order]
        distinct, starts = np.unique(buckets, return_index=True)
        stops = np.append(starts[1:], len(buckets))
        for bucket, start, stop in zip(distinct.tolist(), starts, stops, strict=False):
            with self._path(bucket).open("ab") as stream:
                stream.write(records[start:stop].tobytes())

    def take(self, bucket: int) -> Records:
        """The records of a bucket, whose file is removed."""
        path = self._path(bucket)
        if not path.exists():
            return np.empty(0, self._dtype)
        records = np.fromfile(path, self._dtype)
        path.unlink()
        return records

    def _path(self, bucket: int) -> Path:
        return self._folder / f"{self._name}-{bucket:06d}"
