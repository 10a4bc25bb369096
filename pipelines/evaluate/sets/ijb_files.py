"""Reads IJB-B and IJB-C as they are distributed (docs/formats.md section 3)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pandas as pd
from torch import Tensor

from mhe_dist.errors import RunError, UserError
from pipelines.data.decode import ImageDecodeError, decode_full_size
from pipelines.embedding.stack import stack_images
from pipelines.evaluate.sets.align import align_face
from pipelines.sources.image_folder import path_below_root

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

_GALLERIES: Final = {"ijbc": ("G1", "G2"), "ijbb": ("S1", "S2")}
_PAIRS_PER_CHUNK: Final = 1 << 20


@dataclass(frozen=True)
class IjbSet:
    """The images of a set, and the templates and media that they belong to.

    Attributes:
        root: folder of the set.
        name: `ijbb` or `ijbc`.
        names: file names of the N images.
        landmarks: `[N, 5, 2]`, (x, y).
        scores: `[N]`, of the face detector.
        templates, media: int64 `[N]`: the template, and the photo or video, of each image.
    """

    root: Path
    name: str
    names: list[str]
    landmarks: Floats
    scores: Floats
    templates: Ints
    media: Ints

    @property
    def count(self) -> int:
        """N."""
        return len(self.names)

    def read(self, start: int, stop: int, image_size: int) -> Tensor:
        """The faces `[start, stop)`, RGB, cut by their landmarks.

        Returns:
            uint8 `[n, 3, image_size, image_size]`.

        Raises:
            RunError: one of them cannot be used; an evaluation leaves nothing out.
        """
        return stack_images(self._face, start, stop, image_size)

    def part(self, start: int, stop: int) -> IjbSet:
        """See `embeddings.Images.part`: the images, without their place in the protocols."""
        none, rows = np.empty(0, np.int64), slice(start, stop)
        landmarks = self.landmarks[rows]
        return IjbSet(self.root, self.name, self.names[rows], landmarks, np.empty(0), none, none)

    def findings(self) -> None:
        """Nothing: reading tells no more than the pixels."""

    def add_findings(self, start: int, findings: None) -> None:
        """See `findings`."""

    def _face(self, number: int, image_size: int) -> npt.NDArray[np.uint8]:
        path = self.root / "loose_crop" / self.names[number]
        try:
            return align_face(
                decode_full_size(path.read_bytes()), self.landmarks[number], image_size
            )
        except (OSError, ImageDecodeError, ValueError) as error:
            raise RunError(f"{path}: cannot be used: {error}") from error

    def pairs(self) -> Iterator[tuple[Ints, Ints, npt.NDArray[np.bool_]]]:
        """Yield the 1:1 protocol in chunks: first and second templates, whether of one subject."""
        path = self.root / "meta" / f"{self.name}_template_pair_label.txt"
        for rows in _table(path, 3, chunksize=_PAIRS_PER_CHUNK):
            first, second, same = rows.to_numpy(np.int64).T
            yield first, second, same == 1

    def galleries(self) -> list[tuple[Ints, Ints]]:
        """Templates and subjects of the two galleries of the 1:N protocol."""
        return [self._subjects(f"1N_gallery_{name}") for name in _GALLERIES[self.name]]

    def probes(self) -> tuple[Ints, Ints]:
        """Templates and subjects of the probes."""
        return self._subjects("1N_probe_mixed")

    @property
    def has_identification(self) -> bool:
        """Whether the files of the 1:N protocol are there."""
        names = [*(f"gallery_{name}" for name in _GALLERIES[self.name]), "probe_mixed"]
        return all((self.root / "meta" / f"{self.name}_1N_{n}.csv").exists() for n in names)

    def _subjects(self, name: str) -> tuple[Ints, Ints]:
        path = self.root / "meta" / f"{self.name}_{name}.csv"
        rows = _read(path, sep=",", usecols=[0, 1]).drop_duplicates()
        templates, subjects = rows.to_numpy(np.int64).T
        if len(np.unique(templates)) < len(templates):
            raise UserError(f"{path}: a template belongs to two subjects")
        return templates, subjects


def load_ijb(root: str) -> IjbSet:
    """Read the tables of a set; images are read later, by `IjbSet.read`.

    Raises:
        UserError: a table is missing, damaged, or does not fit the others.
    """
    folder = Path(root)
    found = [name for name in _GALLERIES if (folder / "meta" / f"{name}_face_tid_mid.txt").exists()]
    if not found:
        raise UserError(
            f"{root}: neither meta/ijbc_face_tid_mid.txt nor meta/ijbb_face_tid_mid.txt is there: "
            f"give the folder that holds loose_crop/ and meta/"
        )
    meta = folder / "meta"
    faces = next(_table(meta / f"{found[0]}_name_5pts_score.txt", 12))
    groups = next(_table(meta / f"{found[0]}_face_tid_mid.txt", 3))
    names = faces[0].astype(str).tolist()
    if names != groups[0].astype(str).tolist():
        raise UserError(f"{meta}: the two tables of faces do not name the same images in one order")
    for name in names:
        try:
            path_below_root(name, str(folder))
        except ValueError as error:
            raise UserError(f"{meta}: {error}") from error
    numbers = faces.iloc[:, 1:].to_numpy(np.float64)
    templates, media = groups.iloc[:, 1:].to_numpy(np.int64).T
    return IjbSet(
        root=folder,
        name=found[0],
        names=names,
        landmarks=numbers[:, :10].reshape(-1, 5, 2),
        scores=numbers[:, 10],
        templates=templates,
        media=media,
    )


def _table(path: Path, columns: int, chunksize: int | None = None) -> Iterator[Any]:
    """Yield a space-separated table as one data frame, or in chunks of that many rows."""
    read = _read(path, sep=" ", header=None, chunksize=chunksize)
    for rows in [read] if chunksize is None else read:
        if rows.shape[1] != columns or rows.isna().to_numpy().any():
            raise UserError(f"{path}: a row does not have {columns} values between single spaces")
        yield rows


def _read(path: Path, **options: Any) -> Any:
    try:
        return pd.read_csv(path, **options)
    except FileNotFoundError:
        raise UserError(f"{path}: is missing") from None
    except (ValueError, UnicodeDecodeError) as error:  # pandas' own errors are ValueErrors
        raise UserError(f"{path}: cannot be read: {error}") from error
