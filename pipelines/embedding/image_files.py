"""Image files of a folder or store, read by number."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mhe_dist.errors import RunError, UserError
from mhe_dist.storage_retry import with_retries
from pipelines.data.decode import ImageDecodeError, decode_image
from pipelines.embedding.stack import stack_images
from pipelines.sources.image_folder import has_image_extension
from pipelines.storage.file_listing import list_files
from pipelines.storage.urls import resolve_url

Ints = npt.NDArray[np.int64]

log = logging.getLogger(__name__)


@dataclass
class ImageFiles:
    """Files below a folder.

    Attributes:
        root: folder or URL.
        paths: below it.
        skip_bad: a file that cannot be read becomes black and is marked, instead of an error.
        bad: int64 `[N]`, 1 for files that were read so far and could not be decoded.
    """

    root: str
    paths: Sequence[str]
    skip_bad: bool = False
    bad: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.bad = torch.zeros(len(self.paths), dtype=torch.int64)

    @property
    def count(self) -> int:
        """N."""
        return len(self.paths)

    def read(self, start: int, stop: int, image_size: int) -> Tensor:
        """The images `[start, stop)`, uint8 `[n, 3, image_size, image_size]`, RGB.

        Raises:
            RunError: one of them cannot be read, and bad ones are not skipped.
            UserError: the same, of what is no image.
        """
        return stack_images(self._image, start, stop, image_size)

    def part(self, start: int, stop: int) -> ImageFiles:
        """See `embeddings.Images.part`."""
        return ImageFiles(self.root, self.paths[start:stop], self.skip_bad)

    def findings(self) -> Any:
        """Which could not be decoded: `bad`."""
        return self.bad.numpy()

    def add_findings(self, start: int, findings: Any) -> None:
        """See `embeddings.Images.add_findings`."""
        self.bad[start : start + len(findings)] = torch.from_numpy(findings)

    def _image(self, number: int, image_size: int) -> npt.NDArray[np.uint8]:
        path = self.paths[number]
        filesystem, root = resolve_url(self.root)
        try:
            # Not left out: what a store does not give at this moment.
            url = f"{self.root}/{path}"
            data = with_retries(lambda: filesystem.cat_file(f"{root}/{path}"), url)
            return decode_image(bytes(data), image_size)
        except (OSError, ImageDecodeError) as error:
            if not self.skip_bad:
                what = f"{self.root}/{path}: cannot be read: {error}"
                if isinstance(error, ImageDecodeError):
                    raise UserError(f"{what}; mend the file, or move it away") from error
                raise RunError(what) from error
            log.info("left out: %s/%s: %s", self.root, path, error)
            self.bad[number] = 1
            return np.zeros((image_size, image_size, 3), np.uint8)


def list_images(root: str, skip_bad: bool = False) -> ImageFiles:
    """List all images below a folder, in the order of their names.

    Raises:
        UserError: no such folder, or no image in it.
    """
    root = root.rstrip("/")
    paths = sorted(path for path, _ in list_files(root) if has_image_extension(path))
    if not paths:
        raise UserError(f"{root}: holds no image")
    return ImageFiles(root, paths, skip_bad)


def folder_classes(files: ImageFiles) -> tuple[list[str], Ints]:
    """The classes, which are the top folders below the root, by name; and each file's number there.

    Raises:
        UserError: a file is in no such folder.
    """
    for path in files.paths:
        if "/" not in path:
            raise UserError(f"{files.root}/{path}: is in no folder; there is one folder per class")
    names, labels = np.unique([path.partition("/")[0] for path in files.paths], return_inverse=True)
    return names.tolist(), labels.astype(np.int64)
