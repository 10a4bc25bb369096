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

from mhe_dist.errors import RunError, UserError, first_line
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
        """Yield the 1:1 protocol in chunks: first and second templates, whether of one subject.

        Raises:
            UserError: the table is missing or damaged, or names a template that has no image; so it
                is with the tables of the 1:N protocol.
        """
        path = self.root / "meta" / f"{self.name}_template_pair_label.txt"
        for rows in _table(path, 3, dtype=np.int64):
            first, second, same = rows.to_numpy(np.int64).T
            self._require_known(path, np.concatenate([first, second]))
            yield first, second, same == 1

    def galleries(self) -> list[tuple[Ints, Ints]]:
        """Templates and subjects of the two galleries of the 1:N protocol."""
        return [self._subjects(f"1N_gallery_{name}") for name in _GALLERIES[self.name]]

    def probes(self) -> tuple[Ints, Ints]:
        """Templates and subjects of the probes."""
        return self._subjects("1N_probe_mixed")

    @property
    def has_identification(self) -> bool:
        """Whether a file of the 1:N protocol is there; then the others have to be, too."""
        names = [*(f"gallery_{name}" for name in _GALLERIES[self.name]), "probe_mixed"]
        return any((self.root / "meta" / f"{self.name}_1N_{n}.csv").exists() for n in names)

    def check_protocols(self) -> None:
        """Read what the protocols name, so that a fault in it is told before images are embedded.

        Raises:
            UserError: see `pairs`.
        """
        for _ in self.pairs():
            pass
        if self.has_identification:
            self.galleries()
            self.probes()

    def _subjects(self, name: str) -> tuple[Ints, Ints]:
        path = self.root / "meta" / f"{self.name}_{name}.csv"
        columns: dict[str, Any] = {"sep": ",", "usecols": [0, 1], "header": 0}
        rows = pd.concat(_table(path, 2, dtype=np.int64, **columns)).drop_duplicates()
        templates, subjects = rows.to_numpy(np.int64).T
        if len(np.unique(templates)) < len(templates):
            raise UserError(f"{path}: a template belongs to two subjects")
        self._require_known(path, templates)
        return templates, subjects

    def _require_known(self, path: Path, templates: Ints) -> None:
        if (unknown := templates[~np.isin(templates, self.templates)]).size:
            raise UserError(
                f"{path}: template {unknown[0]} is in a protocol, but it has no image in "
                f"{self.name}_face_tid_mid.txt"
            )


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
    types: dict[int, type] = {0: str} | dict.fromkeys(range(1, 12), np.float64)
    faces = pd.concat(_table(meta / f"{found[0]}_name_5pts_score.txt", 12, dtype=types))
    types = {0: str, 1: np.int64, 2: np.int64}
    groups = pd.concat(_table(meta / f"{found[0]}_face_tid_mid.txt", 3, dtype=types))
    names = faces[0].tolist()
    if names != groups[0].tolist():
        raise UserError(f"{meta}: the two tables of faces do not name the same images in one order")
    for name in names:
        try:
            path_below_root(name, str(folder))
        except ValueError as error:
            raise UserError(f"{meta}: {error}") from error
    numbers = faces.iloc[:, 1:].to_numpy(np.float64)
    templates, media = groups.iloc[:, 1:].to_numpy(np.int64).T
    ijb = IjbSet(
        root=folder,
        name=found[0],
        names=names,
        landmarks=numbers[:, :10].reshape(-1, 5, 2),
        scores=numbers[:, 10],
        templates=templates,
        media=media,
    )
    ijb.check_protocols()
    return ijb


def _table(
    path: Path, columns: int, sep: str = " ", header: int | None = None, **options: Any
) -> Iterator[Any]:
    """Yield a table as data frames of some rows each.

    Raises:
        UserError: it is missing, or a cell is missing or not of its column's type; names the file.
    """
    options |= {"sep": sep, "header": header, "chunksize": _PAIRS_PER_CHUNK}
    try:
        with pd.read_csv(path, **options) as chunks:
            for rows in chunks:
                if rows.shape[1] != columns or rows.isna().to_numpy().any():
                    kind = "single spaces" if sep == " " else "commas"
                    raise UserError(f"{path}: a row does not have {columns} values between {kind}")
                yield rows
    except FileNotFoundError:
        raise UserError(f"{path}: is missing") from None
    except (ValueError, OSError) as error:  # pandas' own errors are ValueErrors
        raise UserError(f"{path}: cannot be read: {first_line(error)}") from error
