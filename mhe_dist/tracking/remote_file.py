"""A copy at a URL of a local file that grows, uploaded in the background."""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path

import fsspec

logger = logging.getLogger(__name__)

_EVERY_S = 60.0


class RemoteCopy:
    """Uploads the file in the background, a minute apart at least, and once more at the end.

    Object stores cannot append, so the whole file travels each time. An upload that fails is tried
    again with the next one.
    """

    def __init__(self, path: Path, url: str) -> None:
        """Args: path: the local file; url: where the copy is, any fsspec URL."""
        self._path, self._url = path, url
        self._thread: threading.Thread | None = None
        self._last = time.monotonic()

    def fetch(self) -> None:
        """Make the local file from the copy, if there is one."""
        filesystem, path = fsspec.core.url_to_fs(self._url)
        if filesystem.exists(path):
            filesystem.get_file(path, str(self._path))

    def update(self) -> None:
        """Begin an upload if one is due and none is under way."""
        busy = self._thread is not None and self._thread.is_alive()
        if not busy and time.monotonic() - self._last >= _EVERY_S:
            self._last = time.monotonic()
            self._thread = threading.Thread(target=self._upload, name="remote-copy", daemon=True)
            self._thread.start()

    def finish(self) -> bool:
        """Upload the file as it is now; say where it is when that fails. Whether it is there."""
        if self._thread is not None:
            self._thread.join()
        return self._upload()

    def _upload(self) -> bool:
        filesystem, path = fsspec.core.url_to_fs(self._url)
        try:
            filesystem.makedirs(path.rpartition("/")[0], exist_ok=True)
            filesystem.put_file(str(self._path), path)
        except Exception as error:  # stores raise what they like, and no upload may end a run
            logger.warning("%s: cannot be written (%s); it is in %s", self._url, error, self._path)
            return False
        return True
