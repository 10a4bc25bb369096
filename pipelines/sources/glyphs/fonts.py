"""The font files below a folder, each under a name of its own."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Final, NamedTuple

from mhe_dist.errors import UserError

_SUFFIXES: Final = (".ttf", ".otf", ".ttc", ".otc")

log = logging.getLogger(__name__)


class FontFile(NamedTuple):
    """A font file; `name` tells it apart from the others, also without its ending."""

    name: str
    path: str
    digest: str


def find_fonts(folder: str) -> list[FontFile]:
    """The font files below a folder, sorted by name; of equal ones, only one.

    Raises:
        UserError: there is none.
    """
    found: dict[str, FontFile] = {}
    names: set[str] = set()
    for path in sorted(Path(folder).rglob("*"), key=lambda path: (path.name, path)):
        if path.suffix.lower() not in _SUFFIXES or not path.is_file():
            continue
        digest = blake2b(path.read_bytes(), digest_size=16).hexdigest()
        if digest in found:
            log.info("%s is the same as %s", path, found[digest].path)
            continue
        name = next(name for name in _names(path) if Path(name).stem not in names)
        names.add(Path(name).stem)
        found[digest] = FontFile(name, str(path), digest)
    if not found:
        endings = ", ".join(_SUFFIXES)
        raise UserError(
            f"data.glyphs.fonts={folder}: no font file ({endings}) here or below; "
            f"docs/data.md names Debian packages that hold some"
        )
    return sorted(found.values())


def _names(path: Path) -> Iterator[str]:
    """What a file could be called, the best first."""
    yield path.name
    yield f"{path.parent.name}-{path.name}"
    number = 2
    while True:
        yield f"{path.stem}-{number}{path.suffix}"
        number += 1
