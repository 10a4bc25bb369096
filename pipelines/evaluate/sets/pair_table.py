"""Pairs of image files from a CSV table."""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from mhe_dist.errors import UserError
from pipelines.embedding.image_files import ImageFiles
from pipelines.sources.image_folder import path_below_root
from pipelines.storage.buffered_file import open_buffered
from pipelines.storage.csv_table import read_rows
from pipelines.storage.urls import resolve_url

Ints = npt.NDArray[np.int64]

_COLUMNS: Final = ("first", "second", "same")


def read_pairs(table: str, root: str) -> tuple[ImageFiles, Ints, Ints, npt.NDArray[np.bool_]]:
    """Read pairs from a CSV file.

    Args:
        table: with the columns `first` and `second`, paths below `root`, and `same`, 0 or 1.
        root: folder or URL of the images.

    Returns:
        Each file once; the numbers of the first and of the second file of each pair; whether they
        are of the same class.

    Raises:
        UserError: a column is missing, or a row is invalid; the message names the line.
    """
    numbers: dict[str, int] = {}
    pairs, same = [], []
    top = resolve_url(root)[1]
    with open_buffered(table) as stream:
        for line, row in read_rows(table, stream, _COLUMNS, f"it needs {','.join(_COLUMNS)}"):
            try:
                paths = [path_below_root(row[name], top) for name in ("first", "second")]
                same.append({"0": False, "1": True}[row["same"].strip()])
            except (ValueError, KeyError) as error:
                raise UserError(f"{table} line {line}: {error}; `same` is 0 or 1") from error
            pairs.append([numbers.setdefault(path, len(numbers)) for path in paths])
    first, second = np.array(pairs, np.int64).reshape(-1, 2).T
    return ImageFiles(root.rstrip("/"), list(numbers)), first, second, np.array(same, bool)
